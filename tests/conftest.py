"""Triton's interpreter, where kernels are tested on the CPU, threads, and modules that tests share with the benchmarks' scripts.

The variables must be set before Triton and torch are first imported. With KVSIM_TEST_DEVICE=cuda kernels are compiled and run on a GPU.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.environ.get("KVSIM_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side: threads that wait for a core spin for milliseconds


def _of_benchmarks(name: str) -> Iterator[object]:
    """A module that benchmarks/fit_datasheet_efficiencies.py fits with."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def host_rows() -> Iterator[object]:
    yield from _of_benchmarks("host_rows")


@pytest.fixture(scope="module")
def filter_rows() -> Iterator[object]:
    yield from _of_benchmarks("filter_rows")
