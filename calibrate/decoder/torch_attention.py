"""The attention backend "torch": a batch in plain torch, caches of alike shapes at once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import inf

import torch

from kvsim.calibrate.decoder import attention
from kvsim.calibrate.decoder.attention import Positions
from kvsim.calibrate.decoder.clock import Clock
from kvsim.calibrate.decoder.decode_batch import DecodeBatch
from kvsim.calibrate.decoder.rules import Rule
from kvsim.units import KIB

FP32_BYTES = 4
CPU_GROUP_BYTES = 512 * KIB
"""Of the keys of a group as fp32 numbers: beyond it a CPU gains nothing by fewer calls and loses its second-level cache (measured)."""


class TorchAttention:
    """Any cache in any dtype, with any positions. Keys that are turned as they are read are attended one sequence after the other."""

    name = "torch"

    def __init__(self, batch: DecodeBatch, how: Positions, scoring: Rule | None, generator: torch.Generator) -> None:
        self.batch, self.how, self.scoring, self.generator = batch, how, scoring, generator
        self._key_bytes = FP32_BYTES * batch.shape.kv_heads * batch.shape.head_dim
        self._most_bytes = CPU_GROUP_BYTES if batch.device.type == "cpu" else inf

    def attend(self, index: int, q: torch.Tensor, clock: Clock) -> torch.Tensor:
        """Queries `[rows, q_heads, head_dim]` over the caches of one layer, rows past the members giving 0; scores are added to."""
        statistic = self.scoring.decode_statistic if self.scoring is not None else None
        groups = self._groups(index)
        outputs, added = [], []
        for rows in groups:
            members = [self.batch.members[row] for row in rows]
            layers = [one.layers[index] for one in members]
            now = [one.num_tokens for one in members]
            out, probabilities = attention.decode(layers, _rows(q, rows), now, self.how)
            outputs.append(out)
            if statistic is not None and statistic != "gumbel":
                added.append((rows, probabilities, now))
        if statistic is not None:
            clock.mark("attention")
            for rows, probabilities, now in added:
                seen = torch.tensor(now, device=q.device)[:, None, None, None] + 1
                self._add(index, rows, attention.decode_scores(probabilities, statistic, seen))
            if statistic == "gumbel":
                self._add_noisy(index, q)
            clock.mark("decode_attention_scored")
        order = [row for rows in groups for row in rows]
        if len(groups) == 1 and len(order) == len(q):
            return outputs[0]
        out = torch.zeros_like(q)
        return out.index_copy_(0, torch.tensor(order, device=q.device), torch.cat(outputs)) if order else out

    def _groups(self, index: int) -> list[list[int]]:
        """Rows that can be attended together, on a CPU as many as its cache holds."""
        found: dict[Hashable, list[list[int]]] = {}
        for row, sequence in enumerate(self.batch.members):
            layer = sequence.layers[index]
            key = attention.alike(layer, self.how)
            groups = found.setdefault(("alone", row) if key is None else key, [[]])
            if groups[-1] and (len(groups[-1]) + 1) * self._key_bytes * max(layer.lengths) > self._most_bytes:
                groups.append([])
            groups[-1].append(row)
        return [rows for groups in found.values() for rows in groups]

    def _add(self, index: int, rows: Sequence[int], added: torch.Tensor) -> None:
        """added `[rows, kv_heads, slots]`, 0 past a head's length."""
        scores = self.batch.scores[index, :, :, : added.shape[2]]
        if rows[-1] - rows[0] == len(rows) - 1:
            scores[rows[0] : rows[-1] + 1] += added.to(scores.dtype)
        else:
            scores.index_add_(0, torch.tensor(rows, device=scores.device), added.to(scores.dtype))

    def _add_noisy(self, index: int, q: torch.Tensor) -> None:
        """Keyformer's second softmax, with noise and a temperature of each sequence's own."""
        assert self.scoring is not None
        for row, sequence in enumerate(self.batch.members):
            layer = sequence.layers[index]
            assert layer.scores is not None
            layer.scores += attention.noisy_scores(
                layer, q[row], sequence.num_tokens, self.how, self.scoring.temperature(sequence), self.generator
            )


def _rows(q: torch.Tensor, rows: list[int]) -> torch.Tensor:
    if rows[-1] - rows[0] == len(rows) - 1:
        return q[rows[0] : rows[-1] + 1]
    return q[torch.tensor(rows, device=q.device)]

