"""Triton's interpreter, where kernels are tested on the CPU, and the module that both tests of vLLM's host work read rows with.

The variable must be set before Triton is first imported, which the decoder's tests do too. With KVSIM_TEST_DEVICE=cuda kernels are
compiled and run on a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.environ.get("KVSIM_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def host_rows() -> Iterator[object]:
    """The module that benchmarks/fit_datasheet_efficiencies.py fits with."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import host_rows

        yield host_rows
    finally:
        sys.path.remove(folder)
