"""Full decoding for real against its prediction: steps of a model that no fit has seen, and a trace served request by request.

    python benchmarks/decoder_prediction.py DIR [--minutes 18] [--rounds 3] [--out results.json]

DIR is a folder of `kvsim calibrate device`. A machine that is not alone varies by more than what is to be seen, from minute to minute, so
everything takes turns. Cases of the models that are fitted and of the one that is predicted are run in one random order, and requests are
served between them; this is done `--rounds` times, each with other requests. A case's time is the median of its rounds. The profile is
fitted when all is measured, and asked for the steps of the unseen model and for all the requests that were served.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import yaml

from kvsim.calibrate.build import build, write_profile
from kvsim.calibrate.decode_command import ENGINE, device_gpu, error_lines, pick_device, step_errors
from kvsim.calibrate.decoder.studies import BLOCK_TOKENS, CPU_UNSEEN, cpu_study
from kvsim.calibrate.decoder.study import Case, Study, measure, measured_rows, open_rows, step_times
from kvsim.calibrate.device.rows_file import RowFile
from kvsim.calibrate.rows import Import, MeasuredRow
from kvsim.calibrate.serve_command import Served, serve_live, simulate_served
from kvsim.hardware import Gpu
from kvsim.profiles import load_profile
from kvsim.scenario import Scenario, parse_scenario

BATCHES, CONTEXTS, CHUNKS, PRIORS = (5, 7), (150, 350, 800), (40, 150), (0, 300)
SERVED = ("full", "h2o", "snapkv", "streaming_llm")
MEDIAN_BAR, SERVE_BAR = 0.10, 0.12
"""Of step times, and of mean TTFT and TPOT."""


class Mixed(Study):
    """The fitted models' cases and the unseen one's, in one order."""

    def cases(self) -> list[Case]:
        unseen = CPU_UNSEEN.name
        mine = [case for case in super().cases() if case.model != unseen]
        theirs = unseen_study(self).cases()
        every = max(1, len(mine) // len(theirs))
        mixed = []
        for index, case in enumerate(mine):
            mixed.append(case)
            if index % every == every - 1 and theirs:
                mixed.append(theirs.pop())
        return mixed + theirs


def unseen_study(study: Study) -> Study:
    """The unseen model at batches, contexts and chunks that no other case has."""
    fields = {name: getattr(study, name) for name in Study.__dataclass_fields__}
    sizes = {"batches": BATCHES, "contexts": CONTEXTS, "chunks": CHUNKS, "priors": PRIORS}
    return Study(**{**fields, "models": {CPU_UNSEEN.name: CPU_UNSEEN}, **sizes})


def rows_of(files: Sequence[RowFile]) -> list[MeasuredRow]:
    """Of the seen models, each the median of its rounds."""
    found: dict[str, list[MeasuredRow]] = defaultdict(list)
    for file in files:
        for row in measured_rows(file):
            if not row.where.startswith(f"{CPU_UNSEEN.name}/"):
                found[row.where].append(row)
    return [rows[0]._replace(seconds=median(row.seconds for row in rows)) for rows in found.values()]


def unseen_rounds(files: Sequence[RowFile]) -> dict[str, list[float]]:
    """Seconds of the unseen model's cases, round by round."""
    found: dict[str, list[float]] = defaultdict(list)
    for file in files:
        for key, seconds in step_times(file):
            if key.startswith(f"{CPU_UNSEEN.name}/"):
                found[key].append(seconds)
    return found


def unseen_times(files: Sequence[RowFile]) -> dict[str, float]:
    """Each the median of its rounds."""
    return {key: median(values) for key, values in unseen_rounds(files).items()}


