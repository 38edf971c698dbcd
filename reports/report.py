"""A report as data: what it says, in sections of prose, tables, charts and code. HTML and Markdown are made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from kvsim.reports.cells import Table
from kvsim.reports.figures.chart import Chart


@dataclass(frozen=True)
class Prose:
    """A paragraph; several lines are a list."""

    lines: tuple[str, ...]
    kind: str = field(default="prose", init=False)


@dataclass(frozen=True)
class Code:
    """Text to copy. folded: closed until it is opened."""

    title: str
    text: str
    folded: bool = False
    copy: bool = True
    kind: str = field(default="code", init=False)


Part: TypeAlias = Prose | Table | Chart | Code


@dataclass(frozen=True)
class Section:
    slug: str
    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Report:
    """stem: name of its HTML and Markdown files. lead: the answer in words. csv_files: text by file name."""

    stem: str
    what: str
    title: str
    facts: tuple[tuple[str, str], ...]
    lead: tuple[str, ...]
    warnings: tuple[str, ...]
    sections: tuple[Section, ...]
    csv_files: Mapping[str, str]

    def charts(self) -> Iterator[Chart]:
        for section in self.sections:
            for part in section.parts:
                if isinstance(part, Chart):
                    yield part


def section(slug: str, title: str, *parts: Part | None) -> Iterator[Section]:
    """Nothing where no part has anything to say."""
    kept = tuple(part for part in parts if part is not None)
    if kept:
        yield Section(slug, title, kept)
