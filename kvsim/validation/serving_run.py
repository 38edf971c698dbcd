"""What a serving run of others states, in the form that the suite `hardware` scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

A100, H100, RTX_4090 = "a100-sxm-80gb", "h100-sxm-80gb", "rtx-4090-24gb"
NO_SXM = "A100 of 80 GB, SXM taken"
VLLM_11 = {"kind": "vllm_v1", "async_scheduling": False, "reserve_full_prompt": False}


class Run(NamedTuple):
    """setting: what the run is there for. workload: of a scenario; or the name of a record in `serving_lengths`. batch: of the roofline."""

    setting: str
    name: str
    gpu: str
    model: str
    engine: Mapping[str, Any]
    workload: Mapping[str, Any] | str
    truths: Mapping[str, float]
    source: str
    missing: str = ""
    tp: int = 1
    weight_dtype: str = "bf16"
    batch: int = 1
