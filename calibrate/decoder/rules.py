"""What each policy does to a real cache, from its own fields and its paper's rules (not from the plan it is compared with).

A rule acts on the layers of one sequence: after a prompt chunk (statistics), when the prefill ends, before a decode step's token
is appended (eviction) and after its attention (scores). `RULES` names the rule of every policy that acts on tokens or channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from kvsim.calibrate.decoder import attention
from kvsim.calibrate.decoder.cache import LayerCache
from kvsim.policies.base import Policy, SequenceShape

if TYPE_CHECKING:
    from kvsim.calibrate.decoder.decoder import CachedSequence

PROTECTED = torch.inf


class Rule:
    """The neutral rule: nothing is evicted."""

    window_queries = 0
    """The prompt's last queries that it looks at."""
    prompt_statistic: str | None = None
    decode_statistic: str | None = None
    keeps_positions = False

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


def pooled(votes: torch.Tensor, width: int, kind: str, window: int) -> torch.Tensor:
    """Votes of the tokens before the window, pooled over `width` neighbours; those of the window as they are."""
    before = votes[:, None, : max(0, votes.shape[1] - window)]
    if not before.shape[2]:
        return votes
    pool = F.max_pool1d if kind == "max" else F.avg_pool1d
    smooth = pool(before, width, stride=1, padding=width // 2)[:, 0, : before.shape[2]]
    return torch.cat((smooth, votes[:, before.shape[2] :]), 1)


def window_votes(seq: CachedSequence, layer: LayerCache, queries: int, statistic: str = "sum") -> torch.Tensor:
    assert layer.window is not None
    q = layer.window[-queries:]
    votes = attention.column_scores(layer, q, seq.num_tokens - len(q), statistic, seq.how)
    seq.clock.mark("prefill_scores")
    return votes


def compact(seq: CachedSequence, layer: LayerCache, kept: Sequence[torch.Tensor]) -> None:
    """These slots stay, with their positions and scores."""
    seq.clock.mark("select")
    layer.full.keep(list(kept))
    most = max(len(slots) for slots in kept)
    index = torch.stack([F.pad(slots, (0, most - len(slots))) for slots in kept])
    for name in ("positions", "scores"):
        rows = getattr(layer, name)
        if rows is not None:
            setattr(layer, name, rows.gather(1, index))
    seq.clock.mark("compact")


# -- one leaves at every step ----------------------------------------------------------------------------------------


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
        self.keeps_positions = policy.moves_positions

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


# -- once, when the prefill ends -------------------------------------------------------------------------------------


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
                votes = pooled(window_votes(seq, layer, window), self.policy.pool_kernel_tokens, "mean", window)
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
            votes = pooled(window_votes(seq, layer, window), policy.pool_kernel_tokens, "max", window)
            heads = votes.shape[0]
            kept = [row for row in best(votes, floor, window)]
            rest = votes.clone()
            rest[:, number - window :] = -torch.inf
            for head, slots in enumerate(kept):
                rest[head, slots] = -torch.inf
            winners = rest.flatten().topk(heads * (policy.budget_tokens - floor)).indices
            for head in range(heads):
                won = winners[winners // number == head] % number
                kept[head] = torch.cat((kept[head], won)).sort().values
            compact(seq, layer, kept)


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
            votes = window_votes(seq, layer, self.window_queries, "square")
            layer.scores = pooled(votes, policy.pool_kernel_tokens, "max", 0)
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
        target = -(-wanted // size) if policy.block_rounding == "up" else wanted // size
        target = max(target, 1, -(-policy.protected_tokens // size))
        excess = int((-(-lengths // size)).sum()) - target * lengths.shape[1]
        excess = min(excess, int(freeable_blocks(lengths, size, policy.protected_tokens).sum()))
        if excess <= 0:
            return
        most = int(lengths.max())
        metrics = torch.cat([_padded(layer.scores, most) for layer in seq.layers])[None].cpu()
        free = torch.tensor([excess], dtype=torch.int32)
        budgets = reference(
            "blocks", metrics, lengths, blocks_to_free=free, block_size_tokens=size, protected_tokens=policy.protected_tokens
        )[0].tolist()
        heads = len(seq.layers[0].full.lengths)
        for index, layer in enumerate(seq.layers):
            own, old = budgets[index * heads : (index + 1) * heads], layer.full.lengths
            if own != old:
                assert layer.scores is not None
                compact(seq, layer, [
                    best(layer.scores[head : head + 1, : old[head]], own[head], min(policy.protected_tokens, own[head]))[0]
                    for head in range(heads)
                ])  # fmt: skip


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
            layer.pruned.append(narrow, v[:, :old])
            newest = torch.arange(old, number, device=k.device).expand(k.shape[0], -1)
            layer.full.keep(list(newest))
            seq.clock.mark("think_gather")


RULES: dict[str, Callable[[Any], Rule]] = {
    "h2o": HeavyHitters,
    "keyformer": Keyformer,
    "window": Window,
    "streaming_llm": Window,
    "scissorhands": Scissorhands,
    "snapkv": SnapKV,
    "pyramid_kv": PyramidKV,
    "ada_kv": AdaKV,
    "kv_compress": KVCompress,
    "think": ThinK,
}
"""By the policy's kind. Policies of bits have no rule: they are a codec (`decoder.lanes`)."""


def rule_of(policy: Policy) -> Rule:
    """Raises ValueError for a policy of tokens or channels that no rule is written for."""
    kind = getattr(policy, "kind", "full")
    if policy.dimension in ("none", "bits"):
        return Rule(policy)
    if kind not in RULES:
        raise ValueError(f"policy={kind} must have a rule in kvsim.calibrate.decoder.rules; write one and list it in RULES")
    return RULES[kind](policy)
