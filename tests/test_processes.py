"""Ctrl-C reaches every process of a terminal: the parent answers it with one line, and nobody outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvsim.commands.exit_codes import INTERRUPTED
from kvsim.processes import Pool, without_interrupts

SCENARIO = """\
gpu: a100-sxm-80gb
model: llama-3.1-8b
engine: {kind: vllm_v1, max_model_len: 4096}
workload:
  arrivals: {kind: poisson, rate_per_s: 4}
  lengths: {kind: fixed, prompt_tokens: 300, output_tokens: 100}
  num_requests: 1000
policies: {full: []}
slo: {ttft_p99_s: 2.0}
plan: {target_rate_per_s: 40}
"""
ENOUGH_S = 60


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Jobs in the background of a script ignore Ctrl-C, and so would these tests and all that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def members(session: int) -> list[int]:
    """Living processes of a session (proc(5): after the name in brackets come state, parent, group and session)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize(
    "argv", [["run", "--uncertainty", "5000", "--out", "out"], ["plan", "--jobs", "2", "--out", "out"]], ids=lambda argv: argv[0]
)
def test_ctrl_c_ends_all_workers(argv: list[str], tmp_path: Path) -> None:
    text = SCENARIO if argv[0] == "plan" else SCENARIO[: SCENARIO.index("plan:")].replace("1000", "60")
    (tmp_path / "s.yaml").write_text(text)
    command = [sys.executable, "-m", "kvsim.cli", argv[0], "s.yaml", *argv[1:]]
    with (tmp_path / "said").open("w") as said:  # no pipe: a worker that is left would keep it open
        process = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said, start_new_session=True)
    deadline = time.monotonic() + ENOUGH_S
    while len(members(process.pid)) < 3 and time.monotonic() < deadline:  # itself and two workers, or one and their tracker
        time.sleep(0.05)
    assert process.poll() is None, (tmp_path / "said").read_text()
    os.killpg(process.pid, signal.SIGINT)
    try:
        assert process.wait(ENOUGH_S) == INTERRUPTED
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert members(process.pid) == []
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)
    assert (tmp_path / "said").read_text() == "kvsim: interrupted\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.yaml", "said"]


BLOCKED = """\
import signal
from multiprocessing import get_context
from kvsim.processes import without_interrupts

def tell():
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)

if __name__ == "__main__":
    for _ in range(2):
        with without_interrupts():
            process = get_context("spawn").Process(target=tell)
            process.start()
        process.join()
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks here")
def test_the_first_process_too_is_spared_ctrl_c(tmp_path: Path) -> None:
    """Its start brings multiprocessing's tracker of resources with it, which lets Ctrl-C through again (CPython 3.11)."""
    (tmp_path / "script.py").write_text(BLOCKED)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=ENOUGH_S, check=True)
    assert done.stdout == "True\nTrue\n"


def test_a_pool_answers_and_passes_on_what_a_worker_raises() -> None:
    with Pool(2) as pool:
        assert list(pool.map(abs, [-1, 2, -3])) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError), Pool(2) as pool:
        pool.submit(time.sleep, ENOUGH_S)
        pool.submit(divmod, 1, 0).result()


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks here")
def test_a_ctrl_c_that_another_thread_takes_waits_too() -> None:
    """The system may hand it to a thread whose mask lets it through; the main one raises when the process has been started."""
    done = False
    with pytest.raises(KeyboardInterrupt), without_interrupts():
        taker = threading.Thread(target=lambda: (signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT}) and None) or time.sleep(0.3))
        taker.start()
        time.sleep(0.05)
        signal.pthread_kill(taker.ident or 0, signal.SIGINT)
        taker.join()
        time.sleep(0.05)
        done = True
    assert done
