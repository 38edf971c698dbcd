"""Measured profiles: tables against scipy's interpolation, fits against a truth that is known, files, and the chain of fallbacks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from kvsim.api import simulate
from kvsim.calibrate.build import build, error_classes
from kvsim.calibrate.fit import fit_rows, fold_numbers, term_specs
from kvsim.calibrate.grid import TermSpec, evaluate, fit_correction
from kvsim.calibrate.report_command import Comparison
from kvsim.calibrate.rows import Import, at_means, shape_group
from kvsim.cli import main
from kvsim.coordinates import ELEMENTWISE_NAMES, POOLED, locate
from kvsim.correction import Correction, Term
from kvsim.datasheet import BEST_OF_PEAK, UNPACKED_ROWS, DatasheetProfile
from kvsim.efficiencies import load_efficiencies
from kvsim.engines import VllmV1
from kvsim.errors import InputError
from kvsim.forward import linear_ops
from kvsim.hardware import list_gpus, load_gpu
from kvsim.measured import DVFS_EXPONENT, KERNEL_SIGMA, MeasuredProfile, widened
from kvsim.model import load_model
from kvsim.ops import DecodeAttention, Elementwise, Gemm, HostWork, MixedAttention, Op, PrefillAttention
from kvsim.profile import Answer
from kvsim.profile_file import ProfileFile, dump_profile_file, load_profile_file, shipped
from kvsim.profiles import load_profile
from kvsim.result import Band
from kvsim.scenario import parse_scenario
from kvsim.uncertainty import error_bands
from kvsim.units import GIB

A100, H100, L4 = (load_gpu(name) for name in ("a100-sxm", "h100-sxm", "l4"))
DECODE = DecodeAttention(16, 32, 8, 128, kv_slots=16 * 8 * 2000, max_kv_tokens=2000, slot_bytes=512.0)
MAX_BYTES = 400_000


# -- tables -------------------------------------------------------------------------------------------------------------


def random_term(rng: np.random.Generator, axes: int) -> Term:
    knots = [np.sort(rng.uniform(0, 10, rng.integers(1 if axes > 1 else 2, 6))) for _ in range(axes)]
    return Term(range(axes), knots, rng.normal(size=math.prod(map(len, knots))))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_terms_interpolate_as_scipy_does(axes: int) -> None:
    rng = np.random.default_rng(axes)
    for _ in range(20):
        term = random_term(rng, axes)
        long = [i for i, knots in enumerate(term.knots) if len(knots) > 1]
        values = np.array(term.values).reshape([len(knots) for knots in term.knots])
        if not long:
            continue
        oracle = RegularGridInterpolator([term.knots[i] for i in long], values.squeeze())
        for place in rng.uniform(-2, 12, (20, axes)):
            inside = [float(np.clip(place[i], term.knots[i][0], term.knots[i][-1])) for i in long]
            assert term.at(place) == pytest.approx(float(oracle(inside)[0]), abs=1e-12)


def test_a_line_along_an_axis_equals_the_points_on_it() -> None:
    rng = np.random.default_rng(5)
    for shift in (None, (0.5, -0.25, 0.0)):
        correction = Correction([random_term(rng, 3), Term((2, 0), [[0.0, 4.0], [1.0, 3.0, 9.0]], rng.normal(size=6))], shift)
        for axis in range(3):
            place = rng.uniform(0, 8, 3)
            sizes = rng.uniform(1, 500, 30)
            for size, ratio in zip(sizes, correction.along(axis, place, sizes.tolist()), strict=True):
                there = [math.log2(size) if i == axis else float(x) for i, x in enumerate(place)]
                assert ratio == pytest.approx(correction.at(there), abs=1e-12)


# -- fits ---------------------------------------------------------------------------------------------------------------

GRID = (np.arange(0.0, 8.0), np.arange(0.0, 6.0))


def bump(places: np.ndarray) -> np.ndarray:
    return 0.3 * np.sin(places[:, 0]) + 0.1 * places[:, 1]


def test_a_smooth_table_is_found_again_and_wild_rows_are_shrugged_off() -> None:
    rng = np.random.default_rng(1)
    places = np.column_stack([rng.uniform(0, 7, 4000), rng.uniform(0, 5, 4000)])
    ratios = bump(places) + rng.normal(0, 0.02, 4000)
    ratios[::200] += 2.0  # one row in 200 is seven times too slow
    found = fit_correction(places, ratios, [TermSpec((0, 1), GRID, (1e-3, 1e-3))])
    fresh = np.column_stack([rng.uniform(0, 7, 500), rng.uniform(0, 5, 500)])
    # Between knots a sine of amplitude 0.3 is at most 0.3/8 off its chord.
    assert np.abs(evaluate(found, fresh) - bump(fresh)).max() < 0.3 / 8 + 0.03
    assert evaluate(found, fresh[:50]) == pytest.approx([found.at(place) for place in fresh[:50]], abs=1e-9)


def test_where_no_rows_are_the_physics_stands() -> None:
    places = np.column_stack([np.zeros(100), np.linspace(0, 5, 100)])
    found = fit_correction(places, np.full(100, 0.5), [TermSpec((0, 1), GRID, (0.0, 0.0))])
    assert found.at((0.0, 2.0)) == pytest.approx(0.5, abs=1e-2) and abs(found.at((7.0, 2.0))) < 1e-6


def made_up(gpu: Any, sigma: float, rng: np.random.Generator) -> Import:
    """GEMMs and decode attention of a GPU whose times are the datasheet profile's, a smooth factor, and noise."""
    physics = DatasheetProfile(gpu)
    found = Import("made", "1", "made up")
    ops: list[Op] = [
        Gemm(m, n, k, "bf16") for n in (1024, 2048, 4096, 8192, 16384) for k in (1024, 2048, 4096, 8192) for m in 2 ** np.arange(13)
    ]
    for kv_heads, group in ((1, 1), (1, 4), (2, 4), (4, 4), (8, 1), (8, 4), (8, 8), (2, 8), (4, 1), (1, 8)):
        for batch in (1, 4, 16, 64):
            for tokens in (64, 512, 4096, 32768):
                slots = batch * kv_heads * tokens
                ops.append(DecodeAttention(batch, kv_heads * group, kv_heads, 128, slots, tokens, 512.0))
    for i, op in enumerate(ops):
        place = locate(op, gpu.num_sms)
        assert place is not None
        factor = math.exp(0.15 * math.sin(place.at[0]) + 0.05 * place.at[1] - 0.3 + rng.normal(0, sigma))
        found.add(op, 1.05 * physics.answer(op).seconds * max(factor, 1.0), f"made:{i}", gpu)
    return found


