"""Bytes of weights and of KV elements, scales of quantised weights included.

Weights, for a matrix of n outputs by k inputs:

- fp16, bf16: ``2·n·k``
- fp8, int8: ``n·k + 4·n`` (one fp32 scale per output channel, as vLLM and compressed-tensors store it)
- int4: ``n·k/2 + 4·n·ceil(k/128)`` (AWQ, GPTQ: an fp16 scale and an fp16 zero per group of 128 inputs), that is
  ``4 + 32/128 = 4.25`` bits = 0.53125 bytes per weight. Packing the zero in 4 bits would make it 4.16 bits.

KV elements have only bits here. Where the scales of a quantised KV cache lie is the policy's matter; by default:

- fp16, bf16: none
- fp8: none per element (one scale per tensor)
- int8, int4, int2: an fp16 scale and an fp16 minimum, 32 bits, per group of ``group_size_elements``
  (KIVI, arXiv:2402.02750: keys in groups along the tokens, values in groups along the channels).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from kvsim.errors import InputError

WeightDtype = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4"]
WEIGHT_DTYPES: tuple[str, ...] = get_args(WeightDtype)
ACTIVATION_DTYPES = ("fp32", "fp16", "bf16")
INT4_GROUP_SIZE = 128
"""Inputs that share a scale and a zero: AWQ (arXiv:2306.00978, section 5) and the usual GPTQ release."""
BYTES_16_BIT = 2
"""Embeddings, lm_head, norms and biases keep 16 bits whatever the matrices are quantised to."""
BYTES_32_BIT = 4

KV_DTYPES: Mapping[str, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4, "int2": 2}
"""Bits of one stored KV element, without scales."""
KV_GROUP_SCALE_BITS: Mapping[str, int] = {"fp32": 0, "fp16": 0, "bf16": 0, "fp8": 0, "int8": 32, "int4": 32, "int2": 32}
"""Bits of scale and minimum per group in the default layout."""


def check_weight_dtype(dtype: str, field: str = "weight_dtype") -> str:
    """The dtype itself; InputError if it is none of WEIGHT_DTYPES."""
    if dtype not in WEIGHT_DTYPES:
        raise InputError(field, dtype, f"must be one of {', '.join(WEIGHT_DTYPES)}")
    return dtype


def check_kv_dtype(dtype: str, field: str = "kv_dtype") -> str:
    """The dtype itself; InputError if it is none of KV_DTYPES."""
    if dtype not in KV_DTYPES:
        raise InputError(field, dtype, f"must be one of {', '.join(KV_DTYPES)}")
    return dtype


def activation_dtype(weight_dtype: str) -> str:
    """The dtype of activations, embeddings and an unquantised cache beside such weights: fp32, fp16, or else bf16."""
    return check_weight_dtype(weight_dtype) if weight_dtype in ACTIVATION_DTYPES else "bf16"


def activation_bytes(weight_dtype: str) -> int:
    """Bytes of an activation beside such weights: 4 where everything is in fp32, as CPUs decode, else 2."""
    return BYTES_32_BIT if check_weight_dtype(weight_dtype) == "fp32" else BYTES_16_BIT


def matrix_bytes(n: int, k: int, weight_dtype: str) -> float:
    """Bytes of an n × k weight matrix (n outputs, k inputs), scales included."""
    check_weight_dtype(weight_dtype)
    if weight_dtype in ACTIVATION_DTYPES:
        return float(activation_bytes(weight_dtype) * n * k)
    if weight_dtype in ("fp8", "int8"):
        return float(n * k + 4 * n)
    return n * k / 2 + 4 * n * math.ceil(k / INT4_GROUP_SIZE)


def weight_bytes_per_element(weight_dtype: str) -> float:
    """Bytes per weight of a large matrix: 4, 2, 1 (channel scales vanish) or 0.53125."""
    check_weight_dtype(weight_dtype)
    if weight_dtype == "int4":
        return 0.5 + 4 / INT4_GROUP_SIZE
    return 1.0 if weight_dtype in ("fp8", "int8") else float(activation_bytes(weight_dtype))


def compute_dtype(weight_dtype: str, activation_dtype: str = "bf16") -> str:
    """The dtype in which a GEMM with such weights multiplies: int4 weights are unpacked to 16 bits (AWQ, GPTQ, Marlin).

    fp8 and int8 mean W8A8, both operands in 8 bits; ``Gpu.peak_flops`` falls back where the GPU has no such units.
    """
    check_weight_dtype(weight_dtype)
    return activation_dtype if weight_dtype == "int4" else weight_dtype


def kv_bytes_per_element(kv_dtype: str) -> float:
    """Bytes of one KV element without scales: 4, 2, 1, 0.5 or 0.25."""
    return KV_DTYPES[check_kv_dtype(kv_dtype)] / 8


def kv_bits_with_scales(kv_dtype: str, group_size_elements: int) -> float:
    """Bits per KV element in the default scale layout: KIVI's 2 bits in groups of 32 take 2 + 32/32 = 3."""
    check_kv_dtype(kv_dtype)
    if isinstance(group_size_elements, bool) or not isinstance(group_size_elements, int) or group_size_elements < 1:
        raise InputError("group_size_elements", group_size_elements, "must be a whole number >= 1")
    return KV_DTYPES[kv_dtype] + KV_GROUP_SCALE_BITS[kv_dtype] / group_size_elements