def spread(rounds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of decode steps that every round holds: slowest over quickest, and how far a round is off the median of the others."""
    most = max(map(len, rounds.values()))
    whole = [times for key, times in rounds.items() if "/decode/" in key and len(times) == most]
    ratios = sorted(max(times) / min(times) for times in whole)
    off = [abs(times[at] / median([*times[:at], *times[at + 1 :]]) - 1) for times in whole for at in range(most) if most > 1]
    return {
        "slowest_over_quickest_median": median(ratios), "slowest_over_quickest_p90": ratios[int(0.9 * len(ratios))],
        "round_off_others_median": median(off) if off else 0.0,
    }  # fmt: skip


def fit(files: Sequence[RowFile], gpu: Gpu, path: Path) -> None:
    """Writes a profile of the seen models' rows."""
    found = Import(ENGINE, torch.__version__.partition("+")[0], "benchmarks/decoder_prediction.py", rows_of(files))
    profile, _, _ = build(gpu, found, "benchmarks/decoder_prediction.py", sparse=True)
    write_profile(profile, path)


def served_scenario(study: Study, folder: Path, seed: int, profile: Path | None) -> Scenario:
    """A round's requests. profile None: prices do not matter."""
    shape = {name: getattr(CPU_UNSEEN, name) for name in (
        "num_layers", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size", "max_context_tokens"
    )}  # fmt: skip
    (folder / "unseen.yaml").write_text(yaml.safe_dump({"name": CPU_UNSEEN.name, "source": "synthetic", **shape}))
    turn = seed % len(SERVED)
    return parse_scenario({
        "gpu": str(folder / "device.yaml"), "model": str(folder / "unseen.yaml"), "weight_dtype": "fp32",
        **({} if profile is None else {"profile": str(profile)}),
        "engine": {
            "kind": ENGINE, "block_size_tokens": BLOCK_TOKENS, "max_num_seqs": 8, "max_num_batched_tokens": 256, "num_gpu_blocks": 90,
        },
        "workload": {
            "arrivals": {"kind": "poisson", "rate_per_s": 2.5}, "num_requests": 60, "seed": seed,
            "lengths": {"kind": "lognormal", "prompt_mean_tokens": 250, "output_mean_tokens": 40, "prompt_max_tokens": 800,
                        "output_max_tokens": 120},
        },
        "policies": {
            name: [policy.model_dump(mode="json") for policy in study.policies[name]] for name in SERVED[turn:] + SERVED[:turn]
        },
    }, Path())  # fmt: skip


def serve_ratios(served: Sequence[Served]) -> dict[str, Any]:
    """Simulated over measured means of one policy, requests of all rounds together."""

    def over(metric: str) -> float:
        said, real = (mean(getattr(getattr(one, side), metric).mean_s for one in served) for side in ("simulated", "measured"))
        return said / real

    return {
        "ttft": over("ttft"), "tpot": over("tpot"), "e2e": over("e2e"),
        "by_round": [
            {"ttft": one.simulated.ttft.mean_s / one.measured.ttft.mean_s, "tpot": one.simulated.tpot.mean_s / one.measured.tpot.mean_s,
             "batch": one.simulated.mean_decode_batch_sequences / one.measured.mean_decode_batch_sequences,
             "measured_ttft_s": one.measured.ttft.mean_s, "measured_tpot_s": one.measured.tpot.mean_s,
             "median_request_errors": one.median_errors(), "preemptions": one.measured.num_preemptions,
             "peak_cache_over_predicted": one.peak_cache_bytes / one.pool_bytes}
            for one in served
        ],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=18.0, help="of measuring steps, all rounds together; serving comes on top"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder, device = options.folder, pick_device("cpu")
    gpu = device_gpu(folder)
    base = cpu_study()
    study = Mixed(**{**{name: getattr(base, name) for name in Study.__dataclass_fields__},
                     "models": {**base.models, CPU_UNSEEN.name: CPU_UNSEEN}, "prefills": False, "fit_models": ()})  # fmt: skip
    files, lives = [], []
    for number in range(options.rounds):
        file = open_rows(folder / f"round-{number}", study, device)
        measure(study, device, file, options.minutes * 60 / options.rounds, lambda done, total: None)
        file.close()
        files.append(file)
        lives.append(serve_live(served_scenario(study, folder, number, None), device))
        print(
            f"round {number}: {len(unseen_times([file]))} steps of the unseen model, {len(SERVED)} policies served", flush=True
        )
    profile = folder / "benchmark-profile.json"
    fit(files, gpu, profile)
    cost = load_profile(str(profile.resolve()), gpu, ENGINE, folder)
    errors = step_errors(unseen_study(study), cost, unseen_times(files), device)
    for line in error_lines(errors):
        print("  ".join(f"{cell:>14}" for cell in line))
    steps = median(abs(exp(error.log_ratio) - 1) for error in errors if error.case.batch and error.case.prior_tokens is None)
    served: dict[str, list[Served]] = defaultdict(list)
    for number, runs in enumerate(lives):
        for live, said in zip(runs, simulate_served(served_scenario(study, folder, number, profile), device), strict=True):
            served[live.policy].append(Served.of(live, said))
    ratios = {policy: serve_ratios(runs) for policy, runs in served.items()}
    for policy, values in ratios.items():
        print(policy, {name: round(values[name], 3) for name in ("ttft", "tpot", "e2e")},
              "TPOT by round", [round(one["tpot"], 3) for one in values["by_round"]])  # fmt: skip
    worst = max(abs(values[name] - 1) for values in ratios.values() for name in ("ttft", "tpot"))
    print(f"decode steps of the unseen model: median error {steps:.1%} (bar {MEDIAN_BAR:.0%}); served means off by at most {worst:.1%} "
          f"(bar {SERVE_BAR:.0%})")  # fmt: skip
    rounds = unseen_rounds(files)
    machine = spread(rounds)
    print("the machine:", {name: round(value, 3) for name, value in machine.items()})
    if options.out is not None:
        content = {
            "device": gpu.name, "torch": torch.__version__, "command": " ".join(sys.argv), "median_step_error": steps,
            "spread_of_rounds": machine, "serve": ratios,
            "steps": [{"case": e.case.key, "measured_s": e.measured_s, "predicted_s": e.predicted_s, "rounds_s": rounds[e.case.key]}
                      for e in errors],
        }  # fmt: skip
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if steps <= MEDIAN_BAR and worst <= SERVE_BAR else 1


if __name__ == "__main__":
    sys.exit(main())