def test_held_out_errors_and_bands_of_a_made_up_gpu() -> None:
    rng = np.random.default_rng(2)
    found = made_up(A100, 0.03, rng)
    fit = fit_rows(A100, found.rows)
    for table in fit.tables.values():
        folds = fold_numbers(table.groups, 5)
        for group in set(table.groups):  # whole shapes are held out together
            assert len({fold for fold, other in zip(folds, table.groups, strict=True) if other == group}) == 1
        assert np.median(np.abs(table.residuals)) < 0.06
    classes = error_classes(A100, fit)
    for key, error in classes.items():
        rows = [t.residuals for k, t in fit.tables.items() if k[0] == key[0]]
        assert error.quantiles == tuple(sorted(error.quantiles)) and error.num_rows <= sum(map(len, rows))
    # The bands are quantiles of these very rows: about 68 % of all lie inside those of their class.
    inside = []
    physics = DatasheetProfile(A100)
    for (kind, _, _), table in fit.tables.items():
        for row, residual in zip(table.rows, table.residuals, strict=True):
            q = classes[kind, physics.answer(row.op).size_class].quantiles
            inside.append(q[1] <= residual <= q[2])
    assert np.mean(inside) == pytest.approx(0.68, abs=0.04)


@pytest.mark.parametrize(("tile_rows", "second", "further"), [(3, 1.0, 1.0), (3, 0.8, 0.4), (4, 1.0, 0.5), (8192, 1.0, 1.0)])
def test_a_cpu_that_reads_weights_for_every_few_rows_is_found_out(tile_rows: int, second: float, further: float) -> None:
    """From batches that a study runs: what lies between them, and on the other side of a step, follows."""
    law = {"gemm.fp32.tile_rows": float(tile_rows), "gemm.fp32.second_tile_reads": second, "gemm.fp32.tile_reads": further,
           "gemm.fp32.packed_reads": 1.0,
           "decode_attention.sequence_s": 4e-4, "decode_attention.launch_s": 2e-4, "decode_attention.memory_frac.16bit": 0.1}  # fmt: skip
    truth = DatasheetProfile(A100, load_efficiencies().replaced(law))
    found, rng = Import("made", "1", "made up"), np.random.default_rng(4)
    shapes = ((2048, 2048), (4096, 2048), (2048, 4096), (8192, 4096))
    ops: list[Op] = [Gemm(m, n, k, "fp32") for m in (1, 2, 3, 4, 6, 8, 16, 64, 256) for n, k in shapes]
    ops += [
        DecodeAttention(batch, 2 * heads, heads, 64, batch * heads * tokens, tokens, 512.0, "fp32")
        for batch in (1, 2, 3, 4, 6, 8) for heads in (2, 4, 8) for tokens in (64, 200, 500, 1200)
    ]  # fmt: skip
    for i, op in enumerate(ops):
        found.add(op, truth.answer(op).seconds * math.exp(rng.normal(0, 0.02)), f"made:{i}", A100)
    file, fit, _ = build(A100, found, "made up", sparse=True)
    assert fit.efficiencies["gemm.fp32.tile_rows"] == tile_rows
    assert fit.efficiencies["decode_attention.sequence_s"] == pytest.approx(4e-4, rel=0.1)
    fitted = MeasuredProfile(file, A100, A100)
    if tile_rows < UNPACKED_ROWS:
        assert fit.efficiencies["gemm.fp32.packed_reads"] == pytest.approx(1.0, rel=0.2)
        assert fit.efficiencies["gemm.fp32.second_tile_reads"] == pytest.approx(second, rel=0.2)
    unseen: list[Op] = [Gemm(m, 3072, 3072, "fp32") for m in (5, 7, 9, 12, 32, 128)]
    unseen.append(DecodeAttention(5, 10, 5, 64, 5 * 5 * 350, 350, 512.0, "fp32"))
    for op in unseen:
        assert fitted.answer(op).seconds == pytest.approx(truth.answer(op).seconds, rel=0.1), op


