"""Published quality beside the simulated speed: a section of the report, and the tables of `kvsim list quality`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from kvsim.reports.formats import percent
from kvsim.reports.tables import plain_table
from kvsim.result import PolicyResult, Result

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvsim.quality import Figure


def quality_section(result: Result) -> Iterable[RenderableType]:
    """The nearest published figure of each policy; in brackets where it is of another model or budget."""
    from rich.text import Text

    policies = _compressed(result)
    if not policies:
        return
    heads = ("policy", "% of full", "budget", "model", "task, metric")
    title = "Published quality, not simulated: the nearest figure (in brackets: of another budget or model)"
    yield plain_table(title, heads, [_row(policy) for policy in policies], left=True)
    if any(policy.quality is None for policy in policies):
        yield Text("-: none published; figures of a composition's parts say nothing of the whole.")
    if any(policy.quality is not None for policy in policies):
        yield Text("Sources and remarks: --sections full_quality, or summary.json.")


def full_quality(result: Result) -> Iterable[RenderableType]:
    """Scores, sources and remarks."""
    from rich.padding import Padding
    from rich.text import Text

    found = [(policy.name, policy.quality) for policy in _compressed(result) if policy.quality is not None]
    if found:
        yield Text("\nPublished quality: scores and sources", style="bold")
    for name, quality in found:
        score = f"{quality.score:g} of {quality.full_score:g} with the full cache"
        yield Text(f"{name}: {score}, {quality.task}, {quality.metric}, {quality.model}, {quality.budget}")
        yield Padding(Text("; ".join(part for part in (quality.source, quality.note) if part)), (0, 0, 0, 4))


def _compressed(result: Result) -> list[PolicyResult]:
    return [policy for policy in result.policies.values() if policy.description != "full"]


def _row(policy: PolicyResult) -> tuple[str, ...]:
    found = policy.quality
    if found is None:
        return (policy.name, "-", "", "", "")
    budget = found.budget if found.same_budget else f"({found.budget})"
    model = found.model if found.same_model else f"({found.model})"
    return policy.name, percent(found.retained_frac), budget, model, f"{found.task}, {found.metric}"


def catalogue_tables(figures: Iterable[Figure]) -> Iterator[RenderableType]:
    """A table for each source, a row for each policy, model and task: its scores by budget."""
    for source, group in groupby(figures, key=lambda figure: figure.source):
        yield plain_table(source, ("policy", "model", "task, metric", "full", "scores by budget"), _rows(group), left=True)


def _rows(figures: Iterable[Figure]) -> Iterator[tuple[str, ...]]:
    def alike(figure: Figure) -> tuple[object, ...]:
        return figure.policies, figure.model, figure.task, figure.full_score, tuple(figure.budget)

    for _, group in groupby(figures, key=alike):
        row = list(group)
        first = row[0]
        full = "-" if first.full_score is None else _score(first.full_score, first.full_read)
        scores = ", ".join(f"{figure.budget_text}: {_score(figure.score, figure.read)}" for figure in row)
        yield first.policies, first.model, f"{first.task}, {first.metric}", full, scores


def _score(score: float, read: str) -> str:
    return f"{score:g}" + ("*" if read == "plot" else "")
