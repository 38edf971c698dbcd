"""Attention over caches in plain torch: prompt chunks, decode steps, and the statistics policies live on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F

from kvsim.calibrate.decoder.cache import LayerCache, joined, read
from kvsim.calibrate.decoder.transformer import Rotary

SCORE_ROWS = 64
"""Queries whose probabilities are held at once when column sums are recomputed: bounds memory, and what is computed above the diagonal,
as tiles do on a GPU."""

Part = TypeVar("Part")


@dataclass(frozen=True)
class Positions:
    """How positions enter attention beside rotation at write.

    slopes: ALiBi's, `[q_heads]`, or None. rotary: the model's, or None. num_sink: first slots whose distance from the query is that in
    the cache, not in the text (StreamingLLM). All that attention sees of positions is distances, and those of the newest tokens are the
    same in cache and text. So keys stay as they were written, rotated at their positions in the text, and for the sinks alone the
    query is turned back by the tokens that have left between.
    """

    slopes: torch.Tensor | None = None
    rotary: Rotary | None = None
    num_sink: int = 0

    @property
    def move(self) -> bool:
        """Positions are worked out anew as a cache is read, so that each sequence is attended by itself."""
        return self.num_sink > 0


def keys(layer: LayerCache) -> torch.Tensor:
    """fp32 K `[heads, longest, head_dim]` of the full lane, its ring's tokens in full precision."""
    k, ring = layer.full.read_keys(), layer.ring
    if ring is not None and layer.full.lengths[0]:
        k = torch.cat((k[:, : layer.quantized], ring.get(ring.k, layer.quantized, layer.full.lengths[0])), 1)
    return k


def numbers(layer: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of K and V."""
    v, ring = layer.full.read_values(), layer.ring
    if ring is not None and layer.full.lengths[0]:
        n = layer.full.lengths[0]
        narrow = max(0, n - ring.size)
        v = torch.cat((v[:, :narrow], ring.get(ring.v, narrow, n)), 1)
    return keys(layer), v


def decode(
    layers: Sequence[LayerCache], q: torch.Tensor, now: Sequence[int], how: Positions
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query of each of several sequences, `[sequences, q_heads, head_dim]` at positions `now`, over their caches of one layer.

    The caches, their own tokens included, must be `alike`. Returns the output as q and fp32 probabilities
    `[sequences, kv_heads, group, longest]`, 0 past a head's length.
    """
    k, v = numbers(layers[0]) if len(layers) == 1 else read([layer.full for layer in layers])
    number, head_dim, first = len(layers), q.shape[2], layers[0]
    pairs, longest = k.shape[:2]
    heads = pairs // number
    rows = q.float().reshape(pairs, -1, head_dim)
    logits = torch.bmm(rows, k.transpose(1, 2))
    gap = now[0] + 1 - longest  # tokens that have left between the sinks and the others
    num_sink = how.num_sink if gap else 0
    assert number == 1 or not how.move, "what has left between sinks and others is one sequence's own"
    if num_sink and how.rotary is not None:
        logits[..., :num_sink] = torch.matmul(rows, how.rotary.turn(-gap)) @ k[:, :num_sink].transpose(1, 2)
    if first.pruned is not None and any(first.pruned.lengths):
        channels = joined([_of(layer.channels) for layer in layers])
        narrow_k, narrow_v = read([_of(layer.pruned) for layer in layers])
        chosen = rows.gather(2, channels[:, None].expand(-1, rows.shape[1], -1))
        logits = torch.cat((torch.bmm(chosen, narrow_k.transpose(1, 2)), logits), 2)
        v = torch.cat((narrow_v, v), 1)
    logits = logits * head_dim**-0.5
    if how.slopes is not None:
        distance = joined([_places(layer, heads, logits.shape[2]) - at for layer, at in zip(layers, now, strict=True)])
        distance[:, :num_sink] += gap
        logits = logits + how.slopes.reshape(heads, -1).repeat(number, 1)[..., None] * distance[:, None]
    lengths = [length for layer in layers for length in layer.full.lengths]
    if len(set(lengths)) > 1:
        ends = torch.tensor(lengths, device=q.device)[:, None, None]
        unused = torch.arange(logits.shape[2], device=q.device) >= ends
        logits = logits.masked_fill(unused, -torch.inf)
        v = v.masked_fill(unused.transpose(1, 2), 0.0)
    probabilities = logits.softmax(2)
    return torch.bmm(probabilities, v).reshape(q.shape).to(q.dtype), probabilities.unflatten(0, (number, heads))


def alike(layer: LayerCache, how: Positions) -> Hashable:
    """Caches with equal keys can be attended together; None: alone, since parts are spliced in or turned as they are read.

    Lengths may differ within a block, but where channels were pruned.
    """
    if how.move or layer.ring is not None:
        return None
    if layer.pruned is not None and layer.pruned.lengths[0]:
        return layer.full.lengths[0], layer.pruned.lengths[0]
    return max(map(len, layer.full.blocks))


def _places(layer: LayerCache, heads: int, number: int) -> torch.Tensor:
    """Positions of a layer's slots, `[heads, number]`; anything past its tokens."""
    if layer.positions is None:
        return torch.arange(number, device=layer.full.device).expand(heads, -1)
    return F.pad(layer.positions, (0, max(0, number - layer.positions.shape[1])))[:, :number]


def _of(part: Part | None) -> Part:
    assert part is not None
    return part


def prefill(layer: LayerCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, how: Positions) -> torch.Tensor:
    """A prompt chunk's attention over what the cache holds (`start` tokens) and itself, `[tokens, q_heads, head_dim]`."""
    new = q.shape[0]
    if start:
        old_k, old_v = numbers(layer)
        k, v = torch.cat((old_k.transpose(0, 1), k.float())), torch.cat((old_v.transpose(0, 1), v.float()))
    else:
        k, v = k.float(), v.float()
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q.float(), k, v))
    mask = None
    if start or how.slopes is not None:
        distance = torch.arange(start, start + new, device=q.device)[:, None] - torch.arange(start + new, device=q.device)
        mask = distance >= 0
        if how.slopes is not None:
            mask = torch.where(mask, -how.slopes[:, None, None] * distance, -torch.inf)[None]
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1).to(q.dtype)


