"""Result files of `vllm bench serve --save-result --save-detailed`, one JSON object, read into a `MeasuredRun`.

Keys as in vllm/benchmarks/serve.py: lists of one entry a request (input_lens, output_lens, ttfts, itls, errors and, in newer
versions, start_times), and what the client was told to do (request_rate, "inf" without a limit, burstiness, max_concurrency).
`sglang.bench_serving --output-details` writes the same lists. A failed request has a text in errors, or no output tokens.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvsim.catalogue import read_text
from kvsim.errors import InputError

FIELD = "--measured"
LISTS = ("input_lens", "output_lens", "ttfts", "itls")
_DETAILED = "run `vllm bench serve` with --save-result --save-detailed"


@dataclass(frozen=True)
class MeasuredRun:
    """The requests of one run that succeeded, in order of start. Arrays of shape [requests]; times in seconds.

    start_s: since the first start, None where the file has none. gaps_s: the chunk gaps (ITL) of each request.
    rate_per_s: inf where the client did not limit it, None where the file does not say. notes: what a reader must know.
    """

    name: str
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    ttft_s: np.ndarray
    gaps_s: tuple[np.ndarray, ...]
    start_s: np.ndarray | None
    rate_per_s: float | None
    burstiness: float
    max_concurrency: int | None
    notes: tuple[str, ...]

    @property
    def e2e_s(self) -> np.ndarray:
        """The file has no latencies of its own: the client's last token is its first plus all gaps."""
        return self.ttft_s + np.array([gaps.sum() for gaps in self.gaps_s])


def read_bench_result(path: Path) -> MeasuredRun:
    """Raises InputError, with what is wrong and where, for anything but one detailed result."""
    result = _one_object(path)
    absent = [key for key in LISTS if key not in result]
    if absent:
        raise _error(path, f"must have the lists {', '.join(LISTS)}; {', '.join(absent)} not found", _DETAILED)
    columns = {key: _column(path, result, key) for key in LISTS}
    count = len(columns["input_lens"])
    optional = {key: _column(path, result, key) for key in ("errors", "start_times") if result.get(key)}
    for key, values in {**columns, **optional}.items():
        if len(values) != count:
            raise _error(path, f"must have lists of one length; input_lens has {count} entries, {key} {len(values)}")
    errors = optional.get("errors", [""] * count)
    good = [i for i in range(count) if not errors[i] and columns["output_lens"][i] != 0]
    if not good:
        raise _error(path, f"must hold a request that succeeded; all {count} failed" if count else "must hold a request")
    starts = [_number(path, "start_times", i, optional["start_times"][i]) for i in good] if "start_times" in optional else None
    order = good if starts is None else [good[k] for k in np.argsort(starts, kind="stable")]
    failed = count - len(good)
    notes = (f"{failed} of {count} requests failed; they are left out of replay and comparison",) if failed else ()
    return MeasuredRun(
        path.name,
        np.array([_tokens(path, "input_lens", i, columns["input_lens"][i]) for i in order]),
        np.array([_tokens(path, "output_lens", i, columns["output_lens"][i]) for i in order]),
        np.array([_number(path, "ttfts", i, columns["ttfts"][i]) for i in order]),
        tuple(_gaps(path, i, columns["itls"][i]) for i in order),
        None if starts is None else np.sort(starts) - min(starts),
        *_traffic(path, result), notes,
    )  # fmt: skip


def _one_object(path: Path) -> dict[str, Any]:
    text = read_text(FIELD, path, "give the JSON file of one run").strip()
    try:
        result = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) > 1 and all(line.lstrip().startswith("{") for line in lines):
            fix = "keep the line of one run (--append-result adds a line for each)"
            raise _error(path, f"must hold the result of one run; it holds {len(lines)}", fix) from None
        reason = getattr(error, "msg", "nested too deeply")
        raise _error(path, f"must be JSON ({reason})", _DETAILED) from None
    if not isinstance(result, dict):
        raise _error(path, f"must hold a JSON object, not a {type(result).__name__}", _DETAILED)
    return result


def _traffic(path: Path, result: dict[str, Any]) -> tuple[float | None, float, int | None]:
    """(request rate, burstiness, most requests in flight)."""
    rate = result.get("request_rate")
    if rate is not None:
        rate = math.inf if rate == "inf" else _number(path, "request_rate", None, rate)
        if rate <= 0:
            raise _error(path, f'must have a request_rate above 0 or "inf"; found {rate:g}')
    burstiness = result.get("burstiness")
    burstiness = 1.0 if burstiness is None else _number(path, "burstiness", None, burstiness)
    if burstiness <= 0:
        raise _error(path, f"must have a burstiness above 0; found {burstiness:g}")
    concurrency = result.get("max_concurrency")
    return rate, burstiness, None if concurrency is None else _tokens(path, "max_concurrency", None, concurrency)


def _column(path: Path, result: dict[str, Any], key: str) -> list[Any]:
    values = result[key]
    if not isinstance(values, list):
        raise _error(path, f"must have a list of one entry a request in {key}; found a {type(values).__name__}", _DETAILED)
    return values


def _gaps(path: Path, index: int, values: Any) -> np.ndarray:
    if not isinstance(values, list):
        raise _error(path, f"must have a list of seconds in itls[{index}]; found a {type(values).__name__}")
    return np.array([_number(path, f"itls[{index}]", i, value) for i, value in enumerate(values)])


def _number(path: Path, key: str, index: int | None, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _error(path, f"must have a number of at least 0 in {_place(key, index)}; found {value!r}")
    return float(value)


def _tokens(path: Path, key: str, index: int | None, value: Any) -> int:
    number = _number(path, key, index, value)
    if number != int(number) or number < 1:
        raise _error(path, f"must have a whole number of at least 1 in {_place(key, index)}; found {value!r}")
    return int(number)


def _place(key: str, index: int | None) -> str:
    return key if index is None else f"{key}[{index}]"


def _error(path: Path, rule: str, fix: str = "check the file") -> InputError:
    return InputError(FIELD, str(path), rule, fix)
