"""Sweeps that are killed, interrupted, run twice or lose a worker: no case is lost, none is there twice, none is simulated again."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sweeps

import kvsim
from kvsim.errors import InputError, KvsimError
from kvsim.sweeping import folder as folders
from kvsim.sweeping.folder import SweepFolder, read_journal
from kvsim.sweeping.pool import _serve
from kvsim.sweeping.rows import COLUMNS, simulate_case
from kvsim.sweeping.run import Outcome, run_sweep
from kvsim.sweeping.spec import load_sweep


def run(data: dict[str, Any], folder: Path, **options: Any) -> Outcome:
    return run_sweep(load_sweep(data), folder, **options)


def table_bytes(folder: Path) -> bytes:
    return (folder / "results.parquet").read_bytes()


# -- killed ----------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_after(path: Path, folder: Path, delay_s: float) -> bool:
    """Starts the sweep, kills it with all it had no time to say, and waits for its workers; whether it was still running."""
    with subprocess.Popen(sweeps.command(path, "--out", folder, "-q"), stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(delay_s)
            return False
        except subprocess.TimeoutExpired:
            workers = children(process.pid)
            process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 30
    while any(map(is_running, workers)):
        assert time.monotonic() < until, "workers outlive a killed sweep"
        time.sleep(0.05)
    return True


def check_kills(tmp_path: Path, num_kills: int, num_seeds: int, seed: int) -> None:
    path = sweeps.write(sweeps.sweep_file(num_seeds), tmp_path / "s.yaml")
    start = time.monotonic()
    done = sweeps.run_command(path, "--out", tmp_path / "whole", "-q")
    duration_s = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    delays = random.Random(seed)
    for number in range(num_kills):
        folder = tmp_path / f"killed{number}"
        was_killed = kill_after(path, folder, delays.uniform(0, 1) * duration_s)
        saved = read_journal(folder) if folder.exists() else []
        assert len({row["id"] for row in saved}) == len(saved)
        outcome = run_sweep(load_sweep(path), folder)
        assert outcome.num_found == len(saved) and outcome.num_simulated == 2 * num_seeds - len(saved)
        assert table_bytes(folder) == table_bytes(tmp_path / "whole"), f"kill {number}, {len(saved)} rows had been saved"
        assert not was_killed or len(saved) <= 2 * num_seeds
        journal = read_journal(folder)
        assert len(journal) == len({row["id"] for row in journal}) == 2 * num_seeds
        assert len(list((folder / "cases").iterdir())) == 1


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    check_kills(tmp_path, num_kills=2, num_seeds=40, seed=1)


@pytest.mark.slow
def test_twenty_kills_of_two_hundred_cases(tmp_path: Path) -> None:
    check_kills(tmp_path, num_kills=20, num_seeds=100, seed=2)


def test_ctrl_c_saves_what_is_finished(tmp_path: Path) -> None:
    path = sweeps.write(sweeps.sweep_file(1200), tmp_path / "s.yaml")
    command = sweeps.command(path, "--out", tmp_path / "out")
    # A background job of a shell ignores Ctrl-C, and what it starts inherits that: the child begins as a terminal would start it.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listening) as process:  # noqa: PLW1509
        while not list((tmp_path / "out" / "cases").glob("part-*")):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "kvsim: interrupted\n")
    rows = sweeps.rows_of(tmp_path / "out")
    num_ok = sum(row["status"] == "ok" for row in rows)
    assert len(rows) == 2400 and 0 < num_ok < 2400 and num_ok == len(read_journal(tmp_path / "out"))
    assert {row["status"] for row in rows} == {"ok", "pending"}


# -- workers ---------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_costs_one_case(tmp_path: Path) -> None:
    """Killed from outside once some cases are done; the row says so, and --retry makes the table whole."""
    killed: list[int] = []

    def kill_one(total: int, finished: int, failed: int) -> None:
        if finished >= 10 and not killed:
            worker = multiprocessing.active_children()[0]
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)

    data = sweeps.sweep_file(40)
    outcome = run(data, tmp_path / "a", jobs=2, progress=kill_one)
    assert outcome.by_status == {"ok": 79, "crashed": 1} and outcome.num_faults == 1 and outcome.num_simulated == 80
    (row,) = (row for row in sweeps.rows_of(tmp_path / "a") if row["status"] == "crashed")
    assert row["error"] == "the worker process died (exit code -9)" and row["ttft_mean_s"] is None
    assert not multiprocessing.active_children()
    assert run(data, tmp_path / "a").num_simulated == 0
    again = run(data, tmp_path / "a", retry=True)
    assert again.num_simulated == 1 and again.by_status == {"ok": 80}
    run(data, tmp_path / "b", jobs=1)
    assert table_bytes(tmp_path / "a") == table_bytes(tmp_path / "b")


@pytest.mark.parametrize("closed_while", ["asking", "answering"])
def test_a_worker_whose_parent_hangs_up_says_nothing(closed_while: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Asking: its answer lies unread, so the pipe is reset. Answering: nobody is there to write to."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,))
    worker.start()
    theirs.close()
    if closed_while == "asking":
        assert ours.poll(60)
    ours.close()
    worker.join(60)
    assert worker.exitcode == 0 and capfd.readouterr() == ("", "")


def test_a_script_without_a_main_guard_is_told(tmp_path: Path) -> None:
    sweeps.write(sweeps.sweep_file(2), tmp_path / "s.yaml")
    (tmp_path / "script.py").write_text("import kvsim\nkvsim.sweep('s.yaml')\n")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and 'if __name__ == "__main__"' in done.stderr.splitlines()[-1]
    (tmp_path / "script.py").write_text("import kvsim\nif __name__ == '__main__':\n    print(len(kvsim.sweep('s.yaml')))\n")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "4\n"


# -- the folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases without worker processes: for tests of what is saved, not of who simulates."""

    def simulate(work: Any, jobs: int) -> Any:
        for case in work:
            yield [simulate_case(case)]

    monkeypatch.setattr("kvsim.sweeping.run.simulate_locally", simulate)


