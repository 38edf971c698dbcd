"""The datasheet profile: rooflines that respect the datasheet, and the socket that all profiles share."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.datasheet import DECODE_TILE_ROWS, DatasheetProfile, kv_format_class, sustained_rate, usual_peak
from kvsim.efficiencies import load_efficiencies
from kvsim.errors import InputError
from kvsim.hardware import list_gpus, load_gpu
from kvsim.ops import (
    Collective,
    Copy,
    DecodeAttention,
    Elementwise,
    Gemm,
    HostWork,
    LogitFilter,
    MixedAttention,
    Op,
    PolicyKernel,
    PrefillAttention,
)
from kvsim.profile import QUANTILE_LEVELS, SOURCES, biased, draw_biases, log_bias_at

GPU_NAMES = ("a100-sxm-80gb", "h100-sxm-80gb", "l4-24gb", "t4-16gb")
PROFILES = {name: DatasheetProfile(load_gpu(name)) for name in list_gpus()}
A100 = PROFILES["a100-sxm-80gb"]

PREFILL = PrefillAttention(512, 1024, 32, 8, 128, "bf16")
DECODE = DecodeAttention(16, 32, 8, 128, kv_slots=16 * 8 * 2000, max_kv_tokens=2000, slot_bytes=512.0)
ONE_OF_EACH: tuple[Op, ...] = (
    *(Gemm(16, 4096, 4096, dtype) for dtype in ("fp16", "bf16", "fp8", "int8", "int4")),
    PREFILL, DECODE, replace(DECODE, kv_format="fp8", slot_bytes=256.0),
    replace(DECODE, kv_format="kivi2", slot_bytes=96.0),
    MixedAttention(PREFILL, DECODE), Elementwise("norm", 10**6), LogitFilter("pytorch", "top_p", 64, 128_256),
    LogitFilter("triton", "top_k", 64, 128_256), LogitFilter("flashinfer", "top_k_top_p", 64, 128_256), Collective("all_reduce", 2**17, 4),
    Collective("all_gather", 2**17, 2, eager=True), Copy("hbm", 10**8), Copy("host", 10**8),
    PolicyKernel("score", 1e8, 1e8, 32),
    HostWork("vllm_v0", "schedule", 32), HostWork("vllm_v1", "prepare", 32), HostWork("huggingface", "launch", 1000),
    HostWork("vllm_v0", "eager_launch", 400), HostWork("vllm_v1", "eager_launch", 400),
)  # fmt: skip

sizes = st.integers(1, 20_000)
counts = st.integers(1, 300)
heads = st.sampled_from([(32, 8), (32, 32), (8, 1), (64, 8)])
gpu_names = st.sampled_from(GPU_NAMES)


def seconds(profile: DatasheetProfile, op: Op, hbm_share: float = 1.0) -> float:
    return profile.answer(op, hbm_share).seconds


def assert_grows(profile: DatasheetProfile, op: Op, field: str, step: int) -> None:
    larger = replace(op, **{field: getattr(op, field) + step})
    assert seconds(profile, larger) >= seconds(profile, op) * (1 - 1e-12), field


@pytest.mark.parametrize("name", list_gpus())
@pytest.mark.parametrize("op", ONE_OF_EACH, ids=lambda op: f"{op.kind}-{getattr(op, 'engine', '')}")
def test_every_op_is_answered_on_every_gpu_with_source_and_error(name: str, op: Op) -> None:
    profile = PROFILES[name]
    answer = profile.answer(op)
    assert 0 < answer.seconds < 10 and math.isfinite(answer.seconds)
    assert answer.source.split(":")[0] in SOURCES and answer.source.split(": ", 1)[1]
    assert list(answer.log_bias) == sorted(answer.log_bias) and answer.log_bias[0] < 0 < answer.log_bias[3]
    assert profile.log_biases[op.kind, answer.size_class] == answer.log_bias


@given(gpu_names, sizes, sizes, sizes, st.sampled_from(["bf16", "fp8", "int8", "int4"]), st.integers(1, 500))
def test_gemm_grows_with_every_dimension(name: str, m: int, n: int, k: int, dtype: str, step: int) -> None:
    for field in ("m", "n", "k"):
        assert_grows(PROFILES[name], Gemm(m, n, k, dtype), field, step)


@given(gpu_names, sizes, st.integers(0, 100_000), heads, st.integers(1, 500))
def test_prefill_grows_with_new_and_prior_tokens(
    name: str, new: int, prior: int, h: tuple[int, int], step: int
) -> None:
    op = PrefillAttention(new, prior, *h, 128, "bf16")
    for field in ("new_tokens", "prior_tokens"):
        assert_grows(PROFILES[name], op, field, step)


@st.composite
def decodes(draw: st.DrawFn) -> DecodeAttention:
    batch, (q_heads, kv_heads) = draw(counts), draw(heads)
    mean, longest = draw(st.integers(0, 50_000)), draw(st.integers(0, 200_000))
    form, slot_bytes = draw(
        st.sampled_from([("bf16", 512.0), ("fp8", 256.0), ("kivi2", 96.0), ("bf16+think80", 320.0)])
    )
    return DecodeAttention(batch, q_heads, kv_heads, 128, mean * batch * kv_heads, longest, slot_bytes, form)


@given(gpu_names, decodes(), st.integers(1, 10_000))
def test_decode_grows_with_slots_and_the_longest(name: str, op: DecodeAttention, step: int) -> None:
    for field in ("kv_slots", "max_kv_tokens"):
        assert_grows(PROFILES[name], op, field, step)


@given(gpu_names, decodes(), counts)
def test_decode_grows_with_sequences_of_the_same_length(name: str, op: DecodeAttention, more: int) -> None:
    op = replace(op, max_kv_tokens=op.kv_slots // (op.batch * op.kv_heads))
    wider = replace(op, batch=op.batch + more, kv_slots=op.kv_slots // op.batch * (op.batch + more))
    assert seconds(PROFILES[name], wider) >= seconds(PROFILES[name], op) * (1 - 1e-12)


@given(gpu_names, decodes(), sizes, st.integers(1, 10_000))
def test_mixed_grows_and_is_never_below_its_prefill(name: str, decode: DecodeAttention, new: int, step: int) -> None:
    profile, prefill = PROFILES[name], PrefillAttention(new, 0, decode.q_heads, decode.kv_heads, 128, "bf16")
    op = MixedAttention(prefill, decode)
    assert seconds(profile, op) >= seconds(profile, prefill)
    for larger in (
        replace(op, prefill=replace(prefill, new_tokens=new + step)),
        replace(op, decode=replace(decode, kv_slots=decode.kv_slots + step)),
    ):
        assert seconds(profile, larger) >= seconds(profile, op) * (1 - 1e-12)


@given(gpu_names, st.integers(0, 10**10), st.integers(1, 10**8))
def test_streams_links_and_host_grow(name: str, size: int, step: int) -> None:
    profile = PROFILES[name]
    assert_grows(profile, Elementwise("norm", size), "bytes_moved", step)
    assert_grows(profile, PolicyKernel("k", size, size), "bytes_moved", step)
    assert_grows(profile, PolicyKernel("k", size, size), "flops", step)
    assert_grows(profile, PolicyKernel("k", size), "num_launches", 1)
    for link in ("hbm", "host"):
        assert_grows(profile, Copy(link, size), "num_bytes", step)
    for collective in ("all_reduce", "all_gather"):
        for num_gpus in (1, 2, 4):
            assert_grows(profile, Collective(collective, size, num_gpus), "message_bytes", step)
            assert_grows(profile, Collective(collective, size, num_gpus), "num_gpus", num_gpus)
    assert_grows(profile, HostWork("vllm_v0", "schedule", size % 500), "batch", step)


@pytest.mark.parametrize("name", list_gpus())
def test_no_faster_than_the_datasheet_when_cold_and_large(name: str) -> None:
    """Decimal bytes per second: 2039 GB/s is 2.039e12, so 2039 binary gigabytes would take longer than a second."""
    gpu, profile = load_gpu(name), PROFILES[name]
    tera = 10**12
    ideal = tera / gpu.hbm_bandwidth_bytes_per_s
    assert ideal <= seconds(profile, Elementwise("x", tera)) < 3 * ideal
    assert 2 * ideal <= seconds(profile, Copy("hbm", tera)) < 3 * ideal
    assert ideal <= seconds(profile, PolicyKernel("k", tera)) < 3 * ideal
    assert (
        tera / gpu.host_link_bytes_per_s
        <= seconds(profile, Copy("host", tera))
        < 1.3 * tera / gpu.host_link_bytes_per_s
    )
    for form, slot_bytes in (("bf16", 512.0), ("fp8", 256.0), ("int4", 144.0)):
        slots = round(tera / slot_bytes)
        op = DecodeAttention(64, 32, 8, 128, slots, slots // 512, slot_bytes, form)
        products_s = 4.0 * slots * op.head_dim * DECODE_TILE_ROWS / usual_peak(gpu, "bf16")  # queries of a group, padded to a tile
        assert ideal <= seconds(profile, op) < max(4 * ideal, 2.5 * products_s)
    n = 2**15
    for dtype, element_bytes in (("bf16", 2), ("fp8", 1), ("int8", 1), ("int4", 0.53125)):
        weight_bytes_s = element_bytes * n * n / gpu.hbm_bandwidth_bytes_per_s
        assert weight_bytes_s <= seconds(profile, Gemm(1, n, n, dtype)) < 2.5 * weight_bytes_s
        operands = dtype if dtype in gpu.peak_flops_per_s and dtype != "int4" else "bf16"  # others are widened
        product_s, flops = seconds(profile, Gemm(n, n, n, dtype)), 2 * n**3
        assert product_s >= flops / (sustained_rate(gpu, operands) or gpu.peak_flops(operands))
        assert product_s < 3 * flops / usual_peak(gpu, operands)
    prefill = PrefillAttention(2**17, 0, 32, 8, 128, "bf16")
    assert prefill.flops / gpu.peak_flops("bf16") <= seconds(profile, prefill) < 3 * prefill.flops / usual_peak(gpu, "bf16")
    assert seconds(profile, MixedAttention(prefill, DECODE)) > seconds(profile, prefill)


@pytest.mark.parametrize("name", list_gpus())
@pytest.mark.parametrize(("kv_format", "slot_bytes"), [("bf16", 512.0), ("fp8", 256.0), ("int4", 144.0)])
def test_what_binds_a_decode_kernel_is_what_it_takes(name: str, kv_format: str, slot_bytes: float) -> None:
    """`terms`, which plans ask, and the time itself; 16-bit kernels multiply as quickly as prompts' kernels do."""
    physics = DatasheetProfile(load_gpu(name))
    op = DecodeAttention(64, 32, 8, 128, 64 * 8 * 2**17, 2**17, slot_bytes, kv_format)
    assert physics.answer(op).seconds == pytest.approx(max(physics.terms(op)), rel=0.02)
    if kv_format == "bf16":
        prompt = PrefillAttention(2**17, 0, 32, 8, 128, "bf16")
        rate = prompt.flops / physics.terms(prompt)[1]
        assert physics.terms(op)[1] == pytest.approx(4.0 * op.kv_slots * op.head_dim * DECODE_TILE_ROWS / rate, rel=0.02)


