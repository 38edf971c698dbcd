"""Host work of vLLM's V1 engine: constants are the fit of committed rows, and the band holds other ways to run a step."""

from __future__ import annotations

from math import exp

import numpy as np
import pytest

from kvsim.datasheet import DatasheetProfile
from kvsim.efficiencies import load_efficiencies
from kvsim.engines import VllmV1
from kvsim.hardware import load_gpu
from kvsim.ops import HostWork

PROFILE = DatasheetProfile(load_gpu("h100-sxm-80gb"))


def step_us(batch: int, engine: VllmV1 | None = None) -> float:
    parts = (engine or VllmV1(async_scheduling=False)).host_ops(batch, 0)
    return 1e6 * sum(PROFILE.answer(op).seconds for ops in parts for op in ops)


def test_constants_are_the_fit_of_the_committed_rows(host_rows) -> None:  # type: ignore[no-untyped-def]
    efficiencies = load_efficiencies()
    batch, times = host_rows.measured(host_rows.V1, host_rows.read_rows(host_rows.V1))
    assert len(batch) == 27 and set(batch) == {2**k for k in range(9)}
    for part, line in host_rows.fit_lines(batch, times).items():
        for name, us in line._asdict().items():
            packaged = efficiencies[f"host.vllm_v1.{part}.{name.removesuffix('_us')}_s"]
            assert packaged == pytest.approx(1e-6 * us, rel=1e-3), (part, name)


def test_lines_meet_the_rows(host_rows) -> None:  # type: ignore[no-untyped-def]
    """The persistent batch leaves little that grows with the context."""
    batch, times = host_rows.measured(host_rows.V1, host_rows.read_rows(host_rows.V1))
    for size, measured_us in zip(batch, sum(times.values()), strict=True):
        assert step_us(int(size)) == pytest.approx(measured_us, rel=0.2)


def test_the_band_holds_other_attention_and_sampling(host_rows) -> None:  # type: ignore[no-untyped-def]
    batch, times = host_rows.measured(host_rows.V1_OTHERWISE, host_rows.read_rows(host_rows.V1))
    low, _, _, high = PROFILE.answer(HostWork("vllm_v1", "process", 1)).log_bias
    ratios = np.array([us / step_us(int(size)) for size, us in zip(batch, sum(times.values()), strict=True)])
    assert (ratios > 1).all()
    assert exp(low) < ratios.min() and ratios.max() < exp(high)


def test_only_launches_run_beside_the_device() -> None:
    """Tokens are read once the device has answered; an engine that schedules ahead does all of it meanwhile."""
    before, beside, after = ([op.part for op in ops] for ops in VllmV1(async_scheduling=False).host_ops(8, 0))
    assert (before, beside, after) == (["schedule", "prepare"], ["launch"], ["sample", "process"])
    ahead = VllmV1(async_scheduling=True)
    assert not ahead.host_ops(8, 0)[0] and not ahead.host_ops(8, 0)[2]
    assert step_us(8, ahead) == pytest.approx(step_us(8))


def test_work_of_the_servers_process_is_in_no_step(host_rows) -> None:  # type: ignore[no-untyped-def]
    """The front end has a process of its own; V0's step holds detokenizer and outputs."""
    used = {name for names in host_rows.V1.parts.values() for name in names}
    beside = {"frontend", "frontend_stats", "new_request", "new_request_input", "wall_alone", "wall_encoding"}
    measured = {row["part"] for row in host_rows.read_rows(host_rows.V1)}
    assert used.isdisjoint(beside) and used | beside <= measured
