"""`kvsim calibrate decode`: full decoding with every policy applied becomes a profile of the decoder, and says how wrong it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from statistics import mean, median

import torch

from kvsim.calibrate.build import build, write_profile
from kvsim.calibrate.decode_report import FILE, Report, make_reports, predictor, write_csv
from kvsim.calibrate.decoder.heap import keep_pages
from kvsim.calibrate.decoder.predict import Predictor
from kvsim.calibrate.decoder.studies import cpu_study, gpu_study
from kvsim.calibrate.decoder.study import Case, Study, ended_cases, measure, measured_rows, open_rows, step_times
from kvsim.calibrate.rows import Import, at_means
from kvsim.errors import InputError
from kvsim.hardware import Gpu, load_gpu
from kvsim.profile import Profile
from kvsim.profile_file import DEVICE_FILE, ProfileFile
from kvsim.profiles import load_profile

PROFILE = "decoder-profile.json"
ENGINE = "torch_decoder"
HEADS = ("policy", "kind", "cases", "median error", "90 % below", "bias")


@dataclass(frozen=True)
class StepError:
    """One case: what was measured and what the profile says."""

    case: Case
    measured_s: float
    predicted_s: float

    @property
    def log_ratio(self) -> float:
        return log(self.predicted_s / self.measured_s)


@dataclass(frozen=True)
class Calibrated:
    """What came of it."""

    gpu: Gpu
    profile: ProfileFile
    path: Path
    errors: list[StepError]
    reports: list[Report]


def pick_device(name: str) -> torch.device:
    """Raises InputError where torch has no such device. A CPU computes in one thread, in memory that it keeps: see
    `kvsim.calibrate.decoder.clock` and `.heap`.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", name, "must be a device that torch can use here", "use --device cpu")
    if name == "cpu":
        torch.set_num_threads(1)
        keep_pages()
    return torch.device(name)


def device_gpu(folder: Path) -> Gpu:
    """The folder's device file. Raises InputError where there is none."""
    path = folder / DEVICE_FILE
    if not path.is_file():
        raise InputError("--out", str(folder), f"must hold {DEVICE_FILE}", f"run kvsim calibrate device --out {folder} first")
    return load_gpu(path)


def run_study(
    device: torch.device, folder: Path, budget_s: float, tell: Callable[[int, int], None], attention: str | None = None
) -> Study:
    """Measures what is still to be measured within the time. attention: the backend; None: the device's default."""
    study = cpu_study() if device.type == "cpu" else gpu_study(torch.cuda.get_device_properties(device).total_memory)
    study = replace(study, attention=attention)
    file = open_rows(folder, study, device)
    try:
        measure(study, device, file, budget_s, tell)
    finally:
        file.close()
    return study


def conclude(study: Study, device: torch.device, folder: Path, command: str) -> Calibrated:
    """Fits the rows, writes the profile, and asks it for the steps that were measured as a whole."""
    gpu, file = device_gpu(folder), open_rows(folder, study, device)
    rows = at_means(measured_rows(file))
    if len(rows) < 2:
        raise InputError("--out", str(folder), f"must hold at least two measured rows, has {len(rows)}", "give it more time")
    found = Import(ENGINE, torch.__version__.partition("+")[0], f"kvsim calibrate decode on {gpu.name}", rows)
    profile, _, _ = build(gpu, found, command, sparse=True)
    path = folder / PROFILE
    write_profile(profile, path)
    answers = load_profile(str(path.resolve()), gpu, ENGINE, folder)
    reports = make_reports(study, answers, ended_cases(study, file), device)
    write_csv(reports, folder / FILE)
    return Calibrated(gpu, profile, path, step_errors(study, answers, dict(step_times(file)), device), reports)


def step_errors(study: Study, profile: Profile, times: dict[str, float], device: torch.device) -> list[StepError]:
    """Cases of the study that were measured, beside the cost model's answer."""
    predictors: dict[tuple[str, str], Predictor] = {}
    errors = []
    for case in study.cases():
        if case.key not in times:
            continue
        at = case.model, case.policy
        if at not in predictors:
            predictors[at] = predictor(study, case, profile, device)
        if not case.batch:
            predicted = predictors[at].end_s(case.tokens)
        elif case.prior_tokens is None:
            predicted = predictors[at].decode_s(case.batch, case.tokens, steps=2 * study.steps)
        else:
            predicted = predictors[at].prefill_s(case.tokens, case.prior_tokens)
        if predicted > 0:  # a short prompt that nothing is dropped from costs nothing
            errors.append(StepError(case, times[case.key], predicted))
    return errors


def error_lines(errors: list[StepError]) -> list[tuple[str, ...]]:
    """Cells under HEADS: each policy, decode steps and prompt chunks apart, and all together."""
    groups: dict[tuple[str, str], list[float]] = {}
    for error in errors:
        for policy in (error.case.policy, "all"):
            groups.setdefault((policy, error.case.kind), []).append(error.log_ratio)
    lines: list[tuple[str, ...]] = []
    for (policy, kind), ratios in sorted(groups.items(), key=lambda item: (item[0][0] == "all", item[0])):
        off = sorted(abs(exp(ratio) - 1) for ratio in ratios)
        at_90 = off[min(len(off) - 1, int(0.9 * len(off)))]
        lines.append((policy, kind, f"{len(off)}", f"{median(off):.1%}", f"{at_90:.1%}", f"{exp(mean(ratios)) - 1:+.1%}"))
    return lines
