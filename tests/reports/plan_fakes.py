"""A plan made of a toy queue, so that its numbers hang together: latency grows as 1 / (1 - load), capacity falls with KV."""

from __future__ import annotations

from math import ceil

from kvsim.planning.result import BasisEntry, LedgerEntry, Option, PlanResult, Probe, PublishedQuality, Sensitivity
from kvsim.units import GIB

SLO = {"ttft_p99_s": 2.0, "tpot_p99_s": 0.05}
TARGET_PER_S = 40.0
POLICIES = (("full", 1.0, 1.0), ("snapkv-1024", 1.5, 0.981), ("kivi-4bit", 1.8, 0.994), ("snapkv+think", 1.7, 0.93))
GPUS = (("h100-sxm-80gb", 2, 5.0, 2.5), ("h100-sxm-80gb", 4, 12.0, 2.5), ("a100-sxm-80gb", 4, 6.0, 1.6), ("l40s-48gb", 8, 5.0, 0.9))
"""GPU, tensor parallel, capacity of the whole cache in requests/s, price per GPU and hour."""


def make_option(gpu: str, tp: int, base_per_s: float, price: float | None, policy: str, gain: float, kept: float) -> Option:
    capacity = base_per_s * gain
    service_s, first_s = 0.6 / capacity * tp, 0.02
    limit = min(1 - service_s / SLO["ttft_p99_s"], 1 - first_s / SLO["tpot_p99_s"])
    rate = capacity * limit

    def probe(per_s: float) -> Probe:
        slack = max(1 - per_s / capacity, 0.02)
        latency = {"ttft_p99_s": service_s / slack, "tpot_p99_s": first_s / slack, "e2e_p99_s": 40 * service_s / slack}
        return Probe(
            rate_per_s=per_s, num_requests=2000, num_seeds=3, meets_slo=per_s <= rate * (1 + 1e-9), latency_s=latency,
            goodput_frac=1.0 if per_s <= rate else 0.7, output_tokens_per_s=per_s * 211, mean_batch=per_s * 8,
            utilisation_frac=min(per_s / capacity, 1.0), peak_pool_frac=min(per_s / capacity, 1.0) * 0.9,
        )  # fmt: skip

    replicas = ceil(TARGET_PER_S / rate)
    gpus = replicas * tp
    shares = {"gemm": 0.6, "decode_attention": 0.3 / gain, "prefill_attention": 0.06, "all_reduce": 0.04, "host": 0.3 - 0.3 / gain}
    bases = (("measured: vllm 0.24.0 on h100", 0.95, 1.06), ("fitted: beyond the table", 0.85, 1.2), ("assumed", 0.5, 2.0))
    return Option(
        name=f"{tp} x {gpu}, {policy}", gpu=gpu, tensor_parallel=tp, policy=policy, policy_description=f"{policy}, described",
        engine={"kind": "vllm_v1", "max_num_seqs": 256, "max_num_batched_tokens": 8192}, rate_per_s=rate,
        failing_rate_per_s=rate * 1.04, robust_rate_per_s=rate * 0.9, binds="kv_capacity" if gain > 1 else "hbm_bandwidth",
        replicas=replicas, num_gpus=gpus, headroom_frac=1 - TARGET_PER_S / (replicas * rate), output_tokens_per_s=rate * 211,
        cost_per_hour=None if price is None else gpus * price,
        cost_per_million_output_tokens=None if price is None else gpus * price / (TARGET_PER_S * 211 * 3600) * 1e6,
        watts=gpus * 700.0, kwh_per_million_output_tokens=gpus * 0.7 / (TARGET_PER_S * 211 * 3600) * 1e6,
        quality=PublishedQuality(
            retained_frac=kept, score=41.2 * kept, full_score=41.2, metric="LongBench average", model="llama-3.1-8b",
            task="LongBench", budget="1024 tokens", source="SnapKV, table 2", same_model=False, same_budget=policy != "kivi-4bit",
        ),
        probes=tuple(probe(rate * share) for share in (1.04, 1.0, 0.25, 0.5, 0.75, 0.9)),
        ledger=(
            LedgerEntry(name="GPU memory", num_bytes=80 * GIB, note="as the driver reports it"),
            LedgerEntry(name="engine's share", num_bytes=72 * GIB, note="gpu_memory_utilization = 0.9"),
            LedgerEntry(name="weights", num_bytes=140 * GIB // tp, note=f"bf16, one of {tp} GPUs"),
            LedgerEntry(name="activation peak", num_bytes=2 * GIB),
            LedgerEntry(name="KV pool", num_bytes=(70 - 140 // tp) * GIB, note="what is left"),
        ),
        op_share_frac=shares,
        basis=tuple(
            BasisEntry(op=op, share_frac=part, source=bases[i % 3][0], bias_low=bases[i % 3][1], bias_high=bases[i % 3][2])
            for i, (op, part) in enumerate(shares.items())
        ),
        sensitivity=tuple(
            Sensitivity(name=name, low_input=low, high_input=high, rate_at_low_per_s=rate * (1 + up), rate_at_high_per_s=rate * (1 - down))
            for name, low, high, up, down in (
                ("time of GEMMs", "-5 %", "+6 %", 0.04, 0.05), ("time of decode attention", "-15 %", "+20 %", 0.06, 0.09),
                ("mean output length", "190 tokens", "230 tokens", 0.08, 0.11), ("host work a step", "-30 %", "+30 %", 0.01, 0.01),
            )
        ),
        flags=(
            "vllm serve meta-llama/Llama-3.1-70B", "--tensor-parallel-size", str(tp), "--max-num-seqs", "256", "--kv-cache-dtype", "auto",
        ),
        notes=("prefix caching is off: compressed blocks cannot be shared",) if policy.startswith("snapkv") else (),
    )  # fmt: skip


def make_plan(*, prices: bool = True, title: str = "Llama-3.1-70B, chat, 40 requests/s", names: dict[str, str] | None = None) -> PlanResult:
    """names: other names for options, by the names they have."""
    made = [
        make_option(gpu, tp, base, price if prices else None, *policy) for gpu, tp, base, price in GPUS for policy in POLICIES
    ]
    made = [o for o in made if not (o.gpu == "h100-sxm-80gb" and o.tensor_parallel == 2)] if not prices else made
    made.sort(key=lambda o: (o.cost_per_hour or 0, o.num_gpus, o.name))
    refused = Option(
        name="1 x l40s-48gb, full", gpu="l40s-48gb", tensor_parallel=1, policy="full", policy_description="full",
        engine={"kind": "vllm_v1"}, reason="does not fit: weights of 131.42 GiB, GPU memory of 44.40 GiB; use 4 GPUs or more",
    )  # fmt: skip
    options = [o.model_copy(update={"name": (names or {}).get(o.name, o.name)}) for o in (*made, refused)]
    first = options[0]
    return PlanResult(
        title=title,
        summary=(
            f"Deploy {first.name} on {first.replicas} replicas: {first.num_gpus} GPUs.",
            f"Each replica bears {first.rate_per_s:.2f} requests/s within the SLO; {first.headroom_frac:.0%} of that is headroom.",
        ),
        scenario={
            "model": "llama-3.1-70b", "gpu": first.gpu, "workload": {
                "arrivals": {"kind": "poisson", "rate_per_s": TARGET_PER_S},
                "lengths": {"kind": "lognormal", "prompt_mean_tokens": 1155, "output_mean_tokens": 211},
            },
        },
        target_rate_per_s=TARGET_PER_S, slo=SLO, min_quality_frac=0.95, currency="USD" if prices else None, options=tuple(options),
        num_draws=20, seeds=(0, 1, 2), versions={"kvsim": "0.1.0", "numpy": "2.4.6", "python": "3.11"},
        notes=("Prices are those of the scenario.",),
    )  # fmt: skip