def column_scores(
    layer: LayerCache, q: torch.Tensor, start: int, statistic: str, how: Positions, temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """What each cached token gets from queries `[queries, q_heads, head_dim]` at positions start, start + 1, ..., over their group.

    statistic: "sum", "square", "count" (of α > 1/t) or "gumbel" of causal probabilities. fp32 `[kv_heads, tokens]`.
    """
    k = keys(layer)
    heads, number, head_dim = k.shape
    scores = torch.zeros(heads, number, device=q.device)
    token = torch.arange(number, device=q.device)
    for first in range(0, q.shape[0], SCORE_ROWS):
        part = q[first : first + SCORE_ROWS]
        at = torch.arange(start + first, start + first + len(part), device=q.device)
        end = min(start + first + len(part), number)  # tokens may have left
        seen = token[:end]
        rows = part.float().transpose(0, 1).unflatten(0, (heads, -1))  # [heads, group, queries, d]
        logits = torch.matmul(rows, k[:, :end].transpose(1, 2)[:, None]) * head_dim**-0.5
        if how.slopes is not None:
            places = seen.expand(heads, -1) if layer.positions is None else layer.positions[:, :end]
            distance = places[:, None, None] - at[:, None]  # [heads, 1, queries, tokens]
            logits = logits + how.slopes.unflatten(0, (heads, -1))[..., None, None] * distance
        if statistic == "gumbel":
            logits = (logits + gumbel(logits, generator)) / temperature
        alpha = logits.masked_fill(seen > at[:, None], -torch.inf).softmax(3)
        scores[:, :end] += _reduced(alpha, statistic, (at + 1)[:, None]).sum((1, 2))
    return scores


def decode_scores(probabilities: torch.Tensor, statistic: str, num_seen: torch.Tensor | int) -> torch.Tensor:
    """One step's part of "sum", "square" or "count", over the group: `[..., kv_heads, tokens]` of `[..., kv_heads, group, tokens]`."""
    return _reduced(probabilities, statistic, num_seen).sum(-2)


def noisy_scores(
    layer: LayerCache, q: torch.Tensor, now: int, how: Positions, temperature: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Keyformer's second softmax of a decode step, with Gumbel noise, `[kv_heads, tokens]`."""
    return column_scores(layer, q[None], now, "gumbel", how, temperature, generator)


def gumbel(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Standard Gumbel noise: −log of an exponential variable."""
    return torch.empty_like(like).exponential_(generator=generator).log_().neg_()


def _reduced(alpha: torch.Tensor, statistic: str, num_seen: torch.Tensor | int) -> torch.Tensor:
    if statistic == "square":
        return alpha.square()
    return (alpha * num_seen > 1).float() if statistic == "count" else alpha
