"""Rules that choose when the prefill has ended: SnapKV and its kin, KV-Compress (which goes on), ThinK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from kvsim.calibrate.decoder import attention
from kvsim.calibrate.decoder.rules.base import PROTECTED, Rule, best, compact, in_place, window_votes

if TYPE_CHECKING:
    from kvsim.calibrate.decoder.sequence import CachedSequence


class SnapKV(Rule):
    """SnapKV (arXiv 2404.14469), and PyramidKV (arXiv 2406.02069) whose layers have budgets of their own."""

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        self.window_queries = policy.window_tokens

    def budgets(self, seq: CachedSequence) -> list[int]:
        return [self.policy.budget_tokens] * len(seq.layers)

    def prompt_ends(self, seq: CachedSequence) -> None:
        if seq.num_tokens <= self.policy.budget_tokens:
            return
        window = self.window_queries
        for layer, budget in zip(seq.layers, self.budgets(seq), strict=True):
            if budget < seq.num_tokens:
                votes = window_votes(seq, layer, window, "sum", self.policy.pool_kernel_tokens, "mean", window)
                compact(seq, layer, list(best(votes, budget, window)))


class PyramidKV(SnapKV):
    """Layer budgets of `kvsim.kernels.select_budgets`."""

    def budgets(self, seq: CachedSequence) -> list[int]:
        from kvsim.kernels.select_budgets import pyramid_layer_budgets

        policy = self.policy
        return pyramid_layer_budgets(
            len(seq.layers), policy.budget_tokens, window_tokens=policy.window_tokens, num_tokens=seq.num_tokens, beta=policy.beta
        )


class AdaKV(Rule):
    """AdaKV (arXiv 2407.11550): the heads of a layer compete for its budget above a floor."""

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        self.window_queries = policy.window_tokens

    def prompt_ends(self, seq: CachedSequence) -> None:
        policy, number, window = self.policy, seq.num_tokens, self.window_queries
        if number <= policy.budget_tokens:
            return
        floor = window + int(policy.floor_frac * (policy.budget_tokens - window))
        for layer in seq.layers:
            votes = window_votes(seq, layer, window, "sum", policy.pool_kernel_tokens, "max", window)
            chosen = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, best(votes, floor, window), True)
            rest = votes.masked_fill(chosen, -torch.inf).flatten()
            chosen.view(-1)[rest.topk(votes.shape[0] * (policy.budget_tokens - floor)).indices] = True
            compact(seq, layer, [row.nonzero()[:, 0] for row in chosen])


class KVCompress(Rule):
    """KV-Compress (arXiv 2410.00161): the cheapest blocks of all layers and heads leave, down to a target in whole blocks."""

    keeps_positions = True
    decode_statistic = "square"

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        self.window_queries = policy.window_tokens

    def prompt_ends(self, seq: CachedSequence) -> None:
        policy = self.policy
        for layer in seq.layers:
            layer.scores = window_votes(seq, layer, self.window_queries, "square", policy.pool_kernel_tokens, "max")
        self._compress(seq)

    def before_step(self, seq: CachedSequence) -> None:
        if (seq.step - 1) % self.policy.interval_steps == 0:
            self._compress(seq)

    def _compress(self, seq: CachedSequence) -> None:
        from kvsim.kernels.select_budgets import freeable_blocks, reference

        policy, size = self.policy, self.policy.block_size_tokens
        if policy.compression_ratio == 1:
            return
        lengths = torch.tensor([layer.full.lengths for layer in seq.layers], dtype=torch.int32).flatten()[None]
        wanted = max(policy.min_kept_tokens, int(seq.shape.prompt_tokens / policy.compression_ratio + 1e-9))
        down = max((wanted - 1) // size, policy.min_kept_tokens // size)
        target = max(-(-wanted // size) if policy.block_rounding == "up" else down, 1, -(-policy.protected_tokens // size))
        excess = int((-(-lengths // size)).sum()) - target * lengths.shape[1]
        excess = min(excess, int(freeable_blocks(lengths, size, policy.protected_tokens).sum()))
        if excess <= 0:
            return
        most, first_protected = int(lengths.max()), seq.num_tokens - policy.protected_tokens
        # By position: survivors fill holes, so that slots are in no order.
        both = [(_padded(layer.scores, most), _padded(layer.positions, most)) for layer in seq.layers]
        worth = [scores.masked_fill(positions >= first_protected, PROTECTED) for scores, positions in both]
        free = torch.tensor([excess], dtype=torch.int32)
        budgets = reference("blocks", torch.cat(worth)[None].cpu(), lengths, blocks_to_free=free, block_size_tokens=size)[0].tolist()
        heads = len(seq.layers[0].full.lengths)
        for index, layer in enumerate(seq.layers):
            own = budgets[index * heads : (index + 1) * heads]
            if own != layer.full.lengths:
                compact(seq, layer, in_place(worth[index], layer.full.lengths, own), holes=True)


def _padded(rows: torch.Tensor | None, width: int) -> torch.Tensor:
    assert rows is not None
    return F.pad(rows[:, :width], (0, width - min(width, rows.shape[1])))


class ThinK(Rule):
    """ThinK (arXiv 2407.21018): key channels of the prompt but its newest tokens leave, after tokens have been chosen."""

    votes = 32
    """Queries that choose (paper: 32)."""
    window_queries = votes

    def prompt_ends(self, seq: CachedSequence) -> None:
        for layer in seq.layers:
            number = layer.full.lengths[0]
            recent = min(self.policy.recent_tokens, number)
            head_dim = seq.head_dim
            stored = self.policy.stored_key_channels(head_dim)
            if number == recent or stored == head_dim:
                continue
            assert layer.window is not None and layer.pruned is not None and layer.full.even
            k, v = attention.numbers(layer)
            queries = layer.window[-self.votes :].float().square().sum(0).unflatten(0, (k.shape[0], -1)).mean(1)
            worth = queries.sqrt() * k.square().sum(1).sqrt()
            layer.channels = worth.topk(stored, 1).indices.sort(1).values
            seq.clock.mark("think_scores")
            old = number - recent
            narrow = k[:, :old].gather(2, layer.channels[:, None].expand(-1, old, -1))
            newest = torch.arange(old, number, device=k.device).expand(k.shape[0], -1)
            layer.full.keep(list(newest))  # first, so that the pool never holds the prompt twice
            layer.pruned.append(narrow, v[:, :old])
            seq.clock.mark("think_gather")
