"""Sequences through the model and their caches: prompt chunks and decode steps of any number of them in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvsim.calibrate.decoder import attention
from kvsim.calibrate.decoder.attention import Positions
from kvsim.calibrate.decoder.cache import LayerCache, Ring, Rows
from kvsim.calibrate.decoder.clock import Clock
from kvsim.calibrate.decoder.lanes import check, make_lanes
from kvsim.calibrate.decoder.rules import Rule, rule_of
from kvsim.calibrate.decoder.transformer import Transformer, alibi_slopes
from kvsim.policies.base import SequenceShape
from kvsim.policies.compose import CachePlan

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class CachedSequence:
    """One sequence: its tokens so far and its cache."""

    def __init__(
        self, shape: SequenceShape, layers: list[LayerCache], how: Positions, transformer: Transformer, max_steps: int
    ) -> None:  # fmt: skip
        self.shape, self.layers, self.how, self.transformer, self.max_steps = shape, layers, how, transformer, max_steps
        self.head_dim = transformer.spec.model.head_dim
        self.num_tokens = 0
        """Tokens computed, evicted ones too: the position of the next."""
        self.step = 0
        """Decode steps begun."""

    @property
    def clock(self) -> Clock:
        """The transformer's, which is exchanged where a step is timed."""
        return self.transformer.clock

    def lengths(self) -> list[list[int]]:
        """Tokens of each head of each layer."""
        return [layer.lengths for layer in self.layers]

    def held_bytes(self) -> int:
        return sum(layer.held_bytes() for layer in self.layers)


@dataclass(frozen=True)
class Work:
    """A part of a step: `tokens` `[n]` of a sequence; chunk: of its prompt, the last of it where it ends the prefill."""

    sequence: CachedSequence
    tokens: torch.Tensor
    chunk: bool


