"""`kvsim calibrate serve`: a trace served for real by the decoder, beside its simulation, request by request."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simpy
import torch

from kvsim.api import Deployment, RequestCheck, build_ledger, build_plan, deploy, run_policy
from kvsim.calibrate.decoder.decoder import Decoder
from kvsim.calibrate.decoder.launching import default_attention
from kvsim.calibrate.decoder.spec import spec_from_hf, spec_of
from kvsim.calibrate.decoder.study import TORCH_DTYPES
from kvsim.calibrate.decoder.transformer import Transformer
from kvsim.calibrate.decoder.weights import hf_weights, random_weights
from kvsim.calibrate.live import LiveReplica
from kvsim.engines.torch_decoder import TorchDecoder
from kvsim.errors import InputError
from kvsim.metrics import Summary, summarize
from kvsim.pool import BlockPool
from kvsim.recording import RunLog
from kvsim.result import PolicyResult
from kvsim.scenario import Scenario
from kvsim.schema import kind_of
from kvsim.units import PS_PER_S
from kvsim.workload import build_source

HEADS = ("metric", "measured", "simulated", "simulated / measured")
COLUMNS = ("policy", "index", "prompt_tokens", "output_tokens", "ttft_s", "ttft_simulated_s", "e2e_s", "e2e_simulated_s",
           "preemptions", "preemptions_simulated")  # fmt: skip


@dataclass(frozen=True)
class Live:
    """One policy's real run. peak_cache_bytes and launch: as of `Served`."""

    policy: str
    measured: Summary
    log: RunLog
    peak_cache_bytes: int
    launch: str


@dataclass(frozen=True)
class Served:
    """One policy: the real run and the simulated one, of the same requests by the same scheduler."""

    policy: str
    measured: Summary
    simulated: Summary
    logs: tuple[RunLog, RunLog]
    peak_cache_bytes: int
    """The most that real caches held, keys, values and scales; `pool_bytes` is what the simulated pool gave out at its peak."""
    pool_bytes: int
    launch: str
    """How steps that only decode were launched."""

    @classmethod
    def of(cls, live: Live, simulated: PolicyResult) -> Served:
        summary = simulated.summary
        pool_bytes = summary.peak_held_units * simulated.unit_bytes
        logs = live.log, simulated.log
        return cls(live.policy, live.measured, summary, logs, live.peak_cache_bytes, pool_bytes, live.launch)

    def lines(self) -> list[tuple[str, ...]]:
        """Cells under HEADS."""
        real, said = self.measured, self.simulated
        rows = []
        for name in ("ttft", "tpot", "e2e"):
            for statistic in ("mean", "p50", "p99"):
                values = [getattr(getattr(side, name), f"{statistic}_s") for side in (real, said)]
                rows.append((f"{name.upper()} {statistic}, s", *values))
        rows += [
            ("output tokens/s", real.output_tokens_per_s, said.output_tokens_per_s),
            ("mean decode batch", real.mean_decode_batch_sequences, said.mean_decode_batch_sequences),
            ("largest decode batch", real.max_decode_batch_sequences, said.max_decode_batch_sequences),
            ("preemptions", real.num_preemptions, said.num_preemptions),
            ("peak cache, MB", self.peak_cache_bytes / 1e6, self.pool_bytes / 1e6),
        ]
        return [(name, f"{a:.4g}", f"{b:.4g}", f"{b / a:.3f}" if a else "-") for name, a, b in rows]

    def median_errors(self) -> dict[str, float]:
        """Median over requests of |simulated - measured| / measured."""
        real, said = (_by_request(log) for log in self.logs)
        return {name: float(np.median(np.abs(said[name] / real[name] - 1))) for name in ("ttft", "e2e")}


def serve(scenario: Scenario, device: torch.device, weights: Path | None = None, seed: int = 0) -> list[Served]:
    """Every policy of the scenario, run and simulated. weights: a Hugging Face folder of the scenario's model; None: random ones.

    Raises InputError for another engine than torch_decoder, for tensor parallelism, and for what the decoder cannot hold.
    """
    _check(scenario)
    simulated = simulate_served(scenario, device)
    return [Served.of(*pair) for pair in zip(serve_live(scenario, device, weights, seed), simulated, strict=True)]


def serve_live(
    scenario: Scenario, device: torch.device, weights: Path | None = None, seed: int = 0, between: Callable[[], None] | None = None
) -> list[Live]:
    """Every policy's real run alone. As `serve` otherwise; prices play no part in it.

    between: called when a step is done; what it takes is not the server's time.
    """
    _check(scenario)
    scenario = on_device(scenario, device)
    deployment = deploy(scenario)
    dtype = TORCH_DTYPES[scenario.weight_dtype]
    if weights is None:
        spec = spec_of(deployment.model)
        transformer = Transformer(spec, random_weights(spec, dtype, device))
    else:
        spec = spec_from_hf(weights)
        transformer = Transformer(spec, hf_weights(spec, weights, dtype, device))
    return [_live(scenario, deployment, transformer, name, seed, between) for name in scenario.policies]


