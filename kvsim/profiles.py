"""Which profile answers: the measured one of the GPU and engine, and where it is silent the next best, each wider than the one before.

In order: the engine's own tables; another engine's or dtype's on the same GPU; those of the other GPUs, the nearest first in
weight, carried by the datasheets' ratios; the datasheet alone. Every answer says which of them it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from math import exp, log
from pathlib import Path

from kvsim.catalogue import is_path, unknown_name
from kvsim.coordinates import OWN_KINDS, Place, locate
from kvsim.datasheet import DatasheetProfile
from kvsim.hardware import Gpu, list_gpus, load_gpu
from kvsim.measured import MeasuredProfile
from kvsim.ops import Collective, DecodeAttention, Elementwise, Gemm, Op
from kvsim.profile import Answer, LogBias, Profile
from kvsim.profile_file import DEVICE_FILE, ProfileFile, load_profile_file, shipped

AUTO, DATASHEET = "auto", "datasheet"
OTHER_ENGINE_SIGMA = 0.12
"""Standard deviation of log(one engine's time / another's) on one GPU. The same shape under two engines is 10-20 % apart (serving
measurements of the field); benchmarks/profile_accuracy.py prints it for the shipped tables."""
NEIGHBOUR_SIGMA = 0.20
"""The same between GPUs, after scaling by datasheet: leave-one-GPU-out errors of benchmarks/profile_accuracy.py, rounded up."""
NEIGHBOUR_RANGE = 0.7
"""A GPU at this distance (`_distance`) counts 1/e of one at distance 0. Chosen by leave-one-GPU-out errors, the same for all Ops."""
SERVERS = ("vllm", "sglang", "trtllm")
HOPPER_ATTENTION = ("a100-sxm-80gb/sglang-0.5.10",)
"""Attention measured under a backend (FlashAttention 3) that the engine takes on Hopper alone (its docs: FlashInfer on A100 and A40): its
decode reads caches beyond 1 GiB at 0.8-1.3 TB/s there, vLLM's at 1.4-1.7. No server is priced with it. Engines on plain torch, whose
batched products no table has, still find it among the tables of other engines."""


class Neighbours:
    """What the tables of other GPUs say of one, carried by datasheet: their weighted geometric mean."""

    def __init__(self, profiles: Sequence[MeasuredProfile], weights: Sequence[float]) -> None:
        self._profiles, self._weights = tuple(profiles), tuple(weights)
        self._chosen: dict[tuple[str, str, int], list[tuple[MeasuredProfile, float]]] = {}
        self.log_biases: Mapping[tuple[str, str], LogBias] = _widest(profile.log_biases for profile in profiles)
        self.name = f"{profiles[0].name} and {len(profiles) - 1} more, scaled by datasheet"

    def knows(self, place: Place, exactly: bool) -> bool:
        """Element-wise Ops are left to the datasheet profile, whose constants come from more GPUs than have tables of them."""
        return place.kind != Elementwise.kind and any(profile.knows(place, exactly) for profile in self._profiles)

    def _asked(self, op: Op) -> list[tuple[MeasuredProfile, float]]:
        """Those with a table of the Op's very dtype, or else of another, with weights that sum to 1."""
        place = locate(op, self._profiles[0].gpu.num_sms)
        found = self._chosen.get(place[:3])
        if found is None:
            pairs = list(zip(self._profiles, self._weights, strict=True))
            able = [(profile, weight) for profile, weight in pairs if profile.knows(place, True)]
            able = able or [(profile, weight) for profile, weight in pairs if profile.knows(place, False)]
            if place.kind == Gemm.kind:  # power limits matrix rates, and power compares within a generation only
                able = [pair for pair in able if pair[0].same_generation] or able
            if place.kind == Collective.kind:  # what the link is matters, and over PCIe the machine, of which a GPU says nothing
                able = [pair for pair in able if pair[0].same_link] or able
                able = able if self._profiles[0].gpu.has_gpu_link else [(profile, 1.0) for profile, _ in able]
            total = sum(weight for _, weight in able)
            found = self._chosen[place[:3]] = [(profile, weight / total) for profile, weight in able]
        return found

    def answer(self, op: Op, hbm_share: float = 1.0) -> Answer:
        asked = self._asked(op)
        answers = [(profile.answer(op, hbm_share), weight) for profile, weight in asked]
        seconds = exp(sum(weight * log(answer.seconds) for answer, weight in answers))
        nearest = max(answers, key=lambda pair: pair[1])[0]
        others = f" and {len(answers) - 1} more GPUs" if len(answers) > 1 else ""
        return nearest._replace(seconds=seconds, source=f"{nearest.source}{others}")

    def decode_curve(self, op: DecodeAttention, kv_slots: Sequence[int], hbm_share: float = 1.0) -> list[float]:
        curves = [(profile.decode_curve(op, kv_slots, hbm_share), weight) for profile, weight in self._asked(op)]
        return [exp(sum(weight * log(curve[i]) for curve, weight in curves)) for i in range(len(kv_slots))]

    def kv_knots(self, op: DecodeAttention) -> Sequence[int]:
        return self._profiles[0].kv_knots(op)


