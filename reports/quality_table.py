"""Published quality as a table of a report: the figures, and how far each is from what was asked."""

from __future__ import annotations

from collections.abc import Iterable

from kvsim.planning.result import PublishedQuality
from kvsim.reports.cells import Cell, Column, Table, portion, quantity, text

COLUMNS = (
    Column("policy"), Column("kept", "%", note="score over that of the full cache"), Column("score"), Column("full cache"),
    Column("task, metric", prose=True), Column("measured on", prose=True), Column("at budget", prose=True),
    Column("source", prose=True),
)  # fmt: skip
CAPTION = "kvsim does not simulate the quality of answers: these are the published figures nearest to each policy."


def quality_table(found: Iterable[tuple[str, PublishedQuality | None]]) -> Table | None:
    """A row for each policy and figure; None where none is published at all."""
    pairs = list(found)
    if not any(published for _, published in pairs):
        return None
    rows = tuple((text(policy), *_cells(published)) for policy, published in pairs)
    return Table("quality", "Published quality", COLUMNS, rows, CAPTION)


def _cells(found: PublishedQuality | None) -> tuple[Cell, ...]:
    if found is None:
        return (*(text("") for _ in range(6)), text("none published"))
    model = found.model + ("" if found.same_model else " (another model)")
    budget = found.budget + ("" if found.same_budget else " (another budget)")
    source = "; ".join(part for part in (found.source, found.note) if part)
    numbers = (portion(found.retained_frac), quantity(found.score), quantity(found.full_score))
    return (*numbers, *(text(value) for value in (f"{found.task}, {found.metric}", model, budget, source)))
