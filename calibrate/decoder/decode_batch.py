"""The sequences that decode, a row each, and what attention over their caches reads: tensors that stay where they are.

A step is staged on the host (blocks taken, tables and lengths written into these tensors) and then computed from them alone. So
a captured step can be replayed, and a row without a sequence does nothing: its lengths are 0, and its keys and values go into
the lanes' spare block, which belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvsim.calibrate.decoder.cache import LayerCache
from kvsim.calibrate.decoder.sequence import CachedSequence
from kvsim.calibrate.decoder.storage import Lane
from kvsim.policies.base import CacheShape


class DecodeBatch:
    """Rows 0 … len(members) − 1 are in use; R rows and tables of M blocks are allocated, both powers of two that grow at need.

    tokens, positions `[R]`; seen int32 `[R]`, tokens so far with the step's own. By layer: tables int32 `[layers, R, heads, M]` and
    lengths int32 `[layers, R, heads]` of the full lane, pruned_tables and pruned_lengths of the pruned one with channels
    `[layers, R, heads, kept]`; write_blocks and write_offsets int64 `[layers, R, heads]`, where the step's keys and values go;
    scores `[layers, R, heads, M · block size]`, of which the sequences' own scores are views.
    """

    def __init__(self, shape: CacheShape, full: Lane, pruned: Lane | None, score_dtype: torch.dtype | None, device: torch.device) -> None:
        self.shape, self.full, self.pruned, self.score_dtype, self.device = shape, full, pruned, score_dtype, device
        self.members: list[CachedSequence] = []
        self.version = 0
        """Grows when the tensors have moved: what was captured over older ones is void."""
        self._allocate(1, 1)

    def _allocate(self, rows: int, blocks: int) -> None:
        layers, heads, size, device = self.shape.num_layers, self.shape.kv_heads, self.shape.block_size_tokens, self.device
        self.num_rows, self.num_blocks, self.version = rows, blocks, self.version + 1
        self._staged = 0

        def zeros(*sizes: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        self.tokens, self.positions = zeros(rows, dtype=torch.int64), zeros(rows, dtype=torch.int64)
        self.seen = zeros(rows)
        self.tables, self.lengths = zeros(layers, rows, heads, blocks), zeros(layers, rows, heads)
        self.write_blocks = torch.full((layers, rows, heads), self.full.spare, dtype=torch.int64, device=device)
        self.write_offsets = torch.zeros_like(self.write_blocks)
        if self.pruned is not None:
            self.pruned_tables, self.pruned_lengths = zeros(layers, rows, heads, blocks), zeros(layers, rows, heads)
            self.channels = zeros(layers, rows, heads, self.pruned.keys.width)
        if self.score_dtype is not None:
            self.scores = zeros(layers, rows, heads, blocks * size, dtype=self.score_dtype)
        self._views: list[list[torch.Tensor | None]] = [[None] * rows for _ in range(layers)]
        self._tables: list[list[torch.Tensor | None]] = [[None] * rows for _ in range(layers)]

    # -- rows -----------------------------------------------------------------------------------------------------

    def _seat(self, sequences: Sequence[CachedSequence]) -> None:
        """Sequences that stay keep their rows where they can; those that come take the rows of those that left."""
        wanted = set(map(id, sequences))
        members: list[CachedSequence | None] = [one if id(one) in wanted else None for one in self.members]
        seated = {id(one) for one in members if one is not None}
        coming = [one for one in sequences if id(one) not in seated]
        for row, one in enumerate(members):
            if one is None and coming:
                members[row] = coming.pop(0)
        members += coming
        while None in members:  # the last moves into a hole, so that rows in use stay the first ones
            last = members.pop()
            if last is not None:
                members[members.index(None)] = last
        for row, one in enumerate(self.members):
            if row >= len(members) or members[row] is not one:
                self._leave(row, one)
        self.members = [one for one in members if one is not None]

    def _leave(self, row: int, sequence: CachedSequence) -> None:
        """The row may be written by another from now on: scores that lie in it become the sequence's own."""
        for layer, views, tables in zip(sequence.layers, self._views, self._tables, strict=True):
            view = views[row]
            if view is not None and layer.scores is view:
                layer.scores = view.clone()
            views[row] = tables[row] = None

    def _reserve(self, rows: int, blocks: int) -> None:
        if rows > self.num_rows or blocks > self.num_blocks:  # scores in the old tensors are copied when they are staged
            sizes = ((self.num_rows, rows), (self.num_blocks, blocks))
            self._allocate(*(max(old, 1 << max(0, new - 1).bit_length()) for old, new in sizes))

    # -- a step ---------------------------------------------------------------------------------------------------

    def stage(self, decodes: Sequence[tuple[CachedSequence, int]], rows: int | None = None) -> None:
        """The next step of these sequences and their last tokens; blocks are taken, and each layer's `slots` is set.

        rows: at least as many; those past the sequences are padding. Raises OutOfBlocks.
        """
        self._seat([sequence for sequence, _ in decodes])
        token_of = {id(sequence): token for sequence, token in decodes}
        number = len(self.members)
        self._reserve(number if rows is None else rows, 1)
        slots = [[_take_slot(sequence.layers[index]) for sequence in self.members] for index in range(self.shape.num_layers)]
        most = 1
        for sequence in self.members:
            for layer in sequence.layers:
                for lane in (layer.full, layer.pruned):
                    most = max(most, 0 if lane is None else max(map(len, lane.blocks)))
        self._reserve(1, most)
        self._clear(number, self._staged)
        self._staged = number
        if not number:
            return
        ids = [(token_of[id(one)], one.num_tokens, one.num_tokens + 1) for one in self.members]
        for target, values in zip((self.tokens, self.positions, self.seen), zip(*ids, strict=True), strict=True):
            target[:number] = torch.tensor(values, dtype=target.dtype, device=self.device)
        self._stage_tables()
        lengths = [[sequence.layers[index].full.lengths for sequence in self.members] for index in range(self.shape.num_layers)]
        self.lengths[:, :number] = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        places = _stacked(slots, self.device)
        size = self.shape.block_size_tokens
        self.write_blocks[:, :number] = self.tables[:, :number].gather(3, (places // size)[..., None])[..., 0].long()
        self.write_offsets[:, :number] = places % size
        self._stage_scores(places)
        for index, layer_slots in enumerate(places):
            for row, sequence in enumerate(self.members):
                sequence.layers[index].slots = layer_slots[row]

    def _clear(self, first: int, end: int) -> None:
        """Rows that held a sequence and hold none now."""
        if first < end:
            self.tokens[first:end] = self.positions[first:end] = 0
            self.lengths[:, first:end] = 0
            self.write_blocks[:, first:end], self.write_offsets[:, first:end] = self.full.spare, 0
            if self.pruned is not None:
                self.pruned_lengths[:, first:end] = 0

    def clear(self) -> None:
        """Nobody decodes: all rows are padding."""
        self.stage([])

    def reserve(self, rows: int, sequences: Sequence[CachedSequence]) -> None:
        """Room for so many rows and for the next step of these sequences, so that staging them moves nothing."""
        lanes = [lane for one in sequences for layer in one.layers for lane in (layer.full, layer.pruned) if lane is not None]
        longest = max((max(lane.lengths) for lane in lanes), default=0)
        self._reserve(rows, longest // self.shape.block_size_tokens + 1)

    def _stage_tables(self) -> None:
        for index in range(self.shape.num_layers):
            staged = self._tables[index]
            for row, sequence in enumerate(self.members):
                layer = sequence.layers[index]
                table = layer.full.table
                if staged[row] is table:
                    continue
                if staged[row] is None and self.pruned is not None:
                    self._stage_pruned(index, row, layer)
                self.tables[index, row, :, : table.shape[1]] = table
                staged[row] = table

    def _stage_pruned(self, index: int, row: int, layer: LayerCache) -> None:
        """Pruned keys stay as the end of the prompt left them."""
        assert layer.pruned is not None
        self.pruned_lengths[index, row] = torch.tensor(layer.pruned.lengths, dtype=torch.int32, device=self.device)
        if layer.channels is not None:
            table = layer.pruned.table
            self.pruned_tables[index, row, :, : table.shape[1]] = table
            self.channels[index, row] = layer.channels

    def _stage_scores(self, places: torch.Tensor) -> None:
        """Every sequence's scores lie in its row, as long as its longest head, and are 0 for the step's own token."""
        if self.score_dtype is None:
            return
        for index, views in enumerate(self._views):
            for row, sequence in enumerate(self.members):
                layer, view = sequence.layers[index], views[row]
                longest, old = max(layer.full.lengths), layer.scores
                assert old is not None
                if old is not view:
                    self.scores[index, row, :, : old.shape[1]] = old
                if longest != old.shape[1] or old is not view:
                    layer.scores = views[row] = self.scores[index, row, :, :longest]
        self.scores[:, : len(self.members)].scatter_(3, places[..., None], 0)

    def write(self, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v `[rows, heads, head_dim]` of the step's tokens in one layer."""
        at = self.write_blocks[index, : len(k)], self.write_offsets[index, : len(k)]
        self.full.keys.write(*at, k)
        self.full.values.write(*at, v)


def _take_slot(layer: LayerCache) -> list[int] | torch.Tensor:
    """The slot of each head that the step's token gets: a new one at its end, or one that a rule gives up."""
    if layer.overwrite is None:
        slots = list(layer.full.lengths)
        layer.seen += layer.ring is None  # rings count for themselves, as they are written
        layer.full.resize([length + 1 for length in slots])
        return slots
    taken, layer.overwrite = layer.overwrite, None
    layer.seen += 1
    return taken


def _stacked(slots: list[list[list[int] | torch.Tensor]], device: torch.device) -> torch.Tensor:
    """int64 `[layers, rows, heads]`."""
    flat = [one for row in slots for one in row]
    given = [(place, one) for place, one in enumerate(flat) if isinstance(one, torch.Tensor)]
    if len(given) == len(flat):
        found = torch.stack([one for _, one in given])
    else:
        heads = len(next(one for one in flat if isinstance(one, list)))
        found = torch.tensor([one if isinstance(one, list) else [0] * heads for one in flat], device=device)
        if given:
            found[torch.tensor([place for place, _ in given], device=device)] = torch.stack([one for _, one in given])
    return found.unflatten(0, (len(slots), -1))
