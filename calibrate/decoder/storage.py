"""Paged memory for keys and values: blocks of `block_size` tokens of one head of one layer, in 16 bits or in codes.

Blocks belong to heads (as `paged_per_head` in `kvsim.kernels.layouts`), so one pool serves policies whose heads differ. A codec
says how rows lie in a block; codes and params are those of `kvsim.kernels.packing`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kvsim.kernels.packing import QuantFormat, pack, unpack


class OutOfBlocks(RuntimeError):
    """The pool has fewer bytes left than were asked for."""


class Codec(Protocol):
    """Rows of `width` numbers in blocks of one tensor or two."""

    width: int
    tensors: tuple[torch.Tensor, ...]

    def write(self, blocks: torch.Tensor, offsets: torch.Tensor | int, rows: torch.Tensor) -> None:
        """rows `[..., width]` at these places, broadcast together."""
        ...

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """fp32 `[heads, blocks · block_size, width]` of blocks `[heads, blocks]`."""
        ...


class Plain:
    """Rows as they are, in 16 bits."""

    def __init__(self, num_blocks: int, block_size: int, width: int, dtype: torch.dtype, device: str | torch.device) -> None:
        self.width = width
        self.rows = torch.empty(num_blocks, block_size, width, dtype=dtype, device=device)
        self.tensors = (self.rows,)

    def write(self, blocks: torch.Tensor, offsets: torch.Tensor | int, rows: torch.Tensor) -> None:
        self.rows[blocks, offsets] = rows.to(self.rows.dtype)

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        return self.rows[blocks].flatten(1, 2).float()


class Float8:
    """e4m3 with a scale of 1 for the whole tensor, converted as it is written."""

    def __init__(self, num_blocks: int, block_size: int, width: int, device: str | torch.device) -> None:
        self.width, self.format = width, QuantFormat("fp8", "channel", width)
        self.codes = torch.empty(num_blocks, block_size, width, dtype=torch.uint8, device=device)
        self.params = torch.ones(1, 1, 1, dtype=torch.float16, device=device).expand(num_blocks, block_size, 1)
        self.tensors = (self.codes,)

    def write(self, blocks: torch.Tensor, offsets: torch.Tensor | int, rows: torch.Tensor) -> None:
        self.codes[blocks, offsets] = rows.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        return self.codes[blocks].flatten(1, 2).view(torch.float8_e4m3fn).float()


class ByChannel:
    """Codes with a scale and a minimum for every group of channels of one token."""

    def __init__(self, num_blocks: int, block_size: int, width: int, fmt: QuantFormat, device: str | torch.device) -> None:
        self.format, self.width, self.size = fmt, width, min(fmt.group_size, width)
        self.codes = torch.empty(num_blocks, block_size, fmt.row_bytes(width), dtype=torch.uint8, device=device)
        self.params = torch.empty(num_blocks, block_size, fmt.params_per_row(width), dtype=torch.float16, device=device)
        self.tensors = (self.codes, self.params)

    def write(self, blocks: torch.Tensor, offsets: torch.Tensor | int, rows: torch.Tensor) -> None:
        short = -self.width % self.size  # the last group may be short: its last channel fills it up
        rows = rows.float()
        whole = torch.cat((rows, rows[..., -1:].expand(*rows.shape[:-1], short)), -1) if short else rows
        codes, params = quantize(whole.unflatten(-1, (-1, self.size)), -1, self.format)
        self.codes[blocks, offsets] = pack(codes.flatten(-2)[..., : self.width], self.format.bits)
        self.params[blocks, offsets] = params.flatten(-2)

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        codes = unpack(self.codes[blocks].flatten(1, 2), self.format.bits).float()
        scale, low = self.params[blocks].flatten(1, 2).float().unflatten(-1, (2, -1)).unbind(-2)
        each = [part.repeat_interleave(self.size, -1)[..., : self.width] for part in (scale, low)]
        return codes * each[0] + each[1]


class ByToken:
    """Codes with a scale and a minimum for every group of tokens of one channel (KIVI's keys): written in whole groups."""

    def __init__(self, num_blocks: int, block_size: int, width: int, fmt: QuantFormat, device: str | torch.device) -> None:
        if block_size % fmt.group_size:
            raise ValueError(f"group_size={fmt.group_size} must divide the block of {block_size} tokens; use blocks of 32 tokens")
        self.format, self.block_size, self.width = fmt, block_size, width
        groups = block_size // fmt.group_size
        self.codes = torch.empty(num_blocks, block_size, fmt.row_bytes(width), dtype=torch.uint8, device=device)
        self.params = torch.empty(num_blocks, groups, fmt.params_per_row(width), dtype=torch.float16, device=device)
        self.tensors = (self.codes, self.params)

    def write(self, blocks: torch.Tensor, offsets: torch.Tensor | int, rows: torch.Tensor) -> None:
        """rows `[heads, tokens, width]`, whole groups in order; blocks and offsets one for each token."""
        size = self.format.group_size
        codes, params = quantize(rows.float().unflatten(1, (-1, size)), 2, self.format)
        assert isinstance(offsets, torch.Tensor) and rows.shape[1] % size == 0
        self.codes[blocks, offsets] = pack(codes.flatten(1, 2), self.format.bits)
        self.params[blocks[:, ::size], offsets[..., ::size] // size] = params.flatten(-2)

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        codes = unpack(self.codes[blocks].flatten(1, 2), self.format.bits).float()
        scale, low = self.params[blocks].flatten(1, 2).float().unflatten(-1, (2, -1)).unbind(-2)
        each = [part.repeat_interleave(self.format.group_size, 1) for part in (scale, low)]
        return codes * each[0] + each[1]


def quantize(groups: torch.Tensor, axis: int, fmt: QuantFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes as `groups`, fp16 params with a dimension of 2 before the last in the place of `axis`), as kernels.kv_quantize."""
    low, high = groups.amin(axis), groups.amax(axis)
    minimum, scale = low.half(), ((high - low) * (1 / fmt.max_code)).half()
    exact = (groups - minimum.float().unsqueeze(axis)) / scale.float().unsqueeze(axis)
    exact = torch.where(scale.float().unsqueeze(axis) > 0, exact, 0.0)
    return exact.add_(0.5).floor_().clamp_(0, fmt.max_code).int(), torch.stack((scale, minimum), -2)


class Budget:
    """Bytes that all lanes and rings of a pool share. peak_bytes: the most that were held since it was last set."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self.held_bytes, self.peak_bytes = num_bytes, 0.0, 0.0

    def take(self, num_bytes: float, what: str) -> None:
        """Raises OutOfBlocks."""
        if self.held_bytes + num_bytes > self.num_bytes:
            raise OutOfBlocks(f"{what} needed, {self.num_bytes - self.held_bytes:.0f} of the pool's {self.num_bytes} bytes are free")
        self.held_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def give(self, num_bytes: float) -> None:
        self.held_bytes -= num_bytes


class Lane:
    """Blocks of one width of key: storage of keys and values, and the blocks that are free.

    num_blocks: of the storage, one of which is nobody's.
    charge_bytes: what a block takes of the budget: keys, values and scales, and the state that policies declare for its slots.
    """

    def __init__(self, keys: Codec, values: Codec, num_blocks: int, budget: Budget, charge_bytes: float) -> None:
        self.keys, self.values, self.budget, self.charge_bytes = keys, values, budget, charge_bytes
        self.block_bytes = sum(t[0].numel() * t.element_size() for t in (*keys.tensors, *values.tensors))
        self.num_blocks = num_blocks - 1
        self.spare = num_blocks - 1
        """The block that is never given out: rows of a batch that hold no sequence write there."""
        self.free = list(range(self.num_blocks - 1, -1, -1))

    @property
    def num_bytes(self) -> int:
        """Allocated, in use or not."""
        return sum(t.numel() * t.element_size() for t in (*self.keys.tensors, *self.values.tensors))

    def take_rows(self, blocks: torch.Tensor, offsets: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values at these places, copied as they are stored: codes stay codes. Not for codecs that store whole groups."""
        return [tensor[blocks, offsets] for tensor in (*self.keys.tensors, *self.values.tensors)]

    def put_rows(self, blocks: torch.Tensor, offsets: torch.Tensor, rows: list[torch.Tensor]) -> None:
        for tensor, own in zip((*self.keys.tensors, *self.values.tensors), rows, strict=True):
            tensor[blocks, offsets] = own

    def take(self, number: int) -> list[int]:
        """Raises OutOfBlocks."""
        if number > len(self.free):
            raise OutOfBlocks(f"{number} blocks are needed, {len(self.free)} of {self.num_blocks} are free")
        self.budget.take(number * self.charge_bytes, f"{number} blocks are")
        taken = self.free[-number:]
        del self.free[-number:]
        return taken

    def give(self, blocks: list[int]) -> None:
        self.budget.give(len(blocks) * self.charge_bytes)
        self.free += blocks
