from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from fakes import make_result

from kvsim.reports.perfetto import write_trace
from kvsim.result import Result

Events = list[dict]


@pytest.fixture(scope="module")
def result() -> Result:
    return make_result()


@pytest.fixture(scope="module")
def events(result: Result, tmp_path_factory: pytest.TempPathFactory) -> Events:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    write_trace(result, path, max_requests=10)
    return json.loads(path.read_text())["traceEvents"]


def test_a_process_for_each_policy(result: Result, events: Events) -> None:
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == list(result.policies)


def test_engine_slices_cover_every_step_and_never_overlap(result: Result, events: Events) -> None:
    for process, policy in enumerate(result.policies.values(), start=1):
        slices = [e for e in events if e["ph"] == "X" and e["pid"] == process]
        assert sum(e["args"]["steps"] for e in slices) == policy.log.step_columns()["num_steps"].sum()
        ends_ns = [round((e["ts"] + e["dur"]) * 1000) for e in slices]
        starts_ns = [round(e["ts"] * 1000) for e in slices]
        assert all(end <= start for end, start in zip(ends_ns, starts_ns[1:], strict=False))


def test_async_slices_nest_and_stop_at_the_limit(events: Events) -> None:
    assert len({e["id"] for e in events if e["ph"] == "b"}) == 3 * 10
    stacks: dict[str, list[str]] = {}
    for event in events:
        if event["ph"] == "b":
            stacks.setdefault(event["id"], []).append(event["name"])
        elif event["ph"] == "e":
            assert stacks[event["id"]].pop() == event["name"]
    assert not any(stacks.values())


def test_counters_end_at_zero(events: Events) -> None:
    for process in (1, 2, 3):
        for name in ("decoding sequences", "waiting requests", "KV pool used %"):
            last = [e for e in events if e["ph"] == "C" and e["pid"] == process and e["name"] == name][-1]
            assert set(last["args"].values()) == {0}


def test_compressed_trace_has_the_same_events_and_stable_bytes(result: Result, events: Events, tmp_path: Path) -> None:
    for name in ("a.json.gz", "b.json.gz"):
        write_trace(result, tmp_path / name, max_requests=10)
    assert json.loads(gzip.decompress((tmp_path / "a.json.gz").read_bytes()))["traceEvents"] == events
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
