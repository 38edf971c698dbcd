"""Attention of one sequence over its cache, in plain torch: prompt chunks, decode steps, and the statistics policies live on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvsim.calibrate.decoder.cache import LayerCache
from kvsim.calibrate.decoder.transformer import Rotary

SCORE_ROWS = 256
"""Queries whose probabilities are held at once when column sums are recomputed: bounds memory, as tiles do on a GPU."""


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


def decode(layer: LayerCache, q: torch.Tensor, now: int, how: Positions) -> tuple[torch.Tensor, torch.Tensor]:
    """One query `[q_heads, head_dim]` at position `now` over the cache, its own token included.

    Returns the output `[q_heads, head_dim]` and fp32 probabilities `[kv_heads, group, longest]`, 0 past a head's length.
    """
    k, v = numbers(layer)
    heads, longest, head_dim = k.shape[0], k.shape[1], q.shape[1]
    rows = q.float().unflatten(0, (heads, -1))
    logits = torch.bmm(rows, k.transpose(1, 2))
    gap = now + 1 - longest  # tokens that have left between the sinks and the others
    num_sink = how.num_sink if gap else 0
    if num_sink and how.rotary is not None:
        logits[..., :num_sink] = torch.matmul(rows, how.rotary.turn(-gap)) @ k[:, :num_sink].transpose(1, 2)
    if layer.pruned is not None and any(layer.pruned.lengths):
        assert layer.channels is not None
        narrow_k, narrow_v = layer.pruned.read()
        chosen = rows.gather(2, layer.channels[:, None].expand(-1, rows.shape[1], -1))
        logits = torch.cat((torch.bmm(chosen, narrow_k.transpose(1, 2)), logits), 2)
        v = torch.cat((narrow_v, v), 1)
    logits = logits * head_dim**-0.5
    if how.slopes is not None:
        number = logits.shape[2]
        at = torch.arange(number, device=q.device).expand(heads, -1) if layer.positions is None else layer.positions[:, :number]
        distance = at - now
        distance[:, :num_sink] += gap
        logits = logits + how.slopes.unflatten(0, (heads, -1))[..., None] * distance[:, None]
    if not layer.full.even:
        ends = torch.tensor(layer.full.lengths, device=q.device)[:, None, None]
        unused = torch.arange(logits.shape[2], device=q.device) >= ends
        logits = logits.masked_fill(unused, -torch.inf)
        v = v.masked_fill(unused.transpose(1, 2), 0.0)
    probabilities = logits.softmax(2)
    return torch.bmm(probabilities, v).flatten(0, 1).to(q.dtype), probabilities


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
        rows = part.float().transpose(0, 1).unflatten(0, (heads, -1))  # [heads, group, queries, d]
        logits = torch.matmul(rows, k.transpose(1, 2)[:, None]) * head_dim**-0.5
        if how.slopes is not None:
            places = token.expand(heads, -1) if layer.positions is None else layer.positions[:, :number]
            distance = places[:, None, None] - at[:, None]  # [heads, 1, queries, tokens]
            logits = logits + how.slopes.unflatten(0, (heads, -1))[..., None, None] * distance
        if statistic == "gumbel":
            logits = (logits + gumbel(logits, generator)) / temperature
        alpha = logits.masked_fill(token > at[:, None], -torch.inf).softmax(3)
        scores += _reduced(alpha, statistic, (at + 1)[:, None]).sum((1, 2))
    return scores


def decode_scores(probabilities: torch.Tensor, statistic: str, num_seen: int) -> torch.Tensor:
    """One step's part of "sum", "square" or "count", `[kv_heads, tokens]`."""
    return _reduced(probabilities, statistic, num_seen).sum(1)


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
