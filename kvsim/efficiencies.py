"""Fitted efficiencies of the datasheet profile: a flat mapping of dotted names to SI numbers, read from one YAML file.

In the file every number is ``{value, source}`` and times are in microseconds (``launch_us``); here ``launch_s``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvsim.catalogue import DATA, read_yaml
from kvsim.errors import InputError
from kvsim.profile import SOURCES, LogBias

DEFAULT_PATH = DATA / "profiles" / "datasheet_efficiencies.yaml"
MICROSECOND = 1e-6


@dataclass(frozen=True)
class Efficiencies:
    """values and sources by dotted name (numbers in SI); log_biases and bias_sources by (kind, size class)."""

    values: Mapping[str, float]
    sources: Mapping[str, str]
    log_biases: Mapping[tuple[str, str], LogBias]
    bias_sources: Mapping[tuple[str, str], str]

    def __getitem__(self, name: str) -> float:
        if name not in self.values:
            raise InputError(f"efficiencies.{name}", None, "is missing", "remake the file with the fit script")
        return self.values[name]

    def replaced(self, values: Mapping[str, float]) -> Efficiencies:
        """A copy with some values replaced (fitting does this)."""
        return Efficiencies({**self.values, **values}, self.sources, self.log_biases, self.bias_sources)

    def children(self, prefix: str) -> list[str]:
        """Names one level below a dotted prefix, in file order."""
        start = prefix + "."
        return list(dict.fromkeys(name[len(start) :].split(".")[0] for name in self.values if name.startswith(start)))


def load_efficiencies(path: str | Path = DEFAULT_PATH) -> Efficiencies:
    """Read and check the YAML; the packaged file unless told otherwise."""
    return _load(Path(path))


@cache
def _load(path: Path) -> Efficiencies:
    content = read_yaml("efficiencies", path)
    values, sources = {}, {}
    for name, entry in _leaves(content.get("values", {}), "values"):
        value, source = _number(name, entry)
        dotted = name.removeprefix("values.")
        if dotted.endswith("_us"):
            dotted, value = dotted[:-3] + "_s", value * MICROSECOND
        values[dotted], sources[dotted] = value, source
    biases: dict[tuple[str, str], LogBias] = {}
    bias_sources: dict[tuple[str, str], str] = {}
    for kind, classes in content.get("log_biases", {}).items():
        for size_class, entry in classes.items():
            field = f"log_biases.{kind}.{size_class}"
            quantiles, source = entry.get("quantiles"), entry.get("source", "")
            if not isinstance(quantiles, list) or len(quantiles) != 4 or sorted(quantiles) != quantiles:
                raise InputError(f"efficiencies.{field}", quantiles, "must be four ascending numbers")
            biases[kind, size_class] = (quantiles[0], quantiles[1], quantiles[2], quantiles[3])
            bias_sources[kind, size_class] = _checked_source(field, source)
    return Efficiencies(values, sources, biases, bias_sources)


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, entry in tree.items():
        name = f"{prefix}.{key}"
        if not isinstance(entry, dict):
            raise InputError(f"efficiencies.{name}", entry, "must be written {value: ..., source: ...}")
        if "value" in entry:
            yield name, entry
        else:
            yield from _leaves(entry, name)


def _number(name: str, entry: Mapping[str, Any]) -> tuple[float, str]:
    value = entry["value"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise InputError(f"efficiencies.{name}", value, "must be a finite number >= 0")
    return float(value), _checked_source(name, entry.get("source", ""))


def _checked_source(name: str, source: object) -> str:
    if not isinstance(source, str) or not source.startswith(SOURCES):
        raise InputError(f"efficiencies.{name}.source", source, f"must begin with one of {', '.join(SOURCES)}")
    return source
