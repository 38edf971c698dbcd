"""Top-k and top-p over logits: constants of the datasheet profile out of what vLLM's pull requests printed (results/logit_filters.csv).

One thread block walks each row: as many abreast as multiprocessors hold, at so many cycles a logit. PyTorch sorts first: row by row from
128 rows on, all of them at once below. The GPU is not named; B200's 148 multiprocessors at 1.965 GHz are taken, and the 132 at 1.98 of an
H100 would give the same times there within a tenth.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log
from pathlib import Path

import numpy as np
from measured_rows import read_csv
from scipy.optimize import least_squares

from kvsim.datasheet import DatasheetProfile
from kvsim.efficiencies import Efficiencies
from kvsim.hardware import load_gpu
from kvsim.ops import LogitFilter

PATH = Path(__file__).parent / "results" / "logit_filters.csv"
FITTED, GPU = "40376", "b200-sxm-180gb"
"""The pull request whose rows are fitted; the others' are left for checking."""
SOURCE = "fitted: top-k and top-p over 64 to 512 rows of 32,768 and 131,072 logits (vLLM pull request 40376, its GPU not named)"
FILTERS = ("top_k", "top_p", "top_k_top_p")
STARTS: Mapping[str, Mapping[str, float]] = {
    "pytorch": {"launch_s": 1e-4, "abreast": 1.2, "sort_row_cycles": 28.0, "sort_cycles": 20.0,
                **{f"{which}.logit_cycles": 3.0 for which in FILTERS}},
    **{
        library: {"abreast": 1.2, **{f"{which}.{name}": start for which in FILTERS
                                     for name, start in (("row_cycles", 1e5), ("logit_cycles", 3.0))}}
        for library in ("triton", "flashinfer")
    },
}  # fmt: skip
"""What is fitted of each library, and where the fit begins."""


def read_rows() -> list[tuple[str, LogitFilter, float]]:
    """(pull request, Op, seconds)."""
    return [
        (row["pull_request"], LogitFilter(row["library"], row["which"], int(row["rows"]), int(row["vocab_size"])),
         1e-3 * float(row["milliseconds"]))
        for row in read_csv(PATH)
    ]  # fmt: skip


def starts() -> dict[str, float]:
    """By the names that efficiencies have, in SI."""
    return {f"sampling.{library}.{name}": value for library, names in STARTS.items() for name, value in names.items()}


def fit(base: Efficiencies) -> dict[str, float]:
    """The same names, fitted by least squares of log(measured / predicted). base: holds the rest of the constants, and `starts()`."""
    found: dict[str, float] = {}
    for library, names in STARTS.items():
        rows = [(op, seconds) for request, op, seconds in read_rows() if request == FITTED and op.library == library]
        keys = [f"sampling.{library}.{name}" for name in names]

        def residuals(x: np.ndarray, keys: list[str] = keys, rows: list[tuple[LogitFilter, float]] = rows) -> np.ndarray:
            answer = DatasheetProfile(load_gpu(GPU), base.replaced(dict(zip(keys, np.exp(x), strict=True)))).answer
            return np.array([log(seconds / answer(op).seconds) for op, seconds in rows])

        solved = least_squares(residuals, [log(start) for start in names.values()], loss="soft_l1", f_scale=0.1)
        found |= {key: exp(value) for key, value in zip(keys, solved.x, strict=True)}
    return found