def test_packing_begins_behind_the_last_unpacked_row() -> None:
    """Of equal weights: tiles cost what further reads of them do, then packing is added to one read."""
    law = {"gemm.fp32.tile_rows": 3.0, "gemm.fp32.second_tile_reads": 0.8, "gemm.fp32.tile_reads": 0.4, "gemm.fp32.packed_reads": 1.5,
           "gemm.fp32.launch_s": 0.0, "gemm.fp32.compute_frac": 100.0}  # fmt: skip
    profile = DatasheetProfile(A100, load_efficiencies().replaced(law))
    once = profile.answer(Gemm(1, 8192, 8192, "fp32")).seconds
    reads = [profile.answer(Gemm(m, 8192, 8192, "fp32")).seconds / once for m in (3, 4, 7, UNPACKED_ROWS, UNPACKED_ROWS + 1)]
    assert reads == pytest.approx([1, 1.8, 2.2, 3.0, 2.5], rel=0.01)


def test_kernels_of_a_forward_pass_have_tables_of_their_own_beside_one_for_all() -> None:
    """Of as many bytes one kernel takes four times what another takes. What has no name that forward passes use shares a table."""
    factors = {"norm": 1.0, "rope_and_kv_write": 4.0, "silu": 2.0}
    truth, found = DatasheetProfile(A100), Import("made", "1", "made up")
    for i, (name, size) in enumerate(product(factors, range(16, 26))):
        op = Elementwise(name, 2**size)
        found.add(op, factors[name] * truth.answer(op).seconds, f"made:{i}", A100)
    file, fit, _ = build(A100, found, "made up", sparse=True)
    assert {variant for _, variant, _ in fit.tables} == {POOLED, "norm", "rope_and_kv_write"}
    assert sum(error.num_rows for error in file.errors.values()) == 30, "every row counts once"
    profile = MeasuredProfile(file, A100, A100)

    def ratio(name: str) -> float:
        op = Elementwise(name, 3 * 2**20)
        return profile.answer(op).seconds / truth.answer(op).seconds

    assert ratio("norm") == pytest.approx(1.0, rel=0.05) and ratio("rope_and_kv_write") == pytest.approx(4.0, rel=0.05)
    assert ratio("activation") == pytest.approx(2.0, rel=0.2) and ratio("activation") == ratio("add") == ratio("silu")
    measured, carried = (profile.answer(Elementwise(name, 3 * 2**20)) for name in ("norm", "activation"))
    assert measured.source.startswith("measured") and "from other kernels" in carried.source
    assert carried.log_bias[2] > 0.5 > 10 * measured.log_bias[2]
    assert all(profile.answer(Elementwise(name, 2**20)).size_class in {c for _, c in profile.log_biases} for name in ("norm", "add"))


