"""The cache of one sequence in one layer: block tables for each KV head, appended to, overwritten and compacted."""

from __future__ import annotations

import torch

from kvsim.calibrate.decoder.storage import Lane


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

    def append_ragged(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """One token `[heads, width]` after each head's last."""
        slots = torch.tensor(self.lengths, device=self.device)[:, None]
        self.resize([length + 1 for length in self.lengths])
        self.put(slots, k[:, None], v[:, None])

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

    def keep(self, kept: list[torch.Tensor]) -> None:
        """Compaction: of each head these slots stay, in this order, as they are stored; blocks behind are freed."""
        lengths = [len(slots) for slots in kept]
        heads = torch.arange(len(kept)).repeat_interleave(torch.tensor(lengths)).to(self.device)
        moved = self.lane.take_rows(*self._flat_places(heads, torch.cat(kept)))
        self.resize(lengths)
        slots = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        self.lane.put_rows(*self._flat_places(heads, slots), moved)

    def _flat_places(self, heads: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table[heads, slots // self.block_size], slots % self.block_size

    def clear(self) -> None:
        self.resize([0] * len(self.lengths))


class Ring:
    """KIVI's newest tokens in full precision: `[heads, residual, head_dim]`, token t in slot t mod residual."""

    def __init__(self, num_heads: int, residual_tokens: int, head_dim: int, dtype: torch.dtype, device: str | torch.device) -> None:
        self.k = torch.empty(num_heads, residual_tokens, head_dim, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.size = residual_tokens
        self.num_bytes = 2 * self.k.numel() * self.k.element_size()

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