class ProfileChain:
    """Profiles asked in turn; the first that has a table for an Op answers it. They are read when they are first needed."""

    def __init__(
        self, own: Sequence[Callable[[], MeasuredProfile]], others: Callable[[], Neighbours | None], last: DatasheetProfile
    ) -> None:
        """own: profiles measured on the GPU itself, best first. others: what other GPUs say."""
        self._makers = [cache(make) for make in own]
        self._others, self._last = cache(others), last
        self._answering: dict[tuple[str, str, int], Profile] = {}

    @property
    def log_biases(self) -> Mapping[tuple[str, str], LogBias]:
        others = self._others()
        links = [make() for make in self._makers]
        return _widest([*(link.log_biases for link in links), *([others.log_biases] if others else []), self._last.log_biases])

    @property
    def name(self) -> str:
        return self._makers[0]().name if self._makers else self._last.name

    def _profile(self, op: Op) -> Profile:
        place = locate(op, self._last.gpu.num_sms)
        found = self._answering.get(place[:3])
        if found is None:
            found = self._answering[place[:3]] = self._first(place)
        return found

    def _first(self, place: Place) -> Profile:
        own_kind = place.kind in OWN_KINDS
        for exactly in (True, False):
            for make in self._makers[:1] if own_kind else self._makers:
                if make().knows(place, exactly):
                    return make()
        others = None if own_kind or self._widens(place) else self._others()
        if others is not None and (others.knows(place, True) or others.knows(place, False)):
            return others
        return self._last

    def _widens(self, place: Place) -> bool:
        """8-bit weights on a GPU without units for them: kernels of GPUs that have them run at another rate than its own would."""
        return place.kind == Gemm.kind and place.variant in ("fp8", "int8") and place.variant not in self._last.gpu.peak_flops_per_s

    def answer(self, op: Op, hbm_share: float = 1.0) -> Answer:
        return self._profile(op).answer(op, hbm_share)

    def decode_curve(self, op: DecodeAttention, kv_slots: Sequence[int], hbm_share: float = 1.0) -> list[float]:
        return self._profile(op).decode_curve(op, kv_slots, hbm_share)

    def kv_knots(self, op: DecodeAttention) -> Sequence[int]:
        return self._last.kv_knots(op)


def _widest(all_biases: Iterable[Mapping[tuple[str, str], LogBias]]) -> dict[tuple[str, str], LogBias]:
    """The first link's biases, and of classes that it lacks those of the next."""
    found: dict[tuple[str, str], LogBias] = {}
    for biases in all_biases:
        for key, bias in biases.items():
            found.setdefault(key, bias)
    return found


def load_profile(name: str, gpu: Gpu, kernels: str, base_dir: Path = Path()) -> Profile:
    """The profile that a scenario names.

    name: "auto" (the shipped one of the GPU and of the engine's kernels, and all that follow), "datasheet", a shipped
    profile's name, or a path. kernels: whose kernels the engine launches, "vllm", "trtllm", "sglang", "torch".
    """
    last = DatasheetProfile(gpu)
    if name == DATASHEET:
        return last
    there = shipped()
    own = [path for path in there.values() if path.parent.name == gpu.name]
    if name == AUTO:
        first = [path for path in own if engine_of(path) == kernels]
    elif is_path(name):
        first = [(base_dir / Path(name).expanduser()).resolve()]
    elif name in there:
        first = [there[name]]
    else:
        raise unknown_name("profile", name, [AUTO, DATASHEET, *there], "kvsim list profiles")
    if name != AUTO:
        load_profile_file(first[0])  # what is wrong with it is said before anything else
    serves = name == AUTO and kernels in SERVERS
    links = [partial(_link, path, gpu, serves=serves) for path in sorted(first, reverse=True)]
    links += [partial(_link, path, gpu, OTHER_ENGINE_SIGMA, "another engine", serves) for path in own if path not in first]
    elsewhere = [path for path in there.values() if path.parent.name != gpu.name]
    return ProfileChain(links, partial(neighbours, gpu, kernels, elsewhere), last)


