"""Bytes of weights and KV elements, against arithmetic done by hand."""

import pytest

from kvsim import dtypes
from kvsim.errors import InputError


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
