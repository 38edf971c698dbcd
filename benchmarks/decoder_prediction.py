"""Full decoding for real against its prediction: steps of a model that no fit has seen, and a trace served request by request.

    python benchmarks/decoder_prediction.py DIR [--minutes 26] [--rounds 4] [--out results.json]

DIR is a folder of `kvsim calibrate device`. A machine that is not alone varies by more than what is to be seen, from minute to minute, so
everything takes turns of seconds. Cases of the models that are fitted and of the one that is predicted are run in one random order; between
them servers of requests, one for each policy, go on for two seconds each, their clocks standing still meanwhile. This is done `--rounds`
times, each with other requests.

Rounds differ by as much as the machine does, so each is a calibration of its own: what was served in it is simulated with a profile
fitted to its rows. Steps of the unseen model are predicted by a profile of all rounds, where a case's time is the mean of its rounds.

DIR keeps rounds that were finished: run again, the command goes on after them.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import exp
from pathlib import Path
from statistics import mean, median
from time import monotonic
from typing import Any

import torch
import yaml

from kvsim.calibrate.build import build, write_profile
from kvsim.calibrate.decode_command import ENGINE, device_gpu, error_lines, pick_device, step_errors
from kvsim.calibrate.decoder.studies import BLOCK_TOKENS, CPU_UNSEEN, cpu_study
from kvsim.calibrate.decoder.study import Case, Study, measured_rows, measuring, open_rows, step_times
from kvsim.calibrate.device.rows_file import RowFile
from kvsim.calibrate.rows import Import, MeasuredRow, at_means
from kvsim.calibrate.serve_command import Live, Served, serve_live, simulate_served
from kvsim.hardware import Gpu
from kvsim.policies.kv_quant import KVQuant
from kvsim.policies.snapkv import SnapKV
from kvsim.policies.streaming_llm import StreamingLLM
from kvsim.profiles import load_profile
from kvsim.recording import RunLog
from kvsim.scenario import Scenario, parse_scenario

BATCHES, CONTEXTS, CHUNKS, PRIORS = (5, 7), (150, 350, 800), (40, 150), (0, 300)
SERVED = ("full", "h2o", "snapkv", "streaming_llm")
MEDIAN_BAR, SERVE_BAR = 0.10, 0.12
"""Of step times, and of mean TTFT and TPOT."""
SERVER_TURN_S, STUDY_TURN_S = 2.0, 8.0
"""Some 70 steps, of which the first finds the caches as others left them. A server takes some 25 s of a round, the study 390."""
TOUCHED = (4, 2**22)
"""Tensors, and fp32 elements of one: pages of the heap that the study gives back between its cases (`PeakMemory`)."""
STEP_KINDS = ("decode", "chunk", "chunk beside decodes")


COMPOSED = {
    "snapkv+int8": [SnapKV(budget_tokens=128, window_tokens=16), KVQuant(dtype="int8")],
    "streaming_llm+int4": [StreamingLLM(window_tokens=124), KVQuant(dtype="int4")],
}
"""Compositions, which only the unseen model runs: a fit knows their parts."""


class Mixed(Study):
    """The fitted models' cases and the unseen one's, in one order. Of compositions, the unseen one's alone."""

    def cases(self) -> list[Case]:
        mine = [case for case in super().cases() if case.model != CPU_UNSEEN.name and case.policy not in COMPOSED]
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
    sizes = {"batches": BATCHES, "contexts": CONTEXTS, "chunks": CHUNKS, "priors": PRIORS}
    return Study(**{**vars(study), "models": {CPU_UNSEEN.name: CPU_UNSEEN}, "chunk_stride": 1, **sizes})