def profile_text(name: str, gpu: Gpu, kernels: str) -> str:
    """For people: what `load_profile` asks first."""
    if name != AUTO:
        return name
    own = [known for known, path in shipped().items() if path.parent.name == gpu.name]
    first = [known for known in own if engine_of(shipped()[known]) == kernels]
    if first:
        return f"auto: {', '.join(first)}, measured on this GPU under this engine's kernels"
    if own:
        return f"auto: this GPU was measured under other engines alone: {', '.join(own)}"
    return "auto: no measurements of this GPU, so those of others scaled by datasheet, with wider bands"


def engine_of(path: Path) -> str:
    """The engine of a shipped profile, which its file name begins with."""
    return path.stem.partition("-")[0]


@cache
def _link(path: Path, gpu: Gpu, sigma: float = 0.0, carried: str = "", serves: bool = False) -> MeasuredProfile:
    """Profiles never change, and what they have worked out serves the next simulation too."""
    content = load_profile_file(path)
    if serves and f"{path.parent.name}/{path.stem}" in HOPPER_ATTENTION:
        content = replace(content, tables={key: data for key, data in content.tables.items() if not key[0].endswith("_attention")})
    measured_on = measured_gpu(content, path, gpu)
    if measured_on.name != gpu.name and not carried:
        sigma, carried = NEIGHBOUR_SIGMA, _by(gpu)
    return MeasuredProfile(content, gpu, measured_on, sigma, carried)


def measured_gpu(content: ProfileFile, path: Path, gpu: Gpu | None = None) -> Gpu:
    """The GPU that a profile was measured on: `gpu` itself, of the catalogue, or of the device.yaml beside the profile."""
    if gpu is not None and gpu.name == content.gpu:
        return gpu
    beside = path.parent / DEVICE_FILE
    if content.gpu not in list_gpus() and beside.exists():
        return load_gpu(beside)
    return load_gpu(content.gpu)


def neighbours(gpu: Gpu, kernels: str, paths: Sequence[Path]) -> Neighbours | None:
    """One profile of each other GPU: of the same engine where there is one."""
    by_gpu: dict[str, Path] = {}
    for path in paths:
        if path.parent.name not in by_gpu or engine_of(path) == kernels:
            by_gpu[path.parent.name] = path
    serves = kernels in SERVERS
    if not by_gpu or gpu.compute_capability is None:  # tables of one vendor's kernels say nothing about another's
        return None
    distances = {name: _distance(gpu, load_gpu(name)) for name in by_gpu}
    order = sorted(by_gpu, key=lambda name: (distances[name], name))
    profiles = [_link(by_gpu[name], gpu, NEIGHBOUR_SIGMA, _by(gpu), serves) for name in order]
    return Neighbours(profiles, [exp(-distances[name] / NEIGHBOUR_RANGE) for name in order])


def _by(gpu: Gpu) -> str:
    return "scaled by datasheet" + (" and sustained_tflops" if gpu.sustained_flops_per_s else "")


def _distance(one: Gpu, other: Gpu) -> float:
    """How unlike two GPUs are: matrix rate of a multiprocessor in a cycle, bandwidth (by half), generation."""

    def per_cycle(gpu: Gpu) -> float:
        return gpu.peak_flops("bf16") / gpu.num_sms / gpu.boost_clock_hz

    bandwidths = one.hbm_bandwidth_bytes_per_s / other.hbm_bandwidth_bytes_per_s
    generation = 0.0 if one.compute_capability == other.compute_capability else 0.5
    return abs(log(per_cycle(one) / per_cycle(other))) + 0.5 * abs(log(bandwidths)) + generation
