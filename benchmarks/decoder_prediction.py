"""Full decoding for real against its prediction: steps of a model that no fit has seen, and a trace served request by request.

    python benchmarks/decoder_prediction.py DIR [--minutes 8] [--out results.json]

DIR is a folder of `kvsim calibrate device`. Cases of the models that are fitted and of the one that is predicted are run in one random
order, so that whatever else the machine does falls on both alike; then requests are served, and the simulation is asked the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from math import exp
from pathlib import Path
from statistics import median

import torch
import yaml

from kvsim.calibrate.build import build, write_profile
from kvsim.calibrate.decode_command import ENGINE, StepError, device_gpu, error_lines, pick_device, step_errors
from kvsim.calibrate.decoder.studies import BLOCK_TOKENS, CPU_UNSEEN, cpu_study
from kvsim.calibrate.decoder.study import Case, Study, measure, measured_rows, open_rows, step_times
from kvsim.calibrate.rows import Import
from kvsim.calibrate.serve_command import serve
from kvsim.hardware import Gpu
from kvsim.profiles import load_profile
from kvsim.scenario import parse_scenario

BATCHES, CONTEXTS, CHUNKS, PRIORS = (3, 6), (150, 350, 800), (40, 150), (0, 300)
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


def fit(study: Study, folder: Path, gpu: Gpu, device: torch.device) -> tuple[Path, list[StepError]]:
    """A profile of the seen models' rows, and its errors on the unseen model's steps."""
    file = open_rows(folder, study, device)
    rows = [row for row in measured_rows(file) if not row.where.startswith(f"{CPU_UNSEEN.name}/")]
    found = Import(ENGINE, torch.__version__.partition("+")[0], "benchmarks/decoder_prediction.py", rows)
    profile, _, _ = build(gpu, found, "benchmarks/decoder_prediction.py", sparse=True)
    path = folder / "benchmark-profile.json"
    write_profile(profile, path)
    times = {key: seconds for key, seconds in step_times(file) if key.startswith(f"{CPU_UNSEEN.name}/")}
    return path, step_errors(unseen_study(study), load_profile(str(path.resolve()), gpu, ENGINE, folder), times, device)


def serve_ratios(study: Study, folder: Path, profile: Path, device: torch.device) -> dict[str, dict[str, float]]:
    """Simulated over measured means by policy."""
    shape = {name: getattr(CPU_UNSEEN, name) for name in (
        "num_layers", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size", "max_context_tokens"
    )}  # fmt: skip
    (folder / "unseen.yaml").write_text(yaml.safe_dump({"name": CPU_UNSEEN.name, "source": "synthetic", **shape}))
    scenario = parse_scenario({
        "gpu": str(folder / "device.yaml"), "model": str(folder / "unseen.yaml"), "weight_dtype": "fp32", "profile": str(profile),
        "engine": {
            "kind": ENGINE, "block_size_tokens": BLOCK_TOKENS, "max_num_seqs": 8, "max_num_batched_tokens": 256, "num_gpu_blocks": 90,
        },
        "workload": {
            "arrivals": {"kind": "poisson", "rate_per_s": 2.5}, "num_requests": 60, "seed": 0,
            "lengths": {"kind": "lognormal", "prompt_mean_tokens": 250, "output_mean_tokens": 40, "prompt_max_tokens": 800,
                        "output_max_tokens": 120},
        },
        "policies": {
            name: [policy.model_dump(mode="json") for policy in policies] for name, policies in study.policies.items() if name in SERVED
        },
    }, Path())  # fmt: skip
    ratios = {}
    for one in serve(scenario, device):
        real, said, off = one.measured, one.simulated, one.median_errors()
        ratios[one.policy] = {
            "ttft": said.ttft.mean_s / real.ttft.mean_s, "tpot": said.tpot.mean_s / real.tpot.mean_s,
            "e2e": said.e2e.mean_s / real.e2e.mean_s, "batch": said.mean_decode_batch_sequences / real.mean_decode_batch_sequences,
            "median_request_ttft_error": off["ttft"], "median_request_e2e_error": off["e2e"],
            "measured_ttft_s": real.ttft.mean_s, "measured_tpot_s": real.tpot.mean_s, "preemptions": real.num_preemptions,
            "peak_cache_over_predicted": one.peak_cache_bytes / one.pool_bytes,
        }  # fmt: skip
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder, device = options.folder, pick_device("cpu")
    gpu = device_gpu(folder)
    base = cpu_study()
    study = Mixed(**{**{name: getattr(base, name) for name in Study.__dataclass_fields__},
                     "models": {**base.models, CPU_UNSEEN.name: CPU_UNSEEN}})  # fmt: skip
    file = open_rows(folder / "benchmark", study, device)
    measure(study, device, file, options.minutes * 60, lambda done, total: None)
    file.close()
    profile, errors = fit(study, folder / "benchmark", gpu, device)
    for line in error_lines(errors):
        print("  ".join(f"{cell:>14}" for cell in line))
    steps = median(abs(exp(error.log_ratio) - 1) for error in errors if error.case.batch and error.case.prior_tokens is None)
    ratios = serve_ratios(study, folder, profile, device)
    for policy, values in ratios.items():
        print(policy, {name: round(value, 3) for name, value in values.items()})
    worst = max(abs(values[name] - 1) for values in ratios.values() for name in ("ttft", "tpot"))
    print(f"decode steps of the unseen model: median error {steps:.1%} (bar {MEDIAN_BAR:.0%}); served means off by at most {worst:.1%} "
          f"(bar {SERVE_BAR:.0%})")  # fmt: skip
    if options.out is not None:
        content = {
            "device": gpu.name, "torch": torch.__version__, "command": " ".join(sys.argv), "median_step_error": steps,
            "steps": [{"case": e.case.key, "measured_s": e.measured_s, "predicted_s": e.predicted_s} for e in errors], "serve": ratios,
        }  # fmt: skip
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if steps <= MEDIAN_BAR and worst <= SERVE_BAR else 1


if __name__ == "__main__":
    sys.exit(main())
