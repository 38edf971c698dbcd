"""Writes what the worked scenarios are expected to print: `python tests/golden/regenerate.py`.

Run it when a change of the model of time or memory is meant to move the numbers, and read the difference before committing it.
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
SECTIONS = "title,capacity,slo,quality,verdict"
CASES = {
    "a100_llama8b": ("a100_llama8b.yaml", "workload.num_requests=400"),
    "h100_summarise": ("h100_summarise.yaml",),
    "h100_llama70b": ("h100_llama70b.yaml",),
    "h100_llama70b_2_gpus": ("h100_llama70b.yaml", "tensor_parallel=2"),
    "h100_llama70b_8_gpus": ("h100_llama70b.yaml", "tensor_parallel=8"),
    "l4_fleet": ("l4_fleet.yaml",),
    "rag_kivi": ("rag_kivi.yaml",),
}
"""By golden file: the scenario and what --set changes in it."""


def command(case: str) -> list[str]:
    scenario, *settings = CASES[case]
    options = [part for setting in settings for part in ("--set", setting)]
    return ["run", f"scenarios/{scenario}", *options, "--sections", SECTIONS]


def printed(argv: list[str]) -> str:
    """What a command prints, in the root of the repository."""
    from kvsim.cli import main

    text, before = io.StringIO(), Path.cwd()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(text):
            code = main(argv)
    finally:
        os.chdir(before)
    assert code == 0, argv
    return text.getvalue()


def expected_path(case: str) -> Path:
    return FOLDER / f"{case}.txt"


if __name__ == "__main__":
    for case in CASES:
        path = expected_path(case)
        path.write_text(f"$ kvsim {' '.join(command(case))}\n{printed(command(case))}", encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")
