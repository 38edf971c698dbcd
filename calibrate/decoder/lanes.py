"""The storage that a composition of policies asks for: lanes of blocks by width of key, and codecs by bits."""

from __future__ import annotations

import torch

from kvsim.calibrate.decoder.storage import Budget, ByChannel, ByToken, Codec, Float8, Lane, Plain
from kvsim.errors import InputError
from kvsim.kernels.packing import QuantFormat, kivi_formats
from kvsim.policies.compose import CachePlan


def check(plan: CachePlan) -> None:
    """Raises InputError for compositions that a slot-by-slot cache cannot hold: what moves single tokens cannot move groups of them."""
    composition = plan.composition
    tokens, bits = composition.tokens, composition.bits
    grouped = bits.wide_window_tokens() > 0
    if grouped and (composition.tokens.dimension == "tokens" or composition.channels.dimension == "channels"):
        raise InputError(
            "policies", composition.describe(), "quantises keys in groups of tokens, which the decoder cannot compress further",
            "run it alone, or use kv_quant",
        )  # fmt: skip
    if plan.prunes and tokens.needs == "decode_probabilities":
        raise InputError(
            "policies", composition.describe(), "evicts while decoding, from keys of two widths, which the decoder does not do",
            "use a policy of tokens that acts once, at the end of the prompt",
        )  # fmt: skip
    if plan.prunes and tokens.dimension == "tokens" and (tokens.per_head_lengths or tokens.moves_positions):
        raise InputError("policies", composition.describe(), "prunes channels of heads that differ, which the decoder does not do")


def make_lanes(plan: CachePlan, budget: Budget, dtype: torch.dtype, device: str | torch.device) -> tuple[Lane, Lane | None]:
    """(full keys, pruned keys or None). Each could take the whole budget alone, and is allocated for it."""
    shape = plan.shape
    widths = [shape.head_dim, *([plan.composition.channels.stored_key_channels(shape.head_dim)] if plan.prunes else [])]
    lanes = [_lane(plan, width, budget, dtype, device) for width in widths]
    return lanes[0], lanes[1] if plan.prunes else None


def _lane(plan: CachePlan, key_width: int, budget: Budget, dtype: torch.dtype, device: str | torch.device) -> Lane:
    shape, bits, policies = plan.shape, plan.composition.bits, plan.composition.policies
    size = shape.block_size_tokens
    slot = bits.key_bytes(key_width, shape.element_bytes) + bits.value_bytes(shape.head_dim, shape.element_bytes)
    state = sum(size * policy.state_bytes_per_slot(shape) + policy.state_bytes_per_block(shape) for policy in policies)
    number = max(1, int(budget.num_bytes // (slot * size))) + 1

    def codec(width: int, key: bool) -> Codec:
        kind = getattr(bits, "kind", None)
        if kind == "kivi":
            fmt = kivi_formats(bits.bits, bits.group_size_tokens)[0 if key else 1]  # type: ignore[attr-defined]
            return (ByToken if key else ByChannel)(number, size, width, fmt, device)
        if kind == "kv_quant":
            if bits.dtype == "fp8":  # type: ignore[attr-defined]
                return Float8(number, size, width, device)
            group = width if bits.scales == "token" else bits.group_size  # type: ignore[attr-defined]
            return ByChannel(number, size, width, QuantFormat(bits.dtype, "channel", group), device)  # type: ignore[attr-defined]
        return Plain(number, size, width, dtype, device)

    return Lane(codec(key_width, True), codec(shape.head_dim, False), number, budget, slot * size + state)
