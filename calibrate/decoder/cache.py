"""The cache of one sequence in one layer: block tables for each KV head, appended to, overwritten and compacted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kvsim.calibrate.decoder.storage import Budget, Lane


class Rows:
    """Tokens of every head in one lane. Slots 0 … length−1 of each head are used; `lengths` may differ between heads."""

    def __init__(self, lane: Lane, num_heads: int, block_size: int, device: str | torch.device) -> None:
        self.lane, self.block_size, self.device = lane, block_size, device
        self.lengths = [0] * num_heads
        self.blocks: list[list[int]] = [[] for _ in range(num_heads)]
        self._table: torch.Tensor | None = None

    @property
    def even(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def table(self) -> torch.Tensor:
        """int64 `[heads, most blocks]`; entries past a head's blocks are 0."""
        if self._table is None:
            most = max(map(len, self.blocks))
            self._table = torch.tensor([row + [0] * (most - len(row)) for row in self.blocks], device=self.device)
        return self._table

    def resize(self, lengths: list[int]) -> None:
        """Takes or frees blocks so that each head has room for so many tokens, all of which count as used."""
        for head, length in enumerate(lengths):
            own, wanted = self.blocks[head], -(-length // self.block_size)
            if wanted > len(own):
                own += self.lane.take(wanted - len(own))
                self._table = None
            elif wanted < len(own):
                self.lane.give(own[wanted:])
                del own[wanted:]
                self._table = None
        self.lengths = list(lengths)

    def places(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(blocks, offsets) of slots `[heads, n]`."""
        return self.table.gather(1, slots // self.block_size), slots % self.block_size

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v `[heads, n, width]` after what is there; heads are even."""
        start, number = self.lengths[0], k.shape[1]
        assert self.even
        self.resize([start + number] * len(self.lengths))
        if number == 1:
            blocks, offset = self.table[:, start // self.block_size], start % self.block_size
            self.lane.keys.write(blocks, offset, k[:, 0])
            self.lane.values.write(blocks, offset, v[:, 0])
        else:
            slots = torch.arange(start, start + number, device=self.device).expand(len(self.lengths), -1)
            self.put(slots, k, v)

    def put(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes k, v `[heads, n, width]` into slots `[heads, n]` that exist."""
        blocks, offsets = self.places(slots)
        self.lane.keys.write(blocks, offsets, k)
        self.lane.values.write(blocks, offsets, v)

    def read_keys(self) -> torch.Tensor:
        """fp32 `[heads, longest, width]`; what lies past a head's length is anything finite or not."""
        return self.lane.keys.read(self.table)[:, : max(self.lengths)]

    def read_values(self) -> torch.Tensor:
        return self.lane.values.read(self.table)[:, : max(self.lengths)]

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.read_keys(), self.read_values()

    def keep(self, kept: list[torch.Tensor], holes: bool = False) -> None:
        """Compaction: of each head these slots stay, in this order, as they are stored; blocks behind are freed.

        holes: most rows stay in their slot, and only the others are moved (a GPU waits to learn which).
        """
        lengths = [len(slots) for slots in kept]
        heads = torch.arange(len(kept)).repeat_interleave(torch.tensor(lengths)).to(self.device)
        old, new = torch.cat(kept), torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        if holes:
            moves = old != new
            heads, old, new = heads[moves], old[moves], new[moves]
        rows = self.lane.take_rows(*self._flat_places(heads, old))
        self.resize(lengths)
        self.lane.put_rows(*self._flat_places(heads, new), rows)

    def _flat_places(self, heads: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table[heads, slots // self.block_size], slots % self.block_size

    def clear(self) -> None:
        self.resize([0] * len(self.lengths))


def read(several: Sequence[Rows]) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 K and V `[sequences · heads, longest, width]` of rows of one lane with equally many blocks in their longest heads."""
    longest = max(length for rows in several for length in rows.lengths)
    table, lane = joined([rows.table for rows in several]), several[0].lane
    return lane.keys.read(table)[:, :longest], lane.values.read(table)[:, :longest]


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class Ring:
    """KIVI's newest tokens in full precision: `[heads, residual, head_dim]`, token t in slot t mod residual.

    charge_bytes: taken from the budget until it is released. Raises OutOfBlocks.
    """

    def __init__(
        self, num_heads: int, residual_tokens: int, head_dim: int, dtype: torch.dtype, device: str | torch.device, budget: Budget,
        charge_bytes: float,
    ) -> None:  # fmt: skip
        budget.take(charge_bytes, "a ring's bytes are")
        self.budget, self.charge_bytes = budget, charge_bytes
        self.k = torch.empty(num_heads, residual_tokens, head_dim, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.size = residual_tokens
        self.num_bytes = 2 * self.k.numel() * self.k.element_size()

    def release(self) -> None:
        self.budget.give(self.charge_bytes)
        self.charge_bytes = 0.0

    def put(self, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Tokens first, first + 1, ... `[heads, n, head_dim]`; the newest `residual` of them stay."""
        slots = torch.arange(first, first + k.shape[1], device=k.device)[-self.size :] % self.size
        self.k[:, slots], self.v[:, slots] = k[:, -self.size :].to(self.k.dtype), v[:, -self.size :].to(self.v.dtype)

    def get(self, which: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """fp32 `[heads, end − first, head_dim]` of `self.k` or `self.v`."""
        return which[:, torch.arange(first, end, device=which.device) % self.size].float()


class LayerCache:
    """One layer of one sequence: rows in the full lane, rows with pruned keys where channels were pruned, a ring.

    positions and scores, where a rule keeps them: `[heads, slots]`, by slot of the full lane.
    """

    def __init__(self, full: Rows, pruned: Rows | None, ring: Ring | None) -> None:
        self.full, self.pruned, self.ring = full, pruned, ring
        self.channels: torch.Tensor | None = None  # of pruned keys, `[heads, stored]`
        self.positions: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self.overwrite: torch.Tensor | None = None  # slots `[heads]` that the next token takes
        self.slots: torch.Tensor | None = None  # `[heads]`, where the token of the step under way lies
        self.window: torch.Tensor | None = None  # the prompt's last queries `[queries, q_heads, head_dim]`
        self.quantized = 0  # tokens below are codes, where there is a ring: of keys
        self.seen = 0  # tokens that were appended, evicted ones too

    @property
    def lengths(self) -> list[int]:
        """Tokens of each head."""
        if self.pruned is None:
            return self.full.lengths
        return [a + b for a, b in zip(self.full.lengths, self.pruned.lengths, strict=True)]

    def held_bytes(self) -> int:
        """Of keys, values and their scales: whole blocks, and the ring."""
        lanes = [self.full] if self.pruned is None else [self.full, self.pruned]
        return sum(rows.num_blocks * rows.lane.block_bytes for rows in lanes) + (self.ring.num_bytes if self.ring else 0)

    def clear(self) -> None:
        self.full.clear()
        if self.pruned is not None:
            self.pruned.clear()
        if self.ring is not None:
            self.ring.release()

    def append_codes(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v `[heads, n, head_dim]` after the tokens of a ring: keys become codes a whole ring at a time, values as they leave it."""
        number, rows, ring, start = k.shape[1], self.full, self.ring, self.seen
        assert ring is not None
        self.seen += number
        old_values, narrow = max(0, start - ring.size), self.quantized
        keys = torch.cat((ring.get(ring.k, narrow, start), k.float()), 1)
        values = torch.cat((ring.get(ring.v, old_values, start), v.float()), 1)
        end = start + number
        rows.resize([end] * len(rows.lengths))
        self.quantized, new_values = end // ring.size * ring.size, max(0, end - ring.size)
        for codec, fresh, first, last in (
            (rows.lane.keys, keys, narrow, self.quantized), (rows.lane.values, values, old_values, new_values)
        ):  # fmt: skip
            if last > first:
                slots = torch.arange(first, last, device=k.device).expand(len(rows.lengths), -1)
                codec.write(*rows.places(slots), fresh[:, : last - first])
        ring.put(start, k, v)


def with_slots(rows: torch.Tensor | None, slots: torch.Tensor, longest: int, value: float) -> torch.Tensor:
    """rows `[heads, ...]`, as long as the longest head, with `value` in these slots; written in place where they are long enough."""
    assert rows is not None
    rows = F.pad(rows, (0, longest - rows.shape[1])) if rows.shape[1] < longest else rows
    rows[torch.arange(len(slots), device=rows.device), slots] = value
    return rows
