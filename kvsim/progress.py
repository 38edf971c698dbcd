"""A progress bar over policies and requests on a terminal's standard error; nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvsim.scenario import Scenario
from kvsim.workload import expected_num_requests

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def progress_bar(scenario: Scenario, *, shown: bool = True) -> Iterator[Callable[[str, int], None] | None]:
    """What `simulate` is to call; None where nobody watches. A trace of unknown length shows a count and no end."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bars(bar, list(scenario.policies), expected_num_requests(scenario.workload))


@contextmanager
def draws_bar(num_draws: int, *, shown: bool = True) -> Iterator[Callable[[int], None] | None]:
    """The same over the draws of `kvsim.uncertainty.error_bands`."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("draws", total=num_draws)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def count_bar(label: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar of (done, of so many), with the time that is left."""
    if not shown or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def sweep_bar(*, shown: bool = True) -> Iterator[Callable[[int, int, int], None] | None]:
    """The same over the cases of a sweep, told (all, finished, failed), with the time that is left."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=300) as bar:
        task = bar.add_task("cases", total=None)

        def tell(total: int, finished: int, failed: int) -> None:
            bar.update(task, total=total, completed=finished, description=f"cases ({failed} failed)" if failed else "cases")

        yield tell


@contextmanager
def tasks_bar(*, shown: bool = True) -> Iterator[Callable[[str, int, int], None] | None]:
    """One bar for a number of tasks after another: told what is being done, how much of it is done, and of how much."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("candidates", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


class _Bars:
    """One bar for the policies, one for the requests of the present one."""

    def __init__(self, bar: Progress, names: list[str], total: int | None) -> None:
        self.bar, self.names, self.total = bar, names, total
        self.policies = bar.add_task("policies", total=len(names))
        self.requests = bar.add_task(names[0], total=total)
        self.name = names[0]

    def __call__(self, name: str, num_finished: int) -> None:
        if name != self.name:
            self.name = name
            self.bar.update(self.policies, completed=self.names.index(name))
            self.bar.reset(self.requests, total=self.total, description=name)
        self.bar.update(self.requests, completed=num_finished)