class Server(threading.Thread):
    """A server that runs while it is given its turn, and stands still, its clock too, while others have theirs."""

    def __init__(self, serve: Callable[[Callable[[], None]], Live]) -> None:
        super().__init__(daemon=True)
        self._serve, self._mine, self._given_back = serve, threading.Semaphore(0), threading.Semaphore(0)
        self._began = 0.0
        self.live: Live | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._wait()
            self.live = self._serve(self._between)
        except BaseException as error:
            self.error = error
        finally:
            self._given_back.release()

    def _wait(self) -> None:
        self._mine.acquire()
        touched = [torch.ones(TOUCHED[1]) for _ in range(TOUCHED[0])]
        del touched
        self._began = monotonic()

    def _between(self) -> None:
        """After a step."""
        if monotonic() - self._began >= SERVER_TURN_S:
            self._given_back.release()
            self._wait()

    def take(self) -> bool:
        """One turn. False if there was none left. Raises what the server raised."""
        if self.live is None and self.error is None:
            self._mine.release()
            self._given_back.acquire()
            if self.live is None and self.error is None:
                return True
        if self.error is not None:
            raise self.error
        return False


def by_turns(servers: Sequence[Callable[[Callable[[], None]], Live]], cases: Iterator[tuple[int, int]], budget_s: float) -> list[Live]:
    """What the servers measured, each in turn with the study's cases, so that all see the machine quick and slow alike."""
    started, left_s = [Server(serve) for serve in servers], budget_s
    serving, alone_s = True, 0.0
    while serving or left_s > 0:
        serving = False
        for server in started:
            begin = monotonic()
            serving |= server.take()
            served_s, begin = monotonic() - begin, monotonic()
            while monotonic() - begin < min(STUDY_TURN_S, left_s):
                if next(cases, None) is None:
                    left_s = 0.0
                    break
            studied_s = monotonic() - begin
            left_s -= studied_s
            alone_s += served_s if left_s <= 0 else studied_s if not serving else 0.0
    print(f"  {alone_s:.0f} s of servers or study had no turns of the other between them", flush=True)
    return [server.live for server in started if server.live is not None]


def rows_of(files: Sequence[RowFile]) -> list[MeasuredRow]:
    """Of the seen models, all rounds together."""
    return at_means([row for file in files for row in measured_rows(file) if not row.where.startswith(f"{CPU_UNSEEN.name}/")])


def unseen_rounds(files: Sequence[RowFile]) -> dict[str, list[float]]:
    """Seconds of the unseen model's cases, round by round."""
    found: dict[str, list[float]] = defaultdict(list)
    for file in files:
        for key, seconds in step_times(file):
            if key.startswith(f"{CPU_UNSEEN.name}/"):
                found[key].append(seconds)
    return found


def unseen_times(files: Sequence[RowFile]) -> dict[str, float]:
    """Each the mean of its rounds."""
    return {key: mean(values) for key, values in unseen_rounds(files).items()}


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


def served_scenario(study: Study, folder: Path, seed: int, profile: Path | None, served: Sequence[str] = SERVED) -> Scenario:
    """A round's requests. profile None: prices do not matter."""
    shape = {name: getattr(CPU_UNSEEN, name) for name in (
        "num_layers", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size", "max_context_tokens"
    )}  # fmt: skip
    (folder / "unseen.yaml").write_text(yaml.safe_dump({"name": CPU_UNSEEN.name, "source": "synthetic", **shape}))
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
            name: [policy.model_dump(mode="json") for policy in study.policies[name]] for name in served
        },
    }, Path())  # fmt: skip


def serve_one(scenario: Scenario, device: torch.device, between: Callable[[], None]) -> Live:
    """A scenario of one policy, for real."""
    (live,) = serve_live(scenario, device, between=between)
    return live


def measure_round(study: Study, folder: Path, number: int, device: torch.device, budget_s: float) -> tuple[RowFile, list[Live]]:
    """The rows of a round and what its servers measured, from DIR if it is there already."""
    place, lives_path = folder / f"round-{number}", folder / f"round-{number}" / "lives.pickle"
    if place.exists() and not lives_path.exists():
        raise SystemExit(f"{place} was not finished, and in a round all take turns: remove it to measure it again")
    file = open_rows(place, study, device)
    if lives_path.exists():
        return file, pickle.loads(lives_path.read_bytes())
    servers = [partial(serve_one, served_scenario(study, folder, number, None, (name,)), device) for name in SERVED]
    lives = by_turns(servers, measuring(study, device, file), budget_s)
    file.close()
    lives_path.write_bytes(pickle.dumps(lives))
    return file, lives


