"""Compressed caches beside full ones on the same machine, as others ran both: scenarios, what they saw, and the gains that follow.

A gain is full over compressed for times, compressed over full for rates, so above 1 is better.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from kvsim.hardware import load_gpu
from kvsim.model import load_model
from kvsim.validation import published_compression as p
from kvsim.validation.cases import Bar, Case, Row, Truth
from kvsim.validation.compression_settings import CALIBRATED, FULL, PARTLY, Setting, settings
from kvsim.validation.loads import mean_tokens
from kvsim.validation.naive import BYTES, ROOFLINE, roofline_of
from kvsim.validation.serving_models import reference, write_models

NAME = "compression"
GAIN = "gain: "
TPOT_LIMIT, GAIN_LIMIT = 0.10, 0.05
"""Our own, as nobody set them: steps as good as the H100 rows of `silicon` have to be, and a gain, where what both caches share cancels,
twice as good."""


def model_folder() -> tempfile.TemporaryDirectory[str]:
    """Where `cases` finds models that the catalogue lacks, and lengths, while it is open."""
    folder = tempfile.TemporaryDirectory()
    write_models(Path(folder.name))
    for prompt in p.KVPRESS_SWEEPS_S:
        lines = ["prompt_tokens,output_tokens", *(f"{round(frac * prompt)},100" for frac in p.KVPRESS_KEPT_FRACS)]
        (Path(folder.name) / f"kvpress-{prompt}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def cases(folder: Path, quick: bool = False) -> list[Case]:
    """folder: that of `model_folder`. quick: every third setting."""
    return [case for setting in settings()[:: 3 if quick else 1] for case in _cases(setting, folder)]


def _cases(setting: Setting, folder: Path) -> Iterator[Case]:
    model = reference(setting.model, folder)
    lengths = dict(setting.workload["lengths"])
    if lengths["kind"] == "empirical":
        lengths["path"] = str(folder / lengths["path"])
    prompt, output = setting.mean_tokens or mean_tokens(lengths)
    for name, run in setting.runs.items():
        scenario = {
            "gpu": setting.gpu, "model": model, "weight_dtype": setting.weight_dtype, "tensor_parallel": setting.tp,
            "engine": dict(setting.engine), "workload": {**setting.workload, "lengths": lengths}, "policies": {name: run.policy},
        }  # fmt: skip
        reads = roofline_of(
            load_gpu(setting.gpu), load_model(model), setting.tp, setting.weight_dtype, setting.batch, prompt, output,
            (prompt + output / 2) * run.bytes_frac,
        )  # fmt: skip
        naive = {**reads, "itl_p50_ms": reads["tpot_ms"], "ttft_p50_ms": reads["ttft_ms"], "duration_s": reads["prefill_s"]}
        yield Case(
            NAME, f"{setting.group}: {load_gpu(setting.gpu).name}", f"{setting.name}, {name}", scenario,
            tuple(Truth(*pair) for pair in run.truths.items()), setting.source, {ROOFLINE: naive}, setting.confidence,
        )  # fmt: skip


def gains(rows: list[Row]) -> list[Row]:
    """Of each compressed cache over the full one of its setting, metric by metric."""
    fractions = {(setting.name, name): run.bytes_frac for setting in settings() for name, run in setting.runs.items()}
    full = {(row.group, row.case.rpartition(", ")[0], row.metric): row for row in rows if row.case.endswith(f", {FULL}")}
    found = []
    for row in rows:
        setting, _, name = row.case.rpartition(", ")
        base = full.get((row.group, setting, row.metric))
        if base is None or name == FULL or row.metric.endswith("_gib"):
            continue
        naive = {BYTES: 1.0 / fractions[setting, name]}
        if ROOFLINE in row.naive and ROOFLINE in base.naive:
            naive[ROOFLINE] = _gain(row.metric, base.naive[ROOFLINE], row.naive[ROOFLINE])
        found.append(Row(
            NAME, f"{GAIN}{row.group}", row.case, f"x {row.metric}", _gain(row.metric, base.truth, row.truth),
            _gain(row.metric, base.predicted, row.predicted), row.source, naive, row.note, row.confidence,
        ))  # fmt: skip
    return found


def _gain(metric: str, full: float, compressed: float) -> float:
    rate = metric.endswith(("_per_s", "tok_s"))
    return compressed / full if rate else full / compressed


def bars(rows: list[Row]) -> list[Bar]:
    """Steps and gains where a source states all its conditions; not what kvsim was calibrated with."""
    stated = [row for row in rows if PARTLY not in row.group and row.confidence != CALIBRATED]
    found = []
    for text, mine, limit in (
        ("time of a decode step", [row for row in stated if row.metric in ("tpot_ms", "itl_p50_ms")], TPOT_LIMIT),
        ("gain of a compressed cache", [row for row in stated if row.metric.startswith("x ")], GAIN_LIMIT),
    ):
        if mine:
            found.append(Bar(NAME, f"{text}, conditions stated: median error", median(abs(row.error) for row in mine), limit))
    return found
