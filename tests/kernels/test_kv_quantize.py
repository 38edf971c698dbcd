"""Codes and params against a float64 reference, e4m3 against torch's, and what dequantising gives back."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest
import torch
from pairwise import case_name, full_product, pairwise

from kvsim.kernels.kv_quantize import FP16_MAX, TOLERANCE, Shape, make_inputs, reference, run
from kvsim.kernels.layouts import LAYOUTS, tokens_of
from kvsim.kernels.packing import QuantFormat, dequantize, kivi_formats, unpack

FORMATS = (
    ("int2", "token", 32), ("int4", "token", 32), ("int2", "channel", 32), ("int4", "channel", 64), ("int4", "channel", 256),
    ("int8", "channel", 128), ("int8", "token", 16), ("fp8", "channel", 256), ("fp8", "channel", 32), ("fp8", "token", 48),
)  # fmt: skip
AXES = {
    "dtype": ("float16", "bfloat16"), "layout": LAYOUTS, "head_dim": (64, 80, 96, 128, 256), "tokens": (1, 17, 129, 200),
    "fmt": FORMATS, "kv_heads": (1, 2),
}  # fmt: skip


def rows_of_head(codes, params, fmt: QuantFormat, table, head: int, length: int):
    """Codes and params of one head of sequence 0 as `reference` gives them."""
    got = tokens_of(codes, table, 0, head, length)
    num_rows = -(-length // fmt.tokens_per_params)
    if table is None or fmt.tokens_per_params == 1:
        return got, tokens_of(params, table, 0, head, num_rows)
    row_table = table[0, head] if table.dim() == 3 else table[0]
    per_block = params.shape[1]
    column = 0 if table.dim() == 3 else head
    rows = [params[int(row_table[row // per_block]), row % per_block, column] for row in range(num_rows)]
    return got, torch.stack(rows) if rows else params.new_zeros(0, params.shape[-1])


def check_codes(got: torch.Tensor, codes: torch.Tensor, x: torch.Tensor, params: torch.Tensor, fmt: QuantFormat) -> None:
    """Equal, or the two numbers beside a quotient that is as far from one as from the other, to within TOLERANCE."""
    numbers = [part.view(torch.float8_e4m3fn).double() if fmt.is_float else unpack(part, fmt.bits).double() for part in (got, codes)]
    groups = params.double().unflatten(-1, (fmt.num_params, -1))
    axis = 0 if fmt.groups == "token" else 1
    per_element = [p.repeat_interleave(fmt.group_size, axis)[: x.shape[0], : x.shape[1]] for p in groups.unbind(1)]
    quotient = (x.double() - (0 if fmt.is_float else per_element[1])) / per_element[0]
    differ = numbers[0] != numbers[1]
    distances = [(number - quotient).abs() for number in numbers]
    tied = (distances[0] - distances[1]).abs() <= TOLERANCE[torch.float16] * (1 + quotient.abs() * fmt.is_float)
    assert tied[differ].all()
    assert differ.double().mean() < 0.01 or differ.numel() < 1000


def check(case: dict, device: str) -> None:
    element, groups, group_size = case["fmt"]
    block_size = 48 if group_size == 48 else 32
    if block_size == 48 and case["layout"] != "contiguous":
        block_size, group_size = 64, 64  # blocks are powers of two and hold whole groups
    shape = Shape(
        **{name: value for name, value in case.items() if name != "fmt"}, ragged=True, block_size=block_size,
        element=element, groups=groups, group_size=group_size,
    )  # fmt: skip
    inputs = make_inputs(shape, np.random.default_rng(crc32(case_name(case).encode())), device)
    codes, params = run(**inputs)
    for head, (expected_codes, expected_params) in enumerate(reference(**inputs)):
        length = shape.pair_lengths()[head]
        got_codes, got_params = rows_of_head(codes, params, shape.fmt, inputs["block_table"], head, length)
        assert torch.equal(got_params, expected_params)
        x = tokens_of(inputs["x"], inputs["block_table"], 0, head, length)
        check_codes(got_codes, expected_codes, x, expected_params, shape.fmt)
        if length:
            back = dequantize(got_codes, got_params, shape.fmt, shape.head_dim)
            scale = dequantize(torch.ones_like(got_codes), got_params, shape.fmt, shape.head_dim) if shape.fmt.is_float else None
            check_error(x.double(), back, got_params, shape.fmt, scale)


def check_error(x, back, params, fmt: QuantFormat, smallest_step) -> None:
    """Half a step, plus what fp16 params add: 2^-11 of the minimum and of the range (and of the whole number for e4m3)."""
    if fmt.is_float:
        assert ((back - x).abs() <= x.abs() / 16 * (1 + 2**-10) + x.abs() * 2**-10 + smallest_step.abs() / 2 + 1e-7).all()
        return
    groups = params.double().unflatten(-1, (2, -1))
    axis = 0 if fmt.groups == "token" else 1
    scale, minimum = (groups[:, i].repeat_interleave(fmt.group_size, axis)[: x.shape[0], : x.shape[1]] for i in range(2))
    assert ((back - x).abs() <= scale * (0.5 + fmt.max_code * 2**-10) + minimum.abs() * 2**-10 + 1e-7).all()


@pytest.mark.parametrize("case", pairwise(**AXES), ids=case_name)
def test_codes_and_params(case: dict, device: str) -> None:
    check(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", full_product(**AXES), ids=case_name)
def test_codes_and_params_everywhere(case: dict, device: str) -> None:
    check(case, device)


def test_every_e4m3_is_rounded_as_torch_does(device: str) -> None:
    """All finite fp16 numbers up to 448 in a group of maximum 448: the scale is 1, ties and subnormals included."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.abs() <= 448]
    every = torch.nn.functional.pad(every, (0, -len(every) % 63)).view(-1, 63)
    x = torch.cat([every, torch.full((len(every), 1), 448.0, dtype=torch.float16)], 1)[None, None].to(device)
    lengths = torch.tensor([[x.shape[2]]], dtype=torch.int32, device=device)
    codes, params = run(x, lengths, QuantFormat("fp8", "channel", 64))
    assert (params == 1).all()
    expected = x.float().to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(codes & 127, expected & 127)
    assert torch.equal(codes[x != 0], expected[x != 0])


