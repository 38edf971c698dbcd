"""How decode steps are launched: which backend attends, and whether steps are recorded and replayed."""

from __future__ import annotations

from typing import TypeAlias

import torch

from kvsim.calibrate.decoder.attention import Positions
from kvsim.calibrate.decoder.decode_batch import DecodeBatch
from kvsim.calibrate.decoder.rules import Rule
from kvsim.calibrate.decoder.torch_attention import TorchAttention
from kvsim.calibrate.decoder.triton_attention import TritonAttention
from kvsim.engines.torch_decoder import TorchDecoder
from kvsim.errors import InputError
from kvsim.policies.compose import CachePlan

ATTENTION = ("torch", "triton")
"""Backends of decode attention."""
Attention: TypeAlias = TorchAttention | TritonAttention


def default_attention(device: torch.device) -> str:
    """The backend where none is named."""
    return "triton" if device.type == "cuda" else "torch"


def make_attention(
    name: str, batch: DecodeBatch, plan: CachePlan, dtype: torch.dtype, how: Positions, scoring: Rule | None,
    generator: torch.Generator, seed: int,
) -> Attention:  # fmt: skip
    """Raises InputError for a name that is none, and for what the backend cannot do."""
    if name not in ATTENTION:
        raise InputError("attention", name, f"must be one of {', '.join(ATTENTION)}")
    if name == "torch":
        return TorchAttention(batch, how, scoring, generator)
    return TritonAttention(batch, plan, dtype, how, scoring, seed)


def never_recorded(plan: CachePlan) -> str:
    """Why steps under this plan are recorded on no device; "" where they can be."""
    return TorchDecoder(attention="triton").why_eager(plan)


def engine_sizes(attention: str, plan: CachePlan, device: torch.device) -> tuple[int, ...]:
    """Batch sizes that `kvsim.engines.torch_decoder` declares, by which the simulator prices steps; none on a CPU."""
    engine = TorchDecoder(attention=attention)
    return engine.capture_sizes if device.type == "cuda" and not engine.why_eager(plan) else ()


def steps_note(attention: str, plan: CachePlan, device: torch.device, recorded: bool) -> str:
    """How steps that only decode are launched, in words."""
    if recorded:
        return f"{attention}, " + ("CUDA graphs" if device.type == "cuda" else "recorded steps")
    why = never_recorded(plan)
    if not why:
        why = TorchDecoder(attention=attention).why_eager(plan) if device.type == "cuda" else "no graphs on a CPU"
    return f"{attention}, eager: {why or 'no sizes to capture'}"