@pytest.mark.parametrize(
    "op", [Elementwise("x", 10**11), Copy("hbm", 10**11), PolicyKernel("k", 1e11), replace(DECODE, kv_slots=10**9)]
)
def test_half_the_hbm_takes_twice_the_bandwidth_term(op: Op) -> None:
    assert seconds(A100, op, 0.5) == pytest.approx(2 * seconds(A100, op), rel=1e-3)  # launches are microseconds


@pytest.mark.parametrize(
    "op", [Copy("host", 10**9), Collective("all_reduce", 10**6, 8), HostWork("vllm_v0", "sample", 9)]
)
def test_links_and_host_do_not_see_the_hbm(op: Op) -> None:
    assert seconds(A100, op, 0.25) == seconds(A100, op)


@given(decodes(), st.floats(0.05, 1.0))
def test_less_bandwidth_is_never_faster(op: DecodeAttention, share: float) -> None:
    assert seconds(A100, op, share) >= seconds(A100, op)
    assert seconds(A100, Gemm(op.batch, 4096, 4096, "bf16"), share) >= seconds(A100, Gemm(op.batch, 4096, 4096, "bf16"))


def test_collectives_across_links() -> None:
    assert seconds(A100, Collective("all_reduce", 10**6, 1)) == 0.0
    eager, graph = (seconds(A100, Collective("all_reduce", 4096, 8, eager=e)) for e in (True, False))
    assert eager > 2 * graph  # serving physics, item 8: 21-44 us against 4-6 us
    assert 3e-6 < graph < 10e-6
    linked, pcie = (PROFILES[n].answer(Collective("all_reduce", 10**8, 4)) for n in ("a100-sxm-80gb", "l4-24gb"))
    assert pcie.seconds > 3 * linked.seconds
    assert pcie.size_class == "pcie"