def simulate_served(scenario: Scenario, device: torch.device) -> list[PolicyResult]:
    """The same policies and requests, simulated as the device runs them."""
    scenario = on_device(scenario, device)
    deployment = deploy(scenario)
    return [
        run_policy(scenario, deployment, name, build_plan(deployment, policies, f"policies.{name}"))
        for name, policies in scenario.policies.items()
    ]


def _check(scenario: Scenario) -> None:
    if not isinstance(scenario.engine, TorchDecoder):
        raise InputError("engine.kind", kind_of(type(scenario.engine)), "must be torch_decoder", "it is the engine that can be run here")
    if scenario.tensor_parallel != 1:
        raise InputError("tensor_parallel", scenario.tensor_parallel, "must be 1: the decoder runs on one device")
    if scenario.replicas != 1 or scenario.fleet:
        field = "fleet" if scenario.fleet else "replicas"
        raise InputError(field, None if scenario.fleet else scenario.replicas, "must be left out here: one decoder serves", "drop it")
    if scenario.weight_dtype not in TORCH_DTYPES:
        names = ", ".join(TORCH_DTYPES)
        raise InputError("weight_dtype", scenario.weight_dtype, f"must be one of {names}", "the decoder does not quantise weights")


def on_device(scenario: Scenario, device: torch.device) -> Scenario:
    """The scenario with its engine as it runs there, so that the simulation prices what is launched.

    engine.attention, where it is left out, is the device's default, and a CPU has no graphs.
    """
    engine = scenario.engine
    changed: dict[str, object] = {} if "attention" in engine.model_fields_set else {"attention": default_attention(device)}
    if device.type != "cuda":
        changed["enforce_eager"] = True
    return scenario.model_copy(update={"engine": engine.model_copy(update=changed)})


def _live(
    scenario: Scenario, deployment: Deployment, transformer: Transformer, name: str, seed: int, between: Callable[[], None] | None
) -> Live:
    plan = build_plan(deployment, scenario.policies[name], f"policies.{name}")
    ledger = build_ledger(deployment, plan)
    engine = deployment.engine
    assert isinstance(engine, TorchDecoder)
    decoder = Decoder(
        transformer, plan, ledger.pool_units * plan.unit_bytes, seed=seed, attention=engine.attention,
        capture_sizes=() if engine.enforce_eager else None,
    )  # fmt: skip
    source = build_source(scenario.workload, scenario.base_dir)
    if source.hash_block_tokens:
        raise InputError("workload.trace", None, "must have no prefix hashes here", "the decoder shares no prefixes")
    env = simpy.Environment(initial_time=0)
    scheduler = deployment.engine.scheduler(BlockPool(ledger.pool_units), plan, deployment.model)
    live = LiveReplica(env, source, scheduler, decoder, seed, RequestCheck(deployment, plan, ledger.pool_units), between)
    env.process(live.serve())
    env.run()
    measured = summarize(live.log, warmup_requests=scenario.workload.warmup_requests, slo=scenario.slo)
    return Live(name, measured, live.log, live.peak_bytes, decoder.steps_note)


def _by_request(log: RunLog) -> Mapping[str, np.ndarray]:
    """Seconds by request, in order of arrival."""
    columns = log.request_columns()
    order = np.argsort(columns["index"], kind="stable")
    arrival = columns["arrival_ps"][order]
    return {
        "index": columns["index"][order], "prompt_tokens": columns["prompt_tokens"][order],
        "output_tokens": columns["output_tokens"][order], "preemptions": columns["num_preemptions"][order],
        "ttft": (columns["first_token_ps"][order] - arrival) / PS_PER_S, "e2e": (columns["finish_ps"][order] - arrival) / PS_PER_S,
    }  # fmt: skip


def write_requests(served: list[Served], path: Path) -> None:
    """A row for each request of each policy."""
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in served:
            real, said = (_by_request(log) for log in one.logs)
            for row in range(len(real["index"])):
                writer.writerow((
                    one.policy, *(int(real[name][row]) for name in ("index", "prompt_tokens", "output_tokens")),
                    *(f"{side[name][row]:.9f}" for name in ("ttft", "e2e") for side in (real, said)),
                    *(int(side["preemptions"][row]) for side in (real, said)),
                ))  # fmt: skip
    partial.replace(path)
