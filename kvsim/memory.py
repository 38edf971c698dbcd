"""The GPU memory ledger: where every byte of one GPU goes, and how many are left for the KV pool."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor

from kvsim.engines.base import ACTIVATIONS, Engine
from kvsim.errors import DoesNotFitError, InputError
from kvsim.hardware import Gpu, list_gpus, load_gpu
from kvsim.model import Model
from kvsim.policies.compose import CachePlan
from kvsim.result import LedgerLine
from kvsim.units import format_bytes


class Ledger:
    """Lines of the ledger, and `pool_units`: what the block pool holds, in the plan's units.

    Raises DoesNotFitError where weights and the rest leave no room, saying by how much and what would make it fit.
    """

    def __init__(
        self, gpu: Gpu, model: Model, tp: int, weight_dtype: str, engine: Engine, plan: CachePlan,
        max_prompt_tokens: int, num_gpu_blocks: int | None = None,
    ) -> None:  # fmt: skip
        weights = engine.gpu_weight_bytes(model, tp, weight_dtype)
        allowed = floor(gpu.usable_bytes * engine.gpu_memory_utilization)
        self.lines: list[LedgerLine] = [
            LedgerLine("GPU memory", gpu.usable_bytes, f"what {gpu.name} leaves to a process: {gpu.sources.get('usable_memory_gib', '')}"),
            LedgerLine(
                "engine's share", allowed, f"gpu_memory_utilization = {engine.gpu_memory_utilization:g}",
            ),
            LedgerLine("weights", weights, f"{weight_dtype}, one of {tp} GPUs" if tp > 1 else weight_dtype),
        ]  # fmt: skip
        used, activations = weights, 0
        for line in engine.for_plan(plan).memory_lines(model, tp, weight_dtype):
            self.lines.append(LedgerLine(line.name, line.num_bytes, line.note))
            used += 0 if line.outside else line.num_bytes
            activations += line.num_bytes if line.name == ACTIVATIONS else 0
        for policy in plan.composition.policies:
            scratch = policy.scratch_bytes(plan.shape, max_prompt_tokens)
            if scratch:
                # A policy acts between layers, when the widest activations are gone: only what exceeds them is extra.
                extra, kind = max(0, scratch - activations), str(getattr(policy, "kind", "policy"))
                note = f"{format_bytes(scratch)} while it acts on {max_prompt_tokens} tokens, within the activation peak"
                self.lines.append(LedgerLine(f"{kind} scratch", extra, note + (" but for this" if extra else "")))
                used += extra
        plain_block = plan.plain_block_bytes
        if num_gpu_blocks is not None:
            pool_bytes = num_gpu_blocks * plain_block
            _check_blocks(num_gpu_blocks, pool_bytes, gpu.hbm_bytes - weights, plain_block)
            note = f"given: {num_gpu_blocks} blocks of {format_bytes(plain_block)}; the lines above are not used"
        else:
            pool_bytes = engine.pool_bytes(allowed - used, model)
            note = f"{pool_bytes // plain_block} uncompressed blocks of {format_bytes(plain_block)}" if pool_bytes > 0 else ""
        if pool_bytes < plain_block:
            raise DoesNotFitError(_does_not_fit(gpu, model, tp, weight_dtype, engine, self.lines, plain_block - pool_bytes))
        self.lines.append(LedgerLine("KV pool", pool_bytes, note))
        self.pool_bytes = pool_bytes
        self.pool_units = pool_bytes // plan.unit_bytes
        if engine.layout == "paged":  # whole blocks only
            self.pool_units -= self.pool_units % plan.prefill_units_per_block
        self.pool_slots = self.pool_units // plan.prefill_units_per_block * plan.shape.block_size_tokens * plan.shape.num_pairs
        state = plan.state_bytes_per_token
        if state:
            part = round(pool_bytes * state / (state + plan.narrow_bytes_per_token))
            self.lines.append(LedgerLine("of which policy state", part, f"{state:,.0f} B of scores or metadata a token"))


def _check_blocks(num_gpu_blocks: int, pool_bytes: int, room_bytes: int, plain_block_bytes: int) -> None:
    """What the engine reports may differ from the ledger, but not from what the GPU holds beside its weights."""
    if pool_bytes > room_bytes:
        raise InputError(
            "engine.num_gpu_blocks", num_gpu_blocks,
            f"must fit the GPU: these are {format_bytes(pool_bytes)}, and {format_bytes(max(room_bytes, 0))} are left beside its weights",
            f"give at most {max(room_bytes, 0) // plain_block_bytes}, or leave it out",
        )  # fmt: skip


def _does_not_fit(
    gpu: Gpu, model: Model, tp: int, weight_dtype: str, engine: Engine, lines: Sequence[LedgerLine], short_bytes: int
) -> str:
    biggest = max(lines[2:], key=lambda line: line.num_bytes)
    fixes = _what_would_fit(gpu, model, tp, weight_dtype, engine, biggest.name, short_bytes)
    return (
        f"{model.name} does not fit on {tp} x {gpu.name}: {format_bytes(short_bytes)} a GPU short of one KV block "
        f"(largest line: {biggest.name}, {format_bytes(biggest.num_bytes)}; "
        f"engine's share {format_bytes(lines[1].num_bytes)}); "
        + (f"what would fit: {' or '.join(fixes)}" if fixes else "no GPU of the catalogue would do: choose a smaller model")
    )


def _what_would_fit(
    gpu: Gpu, model: Model, tp: int, weight_dtype: str, engine: Engine, biggest: str, short_bytes: int
) -> list[str]:
    """Changes of one or two fields, the smallest first."""

    def fits(gpu: Gpu = gpu, tp: int = tp, dtype: str = weight_dtype) -> bool:
        others = sum(line.num_bytes for line in engine.memory_lines(model, tp, weight_dtype) if not line.outside)
        return model.weight_bytes(dtype, tp) + others < 0.98 * gpu.usable_bytes * engine.gpu_memory_utilization

    fixes = []
    share = engine.gpu_memory_utilization + short_bytes / gpu.usable_bytes
    if share <= 0.97:
        fixes.append(f"engine.gpu_memory_utilization: {ceil(100 * share) / 100:g}")
    limits = [name for name in ("max_prefill_tokens", "max_num_batched_tokens") if name in type(engine).model_fields]
    if biggest == "activation peak" and limits:
        fixes.append(f"a lower engine.{limits[0]}")
    elif biggest.endswith("scratch"):
        fixes.append("a lower engine.max_model_len")
    dtypes = [dtype for dtype in ("fp8", "int4") if weight_dtype in ("fp16", "bf16")]
    tps = [n for n in model.valid_tps() if n > tp]
    fixes += [f"tensor_parallel: {n}" for n in tps if fits(tp=n)][:1]
    fixes += [f"weight_dtype: {dtype}" for dtype in dtypes if fits(dtype=dtype)][:1]
    if not fixes:
        both = ((n, dtype) for dtype in dtypes for n in tps if fits(tp=n, dtype=dtype))
        fixes += [f"tensor_parallel: {n} with weight_dtype: {dtype}" for n, dtype in both][:1]
    larger = sorted((load_gpu(name) for name in list_gpus()), key=lambda gpu: gpu.usable_bytes)
    fixes += [f"gpu: {other.name}" for other in larger if other.usable_bytes > gpu.usable_bytes and fits(gpu=other)][:1]
    if not fixes:
        groups = ((other.name, n) for n in tps for other in larger if fits(gpu=other, tp=n))
        fixes += [f"gpu: {name} with tensor_parallel: {n}" for name, n in groups][:1]
    return fixes


def check_fits(plan: CachePlan, pool_units: int, field: str, prompt_tokens: int, output_tokens: int) -> None:
    """Raises InputError where one sequence alone overflows the pool."""
    peak = plan.peak_units(prompt_tokens, output_tokens)
    if peak > pool_units:
        raise InputError(
            field, prompt_tokens,
            f"must fit the KV pool: with {output_tokens} output tokens it needs {format_bytes(peak * plan.unit_bytes)}, "
            f"the pool holds {format_bytes(pool_units * plan.unit_bytes)}",
            "shorten the request, use more GPUs or a smaller kv_cache_dtype",
        )  # fmt: skip