def step_durations(logs: Iterable[RunLog]) -> dict[tuple[str, int], tuple[float, int]]:
    """(picoseconds, steps) by kind and, of steps that only decode, by batch."""
    found: dict[tuple[str, int], tuple[float, int]] = {}
    for log in logs:
        steps = log.step_columns()
        number, chunks = steps["num_steps"], steps["prefill_tokens"] > 0
        lasted_ps = steps["first_step_ps"] * number + steps["step_growth_ps"] * number * (number - 1) // 2
        columns = chunks, steps["num_decodes"], lasted_ps, number
        for chunk, decodes, ps, count in zip(*(column.tolist() for column in columns), strict=True):
            key = ("decode", decodes) if not chunk else ("chunk beside decodes" if decodes else "chunk", 0)
            before_ps, before = found.get(key, (0.0, 0))
            found[key] = before_ps + ps, before + count
    return found


def step_ratios(served: Sequence[Served]) -> dict[str, float]:
    """Simulated over measured mean duration of the steps of one policy, by kind: at the measured mix of batches, where they only decode,
    and of each of these batches.
    """
    real, said = (step_durations(one.logs[side] for one in served) for side in (0, 1))
    predicted_ps = {key: said[key][0] / said[key][1] * real[key][1] for key in sorted(real.keys() & said.keys())}
    found: dict[str, float] = {}
    for kind in STEP_KINDS:
        keys = [key for key in predicted_ps if key[0] == kind]
        found[kind] = sum(predicted_ps[key] for key in keys) / sum(real[key][0] for key in keys)
    return found | {f"decode {batch}": ps / real[kind, batch][0] for (kind, batch), ps in predicted_ps.items() if kind == "decode"}


def serve_ratios(served: Sequence[Served]) -> dict[str, Any]:
    """Simulated over measured means of one policy, requests of all rounds together."""

    def over(metric: str) -> float:
        said, real = (mean(getattr(getattr(one, side), metric).mean_s for one in served) for side in ("simulated", "measured"))
        return said / real

    return {
        "ttft": over("ttft"), "tpot": over("tpot"), "e2e": over("e2e"), "steps": step_ratios(served),
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
    parser.add_argument("--minutes", type=float, default=26.0, help="of measuring steps, all rounds together; serving comes on top")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder, device = options.folder, pick_device("cpu")
    gpu = device_gpu(folder)
    base = cpu_study()
    mixed = {"models": {**base.models, CPU_UNSEEN.name: CPU_UNSEEN}, "policies": {**base.policies, **COMPOSED}}
    study = Mixed(**{**vars(base), **mixed, "prefills": False, "fit_models": ()})
    files, served = [], defaultdict[str, list[Served]](list)
    for number in range(options.rounds):
        file, lives = measure_round(study, folder, number, device, options.minutes * 60 / options.rounds)
        files.append(file)
        own = folder / f"round-{number}" / "profile.json"
        fit([file], gpu, own)
        for live, said in zip(lives, simulate_served(served_scenario(study, folder, number, own), device), strict=True):
            served[live.policy].append(Served.of(live, said))
        print(f"round {number}: {len(unseen_times([file]))} steps of the unseen model, {len(lives)} policies served", flush=True)
    profile = folder / "benchmark-profile.json"
    fit(files, gpu, profile)
    cost = load_profile(str(profile.resolve()), gpu, ENGINE, folder)
    errors = step_errors(unseen_study(study), cost, unseen_times(files), device)
    for line in error_lines(errors):
        print("  ".join(f"{cell:>14}" for cell in line))
    steps = median(abs(exp(error.log_ratio) - 1) for error in errors if error.case.batch and error.case.prior_tokens is None)
    ratios = {policy: serve_ratios(runs) for policy, runs in served.items()}
    for policy, values in ratios.items():
        print(policy, {name: round(values[name], 3) for name in ("ttft", "tpot", "e2e")},
              "TPOT by round", [round(one["tpot"], 3) for one in values["by_round"]],
              {name: round(values["steps"][name], 3) for name in STEP_KINDS})  # fmt: skip
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
