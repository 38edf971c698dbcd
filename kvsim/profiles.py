"""Which profile answers: the measured one of the GPU and engine, and where it is silent the next best, each wider than the one before.

In order: the engine's own tables; another engine's or dtype's on the same GPU; those of a neighbouring GPU, carried by the
datasheets' ratios; the datasheet alone. Every answer says which of them it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log
from pathlib import Path

from kvsim.catalogue import is_path
from kvsim.coordinates import Place, locate
from kvsim.datasheet import DatasheetProfile
from kvsim.errors import InputError
from kvsim.hardware import Gpu, load_gpu
from kvsim.measured import MeasuredProfile
from kvsim.ops import DecodeAttention, Op
from kvsim.profile import Answer, LogBias, Profile
from kvsim.profile_file import ProfileFile, load_profile_file, shipped

AUTO, DATASHEET = "auto", "datasheet"
OTHER_ENGINE_SIGMA = 0.12
"""Standard deviation of log(one engine's time / another's) on one GPU. The same shape under two engines is 10-20 % apart (serving
measurements of the field); benchmarks/profile_accuracy.py prints it for the shipped tables."""
NEIGHBOUR_SIGMA = 0.20
"""The same between GPUs, after scaling by datasheet: leave-one-GPU-out errors of benchmarks/profile_accuracy.py, rounded up."""
MAX_NEIGHBOURS = 1


class ProfileChain:
    """Profiles asked in turn; the first that has a table for an Op answers it."""

    def __init__(self, links: Sequence[MeasuredProfile], num_own_gpu: int, last: DatasheetProfile) -> None:
        """links: best first, of which `num_own_gpu` were measured on the GPU itself."""
        self._links, self._last = tuple(links), last
        self._passes = [(link, exactly) for group in (links[:num_own_gpu], links[num_own_gpu:]) for exactly in (True, False)
                        for link in group]  # fmt: skip
        self._answering: dict[tuple[str, str, int], Profile] = {}
        self.log_biases: Mapping[tuple[str, str], LogBias] = _widest([*(link.log_biases for link in links), last.log_biases])

    @property
    def name(self) -> str:
        return self._links[0].name if self._links else self._last.name

    def _profile(self, op: Op) -> Profile:
        place = locate(op, self._last.gpu.num_sms)
        if place is None:
            return self._last
        found = self._answering.get(place[:3])
        if found is None:
            found = self._answering[place[:3]] = self._first(place)
        return found

    def _first(self, place: Place) -> Profile:
        for link, exactly in self._passes:
            if link.knows(place, exactly):
                return link
        return self._last

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
    files = {key: load_profile_file(path) for key, path in shipped().items()}
    own = [content for content in files.values() if content.gpu == gpu.name]
    if name == AUTO:
        first = [content for content in own if content.engine == kernels]
    elif is_path(name):
        first = [load_profile_file((base_dir / Path(name).expanduser()).resolve())]
    elif name in files:
        first = [files[name]]
    else:
        raise InputError(
            "profile", name, f"must be auto, datasheet, a path, or one of {', '.join(files) or 'no shipped profiles'}",
            "see kvsim list profiles",
        )  # fmt: skip
    links = [_link(content, gpu) for content in sorted(first, key=lambda content: content.engine_version, reverse=True)]
    links += [_link(content, gpu, OTHER_ENGINE_SIGMA, "another engine") for content in own if content not in first]
    num_own = len(links)
    neighbour = _neighbour(gpu, {content.gpu for content in files.values()})
    if neighbour is not None:
        carried = [content for content in files.values() if content.gpu == neighbour]
        carried.sort(key=lambda content: content.engine != kernels)
        links += [_link(content, gpu, NEIGHBOUR_SIGMA, "scaled by datasheet") for content in carried if content not in first]
    return ProfileChain(links, num_own, last) if links else last


def _link(content: ProfileFile, gpu: Gpu, sigma: float = 0.0, carried: str = "") -> MeasuredProfile:
    measured_on = load_gpu(content.gpu)
    if measured_on.name != gpu.name and not carried:
        sigma, carried = NEIGHBOUR_SIGMA, "scaled by datasheet"
    return MeasuredProfile(content, gpu, measured_on.num_sms, sigma, carried)


def _neighbour(gpu: Gpu, measured: Iterable[str]) -> str | None:
    """The measured GPU most like this one: of its generation if there is one, then by what its datasheet says."""
    others = [load_gpu(name) for name in measured if name != gpu.name]
    if not others or gpu.compute_capability is None:
        return None

    def distance(other: Gpu) -> tuple[int, float]:
        here, there = gpu.compute_capability or (0, 0), other.compute_capability or (0, 0)
        generations = abs(here[0] - there[0]) * 10 + (here != there)
        sizes = (
            (gpu.hbm_bandwidth_bytes_per_s, other.hbm_bandwidth_bytes_per_s),
            (gpu.peak_flops("bf16"), other.peak_flops("bf16")),
        )
        return generations, sum(abs(log(one / two)) for one, two in sizes)

    return min(others, key=distance).name
