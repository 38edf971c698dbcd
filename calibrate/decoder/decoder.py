"""Sequences through the model and their caches: prompt chunks and decode steps of any number of them in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvsim.calibrate.decoder import attention
from kvsim.calibrate.decoder.attention import Positions
from kvsim.calibrate.decoder.cache import LayerCache, Ring, Rows, with_slots
from kvsim.calibrate.decoder.clock import NoClock
from kvsim.calibrate.decoder.decode_batch import DecodeBatch
from kvsim.calibrate.decoder.graphs import RecordedSteps, recorder_for
from kvsim.calibrate.decoder.lanes import check, make_lanes
from kvsim.calibrate.decoder.launching import default_attention, engine_sizes, make_attention, never_recorded, steps_note
from kvsim.calibrate.decoder.rules import Rule, rule_of
from kvsim.calibrate.decoder.sequence import CachedSequence
from kvsim.calibrate.decoder.storage import Budget, OutOfBlocks
from kvsim.calibrate.decoder.transformer import Transformer, alibi_slopes
from kvsim.policies.base import SequenceShape
from kvsim.policies.compose import CachePlan

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Decoder:
    """A model with a paged cache under a composition of policies.

    pool_bytes: shared by blocks, rings and the policies' declared state, as the simulator counts them; lanes of two widths are
    allocated for that many each. dtype: of the cache's uncompressed elements; None: the plan's. attention: the backend that decode
    steps attend with, of `launching.ATTENTION`; None: the device's default. capture_sizes: batch sizes of steps that are recorded
    and replayed; None: those that the engine declares, on a GPU. Raises InputError for compositions that it cannot hold and for
    what the backend cannot do, OutOfBlocks from `open` and `step`.
    """

    def __init__(
        self, transformer: Transformer, plan: CachePlan, pool_bytes: int, dtype: torch.dtype | None = None, seed: int = 0,
        attention: str | None = None, capture_sizes: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        check(plan)
        self.transformer, self.plan = transformer, plan
        self.dtype = dtype = DTYPES[plan.kv_dtype] if dtype is None else dtype
        self.device = transformer.weights.embedding.device
        composition, shape = plan.composition, plan.shape
        self.rules: list[Rule] = [rule_of(policy) for policy in (composition.tokens, composition.channels)]
        self.budget = Budget(pool_bytes)
        self.full, self.pruned = make_lanes(plan, self.budget, dtype, self.device)
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
        self._quantises = composition.bits.dimension == "bits"
        statistic = self.scoring.decode_statistic if self.scoring is not None else None
        score_dtype = None if statistic is None else torch.int16 if statistic == "count" else torch.float32
        self.batch = DecodeBatch(shape, self.full, self.pruned, score_dtype, self.device)
        name = default_attention(self.device) if attention is None else attention
        self.attention = make_attention(name, self.batch, plan, dtype, self.how, self.scoring, self.generator, seed)
        self.recorded: RecordedSteps | None = None
        sizes = engine_sizes(name, plan, self.device) if capture_sizes is None else tuple(capture_sizes)
        if sizes and not never_recorded(plan):
            self.recorded = RecordedSteps(self.batch, self._compute_rows, sizes, recorder_for(self.device))

    @property
    def steps_note(self) -> str:
        """How steps that only decode are launched, in words."""
        return steps_note(self.attention.name, self.plan, self.device, self.recorded is not None)

    @property
    def allocated_bytes(self) -> int:
        """Of all blocks, in use or not."""
        return self.full.num_bytes + (0 if self.pruned is None else self.pruned.num_bytes)

    # -- sequences ------------------------------------------------------------------------------------------------

    def open(self, prompt_tokens: int, prefill_tokens: int | None = None, max_steps: int = 1) -> CachedSequence:
        """A sequence with an empty cache. prefill_tokens: more than the prompt where a preempted one is computed again.

        Raises OutOfBlocks where the pool has no room for its rings.
        """
        layers: list[LayerCache] = []
        try:
            while len(layers) < self.plan.shape.num_layers:
                layers.append(self._layer())
        except OutOfBlocks:
            for layer in layers:
                layer.clear()
            raise
        sizes = SequenceShape(prompt_tokens, prompt_tokens if prefill_tokens is None else prefill_tokens)
        return CachedSequence(sizes, layers, self.how, self.transformer, max_steps)

    def _layer(self) -> LayerCache:
        shape, device = self.plan.shape, self.device
        lanes = [None if lane is None else Rows(lane, shape.kv_heads, shape.block_size_tokens, device) for lane in (self.full, self.pruned)]
        ring = None
        if self.residual_tokens:
            charge = shape.kv_heads * self.residual_tokens * shape.slot_bytes
            ring = Ring(shape.kv_heads, self.residual_tokens, shape.head_dim, self.dtype, device, self.budget, charge)
        assert lanes[0] is not None
        return LayerCache(lanes[0], lanes[1], ring)

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
        mark = self.transformer.clock.mark
        mark("step")
        for sequence, _ in decodes:
            sequence.step += 1
            for rule in self.rules:
                rule.before_step(sequence)
        mark("select")
        if decodes and not chunks and self._replays(len(decodes)):
            return self._replay(decodes)
        self._stage(decodes)
        number = len(decodes)
        tokens, positions = [self.batch.tokens[:number]], [self.batch.positions[:number]]
        for sequence, part in chunks:
            tokens.append(part)
            positions.append(torch.arange(sequence.num_tokens, sequence.num_tokens + len(part), device=self.device))

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            outputs, first = [], number
            if number:
                outputs.append(self._decode(index, q[:number], k[:number], v[:number]))
            for sequence, part in chunks:
                rows = slice(first, first + len(part))
                first = rows.stop
                outputs.append(self._prefill(sequence, index, q[rows], k[rows], v[rows]))
            return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

        flat = torch.cat(tokens), torch.cat(positions)
        mark("step")
        hidden = self.transformer.hidden(*flat, attend)
        last, ended, end = self._finish_decodes(decodes), [], number
        for sequence, part in chunks:
            end += len(part)
            sequence.num_tokens += len(part)
            if sequence.num_tokens == sequence.shape.prefill_tokens:
                ended.append(sequence)
                last.append(end - 1)
        mark("step")
        logits = self.transformer.logits(hidden[last])
        for sequence in ended:
            if sequence.max_steps > 0:
                self.compress(sequence)
        return logits

    def _replays(self, number: int) -> bool:
        """Steps that are timed mark by mark are launched one by one: marks wait for the device."""
        return self.recorded is not None and self.recorded.size_for(number) > 0 and isinstance(self.transformer.clock, NoClock)

    def _replay(self, decodes: Sequence[tuple[CachedSequence, int]]) -> torch.Tensor:
        assert self.recorded is not None
        rows = self.recorded.prepare([sequence for sequence, _ in decodes])
        self._stage(decodes, rows)
        logits = self.recorded.replay(rows)
        return logits[self._finish_decodes(decodes)]

    def _compute_rows(self, rows: int) -> torch.Tensor:
        """Logits of the batch's first rows, from what is staged."""
        tokens, positions = self.batch.tokens[:rows], self.batch.positions[:rows]
        return self.transformer.logits(self.transformer.hidden(tokens, positions, self._decode))

    def _stage(self, decodes: Sequence[tuple[CachedSequence, int]], rows: int | None = None) -> None:
        """Blocks for the step's tokens, and the bookkeeping of their slots."""
        if not decodes:
            return
        self.batch.stage(decodes, rows)
        for sequence in self.batch.members if self.keeps_positions else ():
            for layer in sequence.layers:
                assert layer.slots is not None
                layer.positions = with_slots(layer.positions, layer.slots, max(layer.full.lengths), sequence.num_tokens)

    def _finish_decodes(self, decodes: Sequence[tuple[CachedSequence, int]]) -> list[int]:
        """The row of each, now that their tokens are computed."""
        row_of = {id(sequence): row for row, sequence in enumerate(self.batch.members)}
        for sequence, _ in decodes:
            sequence.num_tokens += 1
        return [row_of[id(sequence)] for sequence, _ in decodes]

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
            layer.positions = torch.arange(layer.seen, device=self.device).repeat(heads, 1)
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

    def _decode(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The batch's rows in one layer: their keys and values are written, then attended to."""
        clock = self.transformer.clock
        if self._quantises:
            clock.mark("attention")
        if self.residual_tokens:
            for row, sequence in enumerate(self.batch.members):
                sequence.layers[index].append_codes(k[row, :, None], v[row, :, None])
        else:
            self.batch.write(index, k, v)
        if self._quantises:
            clock.mark("kv_quantize")
        return self.attention.attend(index, q, clock)

    def append(self, layer: LayerCache, k: torch.Tensor, v: torch.Tensor) -> None:
        """A prompt's k, v `[heads, n, head_dim]` after the tokens that are there."""
        if not self._quantises:
            layer.seen += k.shape[1]
            layer.full.append(k, v)
            return
        self.transformer.clock.mark("attention")
        if layer.ring is None:
            layer.seen += k.shape[1]
            layer.full.append(k, v)
        else:
            layer.append_codes(k, v)
        self.transformer.clock.mark("kv_quantize")
