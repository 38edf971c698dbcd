"""`kvsim sweep` from the command line, on a cluster, and the page that shows it."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sweeps
import yaml

from kvsim.cli import main
from kvsim.commands.exit_codes import BAD_INPUT, BUG, DONE, SWEEP_EXIT_CODES
from kvsim.errors import KvsimError
from kvsim.sweeping.rows import COLUMNS, GAINS, STATUSES
from kvsim.sweeping.spec import MAX_CASES, Range, SweepFile, load_sweep

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sweeps.write(sweeps.sweep_file(2), tmp_path / "s.yaml")
    return tmp_path


def refused(argv: list[str], says: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["sweep", *argv]) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("kvsim: error: ") and captured.err.count("\n") == 1, captured.err
    assert all(part in captured.err for part in says), captured.err
    assert len(captured.err) < 400 and sorted(folder.rglob("*")) == before


def test_a_sweep_says_what_came_of_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = sweeps.sweep_file(1)
    data["vary"] = {"policies.snapkv[0].budget_tokens": [64, 16, 128], "model": [sweeps.TINY, "llama-3.1-70b"]}
    sweeps.write(data, folder / "s.yaml")
    assert main(["sweep", "s.yaml", "--dry-run"]) == DONE
    assert capsys.readouterr().out == "6 points, 12 cases: 6 to simulate, 2 invalid\n" and not (folder / "out").exists()
    assert main(["sweep", "s.yaml", "--jobs", "2"]) == DONE
    captured = capsys.readouterr()
    assert captured.err == ""  # no bar in a pipe
    lines = captured.out.splitlines()
    assert lines[:2] == ["12 cases: 5 ok, 5 does not fit, 2 invalid", "simulated 6; 0 were there already, 4 are the same as another"]
    assert lines[2].startswith("  5 x llama-3.1-70b does not fit") and "window_tokens=32 must be below budget_tokens=16" in lines[3]
    assert lines[-1] == "wrote out/s/results.parquet"
    assert main(["sweep", "s.yaml", "--out", "out/s", "-q"]) == DONE and capsys.readouterr().out == ""
    assert main(["sweep", "s.yaml", "--set", "workload.num_requests=10", "--out", "o"]) == DONE
    assert {row["num_requests"] for row in sweeps.rows_of(folder / "o")} == {10, None}


def test_bugs_and_crashes_have_an_exit_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvsim.sweeping.rows import crashed

    def simulate(work: Any, jobs: int) -> Any:
        yield [crashed(case, "the worker process died (exit code -11)") for case in work]

    monkeypatch.setattr("kvsim.sweeping.run.simulate_locally", simulate)
    assert main(["sweep", "s.yaml"]) == BUG
    assert "4 x the worker process died (exit code -11)" in capsys.readouterr().out
    monkeypatch.undo()
    os.chdir(folder)
    assert main(["sweep", "s.yaml", "-q"]) == BUG
    assert main(["sweep", "s.yaml", "-q", "--retry"]) == DONE


WRONG_FILES = {
    "empty": ("", ["sweep='w.yaml' must not be empty", "scenario and vary"]),
    "a list": ("- 1\n", ["sweep='w.yaml' must hold a mapping"]),
    "a key twice": ("vary: {}\nvary: {}\n", ["is not valid YAML at line 2", "given twice"]),
    "no vary": ("scenario: s.yaml\n", ["vary is missing"]),
    "a scenario in place of a sweep": ("gpu: l4\nmodel: llama-3.1-8b\n", ["gpu is not a known field"]),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_that_are_no_sweep(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, says = WRONG_FILES[name]
    (folder / "w.yaml").write_text(text)
    refused(["w.yaml"], says, folder, capsys)


def test_wrong_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["nope.yaml"], ["sweep='nope.yaml' does not exist"], folder, capsys)
    refused(["s.yaml", "--jobs", "0"], ["--jobs", "kvsim sweep --help"], folder, capsys)
    refused(["s.yaml", "--out", "s.yaml"], ["--out='s.yaml' must be a directory"], folder, capsys)
    refused(["s.yaml", "--out", "/proc/nowhere/x"], ["cannot be written"], folder, capsys)
    refused(["s.yaml", "--set", "engine.max_num_seq=3"], ["engine.max_num_seq is not a known field"], folder, capsys)
    refused(["--ray", "s.yaml"], ["SWEEP", "kvsim sweep --help"], folder, capsys)


def test_without_parquet(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(["s.yaml"], ["needs pyarrow, which is not installed; pip install 'kvsim[sweep]'"], folder, capsys)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from kvsim.cli import main; main(['sweep', '--help']); print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"'numpy'", "'pydantic'", "'pyarrow'", "'pandas'", "'ray'", "'rich'"} & set(re.findall(r"'\w+'", done.stderr))
    assert SWEEP_EXIT_CODES.split()[-1] in done.stdout


def test_a_bar_with_the_time_left_on_a_terminal(folder: Path) -> None:
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    sweeps.write(sweeps.sweep_file(30), folder / "s.yaml")
    with subprocess.Popen(sweeps.command("s.yaml"), stdout=subprocess.PIPE, stderr=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.wait(60) == DONE
    os.close(master)
    assert b"cases" in shown and b"/60" in shown and b"left" in shown


# -- Ray -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ray() -> Any:
    return pytest.importorskip("ray", reason="needs kvsim[ray]")


def test_ray_gives_the_same_rows(folder: Path, ray: Any) -> None:
    """A Ray of its own in a process of its own: it leaves threads behind."""
    data = sweeps.sweep_file(6)
    data["vary"]["model"] = [sweeps.TINY, "llama-3.1-70b"]
    sweeps.write(data, folder / "s.yaml")
    done = sweeps.run_command("s.yaml", "--out", "ray", "--jobs", 2, "--ray")
    assert done.returncode == DONE and done.stderr == "", done.stderr
    assert sweeps.run_command("s.yaml", "--out", "local").returncode == DONE
    assert (folder / "ray" / "results.parquet").read_bytes() == (folder / "local" / "results.parquet").read_bytes()
    assert {row["status"] for row in sweeps.rows_of(folder / "ray")} == {"ok", "does_not_fit"}


def test_a_cluster_that_is_not_there(folder: Path, ray: Any, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        port = closed.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            says = [f"--ray='{address}' must be a Ray cluster that answers", "Connection refused", "ray start --head"]
            refused(["s.yaml", f"--ray={address}"], says, folder, capsys)
    for address in ("nonsense", "localhost:port", "localhost:99999", "http://"):
        refused(["s.yaml", f"--ray={address}"], ["must be host:port, ray://host:port or auto"], folder, capsys)
    assert time.monotonic() - start < 10


def test_what_listens_but_is_no_ray(folder: Path, ray: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("kvsim.sweeping.cluster._ANSWER_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: [server.accept() for _ in range(9)], daemon=True).start()
        start = time.monotonic()
        refused(["s.yaml", f"--ray=127.0.0.1:{server.getsockname()[1]}"], ["must be a Ray cluster that answers"], folder, capsys)
        assert time.monotonic() - start < 15


def test_a_node_with_other_versions_is_told(ray: Any) -> None:
    from kvsim.api import versions
    from kvsim.sweeping.cases import Plan
    from kvsim.sweeping.cluster import _simulate_there

    work = next(Plan(load_sweep(sweeps.sweep_file(1))).work({}))
    assert _simulate_there(work, versions())["status"] == "ok"
    with pytest.raises(KvsimError, match=r"has numpy \S+, this machine 0\.1; install the same"):
        _simulate_there(work, versions() | {"numpy": "0.1"})


def test_without_ray(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(["s.yaml", "--ray"], ["--ray needs ray, which is not installed; pip install 'kvsim[ray]'"], folder, capsys)


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line of the page's console block, on fewer requests; what it prints is what the page shows."""
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "scenarios", tmp_path / "scenarios")
    (block,) = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    commands = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", block, re.MULTILINE)
    assert len(commands) >= 3
    for line, shown in commands:
        program, *argv = shlex.split(line, comments=True)
        assert program == "kvsim"
        small = [] if "--dry-run" in argv else ["--set", "workload.num_requests=50"]
        assert main([*argv, *small]) == DONE
        assert capsys.readouterr().out == shown, line
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/sweep.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) == 1 + 3 * 3 and lines[0].split()[:3] == ["workload.arrivals.rate_per_s", "engine.max_num_seqs", "policy"]


def test_the_page_names_every_field_column_and_code() -> None:
    for model in (SweepFile, Range):
        for name, field in model.model_fields.items():
            assert f"`{field.alias or name}`" in PAGE, name
            assert field.description
    for name in (*STATUSES, *GAINS, *(column for column in COLUMNS if not re.match(r"(ttft|tpot|e2e|queue|itl)_|id$", column))):
        assert f"`{name}`" in PAGE, name
    assert f"{MAX_CASES:,}" in PAGE
    codes = re.findall(r"^  (\d+) ", SWEEP_EXIT_CODES, re.MULTILINE)
    assert codes == re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        data = yaml.safe_load(block)
        SweepFile.model_validate(data | {"scenario": data.get("scenario", "x.yaml")})
        json.dumps(data)