def test_a_changed_sweep_file_starts_only_what_is_new(tmp_path: Path, in_process: None) -> None:
    assert run(sweeps.sweep_file(3), tmp_path).num_simulated == 6
    more = run(sweeps.sweep_file(5), tmp_path)
    assert (more.num_simulated, more.num_found, more.was_changed, more.num_rows) == (4, 6, True, 10)
    fewer = run(sweeps.sweep_file(2), tmp_path)
    assert (fewer.num_simulated, fewer.num_found, fewer.was_changed, fewer.num_rows) == (0, 4, True, 4)
    back = run(sweeps.sweep_file(5), tmp_path)
    assert (back.num_simulated, back.num_found) == (0, 10)
    run(sweeps.sweep_file(5), tmp_path / "fresh")
    assert table_bytes(tmp_path) == table_bytes(tmp_path / "fresh")
    assert not run(sweeps.sweep_file(5), tmp_path).was_changed


def test_parts_are_merged_and_nothing_is_lost(tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SAVE_S", 0.0)
    monkeypatch.setattr(folders, "_MERGED_PARTS", 3)
    most = 0

    def count(total: int, finished: int, failed: int) -> None:
        nonlocal most
        parts = len(list((tmp_path / "a" / "cases").glob("part-*")))
        assert len(read_journal(tmp_path / "a")) == finished
        most = max(most, parts)

    run(sweeps.sweep_file(10), tmp_path / "a", progress=count)
    assert 3 < most < 12
    run(sweeps.sweep_file(10), tmp_path / "b")
    assert table_bytes(tmp_path / "a") == table_bytes(tmp_path / "b")


def test_what_a_kill_leaves_behind_does_no_harm(tmp_path: Path, in_process: None) -> None:
    run(sweeps.sweep_file(3), tmp_path)
    before = table_bytes(tmp_path)
    (part,) = (tmp_path / "cases").iterdir()
    (tmp_path / "cases" / ".part-00000009.parquet.tmp").write_bytes(part.read_bytes()[:100])
    (tmp_path / "cases" / "part-00000007.parquet").write_bytes(part.read_bytes())  # merged, and killed before the old were removed
    (tmp_path / "results.parquet").unlink()
    assert run(sweeps.sweep_file(3), tmp_path).num_simulated == 0
    assert table_bytes(tmp_path) == before and len(list((tmp_path / "cases").iterdir())) == 1


def test_folders_that_cannot_be_used(tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path, says: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=says):
            run(sweeps.sweep_file(2), folder)
        assert sorted(tmp_path.rglob("*")) == before

    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "must be a directory; a file is in the way")
    refused(tmp_path / "file" / "below", "must be a directory; a file is in the way")
    refused(tmp_path, "must be a new folder or hold a sweep; it holds other files")
    refused(Path("/proc/nowhere/out"), "cannot be written")
    run(sweeps.sweep_file(2), tmp_path / "out")
    with SweepFolder(tmp_path / "out"):
        refused(tmp_path / "out", "is in use by another sweep")
    monkeypatch.setattr(folders, "versions", lambda: {"kvsim": "0.0.1"})
    refused(tmp_path / "out", r"holds results of other versions \(kvsim 0.1.0\)")
    monkeypatch.undo()
    (part,) = (tmp_path / "out" / "cases").iterdir()
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "out", "must be a part of a sweep's results .* delete it: its cases are simulated again")
    (tmp_path / "out" / "sweep.json").write_text("{")
    refused(tmp_path / "out", "must be the JSON of a sweep")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path, in_process: None) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written"):
        run(sweeps.sweep_file(2), tmp_path / "locked" / "out")


