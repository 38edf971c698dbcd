"""The whole Azure conversation trace runs through the A100 scenario, under every policy and composition in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvsim.api import build_plan, deploy, run_policy
from kvsim.policies import POLICIES
from kvsim.scenario import Scenario, load_scenario

ROOT = Path(__file__).resolve().parent.parent
TRACE = ROOT.parent / "shared" / "traces" / "azure2023_conv.csv"
NUM_REQUESTS = 19_366


def with_trace() -> Scenario:
    trace = {"trace": {"path": str(TRACE), "format": "csv"}}
    return load_scenario(ROOT / "scenarios" / "a100_llama8b.yaml", {"workload": trace})


def test_the_scenario_has_every_policy_but_the_plain_window() -> None:
    kinds = {policy.kind for policies in load_scenario(ROOT / "scenarios" / "a100_llama8b.yaml").policies.values() for policy in policies}
    assert {str(policy.model_fields["kind"].default) for policy in POLICIES} - kinds == {"full", "window"}  # full is []


@pytest.mark.skipif(not TRACE.exists(), reason="the trace is not part of the project: ../shared is absent")
@pytest.mark.parametrize("name", load_scenario(ROOT / "scenarios" / "a100_llama8b.yaml").policies)
def test_all_requests_are_answered(name: str) -> None:
    scenario = with_trace()
    plan = build_plan(deploy(scenario), scenario.policies[name], name)
    result = run_policy(scenario, deploy(scenario), name, plan)
    assert result.summary.num_requests == NUM_REQUESTS
    # The trace sends 5.5 requests/s for an hour. Whoever keeps up is done when the last has been served.
    assert result.log.end_ps > 3_500 * 10**12 and result.summary.requests_per_s < 5.6
