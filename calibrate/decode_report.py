"""What `kvsim calibrate decode` found, beside what the simulator says: a row for each policy, context and batch, and each pool."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kvsim.calibrate.decoder.launching import default_attention
from kvsim.calibrate.decoder.predict import Predictor
from kvsim.calibrate.decoder.study import DECODE, FIT, FIT_STEPS, NO_MEMORY, REFUSED, Case, Study, make_plan
from kvsim.calibrate.device.rows_file import Row
from kvsim.engines.torch_decoder import TorchDecoder
from kvsim.profile import Profile
from kvsim.units import MIB

FILE = "decode.csv"
COLUMNS = (
    "model", "policy", "kind", "context_tokens", "batch", "status", "prefill_s", "prefill_predicted_s", "step_s", "step_predicted_s",
    "spread_frac", "tokens_per_s", "tokens_per_s_predicted", "cache_bytes", "cache_predicted_bytes", "cache_peak_bytes", "pool_bytes",
    "weight_bytes", "memory_peak", "memory_peak_bytes", "memory_reserved_bytes", "batch_predicted", "launch", "reason",
)  # fmt: skip
DECODE_HEADS = (
    "policy", "context", "batch", "prefill s", "off", "step ms", "spread", "off", "tokens/s", "cache MiB", "off", "peak MiB",
)  # fmt: skip
"""off: predicted over measured, less 1, of what stands before it; tokens/s are batch over step."""
FIT_HEADS = ("policy", "context", "pool MiB", "largest batch", "predicted", "cache MiB")
SPREAD_LIMIT = 0.10
"""(p80 - p20) / mean of a step's samples from which it is marked."""
PEAKS = ("allocated_peak_bytes", "resident_peak_bytes", "process_peak_bytes")
"""Of `decoder.memory`; a row has one of them."""

WITHOUT = (NO_MEMORY, REFUSED)
"""Status of rows that have a reason in the place of numbers."""

Report = dict[str, Any]
"""By COLUMNS; what does not apply is absent."""


def predictor(study: Study, case: Case, profile: Profile, device: torch.device) -> Predictor:
    """Of a case's model and policy, with the engine as the decoder runs on this device."""
    attention = study.attention or default_attention(device)
    engine = TorchDecoder(attention=attention, enforce_eager=device.type != "cuda")
    model = study.models[case.model]
    plan = make_plan(model, study.policies[case.policy], study.weight_dtype, study.block_size_tokens, case.policy, attention)
    return Predictor(model, plan, profile, study.weight_dtype, engine)


def make_reports(study: Study, profile: Profile, ended: Iterable[tuple[Case, Row]], device: torch.device) -> list[Report]:
    """Of decoding and of pools that were filled; chunks and prompt's ends are in the table of errors alone."""
    predictors: dict[tuple[str, str], Predictor] = {}
    found = []
    for case, row in ended:
        if case.kind not in (DECODE, FIT):
            continue
        at = case.model, case.policy
        if at not in predictors:
            predictors[at] = predictor(study, case, profile, device)
        report: Report = {"model": case.model, "policy": case.policy, "kind": case.kind, "context_tokens": case.tokens}
        report |= {"batch": case.batch, "status": row["status"], "reason": row.get("reason", "")}
        if row["status"] not in WITHOUT:
            report |= (_decoded if case.kind == DECODE else _fitted)(study, case, row, predictors[at])
        found.append(report)
    return found


def _decoded(study: Study, case: Case, row: Row, said: Predictor) -> Report:
    step_s, last_step = said.decode_s(case.batch, case.tokens, steps=2 * study.steps), 2 * study.steps + 1
    kept = ("prefill_s", "spread_frac", "cache_bytes", "cache_peak_bytes", "pool_bytes", "weight_bytes", "launch")
    peak = next(name for name in PEAKS if name in row)
    return {
        **{name: row[name] for name in kept}, "step_s": row["seconds"], "step_predicted_s": step_s,
        "prefill_predicted_s": said.prompts_s(case.batch, case.tokens), "tokens_per_s": case.batch / row["seconds"],
        "tokens_per_s_predicted": case.batch / step_s,
        "cache_predicted_bytes": said.cache_bytes(case.batch, case.tokens, last_step),
        "memory_peak": peak.removesuffix("_peak_bytes"), "memory_peak_bytes": row[peak],
        "memory_reserved_bytes": row.get("reserved_peak_bytes", ""),
    }  # fmt: skip


