"""Tables with a row or a column for each policy; every cell is literal text, never markup."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kvsim.reports.verdict import is_overloaded
from kvsim.result import Result

if TYPE_CHECKING:
    from rich.console import RenderableType

POLICIES_PER_TABLE = 5


def policy_table(title: str, result: Result, columns: list[tuple[str, list[str]]]) -> RenderableType:
    """A row for each policy; an asterisk marks the overloaded ones."""
    names = [name + (" *" if is_overloaded(policy.summary) else "") for name, policy in result.policies.items()]
    rows = list(zip(names, *(cells for _, cells in columns), strict=True))
    return plain_table(title, ("policy", *(head for head, _ in columns)), rows, right=True)


def lines_by_policy(
    title: str, result: Result, lines: list[str], cell: Callable[[str, str], str]
) -> Iterable[RenderableType]:
    """A row for each line and a column for each policy, in as many tables as it takes."""
    names = list(result.policies)
    for start in range(0, len(names) if lines else 0, POLICIES_PER_TABLE):
        shown = names[start : start + POLICIES_PER_TABLE]
        rows = [(line, *(cell(line, name) for name in shown)) for line in lines]
        yield plain_table(title, ("", *shown), rows, right=True)


def plain_table(
    title: str, heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, right: bool = False
) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for i, head in enumerate(heads):
        numeric = i > 0 and (right or i < len(heads) - 1)
        table.add_column(Text(head), justify="right" if numeric else "left", vertical="bottom", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return Group(Text(f"\n{title}", style="bold"), table)
