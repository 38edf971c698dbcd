"""From measured rows to tables: physics fitted first, then corrections, then errors on shapes that the fit has not seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from kvsim.calibrate.grid import TermSpec, evaluate, fit_correction
from kvsim.calibrate.rows import MeasuredRow, shape_group
from kvsim.coordinates import AXES, POOLED, Place, locate
from kvsim.correction import Correction
from kvsim.datasheet import DatasheetProfile
from kvsim.efficiencies import Efficiencies, load_efficiencies
from kvsim.hardware import Gpu
from kvsim.ops import (
    Collective,
    Copy,
    DecodeAttention,
    Elementwise,
    Gemm,
    HostWork,
    LogitFilter,
    MixedAttention,
    PolicyKernel,
    PrefillAttention,
)

FOLDS = 5
PHYSICS_ROWS = 500
"""Rows, evenly spread, that the handful of physical constants is fitted to."""
SOFT_L1_SCALE = 0.1
MAX_KNOTS = 24
LEAST_KNOT_GAP = 0.05
"""Octaves: 3.5 %. Rows of nearly one size, as a decoder has them that moves on between steps, are one size."""
LEAST_KNOTS, KNOTS_PER_ROOT = 3, 1.5
"""Of an axis of sparse rows: so many times the root of the rows, of as high an order as the table has axes."""
TAIL_KNOTS = np.array([0.0, 0.15, 0.3, 0.5, 0.75, 1.0])

Bounds = Mapping[str, tuple[float, float, float]]
_GEMM: Bounds = {"launch_s": (5e-6, 1e-7, 5e-5), "memory_frac": (0.8, 0.1, 1.05), "compute_frac": (0.7, 0.1, 1.1)}
_ATTENTION: Mapping[str, Bounds] = {
    DecodeAttention.kind: {
        "decode_attention.launch_s": (8e-6, 1e-6, 5e-5), "decode_attention.split_s": (5e-6, 1e-7, 5e-5),
        "decode_attention.block_s": (4e-6, 1e-7, 4e-5), "decode_attention.memory_frac.16bit": (0.8, 0.2, 1.05),
    },
    PrefillAttention.kind: {
        "prefill_attention.launch_s": (1e-5, 1e-6, 1e-4), "prefill_attention.compute_frac": (0.6, 0.1, 1.05),
        "prefill_attention.memory_frac": (0.5, 0.05, 1.0), "prefill_attention.walk_frac": (0.4, 0.0, 2.0),
    },
    MixedAttention.kind: {"mixed_attention.reread_frac": (0.4, 0.0, 2.0), "mixed_attention.block_s": (4e-6, 1e-8, 4e-5)},
}  # fmt: skip
PHYSICS: Mapping[tuple[str, str], Bounds] = {
    **{(Gemm.kind, dtype): {f"gemm.{dtype}.{n}": b for n, b in _GEMM.items()} for dtype in ("16bit", "fp8", "int8", "int4")},
    (Gemm.kind, "fp32"): {
        **{f"gemm.fp32.{n}": b for n, b in _GEMM.items()},
        "gemm.fp32.second_tile_reads": (0.7, 0.3, 1.0), "gemm.fp32.tile_reads": (0.5, 0.2, 1.0), "gemm.fp32.packed_reads": (1.0, 0.0, 8.0),
    },
    (DecodeAttention.kind, "16bit"): _ATTENTION[DecodeAttention.kind],
    (DecodeAttention.kind, "fp8"): {"decode_attention.memory_frac.fp8": (0.7, 0.1, 1.05)},
    (PrefillAttention.kind, "16bit"): _ATTENTION[PrefillAttention.kind],
    (MixedAttention.kind, "16bit"): _ATTENTION[MixedAttention.kind],
    (DecodeAttention.kind, "subbyte"): {"decode_attention.memory_frac.subbyte": (0.7, 0.001, 1.05)},
    (DecodeAttention.kind, "fp32"): {
        "decode_attention.launch_s": (1e-4, 1e-6, 1e-2), "decode_attention.sequence_s": (1e-4, 0.0, 1e-2),
        "decode_attention.split_s": (5e-6, 1e-7, 5e-5), "decode_attention.block_s": (1e-5, 1e-7, 1e-3),
        "decode_attention.memory_frac.16bit": (0.2, 0.005, 1.05), "decode_attention.compute_frac": (0.2, 0.005, 1.05),
    },
    (PrefillAttention.kind, "fp32"): {
        "prefill_attention.launch_s": (1e-4, 1e-6, 1e-2), "prefill_attention.compute_frac": (0.4, 0.01, 1.05),
        "prefill_attention.memory_frac": (0.1, 0.005, 1.0), "prefill_attention.walk_frac": (0.4, 0.0, 2.0),
    },
    (MixedAttention.kind, "fp32"): _ATTENTION[MixedAttention.kind],
    **{
        (Collective.kind, f"{link} {mode}"): {
            f"collective.{link}.{mode}_s": (1e-5, 1e-7, 2e-4), f"collective.{link}.per_doubling_s": (1e-6, 1e-9, 5e-5),
            f"collective.{link}.bus_frac": (0.7, 0.05, 2.0),
        }
        for link in ("link", "pcie") for mode in ("graph", "eager")
    },
    (Elementwise.kind, POOLED): {
        "elementwise.launch_cycles": (4000.0, 100.0, 40000.0), "elementwise.memory_frac": (0.7, 0.1, 1.0),
    },
    (Copy.kind, "host"): {"copy.launch_s": (5e-6, 1e-7, 1e-4), "copy.host_frac": (0.85, 0.05, 1.05)},
    (HostWork.kind, "huggingface launch"): {"host.huggingface.launch.per_sequence_s": (2e-5, 1e-6, 5e-4)},
}  # fmt: skip
"""Physical constants by (kind, variant): (start, least, most). What is not here keeps the packaged value.
fp32 comes last: where 16 bit has been fitted, attention keeps the constants of that. Decodes in fp32 are a CPU's, where single
caches are attended one after the other and a launch is a dozen calls of torch."""
WHOLE: Mapping[tuple[str, str], tuple[str, Sequence[float]]] = {
    (Gemm.kind, "fp32"): ("gemm.fp32.tile_rows", (8192, 1, 2, 3, 4, 6, 8, 12, 16)),
}
"""Whole numbers among them: all are tried, and the first of equals is taken. Where there are few rows of activations, a CPU's library
reads the weights again for every so many of them (torch's on AVX-512: 3, so that a batch of 4 takes up to twice as long as one of 3)."""

SMOOTH: Mapping[str, Sequence[tuple[tuple[str, ...], tuple[float, ...]]]] = {
    Gemm.kind: [
        (("n", "k", "m"), (0.03, 0.03, 0.01)),
        (("tail_128x128", "m"), (0.1, 0.1)),
        (("tail_128x256", "m"), (0.1, 0.1)),
    ],
    DecodeAttention.kind: [
        (("lanes", "context", "group"), (0.1, 0.1, 0.003)),  # kernels differ by group, so groups hardly inform each other
        (("lanes", "context", "kv_heads"), (0.1, 0.1, 0.03)),  # splits are chosen by sequences, not lanes
    ],
    PrefillAttention.kind: [
        (("heads", "new_tokens", "group"), (0.1, 0.1, 0.05)),
        (("sequences", "new_tokens"), (0.1, 0.03)),
        (("total_over_new", "new_tokens"), (0.03, 0.03)),
    ],
    MixedAttention.kind: [
        (("new_tokens", "total_over_new", "decodes"), (0.01, 0.01, 0.01)),
        (("new_tokens", "decodes", "decode_context"), (0.01, 0.01, 0.01)),
    ],
    Elementwise.kind: [(("bytes",), (0.03,))],
    LogitFilter.kind: [(("rows", "vocab_size"), (0.03, 0.03))],
    Collective.kind: [(("bytes",), (0.003,))],
    PolicyKernel.kind: [(("bytes",), (0.03,)), (("flops_per_byte",), (0.03,))],
    Copy.kind: [(("bytes",), (0.03,))],
    HostWork.kind: [(("count",), (0.03,))],
}
"""Terms of each kind's correction: axes, and weights of squared second differences along them. Chosen by five-fold errors on
H100 tables once, for all GPUs and engines."""

TableKey = tuple[str, str, int]
"""(kind, variant, size) of `kvsim.coordinates.Place`."""


@dataclass(frozen=True)
class Table:
    """A fitted table. residuals: log(measured / predicted) of every row by a fit that had not seen its shape."""

    correction: Correction
    rows: Sequence[MeasuredRow]
    residuals: np.ndarray
    groups: Sequence[object]


@dataclass(frozen=True)
class Fit:
    """efficiencies: the fitted physics, by dotted name. tables: by (kind, variant, size)."""

    efficiencies: Mapping[str, float]
    tables: Mapping[TableKey, Table]


def fit_rows(gpu: Gpu, rows: Sequence[MeasuredRow], folds: int = FOLDS, sparse: bool = False) -> Fit:
    """Fits everything that the rows inform. Rows must be possible (`kvsim.calibrate.rows.Import` sees to it).

    sparse: rows are chosen points of a grid, not all of it. Tables get no more knots than rows can hold, lean on the median ratio
    where nobody measured, and where all rows are of one shape, single rows are held out instead of none.
    """
    by_table: dict[TableKey, list[tuple[Place, MeasuredRow]]] = {}
    for row in rows:
        own = locate(row.op, gpu.num_sms)
        for place in {own, own._replace(variant=POOLED)} if own.kind == Elementwise.kind else {own}:
            by_table.setdefault(place[:3], []).append((place, row))
    by_table = {key: found for key, found in by_table.items() if len(found) >= 2}
    base = load_efficiencies()
    answered = {row.op for found in by_table.values() for _, row in found}
    physics = fit_physics(gpu, base, [row for row in rows if row.op in answered])
    fitted = base.replaced(physics)
    tables = {}
    for key, found in sorted(by_table.items()):
        chosen = [row for _, row in found]
        places = np.array([place.at for place, _ in found])
        specs = term_specs(key[0], places, len({row.op for row in chosen}) if sparse else None)
        groups: list[object] = [shape_group(row.op) for row in chosen]
        if sparse and len(set(groups)) == 1:
            groups = [row.op for row in chosen]
        residuals = held_out(gpu, fitted, chosen, places, groups, specs, folds, sparse)
        correction = fit_correction(places, log_ratios(DatasheetProfile(gpu, fitted), chosen), specs, sparse)
        tables[key] = Table(correction, chosen, residuals, groups)
    return Fit(physics, tables)


def log_ratios(profile: DatasheetProfile, rows: Sequence[MeasuredRow]) -> np.ndarray:
    """log(measured / physics)."""
    return np.log([row.seconds for row in rows]) - np.log([profile.answer(row.op).seconds for row in rows])


def fit_physics(gpu: Gpu, base: Efficiencies, rows: Sequence[MeasuredRow]) -> dict[str, float]:
    """Robust least squares of log(measured / physics), kind by kind; kinds without rows keep the packaged constants."""
    found: dict[str, float] = {}
    for (kind, variant), bounds in PHYSICS.items():
        chosen = [row for row in rows if _is(row, kind, variant, gpu)]
        bounds = {name: bound for name, bound in bounds.items() if name not in found}
        if not bounds or len(chosen) <= len(bounds):
            continue
        chosen = chosen[:: max(1, len(chosen) // PHYSICS_ROWS)]
        name, choices = WHOLE.get((kind, variant), ("", (0.0,)))
        tries = []
        for choice in choices:
            given = {name: float(choice)} if name else {}
            values, loss = _fit_constants(gpu, base.replaced(found | given), chosen, bounds)
            tries.append((loss, values | given))
        found |= min(tries, key=lambda one: one[0])[1]
    return found


def _fit_constants(
    gpu: Gpu, base: Efficiencies, rows: Sequence[MeasuredRow], bounds: Bounds
) -> tuple[dict[str, float], float]:
    """The constants, and what is left of the robust loss."""
    measured = np.log([row.seconds for row in rows])
    scale = np.array([start or 1.0 for start, _, _ in bounds.values()])

    def values(x: np.ndarray) -> dict[str, float]:
        return dict(zip(bounds, map(float, x * scale), strict=True))

    def residual(x: np.ndarray) -> np.ndarray:
        answer = DatasheetProfile(gpu, base.replaced(values(x))).answer
        return np.log([answer(row.op).seconds for row in rows]) - measured

    start, low, high = (np.array([bound[i] for bound in bounds.values()]) / scale for i in range(3))
    best = least_squares(residual, start, bounds=(low, high), loss="soft_l1", f_scale=SOFT_L1_SCALE, max_nfev=60)
    told = np.abs(best.jac).max(axis=0) > 0.0  # what no row says anything about may have drifted
    return values(np.where(told, best.x, start)), float(best.cost)


def _is(row: MeasuredRow, kind: str, variant: str, gpu: Gpu) -> bool:
    """Whether a row informs these constants: only KV beyond twice the L2, or far inside it, says anything about bandwidth."""
    place = locate(row.op, gpu.num_sms)
    if place.kind != kind:
        return False
    if isinstance(row.op, Elementwise):
        return True
    if isinstance(row.op, Collective):
        link = "link" if gpu.has_gpu_link else "pcie"
        return variant == f"{link} {'eager' if row.op.eager else 'graph'}"
    if place.variant != variant:
        return False
    if isinstance(row.op, DecodeAttention):
        kv_bytes = row.op.kv_slots * row.op.slot_bytes
        return kv_bytes > 2 * gpu.l2_bytes or kv_bytes < 0.1 * gpu.l2_bytes
    return True


def term_specs(kind: str, places: np.ndarray, num_rows: int | None = None) -> list[TermSpec]:
    """The terms of a kind with knots where the rows are. Terms whose axes do not vary are left out.

    num_rows: that must suffice for the knots; None: there are plenty.
    """
    names = AXES[kind]
    specs: list[TermSpec] = []
    for axes, smooth in SMOOTH[kind]:
        where = tuple(names.index(axis) for axis in axes)
        coarse = bool(specs) and kind == Gemm.kind
        knots = [_axis_knots(names[which], places[:, which], coarse) for which in where]
        if num_rows is not None:
            most = max(LEAST_KNOTS, round(KNOTS_PER_ROOT * num_rows ** (1 / len(where))))
            knots = [axis[np.unique(np.linspace(0, len(axis) - 1, most).round().astype(int))] for axis in knots]
        if specs and len(knots[0]) == 1:  # a later term is there for its first axis
            continue
        specs.append(TermSpec(where, tuple(knots), smooth))
    return specs


def _axis_knots(name: str, values: np.ndarray, coarse: bool) -> np.ndarray:
    if name.startswith("tail"):
        return TAIL_KNOTS
    if name == "kv_heads":  # beyond 8 it no longer matters how lanes split into sequences and heads
        found = np.unique(np.round(values, 4))
        return np.unique([*found[found <= 3.0], *found[-1:]])
    return _knots(values, coarse)


def _knots(values: np.ndarray, coarse: bool) -> np.ndarray:
    """The values themselves where they are few, else about one and a half an octave; coarse: one an octave and a half."""
    unique = _apart(np.unique(np.round(values, 4)))
    if len(unique) <= (8 if coarse else MAX_KNOTS):
        return unique
    count = int(min(MAX_KNOTS, max(3, math.ceil((unique[-1] - unique[0]) * (0.7 if coarse else 1.5)))))
    targets = np.linspace(unique[0], unique[-1], count)
    nearest = np.unique([unique[np.argmin(np.abs(unique - target))] for target in targets])
    return nearest


def _apart(values: np.ndarray) -> np.ndarray:
    """Ascending values without those that follow the last one kept too closely."""
    kept = values[:1].tolist()
    for value in values[1:]:
        if value - kept[-1] >= LEAST_KNOT_GAP:
            kept.append(value)
    return np.array(kept)


def fold_numbers(groups: Sequence[object], folds: int) -> np.ndarray:
    """The fold of each row: groups are dealt out in an order that is random but always the same."""
    names = sorted(set(groups), key=repr)
    order = np.random.default_rng(0).permutation(len(names))
    fold_of = {names[which]: place % folds for place, which in enumerate(order)}
    return np.array([fold_of[group] for group in groups])


def held_out(
    gpu: Gpu, base: Efficiencies, rows: Sequence[MeasuredRow], places: np.ndarray, groups: Sequence[object],
    specs: Sequence[TermSpec], folds: int, sparse: bool = False,
) -> np.ndarray:  # fmt: skip
    """log(measured / predicted) of every row by a fit, physics included, to the other folds; whole groups go together.

    Where there is one shape only nothing can be held out, and the physics alone is what is known about others.
    """
    fold = fold_numbers(groups, folds)
    if not fold.any():
        return log_ratios(DatasheetProfile(gpu, base), rows)
    residuals = np.empty(len(rows))
    for number in set(fold.tolist()):
        out = fold == number
        seen = [row for row, left_out in zip(rows, out, strict=True) if not left_out]
        ratios = log_ratios(DatasheetProfile(gpu, base.replaced(fit_physics(gpu, base, seen))), rows)
        residuals[out] = ratios[out] - evaluate(
            fit_correction(places[~out], ratios[~out], specs, sparse), places[out]
        )
    return residuals
