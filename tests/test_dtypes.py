"""Bytes of weights and KV elements, against arithmetic done by hand."""

import pytest

from kvsim import dtypes
from kvsim.datasheet import DatasheetProfile
from kvsim.errors import InputError
from kvsim.forward import head_ops, linear_ops
from kvsim.hardware import load_gpu
from kvsim.model import load_model
from kvsim.ops import DecodeAttention, Elementwise, Gemm, PrefillAttention


def test_int4_matrix_counts_packed_weights_and_one_scale_and_zero_per_group():
    assert dtypes.matrix_bytes(4096, 4096, "int4") == 4096 * 4096 / 2 + 4096 * (4096 // 128) * (2 + 2)
    assert dtypes.matrix_bytes(4096, 4096, "int4") == 4096 * 4096 * dtypes.weight_bytes_per_element("int4")


def test_int4_rounds_groups_up_when_inputs_are_no_multiple_of_128():
    assert dtypes.matrix_bytes(10, 130, "int4") == 10 * 65 + 10 * 2 * 4


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_channel_scales_are_counted_but_negligible(dtype):
    num_bytes = dtypes.matrix_bytes(4096, 4096, dtype)
    assert num_bytes == 4096 * 4096 + 4 * 4096
    assert num_bytes == pytest.approx(4096 * 4096, rel=1e-3)


def test_sixteen_bit_weights():
    assert dtypes.matrix_bytes(3, 5, "fp16") == dtypes.matrix_bytes(3, 5, "bf16") == 30


def test_kv_bits():
    assert [dtypes.KV_DTYPES[name] for name in ("fp16", "bf16", "fp8", "int8", "int4", "int2")] == [16, 16, 8, 8, 4, 2]
    assert dtypes.kv_bytes_per_element("int2") == 0.25
    assert dtypes.KV_GROUP_SCALE_BITS.keys() == dtypes.KV_DTYPES.keys()


def test_kv_bits_with_scales_of_kivi_and_of_fp8():
    assert dtypes.kv_bits_with_scales("int2", 32) == 3.0
    assert dtypes.kv_bits_with_scales("int4", 128) == 4.25
    assert dtypes.kv_bits_with_scales("fp8", 32) == 8.0


def test_compute_dtype_unpacks_int4_only():
    assert dtypes.compute_dtype("int4") == "bf16"
    assert dtypes.compute_dtype("int4", "fp16") == "fp16"
    assert dtypes.compute_dtype("fp8") == "fp8"


@pytest.mark.parametrize(
    "call",
    [
        lambda: dtypes.matrix_bytes(1, 1, "int2"),
        lambda: dtypes.kv_bytes_per_element("int3"),
        lambda: dtypes.kv_bits_with_scales("int4", 0),
        lambda: dtypes.kv_bits_with_scales("int4", 32.0),
    ],
)
def test_bad_input_is_one_line(call):
    with pytest.raises(InputError) as error:
        call()
    assert "must be" in str(error.value) and "\n" not in str(error.value)


def test_fp32_doubles_weights_cache_and_activations():
    assert dtypes.matrix_bytes(3, 5, "fp32") == 60 and dtypes.weight_bytes_per_element("fp32") == 4.0
    assert dtypes.kv_bytes_per_element("fp32") == 4.0 and dtypes.compute_dtype("fp32") == "fp32"
    assert [dtypes.activation_dtype(name) for name in dtypes.WEIGHT_DTYPES] == ["fp32", "fp16", "bf16", "bf16", "bf16", "bf16"]
    assert [dtypes.activation_bytes(name) for name in dtypes.WEIGHT_DTYPES] == [4, 2, 2, 2, 2, 2]
    model = load_model("llama-3.1-8b")
    assert model.weight_bytes("fp32") == 2 * model.weight_bytes("bf16")
    pairs = zip(linear_ops(model, 1, "fp32", 7), linear_ops(model, 1, "bf16", 7), strict=True)
    for (times, wide), (same_times, narrow) in pairs:
        assert times == same_times
        if isinstance(wide, Elementwise):
            assert wide.bytes_moved == 2 * narrow.bytes_moved
        else:
            assert (wide.weight_dtype, narrow.weight_dtype) == ("fp32", "bf16")
    head, *_ = head_ops(model, 1, 4, weight_dtype="fp32")
    assert head[1].weight_dtype == "fp32"


def test_fp32_is_answered_by_the_datasheet_and_slower_than_16_bits():
    profile = DatasheetProfile(load_gpu("a100"))
    for m in (1, 64, 4096):
        assert profile.answer(Gemm(m, 4096, 4096, "fp32")).seconds > 1.3 * profile.answer(Gemm(m, 4096, 4096, "bf16")).seconds
    wide, narrow = (DecodeAttention(8, 32, 8, 128, 8 * 8 * 4096, 4096, size, name) for size, name in ((1024.0, "fp32"), (512.0, "bf16")))
    assert 1.5 < profile.answer(wide).seconds / profile.answer(narrow).seconds < 2.1
    prompts = [profile.answer(PrefillAttention(2048, 0, 32, 8, 128, name)).seconds for name in ("fp32", "bf16")]
    assert prompts[0] > 5 * prompts[1]
