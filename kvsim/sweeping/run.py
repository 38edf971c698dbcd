"""Runs a sweep: plan, workers, folder. What the command `kvsim sweep` and `kvsim.sweep` share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kvsim.errors import InputError, KvsimError
from kvsim.sweeping.cases import Plan, check_deployable
from kvsim.sweeping.folder import RESULTS, SweepFolder, check_folder, check_parquet, read_journal, read_manifest
from kvsim.sweeping.pool import num_cores, simulate_locally
from kvsim.sweeping.rows import FAULTS, STATUSES
from kvsim.sweeping.spec import Sweep, load_sweep
from kvsim.sweeping.table import METRICS, result_rows, result_table, with_results

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int, int, int], None]
"""Told how many cases there are to simulate, how many of them are done, and how many of these failed."""


@dataclass(frozen=True)
class Outcome:
    """A sweep that ended.

    num_simulated: cases simulated now; num_found: cases that were done before; num_shared: rows that are the same case as another
    row, so not simulated again. was_changed: the folder held cases of another sweep file. errors: one-line errors with how many
    rows have each, the most frequent first.
    """

    results: Path
    num_rows: int
    by_status: Mapping[str, int]
    num_simulated: int
    num_found: int
    num_shared: int
    was_changed: bool
    errors: tuple[tuple[str, int], ...]

    @property
    def num_faults(self) -> int:
        """Rows that failed through no fault of the user."""
        return sum(self.by_status.get(status, 0) for status in FAULTS)


def run_sweep(
    sweep: Sweep, folder: str | os.PathLike[str], *, jobs: int | None = None, ray: str | None = None, retry: bool = False,
    progress: Progress | None = None,
) -> Outcome:  # fmt: skip
    """Simulates what the folder does not hold yet, and leaves the table of all cases there.

    jobs: local processes, by default one for each core. ray: address of a Ray cluster in place of them, or "local". retry: simulate
    cases again that ended in a bug or a crash. Raises InputError for what cannot work, before anything is written; what goes wrong
    in a case is its row. Interrupted, it saves what is finished.
    """
    jobs = num_cores() if jobs is None else jobs
    if jobs < 1:
        raise InputError("--jobs", jobs, "must be >= 1", "leave it out for one process on each core")
    target = Path(folder)
    check_parquet()
    check_folder(target)
    plan = Plan(sweep)
    check_deployable(plan)
    with _workers(jobs, ray) as simulate, SweepFolder(target) as store:
        was_changed = store.open(plan, retry)
        wanted = {case.id for case in plan.cases if not case.error}
        found = len(wanted & set(store.done))
        total, failed, finished = len(wanted) - found, 0, 0
        try:
            for rows in simulate(plan.work(store.done)):
                store.add(rows)
                finished += len(rows)
                failed += sum(row["status"] != "ok" for row in rows)
                if progress is not None:
                    progress(total, finished, failed)
        finally:
            store.close(plan)
        rows = result_rows(plan, store.done)
    counts = Counter(row["status"] for row in rows)
    return Outcome(
        target / RESULTS, len(rows), {status: counts[status] for status in STATUSES if counts[status]}, finished, found,
        sum(not case.error for case in plan.cases) - len(wanted), was_changed,
        tuple(Counter(row["error"] for row in rows if row["error"]).most_common()),
    )  # fmt: skip


def sweep(
    source: str | Path | Mapping[str, Any], out: str | os.PathLike[str] | None = None, *, jobs: int | None = None,
    ray: str | None = None, overrides: Mapping[str, Any] | None = None, retry: bool = False, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Runs a sweep and returns its table: a row per case, in order, units in the names of the columns.

    source: path of a sweep file, or the same as a mapping. out: the folder to keep it in, and to go on from; None keeps nothing.
    jobs, ray, retry: as `run_sweep`. overrides: dotted fields of the base scenario. progress: a bar on a terminal.
    Raises InputError for wrong input, KvsimError where pandas, pyarrow or Ray is missing.
    """
    _pandas()
    from kvsim.progress import sweep_bar

    wanted = load_sweep(source, overrides)
    with TemporaryDirectory(prefix="kvsim-sweep-") if out is None else nullcontext(str(out)) as folder:
        with sweep_bar(shown=progress) as tell:
            run_sweep(wanted, folder, jobs=jobs, ray=ray, retry=retry, progress=tell)
        return read_sweep(folder)


def read_sweep(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """The table of a sweep's folder, also of one that still runs or was killed: what is not done has the status pending.

    Raises InputError where the folder holds no sweep.
    """
    _pandas()
    check_parquet()
    import pyarrow.parquet as pq

    path = Path(folder)
    if read_manifest(path) is None or not (path / RESULTS).exists():
        raise InputError("folder", str(path), "must hold a sweep", "kvsim sweep makes one")
    table = pq.read_table(path / RESULTS, partitioning=None)
    names = table.column_names
    fields = names[names.index("policy") + 1 : names.index("status")]
    rows = [{name: value for name, value in row.items() if name not in METRICS} for row in table.to_pylist()]
    done = {row["id"]: row for row in _steady_journal(path)}
    joined = result_table(with_results(rows, done), fields)
    return joined.cast(table.schema).to_pandas()


def _steady_journal(path: Path) -> list[dict[str, Any]]:
    """A running sweep may put one part in place of several while they are read: then once more."""
    for _ in range(3):
        try:
            return read_journal(path)
        except InputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    return read_journal(path)


def _workers(jobs: int, ray: str | None) -> AbstractContextManager[Any]:
    if ray is None:
        return nullcontext(partial(simulate_locally, jobs=jobs))
    from kvsim.sweeping.cluster import ray_cluster

    return ray_cluster(ray, jobs)


def _pandas() -> None:
    try:
        import pandas  # noqa: F401
    except ImportError as error:
        raise KvsimError("kvsim.sweep needs pandas, which is not installed; pip install 'kvsim[sweep]'") from error


__all__ = ["Outcome", "load_sweep", "read_sweep", "run_sweep", "sweep"]
