"""Keys turned to another position, against complex numbers in float64 and against rotating afresh."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest
import torch
from pairwise import case_name, full_product, pairwise

from kvsim.kernels.layouts import LAYOUTS, tokens_of
from kvsim.kernels.rerotate import CONVENTIONS, TOLERANCE, Shape, make_inputs, phase_per_token, reference, run

AXES = {
    "dtype": ("float16", "bfloat16"), "layout": LAYOUTS, "head_dim": (64, 80, 96, 128, 256), "tokens": (1, 17, 129, 1023),
    "convention": CONVENTIONS, "kv_heads": (1, 2),
}  # fmt: skip


def pair_lengths_of(rows: torch.Tensor, half: int, convention: str) -> torch.Tensor:
    """Length of the pair that each rotated channel belongs to; rotation keeps it, and errors scale with it."""
    first, second = (rows[:, :half], rows[:, half : 2 * half])
    if convention == "interleaved":
        first, second = rows[:, 0 : 2 * half : 2], rows[:, 1 : 2 * half : 2]
    length = torch.hypot(first, second)
    return torch.cat([length, length], 1) if convention == "half_split" else length.repeat_interleave(2, 1)


def check(case: dict, device: str, rotary_frac: float = 1.0, moved: bool = False) -> None:
    shape = Shape(**case, ragged=True)
    rng = np.random.default_rng(crc32(case_name(case).encode()))
    inputs = make_inputs(shape, rng, device)
    inputs["phases"] = inputs["phases"][: int(shape.head_dim // 2 * rotary_frac)]
    half = len(inputs["phases"])
    if moved:
        new = torch.from_numpy(rng.integers(0, 131072, inputs["old_positions"].shape)).to(torch.int32)
        inputs["new_positions"] = new.to(device)
    before = [tokens_of(inputs["k"], inputs["block_table"], 0, h, n).clone() for h, n in enumerate(shape.pair_lengths())]
    expected = reference(**inputs)
    untouched = int(inputs["k"].isnan().sum())
    k = run(**inputs)
    assert k is inputs["k"]
    assert int(k.isnan().sum()) == untouched
    for head, rows in enumerate(expected):
        got = tokens_of(k, inputs["block_table"], 0, head, len(rows)).double()
        assert torch.equal(got[:, 2 * half :], before[head].double()[:, 2 * half :]), "channels past the rotary ones stay"
        error = (got - rows).abs()[:, : 2 * half]
        # The interpreter cuts bf16 off, a GPU rounds it. 2^-24: subnormal fp16 numbers are no finer.
        tolerance = TOLERANCE[shape.torch_dtype] * (2 if device == "cpu" and shape.dtype == "bfloat16" else 1)
        assert (error <= tolerance * pair_lengths_of(rows, half, shape.convention) + 2**-24).all()


@pytest.mark.parametrize("case", pairwise(**AXES), ids=case_name)
def test_to_the_slot(case: dict, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_some_channels_to_any_position(convention: str, device: str) -> None:
    case = {"tokens": 129, "head_dim": 80, "convention": convention, "kv_heads": 2, "dtype": "float16"}
    check(case, device, rotary_frac=0.5, moved=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", full_product(**AXES), ids=case_name)
def test_everywhere(case: dict, device: str) -> None:
    check(case, device)
    check(case, device, rotary_frac=0.5, moved=True)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_same_as_rotating_afresh(convention: str, device: str) -> None:
    """Unrotated keys rotated in float64 at old and at new positions, as models do: one becomes the other."""
    rng = np.random.default_rng(1)
    raw = rng.standard_normal((50, 64))
    frequencies = 10000.0 ** (-np.arange(32) / 32)
    old = np.sort(rng.choice(100_000, 50, replace=False))

    def rotated(positions: np.ndarray) -> torch.Tensor:
        out = np.empty_like(raw)
        for token, position in enumerate(positions):
            for pair, frequency in enumerate(frequencies):
                i, j = (pair, pair + 32) if convention == "half_split" else (2 * pair, 2 * pair + 1)
                cosine, sine = np.cos(position * frequency), np.sin(position * frequency)
                out[token, i] = raw[token, i] * cosine - raw[token, j] * sine
                out[token, j] = raw[token, j] * cosine + raw[token, i] * sine
        return torch.from_numpy(out)

    k = rotated(old).half()[None, None].to(device)
    run(
        k, torch.tensor([[50]], dtype=torch.int32, device=device), torch.from_numpy(old).to(torch.int32)[None, None].to(device),
        phase_per_token(torch.from_numpy(frequencies)).to(device), convention=convention,
    )  # fmt: skip
    # Rounded to fp16 before and after: twice half a unit of up to 2^-10 at numbers up to 4.
    assert (k[0, 0].double().cpu() - rotated(np.arange(50))).abs().max() < 4 * 2**-10


K, PHASES, LENGTHS = torch.zeros(1, 1, 8, 64).half(), torch.zeros(32, dtype=torch.int64), torch.tensor([[8]], dtype=torch.int32)
POSITIONS = torch.zeros(1, 1, 8, dtype=torch.int32)
BAD = [
    ("k", {"k": K.float()}), ("head_dim", {"k": K[..., :48]}), ("convention", {"convention": "llama"}),
    ("phases", {"phases": PHASES.float()}), ("phases", {"phases": torch.zeros(33, dtype=torch.int64)}),
    ("old_positions", {"old_positions": POSITIONS[..., :7]}), ("new_positions", {"new_positions": POSITIONS.long()}),
    ("lengths", {"lengths": LENGTHS.T.expand(1, 2)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), BAD, ids=[f"{i}-{case[0]}" for i, case in enumerate(BAD)])
def test_bad_input_is_named(name: str, change: dict) -> None:
    good = {"k": K, "lengths": LENGTHS, "old_positions": POSITIONS, "phases": PHASES}
    with pytest.raises(ValueError, match=f"^{name}"):
        run(**(good | change))