class Decoder:
    """A model with a paged cache under a composition of policies.

    dtype: of the cache's uncompressed elements; None: the plan's. Raises InputError for compositions that it cannot hold,
    OutOfBlocks from `step`.
    """

    def __init__(
        self, transformer: Transformer, plan: CachePlan, pool_bytes: int, dtype: torch.dtype | None = None, seed: int = 0
    ) -> None:
        check(plan)
        self.transformer, self.plan, self.pool_bytes = transformer, plan, pool_bytes
        self.dtype = dtype = DTYPES[plan.kv_dtype] if dtype is None else dtype
        self.device = transformer.weights.embedding.device
        composition, shape = plan.composition, plan.shape
        self.rules: list[Rule] = [rule_of(policy) for policy in (composition.tokens, composition.channels)]
        self.full, self.pruned = make_lanes(plan, pool_bytes, dtype, self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        slopes = None
        if transformer.spec.model.position == "alibi":
            slopes = alibi_slopes(shape.q_heads, self.device)
        self.how = Positions(slopes, transformer.rotary, max(rule.num_near for rule in self.rules))
        evicts = composition.tokens.dimension == "tokens" and not plan.prunes
        self.window_queries = max(rule.window_queries for rule in self.rules)
        self.keeps_positions = any(rule.keeps_positions for rule in self.rules) or (slopes is not None and evicts)
        self.residual_tokens = plan.window_tokens
        statistics = [rule for rule in self.rules if rule.prompt_statistic or rule.decode_statistic]
        self.scoring: Rule | None = statistics[0] if statistics else None

    # -- sequences ------------------------------------------------------------------------------------------------

    def open(self, prompt_tokens: int, prefill_tokens: int | None = None, max_steps: int = 1) -> CachedSequence:
        """A sequence with an empty cache. prefill_tokens: more than the prompt where a preempted one is computed again."""
        shape = self.plan.shape
        layers = [
            LayerCache(
                Rows(self.full, shape.kv_heads, shape.block_size_tokens, self.device),
                None if self.pruned is None else Rows(self.pruned, shape.kv_heads, shape.block_size_tokens, self.device),
                Ring(shape.kv_heads, self.residual_tokens, shape.head_dim, self.dtype, self.device) if self.residual_tokens else None,
            )
            for _ in range(shape.num_layers)
        ]  # fmt: skip
        sizes = SequenceShape(prompt_tokens, prompt_tokens if prefill_tokens is None else prefill_tokens)
        return CachedSequence(sizes, layers, self.how, self.transformer, max_steps)

    def close(self, sequence: CachedSequence) -> None:
        """Its blocks are free again."""
        for layer in sequence.layers:
            layer.clear()

    # -- steps ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, chunks: Sequence[tuple[CachedSequence, torch.Tensor]], decodes: Sequence[tuple[CachedSequence, int]]) -> torch.Tensor:
        """One forward pass. chunks: next tokens of prompts; decodes: the last token of each decoding sequence.

        Returns logits of the sequences that get a token: decodes first, then the chunks that end their prefill, after which
        their caches are compressed.
        """
        work = [Work(sequence, torch.tensor([token], device=self.device), False) for sequence, token in decodes]
        work += [Work(sequence, tokens, True) for sequence, tokens in chunks]
        mark = self.transformer.clock.mark
        mark("step")
        for sequence, _ in decodes:
            sequence.step += 1
            for rule in self.rules:
                rule.before_step(sequence)
        mark("select")
        positions = torch.cat([
            torch.arange(item.sequence.num_tokens, item.sequence.num_tokens + len(item.tokens), device=self.device) for item in work
        ])  # fmt: skip

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            outputs, first = [], 0
            for item in work:
                rows = slice(first, first + len(item.tokens))
                first = rows.stop
                attend_one = self._prefill if item.chunk else self._decode
                outputs.append(attend_one(item.sequence, index, q[rows], k[rows], v[rows]))
            return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

        hidden = self.transformer.hidden(torch.cat([item.tokens for item in work]), positions, attend)
        ended, last, end = [], [], 0
        for item in work:
            end += len(item.tokens)
            item.sequence.num_tokens += len(item.tokens)
            if item.chunk and item.sequence.num_tokens == item.sequence.shape.prefill_tokens:
                ended.append(item.sequence)
            if not item.chunk or (ended and ended[-1] is item.sequence):
                last.append(end - 1)
        mark("step")
        logits = self.transformer.logits(hidden[last])
        for sequence in ended:
            if sequence.max_steps > 0:
                self.compress(sequence)
        return logits

    def compress(self, sequence: CachedSequence) -> None:
        for rule in self.rules:
            rule.prompt_ends(sequence)
        self.transformer.clock.mark("step")
        for layer in sequence.layers:
            layer.window = None

    def _prefill(self, sequence: CachedSequence, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        layer, start = sequence.layers[index], sequence.num_tokens
        out = attention.prefill(layer, q, k, v, start, self.how)
        self.append(layer, k.transpose(0, 1), v.transpose(0, 1))
        heads = k.shape[1]
        if self.keeps_positions:
            layer.positions = torch.arange(layer.seen, device=self.device).expand(heads, -1)
        if self.window_queries:
            layer.window = (q if layer.window is None else torch.cat((layer.window, q)))[-self.window_queries :]
        if self.scoring is not None and self.scoring.prompt_statistic:
            self.transformer.clock.mark("attention")
            statistic = self.scoring.prompt_statistic
            added = attention.column_scores(
                layer, q, start, statistic, self.how, self.scoring.temperature(sequence), self.generator
            )
            if layer.scores is not None:
                added[:, :start] += layer.scores
            layer.scores = added
            self.transformer.clock.mark("prefill_scores")
        return out

    def _decode(self, sequence: CachedSequence, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        layer, now = sequence.layers[index], sequence.num_tokens
        slots = layer.overwrite
        if slots is not None:
            layer.full.put(slots[:, None], k.transpose(0, 1), v.transpose(0, 1))
            layer.overwrite = None
            layer.seen += 1
        else:
            slots = torch.tensor(layer.full.lengths, device=self.device) if self.keeps_positions else None
            self.append(layer, k.transpose(0, 1), v.transpose(0, 1))
        if slots is not None and self.keeps_positions:
            longest = max(layer.full.lengths)
            layer.positions = _set(layer.positions, slots, longest, now)
            if layer.scores is not None:
                layer.scores = _set(layer.scores, slots, longest, 0)
        out, probabilities = attention.decode(layer, q[0], now, self.how)
        rule = self.scoring
        if rule is not None and rule.decode_statistic and layer.scores is not None:
            self.transformer.clock.mark("attention")
            if rule.decode_statistic == "gumbel":
                added = attention.noisy_scores(layer, q[0], now, self.how, rule.temperature(sequence), self.generator)
            else:
                added = attention.decode_scores(probabilities, rule.decode_statistic, now + 1)
            layer.scores += added.to(layer.scores.dtype)
            self.transformer.clock.mark("decode_attention_scored")
        return out[None]

    def append(self, layer: LayerCache, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v `[heads, n, head_dim]` after the tokens that are there."""
        rows, start = layer.full, layer.seen
        layer.seen += k.shape[1]
        if self.plan.composition.bits.dimension == "bits":
            self.transformer.clock.mark("attention")
            self._append_codes(layer, k, v, start)
            self.transformer.clock.mark("kv_quantize")
            return
        self._append_rows(rows, k, v)

    @staticmethod
    def _append_rows(rows: Rows, k: torch.Tensor, v: torch.Tensor) -> None:
        if k.shape[1] == 1 and not rows.even:
            rows.append_ragged(k[:, 0], v[:, 0])
        else:
            rows.append(k, v)

    def _append_codes(self, layer: LayerCache, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
        """Where there is a ring, keys become codes a whole ring at a time, and values as they leave it."""
        number, rows, ring = k.shape[1], layer.full, layer.ring
        if ring is None:
            self._append_rows(rows, k, v)
            return
        old_values, narrow = max(0, start - ring.size), layer.quantized
        keys = torch.cat((ring.get(ring.k, narrow, start), k.float()), 1)
        values = torch.cat((ring.get(ring.v, old_values, start), v.float()), 1)
        end = start + number
        rows.resize([end] * len(rows.lengths))
        layer.quantized, new_values = end // ring.size * ring.size, max(0, end - ring.size)
        for codec, fresh, first, last in (
            (rows.lane.keys, keys, narrow, layer.quantized), (rows.lane.values, values, old_values, new_values)
        ):  # fmt: skip
            if last > first:
                slots = torch.arange(first, last, device=self.device).expand(len(rows.lengths), -1)
                codec.write(*rows.places(slots), fresh[:, : last - first])
        ring.put(start, k, v)


def _set(rows: torch.Tensor | None, slots: torch.Tensor, longest: int, value: float) -> torch.Tensor:
    """rows `[heads, ...]`, as long as the longest head, with `value` in these slots."""
    assert rows is not None
    rows = F.pad(rows, (0, longest - rows.shape[1])) if rows.shape[1] < longest else rows.clone() if rows._is_view() else rows
    rows[torch.arange(len(slots), device=rows.device), slots] = value  # type: ignore[index]
    return rows
