"""Kernels run in Triton's interpreter on the CPU (see ../conftest.py), or with KVSIM_TEST_DEVICE=cuda compiled on a GPU.

Ahead-of-time tests run in a process of their own without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

DEVICE = os.environ.get("KVSIM_TEST_DEVICE", "cpu")

torch = pytest.importorskip("torch", reason="kernels need torch")
pytest.importorskip("triton", reason="kernels need Triton, which PyPI has for Linux")


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Every torch.empty is filled with NaN, or the largest integer: what a kernel forgets to write is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