@settings(max_examples=50)
@given(decodes(), st.floats(0.0, 1.0))
def test_linear_interpolation_between_kv_knots_is_within_one_percent(op: DecodeAttention, where: float) -> None:
    knots = A100.kv_knots(op)
    assert knots[0] in (0, 1) and knots[-1] >= 2**32 and list(knots) == sorted(set(knots))
    i = min(int(where * (len(knots) - 1)), len(knots) - 2)
    low, high = knots[i], knots[i + 1]
    middle = (low + high) // 2
    # the longest sequence is held apart: DESIGN cuts pieces where it changes
    at = {k: seconds(A100, replace(op, kv_slots=k, max_kv_tokens=0)) for k in (low, middle, high)}
    line = at[low] + (at[high] - at[low]) * (middle - low) / (high - low)
    assert line == pytest.approx(at[middle], rel=0.01)


def test_kv_formats() -> None:
    assert [kv_format_class(f) for f in ("bf16", "fp16", "fp8", "fp8_e4m3")] == ["16bit", "16bit", "fp8", "fp8"]
    assert {kv_format_class(f) for f in ("int8", "int4", "kivi2", "bf16+think80", "kivi4+think60")} == {"subbyte"}
    full, fp8 = DECODE, replace(DECODE, kv_format="fp8", slot_bytes=256.0)
    large = 10**8  # slots; serving physics, item 6: fp8 KV is 1.08-1.9 times as fast, never 2
    assert 1.08 < seconds(A100, replace(full, kv_slots=large)) / seconds(A100, replace(fp8, kv_slots=large)) < 1.9
    assert A100.answer(replace(DECODE, kv_format="kivi2")).source.startswith("assumed")


