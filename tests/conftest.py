"""Triton's interpreter, where kernels are tested on the CPU.

The variable must be set before Triton is first imported, which the decoder's tests do too. With KVSIM_TEST_DEVICE=cuda kernels are
compiled and run on a GPU.
"""

from __future__ import annotations

import os

if os.environ.get("KVSIM_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
