"""Decode attention over quantised caches against the float64 reference, and behind the kernel that quantises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pairwise import assert_close, case_name, full_product, pairwise

from kvsim.kernels import decode_attention, kv_quant_decode_attention, kv_quantize
from kvsim.kernels.kv_quant_decode_attention import LSE_TOLERANCE, TOLERANCE, Shape, make_inputs, reference, run
from kvsim.kernels.packing import QuantFormat
from kvsim.kernels.quant_inputs import FORMATS, formats_of

GRID: dict[str, Any] = {
    "format": FORMATS,
    "dtype": ("float16", "bfloat16"),
    "layout": ("contiguous", "paged", "paged_per_head"),
    "head_dim": (64, 80, 96, 128, 256),
    "group": (1, 4, 16),
    "tokens": (1, 17, 129),
    "residual_tokens": (32, 64, 128),
    "num_splits": (None, 1, 2),
}
ODD = (
    {"format": "kivi2", "tokens": 1023, "head_dim": 64, "kv_heads": 1, "layout": "paged"},
    {"format": "kivi4", "tokens": 200, "residual_tokens": 32, "group": 3, "num_splits": 3},
    {"format": "int4_group64", "tokens": 129, "batch": 3, "kv_heads": 1, "head_dim": 96},
)


def check(case: dict[str, Any], device: str) -> None:
    case = dict(case)
    num_splits = case.pop("num_splits", None)
    shape = Shape(**{"kv_heads": 2, "ragged": True, "block_size": 32, **case})
    inputs = make_inputs(shape, np.random.default_rng(), device)
    out, lse = run(**inputs, num_splits=num_splits)
    expected_out, expected_lse = reference(**inputs)
    assert_close(out, expected_out, TOLERANCE[out.dtype], "out")
    assert_close(lse, expected_lse, LSE_TOLERANCE[out.dtype], "lse")


@pytest.mark.parametrize("case", [*pairwise(**GRID), *ODD], ids=case_name)
def test_equals_the_reference(case: dict[str, Any], device: str) -> None:
    check(case, device)


FULL = full_product(**{**GRID, "tokens": (129,), "residual_tokens": (64,), "num_splits": (2,)})


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=case_name)
def test_equals_the_reference_everywhere(case: dict[str, Any], device: str) -> None:
    check(case, device)


@pytest.mark.parametrize(("name", "step"), [("int8_token", 1 / 255), ("int4_group64", 1 / 15), ("fp8_token", 1 / 16)])
def test_what_kv_quantize_wrote(name: str, step: float, device: str) -> None:
    """Attention over quantised keys and values is attention over K and V, to within the steps of the format.

    A number is off by at most half a step of its group's range (below 8 for standard normal numbers; fp8: of itself), so a
    logit by less than the norm of q times that, and with it the log-sum-exp.
    """
    shape = decode_attention.Shape(tokens=60, kv_heads=2, head_dim=64, dtype="float16")
    inputs = decode_attention.make_inputs(shape, np.random.default_rng(), device)
    k_format, v_format = formats_of(name, 64)
    k_codes, k_params = kv_quantize.run(inputs["k"], inputs["lengths"], k_format)[:2]
    v_codes, v_params = kv_quantize.run(inputs["v"], inputs["lengths"], v_format)[:2]
    out, lse = run(inputs["q"], k_codes, k_params, v_codes, v_params, k_format, v_format, inputs["lengths"])
    expected_out, expected_lse = decode_attention.reference(**inputs)
    norm = float(inputs["q"].double().norm(dim=-1).max())
    bound = norm * 8 * step / 2 + LSE_TOLERANCE[torch.float16]
    assert float((lse - expected_lse).abs().max()) < bound
    assert_close(out, expected_out, 4 * step + 2 * bound, "out")


BAD = (
    ("q", lambda i: i["q"].float(), "q.dtype"),
    ("k_codes", lambda i: i["k_codes"].to(torch.int8), "k_codes.dtype"),
    ("v_codes", lambda i: i["v_codes"][..., :-1], "v_codes.shape"),
    ("k_params", lambda i: i["k_params"].float(), "k_params.dtype"),
    ("v_params", lambda i: i["v_params"][..., :-1], "v_params.shape"),
    ("k_ring", lambda i: None, "arguments"),
    ("v_ring", lambda i: i["v_ring"][:, :, :-1].contiguous(), "v_ring.shape"),
    ("v_quantized", lambda i: i["k_quantized"] + 1, "v_quantized"),
    ("v_quantized", lambda i: i["v_quantized"] * 0, "lengths"),
    ("k_format", lambda i: QuantFormat("int4", "token", 64), "k_format.group_size"),
)


@pytest.mark.parametrize(("name", "change", "named"), BAD, ids=[f"{name}-{named}" for name, _, named in BAD])
def test_bad_input_is_refused_by_name(name: str, change: Any, named: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(kv_quant_decode_attention, "launch", lambda *args, **kwargs: pytest.fail("launched"))
    shape = Shape(kv_heads=2, tokens=300, layout="paged", block_size=32)
    inputs = make_inputs(shape, np.random.default_rng(0), "cpu")
    with pytest.raises(ValueError, match=rf"^{named}.* must .*; "):
        run(**{**inputs, name: change(inputs)})


@pytest.mark.parametrize(("arguments", "named"), [(("int3", "token", 32), "element"), (("int4", "row", 32), "groups"),
                                                  (("int4", "token", 24), "group_size")])  # fmt: skip
def test_bad_formats_are_refused_by_name(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}="):
        QuantFormat(*arguments)