@pytest.mark.parametrize(
    "op",
    [
        Gemm(1, 2, 3, "bf17"), replace(DECODE, kv_format="float"), replace(PREFILL, kv_dtype="x"),
        Copy("ib", 1), Collective("broadcast", 1, 2), HostWork("orca", "schedule", 1), HostWork("vllm_v0", "nap", 1),
    ],
)  # fmt: skip
def test_unknown_names_are_input_errors(op: Op) -> None:
    with pytest.raises(InputError):
        A100.answer(op)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, math.nan])
def test_bad_hbm_share(share: float) -> None:
    with pytest.raises(InputError, match="hbm_share"):
        A100.answer(DECODE, share)


def test_biased_multiplies_exactly_by_class_then_by_kind() -> None:
    size_class = A100.answer(DECODE).size_class
    profile = biased(A100, {("decode_attention", size_class): 1.25, "decode_attention": 3.0, "gemm": 0.5})
    assert profile.answer(DECODE).seconds == 1.25 * seconds(A100, DECODE)
    other = replace(DECODE, kv_format="fp8")
    assert profile.answer(other, 0.5).seconds == 3.0 * seconds(A100, other, 0.5)
    assert profile.answer(Gemm(1, 64, 64, "bf16")).seconds == 0.5 * seconds(A100, Gemm(1, 64, 64, "bf16"))
    assert profile.answer(PREFILL) == A100.answer(PREFILL)
    assert profile.kv_knots(DECODE) == A100.kv_knots(DECODE) and profile.name == A100.name


def test_drawn_biases_have_the_quantiles_they_were_given() -> None:
    """Share of draws below each quantile: binomial, so within 4 standard errors of its level."""
    biases = {("a", "x"): (-0.5, -0.2, 0.1, 0.9), ("b", "y"): (-0.1, -0.05, 0.05, 0.1)}
    rng, num_draws = np.random.default_rng(1), 4000
    drawn = [draw_biases(biases, rng) for _ in range(num_draws)]
    for key, quantiles in biases.items():
        logs = np.log([d[key] for d in drawn])
        for level, quantile in zip(QUANTILE_LEVELS, quantiles, strict=True):
            assert abs(np.mean(logs <= quantile) - level) < 4 * math.sqrt(level * (1 - level) / num_draws)
    correlation = np.corrcoef([[math.log(d[key]) for key in biases] for d in drawn], rowvar=False)[0, 1]
    assert abs(correlation) < 4 / math.sqrt(num_draws)  # kinds are independent


def test_classes_of_one_kind_share_the_draw_and_a_seed_repeats() -> None:
    drawn = draw_biases(A100.log_biases, np.random.default_rng(7))
    assert drawn == draw_biases(A100.log_biases, np.random.default_rng(7))
    assert set(drawn) == set(A100.log_biases)
    z = NormalDist().inv_cdf(0.84)
    assert log_bias_at((-0.4, -0.2, 0.3, 0.6), z) == pytest.approx(0.3)
    same = draw_biases(
        {("a", "x"): (-0.4, -0.2, 0.2, 0.4), ("a", "y"): (-0.4, -0.2, 0.2, 0.4)}, np.random.default_rng(3)
    )
    assert same["a", "x"] == same["a", "y"]


def test_every_efficiency_names_its_source_and_is_a_fraction_where_it_says_so() -> None:
    efficiencies = load_efficiencies()
    assert set(efficiencies.sources) == set(efficiencies.values)
    for name, value in efficiencies.values.items():
        assert efficiencies.sources[name].startswith(SOURCES)
        if name.rsplit(".", 1)[-1] in ("memory_frac", "compute_frac", "hbm_frac", "host_frac", "bus_frac"):
            assert 0 < value <= 1, name
    with pytest.raises(InputError, match=r"efficiencies\.no\.such"):
        efficiencies["no.such"]


def test_the_profile_imports_nothing_heavy() -> None:
    code = "import sys, kvsim.datasheet; print([m for m in ('numpy', 'scipy', 'torch', 'pandas') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "scipy" not in shown and "torch" not in shown and "pandas" not in shown


def test_the_fit_script_says_when_the_measured_rows_are_absent(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "fit_datasheet_efficiencies.py"
    done = subprocess.run([sys.executable, script, "--measured", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "absent" in done.stderr
