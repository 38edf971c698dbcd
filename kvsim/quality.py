"""What was published about the quality of answers under compression: data with sources, and the figure nearest to a policy.

kvsim does not simulate quality. `nearest` finds, for a composition of policies, the published figure that is closest in model
and budget, and says how far off it is. Nothing is interpolated, and a figure of one policy says nothing of a composition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from pathlib import Path
from typing import Any, NamedTuple

from kvsim.catalogue import DATA, Fields, names, positive_number, read_yaml
from kvsim.errors import InputError
from kvsim.model import Model
from kvsim.planning.result import PublishedQuality
from kvsim.policies import POLICIES
from kvsim.policies.base import Policy
from kvsim.schema import kind_of

MEASURES = {
    "kept_frac": "{:.0%} of prompt", "kept_tokens": "{:,.0f} tokens", "compression_ratio": "{:g}x", "bits": "{:g} bits",
}  # fmt: skip
"""What budgets are published in, and how they are shown: `published_budget` of policies and the data use these names."""

PLOT_ERROR = 0.2
"""A score read off a plot may be so far off, in its own unit."""
READ = {"text": "printed", "plot": f"read off a plot, ±{PLOT_ERROR}"}
SAME = 0.01
"""Budgets that differ by less are one."""


@dataclass(frozen=True)
class Figure:
    """One published score of one composition on one model.

    policies: kinds joined by " + ". budget: by MEASURES. full_score: with the full cache; None where it was not printed.
    read, full_read: "text" or "plot". source: paper and place.
    """

    policies: str
    model: str
    task: str
    metric: str
    budget: Mapping[str, float]
    score: float
    read: str
    full_score: float | None
    full_read: str
    source: str
    note: str = ""

    @property
    def budget_text(self) -> str:
        return _budget_text(self.budget)

    @property
    def retained_frac(self) -> float:
        """Score over full_score, which must be there."""
        assert self.full_score is not None
        return self.score / self.full_score


class _Distance(NamedTuple):
    """How far a figure is from what is asked, nearest first.

    optimistic: it was measured with more of the cache than is asked. apart: sum over measures of |log(published / asked)|.
    """

    other_model: bool
    converted: bool
    optimistic: bool
    apart: float

    @property
    def same_budget(self) -> bool:
        return not self.converted and self.apart == 0


def nearest(policies: Sequence[Policy], model: Model, prompt_tokens: float) -> PublishedQuality | None:
    """The published figure nearest to a composition: own model first, then a budget in the policy's own terms, then the nearest
    budget that is not above the one asked for, then one above it. Of several at the same distance the lowest is taken.

    prompt_tokens: mean of the traffic; turns a share of the prompt into tokens where a figure states the other.
    None where nothing was published, and for a cache that is left whole, which loses nothing.
    """
    kinds = kinds_of(policies)
    asked = {measure: value for policy in policies for measure, value in policy.published_budget().items()}
    found = [figure for figure in figures() if figure.policies == kinds]
    scaled = [(_distance(figure, model, asked, prompt_tokens), figure) for figure in found if figure.full_score is not None]
    if not scaled:
        return None
    closest = min(distance for distance, _ in scaled)
    level = [figure for distance, figure in scaled if distance == closest]
    chosen = min(level, key=lambda figure: figure.retained_frac)
    assert chosen.full_score is not None
    unscaled = [figure for figure in found if figure.full_score is None and figure.model == model.name]
    return PublishedQuality(
        retained_frac=chosen.retained_frac, score=chosen.score, full_score=chosen.full_score, metric=chosen.metric,
        model=chosen.model, task=chosen.task, source=chosen.source,
        budget=chosen.budget_text + (", more than asked" if closest.optimistic else ""),
        same_model=not closest.other_model, same_budget=closest.same_budget,
        note="; ".join(_notes(chosen, closest, level, unscaled, asked, prompt_tokens)),
    )  # fmt: skip


def kinds_of(policies: Sequence[Policy]) -> str:
    """The kinds of a composition as the data names it, in one order; "" for the whole cache."""
    return " + ".join(sorted(str(policy.kind) for policy in policies if not policy.full_cache))  # type: ignore[attr-defined]


def _distance(figure: Figure, model: Model, asked: Mapping[str, float], prompt_tokens: float) -> _Distance:
    converted, optimistic, apart = False, False, 0.0
    for measure, value in figure.budget.items():
        wanted = asked.get(measure)
        if wanted is None:
            converted, wanted = True, _converted(measure, asked, prompt_tokens)
        ratio = value / wanted
        if abs(ratio - 1) > SAME:
            apart += abs(log(ratio))
            optimistic |= (ratio < 1) if measure == "compression_ratio" else (ratio > 1)
    return _Distance(figure.model != model.name, converted, optimistic, round(apart, 6))


def _converted(measure: str, asked: Mapping[str, float], prompt_tokens: float) -> float:
    """A budget of tokens in another measure of tokens, at this length of prompt."""
    assert measure != "bits", "every policy whose figures are by bits states its bits"
    if "kept_tokens" in asked:
        kept_frac = asked["kept_tokens"] / prompt_tokens
    else:
        kept_frac = asked["kept_frac"] if "kept_frac" in asked else 1 / asked["compression_ratio"]
    return {"kept_frac": kept_frac, "kept_tokens": kept_frac * prompt_tokens, "compression_ratio": 1 / kept_frac}[measure]


def _notes(
    chosen: Figure, distance: _Distance, level: Sequence[Figure], unscaled: Sequence[Figure], asked: Mapping[str, float],
    prompt_tokens: float,
) -> Iterator[str]:  # fmt: skip
    if distance.other_model:
        yield "published for another model"
    if not distance.same_budget:
        mean = f" with prompts of {prompt_tokens:,.0f} tokens" if distance.converted else ""
        side = ", less than published: the figure is optimistic" if distance.optimistic else ""
        yield f"published for another budget: asked for are {_budget_text(asked)}{mean}{side}"
    if asked.get("kept_tokens", 0) >= prompt_tokens:
        yield f"a prompt of the mean length, {prompt_tokens:,.0f} tokens, is kept whole"
    if len(level) > 1:
        least, most = (choose(figure.retained_frac for figure in level) for choose in (min, max))
        yield f"the lowest of {len(level)} figures this near, {least:.1%} to {most:.1%}"
    if "plot" in (chosen.read, chosen.full_read):
        yield READ["plot"]
    yield from _of_the_model(unscaled, asked)
    if chosen.note:
        yield chosen.note


def _budget_text(budget: Mapping[str, float]) -> str:
    return ", ".join(text.format(budget[measure]) for measure, text in MEASURES.items() if measure in budget)


def _of_the_model(unscaled: Sequence[Figure], asked: Mapping[str, float]) -> Iterator[str]:
    """The score nearest in budget of those printed for the model itself, which cannot be compared with a full cache's."""
    comparable = [(abs(log(figure.budget[m] / asked[m])), figure) for figure in unscaled for m in asked if m in figure.budget]
    if comparable:
        _, figure = min(comparable, key=lambda pair: pair[0])
        yield f"{figure.model} itself scored {figure.score:g} at {figure.budget_text}, printed without the full cache's score"


