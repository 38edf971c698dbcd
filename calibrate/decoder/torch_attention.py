"""The attention backend "torch": a batch in plain torch, on a GPU caches of alike shapes at once.

On a CPU every cache is attended alone. Groups of alike ones make its steps up to a third quicker, but then a step's time depends on how
alike the lengths of a batch are, which no profile is told: served requests took up to 28 % longer than a study of equal ones said.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from kvsim.calibrate.decoder import attention
from kvsim.calibrate.decoder.attention import Positions
from kvsim.calibrate.decoder.clock import Clock
from kvsim.calibrate.decoder.decode_batch import DecodeBatch
from kvsim.calibrate.decoder.rules import Rule


class TorchAttention:
    """Any cache in any dtype, with any positions. Keys that are turned as they are read are attended one sequence after the other."""

    name = "torch"

    def __init__(self, batch: DecodeBatch, how: Positions, scoring: Rule | None, generator: torch.Generator) -> None:
        self.batch, self.how, self.scoring, self.generator = batch, how, scoring, generator
        self.groups_alike = batch.device.type != "cpu"

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
        """Rows that are attended together."""
        members = self.batch.members
        if not self.groups_alike:
            return [[row] for row in range(len(members))]
        found: dict[Hashable, list[int]] = {}
        for row, sequence in enumerate(members):
            key = attention.alike(sequence.layers[index], self.how)
            found.setdefault(("alone", row) if key is None else key, []).append(row)
        return list(found.values())

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

