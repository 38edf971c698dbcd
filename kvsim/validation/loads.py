"""Lengths and arrivals of the cases, as scenarios write them."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

SHAREGPT_MEANS = {"kind": "lognormal", "prompt_mean_tokens": 217.4, "output_mean_tokens": 200.5}
"""ShareGPT where a source says no more: other sources' means."""
_BOUNDS = {"fixed": ("{}_tokens",), "uniform": ("{}_min_tokens", "{}_max_tokens"), "lognormal": ("{}_mean_tokens",)}


def fixed(prompt: int, output: int) -> dict[str, Any]:
    return {"kind": "fixed", "prompt_tokens": prompt, "output_tokens": output}


def sharegpt(prompt: float, output: float) -> dict[str, Any]:
    """Its means, spread as the 320 of `serving_lengths` and no longer than vLLM's benchmark lets through (is_valid_sequence)."""
    return {
        "kind": "lognormal", "prompt_mean_tokens": prompt, "prompt_cv": 1.17, "prompt_max_tokens": 1024,
        "output_mean_tokens": output, "output_cv": 1.02, "output_max_tokens": 2047,
    }  # fmt: skip


def at_once(num_requests: int, lengths: Mapping[str, Any]) -> dict[str, Any]:
    return {"arrivals": {"kind": "all_at_once"}, "num_requests": num_requests, "lengths": lengths}


def loop(clients: int, num_requests: int, lengths: Mapping[str, Any]) -> dict[str, Any]:
    return {"arrivals": {"kind": "closed_loop", "clients": clients}, "num_requests": num_requests, "lengths": lengths}


def mean_tokens(lengths: Mapping[str, Any]) -> tuple[float, float]:
    """Of prompt and answer. lengths: fixed, uniform or lognormal."""
    names = _BOUNDS[lengths["kind"]]
    prompt, output = (mean(float(lengths[name.format(side)]) for name in names) for side in ("prompt", "output"))
    return prompt, output