# -- the data ----------------------------------------------------------------------------------------------------------


@cache
def figures() -> tuple[Figure, ...]:
    """Every published figure, by file and in the order of the paper."""
    return tuple(figure for name in names("quality") for figure in read_figures(DATA / "quality" / f"{name}.yaml"))


def read_figures(path: Path) -> tuple[Figure, ...]:
    """The figures of one file. Raises InputError for what is missing, unknown or out of range."""
    fields = Fields(read_yaml("quality", path), "quality")
    paper = fields.text("paper")
    tables = [_block(table, f"quality.tables[{place}]") for place, table in enumerate(_list(fields, "tables"))]
    fields.reject_unknown()
    return tuple(figure for table in tables for figure in _table(table, paper))


def _table(table: Fields, paper: str) -> Iterator[Figure]:
    source, note = f"{paper}, {table.text('where')}", table.text("note") if table.has("note") else ""
    task, metric = table.text("task"), table.text("metric")
    models = table.mapping("models")
    table.reject_unknown()
    for model in models.keys:
        block = models.mapping(model)
        full = block.mapping("full") if block.has("full") else None
        block.raw("full")
        full_score, full_read = (full.number("score"), full.text("read", choices=tuple(READ))) if full else (None, "")
        scores = block.mapping("scores")
        block.reject_unknown()
        for policies in scores.keys:
            _check_kinds(scores.field(policies), policies)
            for place, row in enumerate(_list(scores, policies)):
                score = _block(row, f"{scores.field(policies)}[{place}]")
                yield Figure(
                    policies, model, task, metric, _budget(score), score.number("score"),
                    score.text("read", choices=tuple(READ)), full_score, full_read, source, note,
                )  # fmt: skip
                score.reject_unknown()


def _budget(score: Fields) -> dict[str, float]:
    budget = {measure: positive_number(score.field(measure), score.raw(measure)) for measure in MEASURES if score.has(measure)}
    if not budget:
        raise InputError(score.field("kept_frac"), None, "is missing", f"give one of {', '.join(MEASURES)}")
    if budget.get("kept_frac", 1) > 1:
        raise InputError(score.field("kept_frac"), budget["kept_frac"], "must be at most 1")
    return budget


def _check_kinds(field: str, policies: str) -> None:
    known = [kind_of(policy) for policy in POLICIES]
    parts = policies.split(" + ")
    for kind in parts:
        if kind not in known:
            raise InputError(field, kind, "is not a policy", f"known: {', '.join(known)}")
    if parts != sorted(parts):
        raise InputError(field, policies, "must be in alphabetical order", f"write {' + '.join(sorted(parts))}")


def _list(fields: Fields, key: str) -> list[Any]:
    value = fields.raw(key)
    if not isinstance(value, list) or not value:
        raise InputError(fields.field(key), value, "must be a list that is not empty")
    return value


def _block(value: Any, field: str) -> Fields:
    if not isinstance(value, dict):
        raise InputError(field, value, "must hold a mapping (key: value lines)")
    return Fields(value, field)