def test_a_disk_that_fills_up_keeps_what_was_saved(tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SAVE_S", 0.0)
    write, calls = pq.write_table, 0

    def fills_up(table: Any, file: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(28, "No space left on device")
        write(table, file)

    monkeypatch.setattr(pq, "write_table", fills_up)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\).*what is saved there stays"):
        run(sweeps.sweep_file(5), tmp_path / "out")
    assert len(read_journal(tmp_path / "out")) == 3  # one write was the table at the start
    monkeypatch.setattr(pq, "write_table", write)
    assert run(sweeps.sweep_file(5), tmp_path / "out").num_found == 3


def test_without_pyarrow_or_pandas_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, extra in (("pyarrow", "sweep"), ("filelock", "sweep")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(KvsimError, match=rf"needs {package}, which is not installed; pip install 'kvsim\[{extra}\]'"):
                run(sweeps.sweep_file(2), tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        with pytest.raises(KvsimError, match="needs pandas"):
            kvsim.sweep(sweeps.sweep_file(2))
    assert not (tmp_path / "out").exists()


# -- tables ----------------------------------------------------------------------------------------------------------


def test_the_table_in_python(tmp_path: Path, in_process: None) -> None:
    data = sweeps.sweep_file(2)
    data["vary"] = {
        "workload.seed": [1, 0], "engine.max_num_seqs": [8, 4096], "engine.max_model_len": [None, 2048], "weight_dtype": ["bf16"],
        "slo.ttft_p99_s": [1, 0.5], "policies.snapkv": [[{"kind": "snapkv", "budget_tokens": 64}]], "engine.enforce_eager": [True],
    }  # fmt: skip
    frame = kvsim.sweep(data, tmp_path / "a=b")  # which Parquet readers may take for a column
    assert list(frame["case"]) == list(range(32)) and list(frame.columns[:4]) == ["case", "point", "case_id", "policy"]
    assert list(frame["workload.seed"]) == [1] * 16 + [0] * 16 and frame["workload.seed"].dtype == "int64"
    assert frame["slo.ttft_p99_s"].dtype == "float64" and frame["engine.enforce_eager"].dtype == "bool"
    assert frame["policies.snapkv"][0] == '[{"budget_tokens": 64, "kind": "snapkv"}]'
    assert set(frame["engine.max_model_len"].dropna()) == {2048} and frame["engine.max_model_len"].isna().sum() == 16
    # A budget of 2048 tokens a step is below 4096 sequences.
    assert set(frame[frame["engine.max_num_seqs"] == 4096]["status"]) == {"invalid"}
    assert set(frame[frame["engine.max_num_seqs"] == 8]["status"]) == {"ok"}
    assert set(COLUMNS) - {"id"} <= set(frame.columns)
    assert frame.equals(kvsim.read_sweep(tmp_path / "a=b"))
    assert frame.equals(kvsim.sweep(data))
    assert frame.equals(pq.read_table(tmp_path / "a=b" / "results.parquet", partitioning=None).to_pandas())
    with pytest.raises(InputError, match="must hold a sweep"):
        kvsim.read_sweep(tmp_path)


def test_a_sweep_under_way_can_be_read(tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SAVE_S", 0.0)
    seen = []

    def read(total: int, finished: int, failed: int) -> None:
        frame = kvsim.read_sweep(tmp_path / "out")
        seen.append(int((frame["status"] == "ok").sum()))
        assert len(frame) == total == 8
        assert frame[frame["policy"] == "full"]["gain_e2e_x"].dropna().eq(1.0).all()

    run(sweeps.sweep_file(4), tmp_path / "out", progress=read)
    assert seen == list(range(1, 9))


def test_files_hold_no_dates_and_no_paths(tmp_path: Path, in_process: None) -> None:
    for name in ("a", "b"):
        run(sweeps.sweep_file(2), tmp_path / name)
    for file in ("results.parquet", "sweep.json", "cases/part-00000001.parquet"):
        first, second = ((tmp_path / name / file).read_bytes() for name in "ab")
        assert first == second and str(tmp_path).encode() not in first
    schema = pq.read_schema(tmp_path / "a" / "results.parquet")
    assert schema.field("ttft_p99_s").type == pa.float64() and schema.field("meets_slo").type == pa.bool_()