def _fitted(study: Study, case: Case, row: Row, said: Predictor) -> Report:
    assert case.pool_bytes is not None
    return {
        "batch": row["batch"], "cache_bytes": row["cache_bytes"], "pool_bytes": case.pool_bytes,
        "batch_predicted": said.largest_batch(case.pool_bytes, case.tokens, FIT_STEPS),
    }  # fmt: skip


def write_csv(reports: list[Report], path: Path) -> None:
    """Every row, seconds and bytes as they are."""
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(reports)
    partial.replace(path)


def decode_lines(reports: list[Report], model: str) -> list[tuple[str, ...]]:
    """Cells under DECODE_HEADS: at each context of each policy the smallest and the largest batch of this model."""
    groups: dict[tuple[str, int], list[Report]] = {}
    for report in reports:
        if report["model"] == model and report["kind"] == DECODE:
            groups.setdefault((report["policy"], report["context_tokens"]), []).append(report)
    return [_decode_line(one) for group in groups.values() for one in (group[:1] if len(group) == 1 else (group[0], group[-1]))]


def _decode_line(report: Report) -> tuple[str, ...]:
    first = report["policy"], f"{report['context_tokens']}", f"{report['batch']}"
    if report["status"] in WITHOUT:
        return (*first, report["status"], *[""] * (len(DECODE_HEADS) - 4))
    spread = report["spread_frac"]
    return (
        *first, f"{report['prefill_s']:.3g}", _against(report["prefill_predicted_s"], report["prefill_s"]),
        f"{1000 * report['step_s']:.3g}", f"{spread:.0%}" + (" !" if spread > SPREAD_LIMIT else ""),
        _against(report["step_predicted_s"], report["step_s"]), f"{report['tokens_per_s']:.4g}", f"{report['cache_bytes'] / MIB:.3g}",
        _against(report["cache_predicted_bytes"], report["cache_bytes"]), f"{report['memory_peak_bytes'] / MIB:.0f}",
    )  # fmt: skip


def fit_lines(reports: list[Report]) -> list[tuple[str, ...]]:
    """Cells under FIT_HEADS."""
    lines: list[tuple[str, ...]] = []
    for report in reports:
        if report["kind"] != FIT:
            continue
        first = report["policy"], f"{report['context_tokens']}"
        if report["status"] in WITHOUT:
            lines.append((*first, "", report["status"], "", ""))
            continue
        batch, said = report["batch"], report["batch_predicted"]
        off = f"{said}" + (f" ({said / batch - 1:+.1%})" if batch else "")
        lines.append((*first, f"{report['pool_bytes'] / MIB:.0f}", f"{batch}", off, f"{report['cache_bytes'] / MIB:.3g}"))
    return lines


def _against(predicted: float, measured: float) -> str:
    return f"{predicted / measured - 1:+.0%}"


def notes(reports: list[Report]) -> list[str]:
    """Sentences under the tables."""
    decoded = [report for report in reports if report["kind"] == DECODE]
    full = [report for report in decoded if report["status"] == NO_MEMORY]
    timed = [report for report in decoded if report["status"] not in WITHOUT]
    noisy = [report for report in timed if report["spread_frac"] > SPREAD_LIMIT]
    lines = [f"{len(timed)} configurations decoded; {len(noisy)} of them with a spread above {SPREAD_LIMIT:.0%}, marked !"]
    if full:
        lines.append(f"{len(full)} did not fit into memory, and are rows that say so")
    for reason in dict.fromkeys(report["reason"] for report in reports if report["status"] == REFUSED):
        lines.append(f"refused: {reason}")
    launches: dict[str, list[str]] = {}
    for report in timed:
        launches.setdefault(report["launch"], []).append(report["policy"])
    lines += [f"steps that only decode, {how}: {', '.join(dict.fromkeys(policies))}" for how, policies in launches.items()]
    if timed:
        what = {"allocated": "of torch's tensors", "resident": "of the process, resident", "process": "of the process since it began"}
        lines.append("off: predicted over measured, less 1")
        lines.append(f"peak MiB: {what[timed[0]['memory_peak']]}; cache MiB: held of the pool after the last step")
    return lines