@pytest.mark.parametrize("element", ["int2", "int4", "int8", "fp8"])
@pytest.mark.parametrize("groups", ["token", "channel"])
def test_constant_tiny_and_huge_groups(element: str, groups: str, device: str) -> None:
    """No division by a scale of 0, and no infinity from numbers past fp16."""
    x = torch.zeros(1, 1, 96, 64, dtype=torch.bfloat16, device=device)
    x[0, 0, :32], x[0, 0, 32:64, ::2], x[0, 0, 64:] = 3.0, 1e-9, 1e30
    fmt = QuantFormat(element, groups, 32)
    codes, params = run(x, torch.tensor([[96]], dtype=torch.int32, device=device), fmt)
    back = dequantize(codes[0, 0], params[0, 0], fmt, 64)
    assert params.isfinite().all()
    assert (back[:32] - 3).abs().max() <= 3 * 2**-10
    assert back[32:64].abs().max() <= 1e-7
    assert back[64:].isfinite().all()
    assert params.abs().max() <= FP16_MAX


@pytest.mark.parametrize("layout", ["contiguous", "paged_per_head"])
def test_a_ring_is_quantised_piece_by_piece(layout: str, device: str) -> None:
    """KIVI's residual of 64 tokens: two pieces of keys, values one token at a time; the same as all at once."""
    shape = Shape(kv_heads=2, tokens=128, head_dim=64, block_size=32, layout=layout, dtype="float16")
    inputs = make_inputs(shape, np.random.default_rng(5), device)
    table, x = inputs["block_table"], inputs["x"]
    tokens = torch.stack([tokens_of(x, table, 0, head, 128) for head in range(2)])[None]
    for fmt, step, first in ((kivi_formats(2)[0], 64, 0), (kivi_formats(4)[1], 1, 120)):
        whole = run(x, inputs["lengths"], fmt, block_table=table)
        codes, params = (torch.full_like(part, 77) for part in whole)
        for start in range(first, 128, step):
            ring = torch.full((1, 2, 64, 64), torch.nan, dtype=torch.float16, device=device)
            held = torch.arange(start, start + step)
            ring[:, :, held % 64] = tokens[:, :, held]
            bounds = [torch.full((1, 2), bound, dtype=torch.int32, device=device) for bound in (start + step, start)]
            run(
                ring, bounds[0], fmt, ring=True, first_tokens=bounds[1], max_new_tokens=step, codes=codes, params=params,
                out_block_table=table,
            )  # fmt: skip
        for head in range(2):
            ours, theirs = (rows_of_head(*pair, fmt, table, head, 128) for pair in ((codes, params), whole))
            for got, expected, per_row in zip(ours, theirs, (1, fmt.tokens_per_params), strict=True):
                assert torch.equal(got[first // per_row :], expected[first // per_row :])
            assert (ours[0][:first] == 77).all(), "tokens before the first are left alone"


X, FMT = torch.zeros(1, 1, 32, 64).half(), QuantFormat("int4", "token", 32)
LENGTHS, PAGED = torch.tensor([[32]], dtype=torch.int32), torch.zeros(2, 16, 1, 64).half()
BAD = [
    ("x", {"x": X.float()}), ("head_dim", {"x": X[..., :48]}), ("lengths", {"lengths": LENGTHS.long()}),
    ("fmt", {"x": PAGED, "block_table": torch.tensor([[0, 1]], dtype=torch.int32)}),
    ("fmt", {"fmt": QuantFormat("int4", "channel", 48)}), ("codes", {"ring": True}), ("codes", {"codes": torch.zeros(1, 1, 32, 32).byte()}),
    ("codes", {"codes": torch.zeros(1, 1, 32, 64).byte(), "params": torch.zeros(1, 1, 1, 128).half()}),
    ("params", {"codes": torch.zeros(1, 1, 32, 32).byte(), "params": torch.zeros(1, 1, 2, 128).half()}),
    ("max_new_tokens", {"max_new_tokens": 33}), ("first_tokens", {"first_tokens": LENGTHS.float()}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{i}-{case[0]}" for i, case in enumerate(BAD)])
def test_bad_input_is_named(name: str, change: dict) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        run(**({"x": X, "lengths": LENGTHS, "fmt": FMT} | change))
