"""The socket that answers Ops with seconds: measured tables and datasheet rooflines plug in here alike.

An Answer says where its number comes from and how wrong it may be. The error is a multiplicative bias, shared by all
answers of one (kind, size class): it is drawn once per run (`draw_biases`) and applied to every answer (`biased`),
never added up as noise over steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import NamedTuple, Protocol

from kvsim.ops import DecodeAttention, Op

LogBias = tuple[float, float, float, float]
"""2.5, 16, 84 and 97.5 % quantiles of log(measured / predicted)."""

QUANTILE_LEVELS = (0.025, 0.16, 0.84, 0.975)
_PROBITS = tuple(NormalDist().inv_cdf(level) for level in QUANTILE_LEVELS)

SOURCES = ("measured", "fitted", "datasheet", "assumed")
"""What an answer's source begins with, best first; a reference follows after ": "."""


class Answer(NamedTuple):
    """Seconds of one Op. source: "<one of SOURCES>: reference". size_class: the part of its kind with one bias."""

    seconds: float
    source: str
    log_bias: LogBias
    size_class: str


class Profile(Protocol):
    """Answers Ops for one device."""

    @property
    def name(self) -> str: ...

    @property
    def log_biases(self) -> Mapping[tuple[str, str], LogBias]:
        """Quantiles of every (Op kind, size class) that `answer` may return."""
        ...

    def answer(self, op: Op, hbm_share: float = 1.0) -> Answer:
        """Time of one launch of the Op with this share (0–1] of the HBM bandwidth; the rest goes to a side stream."""
        ...

    def kv_knots(self, op: DecodeAttention) -> Sequence[int]:
        """Ascending kv_slots, from 0 or 1 to beyond any use: between them answers at op's batch may be interpolated."""
        ...

    def decode_curve(self, op: DecodeAttention, kv_slots: Sequence[int], hbm_share: float = 1.0) -> list[float]:
        """Seconds of the op with each of these numbers of slots in place of its own, all sequences and heads alike."""
        ...


def curve_by_answers(profile: Profile, op: DecodeAttention, kv_slots: Sequence[int], hbm_share: float) -> list[float]:
    """`Profile.decode_curve` one answer at a time."""
    lanes = op.batch * op.kv_heads
    ops = (replace(op, kv_slots=slots, max_kv_tokens=slots // lanes) for slots in kv_slots)
    return [profile.answer(each, hbm_share).seconds for each in ops]


class Biased:
    """A profile whose answers are multiplied by fixed factors; see `biased`."""

    def __init__(self, profile: Profile, biases: Mapping[tuple[str, str] | str, float]) -> None:
        self._profile, self._biases = profile, dict(biases)

    @property
    def name(self) -> str:
        return self._profile.name

    @property
    def log_biases(self) -> Mapping[tuple[str, str], LogBias]:
        return self._profile.log_biases

    def answer(self, op: Op, hbm_share: float = 1.0) -> Answer:
        seconds, source, log_bias, size_class = self._profile.answer(op, hbm_share)
        factor = self._biases.get((op.kind, size_class))
        if factor is None:
            factor = self._biases.get(op.kind, 1.0)
        return Answer(seconds * factor, source, log_bias, size_class)

    def kv_knots(self, op: DecodeAttention) -> Sequence[int]:
        return self._profile.kv_knots(op)

    def decode_curve(self, op: DecodeAttention, kv_slots: Sequence[int], hbm_share: float = 1.0) -> list[float]:
        return curve_by_answers(self, op, kv_slots, hbm_share)


def biased(profile: Profile, biases: Mapping[tuple[str, str] | str, float]) -> Profile:
    """The same profile with its seconds multiplied, by (kind, size class) or else by kind; 1 where neither is given."""
    return Biased(profile, biases)


class NormalRng(Protocol):
    """What `draw_biases` asks of a generator; ``numpy.random.Generator`` has it (numpy need not be imported here)."""

    def normal(self, loc: float, scale: float) -> float: ...


def log_bias_at(log_bias: LogBias, probit: float) -> float:
    """Inverse CDF of a bias: linear between its quantiles in probit space, the outer pieces continued to ±3 sigma."""
    probit = min(max(probit, -3.0), 3.0)
    piece = min(max(bisect_right(_PROBITS, probit) - 1, 0), len(_PROBITS) - 2)
    left, right = _PROBITS[piece], _PROBITS[piece + 1]
    share = (probit - left) / (right - left)
    return log_bias[piece] + share * (log_bias[piece + 1] - log_bias[piece])


def draw_biases(log_biases: Mapping[tuple[str, str], LogBias], rng: NormalRng) -> dict[tuple[str, str] | str, float]:
    """One factor per (kind, size class) for a whole run, from ``profile.log_biases``.

    Independent between kinds; the classes of one kind share the draw (a GPU whose GEMMs are slow at m <= 16 is rarely
    fast at m > 16), each through its own quantiles. Kinds are drawn in sorted order, so a seed gives the same run.
    """
    probits = {kind: float(rng.normal(0.0, 1.0)) for kind in sorted({kind for kind, _ in log_biases})}
    return {key: math.exp(log_bias_at(bias, probits[key[0]])) for key, bias in log_biases.items()}
