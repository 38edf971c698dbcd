"""Laws that any complete log obeys, on the logs of the toy server."""

from __future__ import annotations

import pytest
from fakes import make_log

from kvsim.metrics import summarize

S = 10**12


@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_accounted_for_and_littles_law_holds(seed: int) -> None:
    log = make_log(seed=seed, num_requests=150)
    summary = summarize(log, warmup_requests=0, slo={})
    assert summary.itl.num_values == log.request_columns()["output_tokens"].sum() - summary.num_requests
    assert summary.mean_in_system_requests == pytest.approx(summary.arrival_rate_times_e2e_requests, rel=1e-9)
    tpot_sum_s = (log.request_columns()["finish_ps"] - log.request_columns()["first_token_ps"]).sum() / S
    assert summary.itl.mean_s * summary.itl.num_values == pytest.approx(tpot_sum_s, rel=1e-9)
    assert summary.max_decode_batch_sequences <= summary.max_running_requests <= 16


def test_a_toy_server_beyond_its_capacity_is_called_overloaded() -> None:
    growth = summarize(make_log(slots=4), warmup_requests=0, slo={}).queue_growth
    assert growth is not None and growth.overloaded and growth.taken_up_per_s < 0.7 * growth.offered_per_s
    assert summarize(make_log(slots=4), warmup_requests=0, slo={"e2e_p50_s": 1e3}).goodput_frac == 1
