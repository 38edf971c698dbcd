"""What a rule is, and the steps that several take: votes of queries, the best slots, compaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from kvsim.calibrate.decoder import attention
from kvsim.calibrate.decoder.cache import LayerCache

if TYPE_CHECKING:
    from kvsim.calibrate.decoder.sequence import CachedSequence

PROTECTED = torch.inf


class Rule:
    """The neutral rule: nothing is evicted."""

    window_queries = 0
    """The prompt's last queries that it looks at."""
    prompt_statistic: str | None = None
    decode_statistic: str | None = None
    keeps_positions = False
    num_near = 0
    """First slots that come no further from the query than the cache is long, however long the text: positions are the cache's."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def temperature(self, seq: CachedSequence) -> float:
        return 1.0

    def prompt_ends(self, seq: CachedSequence) -> None:
        """The whole prompt has been computed and is resident."""

    def before_step(self, seq: CachedSequence) -> None:
        """Decode step `seq.step` begins: its token is about to be appended in every layer."""


def best(scores: torch.Tensor, budget: int, num_recent: int, num_sink: int = 0) -> torch.Tensor:
    """Slots `[heads, budget]`, ascending: the first num_sink, the last num_recent and the best of the others."""
    number = scores.shape[1]
    scores = scores.clone()
    scores[:, :num_sink] = PROTECTED
    scores[:, max(0, number - num_recent) :] = PROTECTED
    return scores.topk(min(budget, number), 1).indices.sort(1).values


def in_place(scores: torch.Tensor, lengths: Sequence[int], budgets: Sequence[int]) -> list[torch.Tensor]:
    """The best slots of each head, in an order that leaves them where they are: those behind the budget go where others have left.

    scores `[heads, longest]`, those past a head's length unread; budgets: at most the lengths.
    """
    assert all(budget <= length for budget, length in zip(budgets, lengths, strict=True))
    slots = torch.arange(scores.shape[1], device=scores.device)
    length, budget = (torch.tensor(list(one), device=scores.device)[:, None] for one in (lengths, budgets))
    order = scores.masked_fill(slots >= length, -PROTECTED).argsort(dim=1, descending=True, stable=True)
    stays = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, slots < budget)
    places = slots.repeat(len(length), 1)
    places[(slots < budget) & ~stays] = places[(slots >= budget) & stays]
    return [row[:number] for row, number in zip(places, budgets, strict=True)]


def pooled(votes: torch.Tensor, width: int, kind: str, window: int) -> torch.Tensor:
    """Votes of the tokens before the window, pooled over `width` neighbours; those of the window as they are."""
    before = votes[:, None, : max(0, votes.shape[1] - window)]
    if not before.shape[2]:
        return votes
    pool = F.max_pool1d if kind == "max" else F.avg_pool1d
    smooth = pool(before, width, stride=1, padding=width // 2)[:, 0, : before.shape[2]]
    return torch.cat((smooth, votes[:, before.shape[2] :]), 1)


def window_votes(
    seq: CachedSequence, layer: LayerCache, queries: int, statistic: str = "sum", pool_tokens: int = 1, kind: str = "mean", window: int = 0
) -> torch.Tensor:  # fmt: skip
    """Votes of the prompt's last queries, pooled over `pool_tokens` neighbours but for the last `window` tokens."""
    assert layer.window is not None
    q = layer.window[-queries:]
    votes = attention.column_scores(layer, q, seq.num_tokens - len(q), statistic, seq.how)
    if pool_tokens > 1:
        votes = pooled(votes, pool_tokens, kind, window)
    seq.clock.mark("prefill_scores")
    return votes


def compact(seq: CachedSequence, layer: LayerCache, kept: Sequence[torch.Tensor], holes: bool = False) -> None:
    """These slots stay, with their positions and scores. holes: as of `Rows.keep`."""
    seq.clock.mark("select")
    layer.full.keep(list(kept), holes)
    most = max(len(slots) for slots in kept)
    index = torch.stack([F.pad(slots, (0, most - len(slots))) for slots in kept])
    for name in ("positions", "scores"):
        rows = getattr(layer, name)
        if rows is not None:
            setattr(layer, name, rows.gather(1, index))
    seq.clock.mark("compact")