def test_ways_of_attending_and_steps_of_policies_have_tables_of_their_own() -> None:
    """Padded heads take twice as long here and a policy's steps three times. What has no table is answered by what others have."""
    truth, found = DatasheetProfile(A100), Import("made", "1", "made up")

    def attend(slots: int, layout: str) -> DecodeAttention:
        return DecodeAttention(4, 8, 2, 64, slots, slots // 8, 512.0, "fp32", layout)

    for size in range(8, 16):
        timed: list[tuple[Op, int]] = [(attend(2**size, "paged"), 1), (attend(2**size, "padded"), 2)]
        timed += [(HostWork("torch_decoder", "step", 2 ** (size - 8), variant), 1 + 2 * bool(variant)) for variant in ("", "kv_compress")]
        timed += [(PrefillAttention(2 ** (size - 4), 64, 8, 2, 64, "fp32", stored=stored), 1 + bool(stored)) for stored in ("", "int8")]
        for op, factor in timed:
            found.add(op, factor * truth.answer(op).seconds, f"made:{size}", A100)
    profile = MeasuredProfile(build(A100, found, "made up", sparse=True)[0], A100, A100)

    def ratio(op: Op) -> float:
        return profile.answer(op).seconds / truth.answer(op).seconds

    assert ratio(attend(5000, "paged")) == ratio(attend(5000, "contiguous")) == pytest.approx(1, rel=0.05)
    assert ratio(attend(5000, "padded")) == pytest.approx(2, rel=0.05) and ratio(attend(5000, "turned")) == ratio(attend(5000, "paged"))
    steps = {variant: HostWork("torch_decoder", "step", 11, variant) for variant in ("", "kv_compress", "fp8")}
    assert ratio(steps[""]) == ratio(steps["fp8"]) == pytest.approx(1, rel=0.05)
    assert ratio(steps["kv_compress"]) == pytest.approx(3, rel=0.05)
    carried = {
        "from plain launches": attend(5000, "turned"), "from steps of other policies": steps["fp8"],
    }  # fmt: skip
    chunks = {stored: PrefillAttention(100, 64, 8, 2, 64, "fp32", stored=stored) for stored in ("", "int8", "kivi2")}
    assert ratio(chunks["int8"]) == pytest.approx(2, rel=0.05)
    assert profile.answer(chunks["kivi2"]).seconds == profile.answer(chunks[""]).seconds, "as exact as what is computed with"
    for reason, op in (*carried.items(), ("from plain launches", chunks["kivi2"])):
        answer = profile.answer(op)
        assert reason in answer.source and (op.kind, answer.size_class) in profile.log_biases, "or uncertainty would leave it as it is"
        assert profile.log_biases[op.kind, answer.size_class][2] >= answer.log_bias[2] > 0.1
    beyond = profile.answer(HostWork("torch_decoder", "step", 4096))
    assert "beyond the table" in beyond.source and profile.answer(steps["fp8"]).log_bias[2] > 0.9 * KERNEL_SIGMA
    assert profile.log_biases["host", beyond.size_class][2] < 0.9 * KERNEL_SIGMA, "not of other policies' steps"


def test_single_rows_of_many_kernels_still_tell_the_physics() -> None:
    found = Import("made", "1", "made up")
    for i, name in enumerate(ELEMENTWISE_NAMES):
        op = Elementwise(name, 2 ** (18 + 2 * i))
        found.add(op, 3 * DatasheetProfile(A100).answer(op).seconds, f"made:{i}", A100)
    fit = fit_rows(A100, found.rows, sparse=True)
    assert fit.tables.keys() == {("elementwise", POOLED, 0)}
    assert fit.efficiencies["elementwise.memory_frac"] < 0.5 * load_efficiencies()["elementwise.memory_frac"]


def test_named_kernels_are_those_of_forward_passes() -> None:
    model = load_model("qwen3-8b")
    ops = [op for _, op in linear_ops(model, 1, "bf16", 7)] + list(VllmV1().sampler_ops(7, model.vocab_size, 2))
    assert {op.name for op in ops if isinstance(op, Elementwise)} == set(ELEMENTWISE_NAMES)


def test_means_add_up_to_the_whole() -> None:
    """Fits of logarithms to single noisy times fall short of their sum."""
    rng, found, single = np.random.default_rng(0), Import("made", "1", "made up"), Import("made", "1", "made up")
    ops = [Elementwise("norm", 2**size) for size in range(16, 26)]
    for i, (op, _) in enumerate(product(ops, range(200))):
        seconds = DatasheetProfile(A100).answer(op).seconds * rng.lognormal(0, 0.5)
        single.add(op, seconds, f"made:{i}", A100)
    found.rows = at_means(single.rows)
    assert [row.op for row in found.rows] == [row.op for row in single.rows]

    def predicted_over_measured(rows: Import) -> float:
        profile = MeasuredProfile(build(A100, rows, "made up", sparse=True)[0], A100, A100)
        return sum(profile.answer(row.op).seconds for row in single.rows) / sum(row.seconds for row in single.rows)

    assert predicted_over_measured(found) == pytest.approx(1.0, abs=0.02)
    assert predicted_over_measured(single) < 0.95


def test_terms_only_where_something_varies() -> None:
    one = np.array([locate(replace(DECODE, batch=b), 108).at for b in (1, 2, 4)])  # type: ignore[union-attr]
    assert len(term_specs("decode_attention", one)) == 2
    prefill = np.array([locate(PrefillAttention(n, 0, 32, 8, 128, "bf16"), 108).at for n in (64, 128)])  # type: ignore[union-attr]
    assert len(term_specs("prefill_attention", prefill)) == 1  # neither batches nor cached tokens


def test_groups() -> None:
    assert shape_group(Gemm(7, 2, 3, "bf16")) == shape_group(Gemm(9, 2, 3, "bf16")) != shape_group(Gemm(7, 2, 4, "bf16"))


# -- files --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile() -> ProfileFile:
    return build(A100, made_up(A100, 0.03, np.random.default_rng(3)), "made up")[0]


def test_a_file_says_what_was_built(profile: ProfileFile, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(dump_profile_file(profile))
    found = load_profile_file(path)
    assert (found.title, found.command, found.rows_sha256) == (profile.title, profile.command, profile.rows_sha256)
    assert found.tables.keys() == profile.tables.keys() and found.errors.keys() == profile.errors.keys()
    for key, table in profile.tables.items():
        for term, other in zip(table.terms, found.tables[key].terms, strict=True):
            assert np.abs(np.array(term.values) - other.values).max() <= 0.0005 + 1e-9
            assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(term.knots, other.knots, strict=True))


def broken(change: Any) -> Any:
    def damaged(content: dict[str, Any]) -> str:
        change(content)
        return json.dumps(content)

    return damaged


def unsort(content: dict[str, Any]) -> None:
    axes = content["tables"][0]["terms"][0]["axes"]
    axes["n" if "n" in axes else "lanes"].reverse()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: json.dumps(content)[:1000], "must be JSON"),
        (lambda content: "[1]", "must be a kvsim profile"),
        (broken(lambda c: c.update(schema=2)), "profile.schema=2 must be 1"),
        (broken(lambda c: c.pop("engine")), "lacks 'engine'"),
        (broken(lambda c: c["tables"][0]["terms"][0]["log_permille"].pop()), "numbers, has"),
        (broken(unsort), "must ascend"),
        (broken(lambda c: c["tables"][0]["terms"][0]["log_permille"][0].__setitem__(0, math.nan)), "finite"),
        (broken(lambda c: c["errors"][0]["quantiles"].reverse()), "four ascending numbers"),
        (broken(lambda c: c["efficiencies"].update({"gemm.16bit.launch_s": -1})), "must be a finite number >= 0"),
    ],
)  # fmt: skip
def test_damaged_files_end_in_one_line(profile: ProfileFile, tmp_path: Path, damage: Any, says: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(damage(json.loads(dump_profile_file(profile))))
    with pytest.raises(InputError) as caught:
        load_profile_file(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_profiles(name: str) -> None:
    path = shipped()[name]
    content = load_profile_file(path)
    assert path.stat().st_size < MAX_BYTES
    assert content.gpu == path.parent.name in list_gpus() and path.stem == f"{content.engine}-{content.engine_version}"
    assert content.source and content.licence and content.made and content.command.startswith("kvsim calibrate import ")
    assert len(content.rows_sha256) == 64
    assert {"gemm", "prefill_attention"} <= {key[0] for key in content.tables}


@pytest.mark.parametrize("name", sorted(shipped()))
def test_no_shipped_gemm_beats_its_gpu(name: str) -> None:
    content = load_profile_file(shipped()[name])
    gpu = load_gpu(content.gpu)
    measured = MeasuredProfile(content, gpu, gpu)
    for dtype in sorted({key[1] for key in content.tables if key[0] == "gemm"}):
        weights = {"16bit": "bf16"}.get(dtype, dtype)
        peak = gpu.peak_flops("bf16" if weights == "int4" else weights)
        for n, k in ((6144, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (8192, 28672)):
            for m in (1, 7, 64, 200, 1000, 8192):
                seconds = measured.answer(Gemm(m, n, k, weights)).seconds
                assert 2.0 * m * n * k / seconds < 1.07 * peak, (n, k, m)


def test_what_large_products_reach_of_a_peak() -> None:
    """Of tables that hold such products themselves, on the GPU they were measured on."""
    shares = []
    for name, path in shipped().items():
        gpu = load_gpu(path.parent.name)
        profile, table = load_profile(name, gpu, "vllm"), f"measured: {path.stem.replace('-', ' ')} on {gpu.name}"
        matrices = ((8192, 8192), (28672, 8192), (57344, 8192), (8192, 28672), (28672, 4096))
        sizes = [(m, n, k) for m in (2048, 4096, 8192) for n, k in matrices]
        answers = [(2.0 * m * n * k, profile.answer(Gemm(m, n, k, "bf16"))) for m, n, k in sizes]
        rates = [flops / answer.seconds for flops, answer in answers if answer.source.startswith(table)]
        if rates:
            shares.append(max(rates) / gpu.peak_flops("bf16"))
    assert len(shares) >= 15
    assert median(shares) == pytest.approx(BEST_OF_PEAK, abs=0.01)


SUSTAINED = [
    ("mi300x", "bf16", 708), ("mi300x", "fp16", 654), ("mi300x", "fp8", 1273), ("mi300x", "int8", 1273), ("mi325x", "fp8", 1408.1),
    ("rtx-3090", "bf16", 76.6), ("l4", "bf16", 57), ("l4", "fp8", 118), ("rtx-5090", "bf16", 237), ("rtx-pro-6000-96gb", "fp8", 500),
    ("a100-pcie-80gb", "bf16", 240), ("a100-pcie-80gb", "int8", 400), ("a100-pcie-80gb", "fp32", 12), ("t4", "fp16", 40),
    ("t4", "bf16", 40),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "tflops"), SUSTAINED)
@pytest.mark.parametrize("profile", ["auto", "datasheet"])
def test_large_products_run_at_what_is_known_to_be_sustained(name: str, dtype: str, tflops: float, profile: str) -> None:
    """Below or above what the datasheet or another GPU's table would say. Of two dtypes of a width one stands in for the other."""
    gpu = load_gpu(name)
    if not gpu.sustained_flops_per_s:
        told = "fp16" if name == "t4" else dtype
        gpu = replace(gpu, sustained_flops_per_s={told: tflops * 1e12})
    answer = load_profile(profile, gpu, "vllm").answer
    sizes = ((4096, 8192, 8192), (8192, 28672, 8192), (8192, 8192, 28672))
    rates = [2.0 * m * n * k / answer(Gemm(m, n, k, dtype)).seconds for m, n, k in sizes]
    assert max(rates) == pytest.approx(tflops * 1e12, rel=0.08)
    assert max(rates) < 1.01 * tflops * 1e12


def test_what_waits_for_memory_does_not_ask_what_is_sustained() -> None:
    known = load_gpu("mi300x")
    with_it, without = (load_profile("auto", gpu, "vllm") for gpu in (known, replace(known, sustained_flops_per_s={})))
    prefill = PrefillAttention(8192, 0, 32, 8, 128, "bf16")  # is held back as products are
    slower = with_it.answer(prefill).seconds / without.answer(prefill).seconds
    assert slower == pytest.approx(1307.4 / (708 / BEST_OF_PEAK), rel=0.05)
    for op in (Gemm(1, 8192, 8192, "bf16"), Gemm(8, 8192, 8192, "fp8"), DecodeAttention(8, 32, 8, 128, 8 * 8 * 4096, 4096, 512.0)):
        assert with_it.answer(op).seconds == pytest.approx(without.answer(op).seconds, rel=0.01)


def test_times_measured_on_a_gpu_stand_above_what_it_is_said_to_sustain() -> None:
    """Own tables answer alike, and so do fits of own rows."""
    h100 = load_gpu("h100")
    said = replace(h100, sustained_flops_per_s={"bf16": 0.5 * h100.peak_flops("bf16")})
    products = [Gemm(m, 8192, 8192, dtype) for m in (1, 256, 8192) for dtype in ("bf16", "fp8")]
    for op in (*products, PrefillAttention(8192, 0, 32, 8, 128, "bf16")):
        assert load_profile("auto", said, "vllm").answer(op) == load_profile("auto", h100, "vllm").answer(op)
    found = made_up(A100, 0.03, np.random.default_rng(3))
    told = replace(A100, sustained_flops_per_s={"bf16": 0.5 * A100.peak_flops("bf16")})
    assert len({dump_profile_file(build(gpu, found, "made up")[0]) for gpu in (A100, told)}) == 1


def test_a_rate_that_is_known_stands_for_the_power_rule() -> None:
    """And for that of its own dtype alone."""
    l40s, op = load_gpu("l40s"), Gemm(8192, 8192, 28672, "bf16")
    card = replace(l40s, name="card", board_power_w=l40s.board_power_w / 4)
    by_power, by_rate, of_fp8 = (
        load_profile("auto", replace(card, sustained_flops_per_s=sustained), "vllm").answer(op).seconds
        for sustained in ({}, {"bf16": 150e12}, {"fp8": 300e12})
    )
    plain = load_profile("auto", replace(card, board_power_w=l40s.board_power_w), "vllm").answer(op).seconds
    assert by_power == of_fp8 == pytest.approx(plain * 4**DVFS_EXPONENT, rel=0.1)
    assert by_rate == pytest.approx(2 * 8192 * 8192 * 28672 / 150e12, rel=0.08)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_more_cache_is_not_read_faster(name: str) -> None:
    """Doubling the context must not make decode attention much faster.

    A little it does: TensorRT-LLM splits a sequence over more blocks from 1,024 tokens on, and 2,048 tokens take 15 % less there.
    Simulations hold a curve where it falls.
    """
    content = load_profile_file(shipped()[name])
    gpu = load_gpu(content.gpu)
    measured = MeasuredProfile(content, gpu, gpu)
    if not any(key[0] == "decode_attention" for key in content.tables):
        pytest.skip("no decode attention: its table was suspect")
    for batch in (1, 3, 8, 50, 256):
        slots = [batch * 8 * 2**i for i in range(5, 17) if batch * 2**i <= 2**21]
        times = measured.decode_curve(replace(DECODE, batch=batch), slots)
        assert all(after > 0.75 * before for before, after in pairwise(times)), (batch, times)


# -- who answers --------------------------------------------------------------------------------------------------------


def half_width(answer: Answer) -> float:
    return (answer.log_bias[2] - answer.log_bias[1]) / 2


@pytest.mark.parametrize(("name", "least", "most"), [("sglang-0.5.10", 0.8e12, 1.3e12), ("vllm-0.14.0", 1.4e12, 1.7e12)])
def test_a100_tables_read_large_caches_at_the_rates_that_set_one_aside(name: str, least: float, most: float) -> None:
    """`kvsim.profiles.HOPPER_ATTENTION` and docs/profiles.md say so."""
    gpu, rates = load_gpu("a100-sxm-80gb"), []
    profile = load_profile(f"a100-sxm-80gb/{name}", gpu, "none")
    for batch, tokens, (q_heads, kv_heads) in product((16, 64, 128), (2048, 4096, 16384), ((32, 8), (32, 32), (8, 1), (64, 8))):
        op = DecodeAttention(batch, q_heads, kv_heads, 128, batch * tokens * kv_heads, tokens, 512, "bf16")
        if op.kv_slots * op.slot_bytes >= GIB:
            rates.append(op.kv_slots * op.slot_bytes / profile.answer(op).seconds)
    assert len(rates) > 15 and least < min(rates) and max(rates) < most


def test_fallbacks_come_in_order_and_widen() -> None:
    gemm = Gemm(64, 4096, 4096, "bf16")
    own = load_profile("auto", A100, "vllm").answer(gemm)
    other_engine = load_profile("auto", A100, "torch").answer(gemm)
    other_gpus = load_profile("auto", L4, "vllm").answer(gemm)
    assert own.source.startswith("measured: vllm") and "a100" in own.source
    assert other_engine.source.startswith("fitted") and "another engine" in other_engine.source and "a100" in other_engine.source
    assert other_gpus.source.startswith("fitted") and "scaled by datasheet" in other_gpus.source
    assert half_width(own) < half_width(other_engine) < half_width(other_gpus)
    assert load_profile("auto", load_gpu("mi300x"), "vllm").answer(gemm).source.startswith("datasheet")


def test_what_an_engine_did_not_measure_another_dtype_or_engine_answers() -> None:
    chain = load_profile("auto", A100, "vllm")
    fp8_cache = chain.answer(replace(DECODE, kv_format="fp8", slot_bytes=256.0))
    assert fp8_cache.source.startswith("fitted") and "by bytes" in fp8_cache.source
    assert chain.answer(Gemm(16, 4096, 4096, "int4")).source.startswith("fitted: trtllm")  # vLLM's int4 was not measured
    odd_head = chain.answer(replace(DECODE, head_dim=96, slot_bytes=384.0))
    assert "from head size 128" in odd_head.source
    prefill = PrefillAttention(512, 0, 32, 8, 128, "bf16")
    mixed = chain.answer(MixedAttention(prefill, DECODE))
    assert mixed.source.startswith("fitted") and mixed.seconds > chain.answer(prefill).seconds
    assert load_profile("auto", load_gpu("rtx-4090"), "vllm").answer(MixedAttention(prefill, DECODE)).source.startswith("measured")


@pytest.mark.parametrize("gpu", ["a100-sxm", "h100-sxm", "l4", "a100-pcie-80gb"])
def test_a_curve_equals_its_answers(gpu: str) -> None:
    chain = load_profile("auto", load_gpu(gpu), "vllm")
    slots = [128 * tokens for tokens in (1, 3, 100, 2000, 2001, 50_000)]
    answers = [chain.answer(replace(DECODE, kv_slots=n, max_kv_tokens=n // 128)).seconds for n in slots]
    assert chain.decode_curve(DECODE, slots) == pytest.approx(answers, rel=1e-12)


def test_one_long_sequence_sets_the_pace() -> None:
    chain = load_profile("auto", H100, "vllm")
    skewed = replace(DECODE, kv_slots=16 * 8 * 100 + 8 * 100_000, max_kv_tokens=100_100)
    alone = replace(DECODE, batch=1, kv_slots=8 * 100_100, max_kv_tokens=100_100)
    assert chain.answer(skewed).seconds >= chain.answer(alone).seconds > 0.9 * chain.answer(skewed).seconds


def test_answers_carry_a_bias_that_can_be_drawn() -> None:
    for gpu, kernels in ((A100, "vllm"), (H100, "sglang"), (L4, "vllm"), (A100, "torch")):
        chain = load_profile("auto", gpu, kernels)
        biases = chain.log_biases
        for op in (Gemm(1, 4096, 4096, "bf16"), Gemm(4096, 4096, 4096, "int8"), DECODE, replace(DECODE, kv_format="kivi2")):
            answer = chain.answer(op)
            assert (op.kind, answer.size_class) in biases, (gpu.name, op)


def test_a_wider_band_has_the_same_middle() -> None:
    q = (-0.2, -0.05, 0.07, 0.3)
    wide = widened(q, 0.1)
    assert (wide[1] + wide[2]) / 2 == pytest.approx(0.01)
    assert (wide[2] - wide[1]) / 2 == pytest.approx(math.hypot(0.06, 0.1))
    assert widened(q, 0.0) == pytest.approx(q)


# -- the report and error bands -----------------------------------------------------------------------------------------


def test_the_report_of_a_profile(
    profile: ProfileFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    path.write_text(dump_profile_file(profile))
    assert main(["calibrate", "report", str(path)]) == 0
    told = capsys.readouterr().out
    assert "gemm 16bit m<=16" in told and "No rows to compare with" in told
    assert main(["calibrate", "report", str(path), "--plot", str(tmp_path / "plots")]) == 2
    assert "needs rows to compare with" in capsys.readouterr().err and not (tmp_path / "plots").exists()
    assert main(["calibrate", "report", "no-such"]) == 2
    assert "see kvsim list profiles" in capsys.readouterr().err


def test_a_comparison_with_rows_and_its_plots(profile: ProfileFile, tmp_path: Path) -> None:
    rows = made_up(A100, 0.03, np.random.default_rng(3)).rows
    comparison = Comparison(profile, rows)
    assert len(comparison.measured_s) == len(rows)
    assert np.median(np.abs(comparison.predicted_s / comparison.measured_s - 1)) < 0.05
    written = comparison.plot(tmp_path / "plots", "made up")
    assert {path.name for path in written} == {path.name for path in (tmp_path / "plots").iterdir()}
    assert all(path.stat().st_size > 10_000 for path in written)


def tiny_scenario(**more: Any) -> Any:
    return parse_scenario({
        "gpu": "a100-sxm", "model": "llama-3.1-8b", "engine": {"kind": "vllm_v1", "max_model_len": 4096},
        "workload": {
            "arrivals": {"kind": "poisson", "rate_per_s": 4}, "num_requests": 20,
            "lengths": {"kind": "fixed", "prompt_tokens": 300, "output_tokens": 20},
        },
        "policies": {"full": [], "again": [], "snapkv": [{"kind": "snapkv", "budget_tokens": 128}]}, **more,
    }, Path())  # fmt: skip


def test_error_bands_share_draws_and_do_not_depend_on_processes() -> None:
    bands = error_bands(tiny_scenario(), 4)
    assert bands == error_bands(tiny_scenario(), 4, jobs=2)
    for gain in ("tpot_x", "ttft_x", "e2e_x", "output_tokens_x"):  # the same cache gains nothing in any draw
        assert bands["again"].by_metric[gain] == Band(1.0, 1.0, 1.0, 1.0, 1.0)
    tpot = bands["full"].by_metric["tpot_p50_s"]
    assert tpot.p2_5 < tpot.p16 < tpot.p84 < tpot.p97_5
    assert error_bands(tiny_scenario(workload={**tiny_scenario().workload.model_dump(exclude_none=True), "seed": 1}), 4) != bands


def test_certain_profiles_have_bands_without_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsim.uncertainty.draw_biases", lambda log_biases, rng: dict.fromkeys(log_biases, 1.0))
    bands = error_bands(tiny_scenario(), 3)
    truth = simulate(tiny_scenario()).policies["snapkv"].summary
    assert set(vars_of(bands["snapkv"].by_metric["tpot_p50_s"])) == {truth.tpot.p50_s}


def vars_of(band: Band) -> tuple[float, ...]:
    return band.p2_5, band.p16, band.p50, band.p84, band.p97_5


@pytest.mark.parametrize("name", ["a40-48gb", "a10g-24gb", "rtx-a6000-48gb", "t4-16gb", "l4-24gb", "h100-pcie-80gb"])
@pytest.mark.parametrize("tokens", [512, 8192, 65536])
def test_no_carried_cache_is_read_faster_than_its_gpu_can(name: str, tokens: int) -> None:
    """Tables of GPUs with 48-96 MiB of L2 were measured with caches that stayed there."""
    gpu = load_gpu(name)
    profile = load_profile("auto", gpu, "vllm")
    op = DecodeAttention(1, 32, 8, 128, tokens * 8, tokens, 512.0)
    least_s = op.kv_slots * op.slot_bytes / gpu.hbm_bandwidth_bytes_per_s
    assert profile.answer(op).seconds >= least_s * (1 - 1e-9)
    assert profile.decode_curve(op, [op.kv_slots])[0] == pytest.approx(profile.answer(op).seconds, rel=1e-6)
