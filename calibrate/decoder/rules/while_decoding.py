"""Rules that evict while a sequence decodes: H2O, Keyformer, windows and sinks, Scissorhands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvsim.calibrate.decoder.cache import LayerCache
from kvsim.calibrate.decoder.rules.base import PROTECTED, Rule, best, compact, window_votes
from kvsim.policies.base import SequenceShape

if TYPE_CHECKING:
    from kvsim.calibrate.decoder.sequence import CachedSequence


class Steady(Rule):
    """A constant number of tokens from the end of the prompt on: the step's own token takes the slot of the one that leaves."""

    keeps_positions = True

    def budget(self, seq: SequenceShape) -> int:
        raise NotImplementedError

    def recent(self, seq: SequenceShape) -> int:
        raise NotImplementedError

    num_sink = 0

    def prompt_ends(self, seq: CachedSequence) -> None:
        budget, recent = self.budget(seq.shape), self.recent(seq.shape)
        if seq.num_tokens <= budget:
            return
        for layer in seq.layers:
            assert layer.positions is not None
            order = layer.positions.float() if layer.scores is None else layer.scores
            compact(seq, layer, list(best(order, budget, recent, self.num_sink)))

    def before_step(self, seq: CachedSequence) -> None:
        budget, recent = self.budget(seq.shape), self.recent(seq.shape)
        for layer in seq.layers:
            count = layer.full.lengths[0]
            if count < budget:
                layer.overwrite = None
                continue
            layer.overwrite = self.victims(layer, seq.num_tokens, recent)

    def victims(self, layer: LayerCache, now: int, recent: int) -> torch.Tensor:
        """The slot of each head that the token at position `now` takes; the newest `recent`, itself included, stay."""
        positions = layer.positions
        assert positions is not None
        worth = positions.float() if layer.scores is None else layer.scores.clone()
        worth[(positions > now - recent) | (positions < self.num_sink)] = PROTECTED
        return worth.argmin(1)


class HeavyHitters(Steady):
    """H2O (arXiv 2306.14048)."""

    prompt_statistic = decode_statistic = "sum"

    def budget(self, seq: SequenceShape) -> int:
        return int(self.policy.kept_tokens(seq))

    def recent(self, seq: SequenceShape) -> int:
        return int(self.policy.kept_tokens(seq) - self.policy.heavy_tokens(seq))


class Keyformer(Steady):
    """Keyformer (arXiv 2403.09054); schedule "code" evicts every eighth step instead."""

    prompt_statistic = decode_statistic = "gumbel"
    code_period_steps = 8

    def budget(self, seq: SequenceShape) -> int:
        return int(self.policy.kept_tokens(seq))

    def recent(self, seq: SequenceShape) -> int:
        return int(self.policy.recent_tokens(seq))

    def temperature(self, seq: CachedSequence) -> float:
        """τ from its first to its last value over the steps to come."""
        share = min(1.0, seq.step / max(1, seq.max_steps))
        return float(self.policy.tau_init + share * (self.policy.tau_end - self.policy.tau_init))

    def prompt_ends(self, seq: CachedSequence) -> None:
        if self.policy.schedule == "paper":
            super().prompt_ends(seq)

    def before_step(self, seq: CachedSequence) -> None:
        if self.policy.schedule == "paper":
            super().before_step(seq)
            return
        if seq.step % self.code_period_steps:
            return
        budget, recent = self.budget(seq.shape), self.recent(seq.shape)
        for layer in seq.layers:  # the token about to come counts towards both
            assert layer.scores is not None
            if layer.full.lengths[0] >= budget:
                compact(seq, layer, list(best(layer.scores, budget - 1, max(0, recent - 1))))


class Window(Steady):
    """The newest tokens; StreamingLLM's sinks beside them (arXiv 2309.17453). Slots behind the sinks are a ring."""

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        self.num_sink = getattr(policy, "sink_tokens", 0)
        self.keeps_positions = False
        self.num_near = self.num_sink if policy.moves_positions else 0

    def budget(self, seq: SequenceShape) -> int:
        return int(self.num_sink + self.policy.window_tokens)

    def recent(self, seq: SequenceShape) -> int:
        return int(self.policy.window_tokens)

    def prompt_ends(self, seq: CachedSequence) -> None:
        number, window = seq.num_tokens, self.policy.window_tokens
        if number <= self.num_sink + window:
            return
        for layer in seq.layers:
            slots = torch.cat((torch.arange(self.num_sink), torch.arange(number - window, number))).to(layer.full.device)
            compact(seq, layer, [slots] * len(layer.full.lengths))

    def before_step(self, seq: CachedSequence) -> None:
        """What the ring's oldest is follows from how many came after it was full."""
        heads = len(seq.layers[0].full.lengths)
        budget = self.num_sink + self.policy.window_tokens
        if seq.layers[0].full.lengths[0] < budget:
            return
        after = seq.num_tokens - max(budget, seq.shape.prefill_tokens)
        slot = torch.full((heads,), self.num_sink + after % self.policy.window_tokens, device=seq.layers[0].full.device)
        for layer in seq.layers:
            layer.overwrite = slot


class Scissorhands(Rule):
    """Scissorhands (arXiv 2305.17118): above B tokens, drop_frac · B leave at once. Counts run on from the prompt's last w queries."""

    keeps_positions = True
    decode_statistic = "count"

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        if policy.recompute:
            raise ValueError("policies.scissorhands.recompute=True must be false here: no queries are kept to count again; drop it")
        self.window_queries = policy.history_window_tokens

    def budgets(self, seq: CachedSequence) -> list[int]:
        """Of each layer."""
        weight, last = self.policy.later_layer_weight, len(seq.layers) - 1
        share = [2 / (1 + weight) * (1 + (weight - 1) * index / last) if last else 1.0 for index in range(last + 1)]
        return [round(self.policy.budget_tokens * part) for part in share]

    def _drop(self, seq: CachedSequence, layer: LayerCache, budget: int, recent: int) -> None:
        assert layer.scores is not None
        kept = budget - int(self.policy.drop_frac * budget + 1e-9)
        compact(seq, layer, list(best(layer.scores.float(), kept, recent)))

    def prompt_ends(self, seq: CachedSequence) -> None:
        for layer, budget in zip(seq.layers, self.budgets(seq), strict=True):
            layer.scores = window_votes(seq, layer, self.window_queries, "count").to(torch.int16)
            if seq.num_tokens > budget:
                self._drop(seq, layer, budget, self.policy.recent_tokens)

    def before_step(self, seq: CachedSequence) -> None:
        for layer, budget in zip(seq.layers, self.budgets(seq), strict=True):
            if layer.full.lengths[0] + 1 > budget:
                self._drop(seq, layer, budget, self.policy.recent_tokens)
