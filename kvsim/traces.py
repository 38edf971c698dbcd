"""Recorded traffic: the ``trace`` block of a workload and its replay as a stream of requests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from kvsim.errors import InputError
from kvsim.frozen import Frozen
from kvsim.requests import Request
from kvsim.trace_files import read_rows, row_error
from kvsim.trace_formats import FORMATS, Broken, Row
from kvsim.units import ps, seconds
from kvsim.workload_fields import Count, NonNegativeTime, Number


class TraceConfig(Frozen):
    """A file of requests, replayed.

    Time zero is the trace's own zero: the first row of an ``azure`` trace, arrival_s = 0 or timestamp = 0 in the
    others. In this order: ``start_s`` drops what arrives before it and moves time zero there; ``repeat`` plays the rest
    so many times, each copy one duration (last minus first arrival, plus one mean gap) after the one before and with
    prefix hashes of its own, so that neither the rate nor the hit rate changes; ``rate_scale`` 2.0 doubles the rate;
    ``limit`` stops after so many requests.

    ``skip_invalid`` leaves out rows that cannot be used, with a warning and a count in ``RequestSource.notes()``.
    ``hash_block_tokens`` is needed where csv or jsonl rows have prefix_hashes; mooncake's are 512.
    """

    path: str = Field(min_length=1, description="the file, plain or gzipped; relative to the scenario's folder")
    format: Literal["azure", "mooncake", "csv", "jsonl"] = Field(description="layout of the file")
    start_s: NonNegativeTime = Field(0.0, description="drop what arrives before it; time zero moves there")
    limit: Count | None = Field(None, description="stop after so many requests")
    rate_scale: Number = Field(1.0, ge=1e-6, le=1e6, description="2.0 doubles the request rate")
    repeat: Count = Field(1, description="play the trace so many times over")
    skip_invalid: bool = Field(False, description="leave out rows that cannot be used, with a warning")
    hash_block_tokens: Count | None = Field(
        None, description="tokens that one prefix hash stands for; needed where csv or jsonl rows have prefix_hashes"
    )

    @model_validator(mode="after")
    def _azure_has_no_hashes(self) -> TraceConfig:
        if self.format == "azure" and self.hash_block_tokens is not None:
            raise ValueError("must not have hash_block_tokens with format azure; try leaving it out")
        return self

    def describe(self) -> str:
        parts = [f"trace {Path(self.path).name}"]
        if self.start_s:
            parts.append(f"from {self.start_s:g} s")
        if self.repeat > 1:
            parts.append(f"{self.repeat} times over")
        if self.rate_scale != 1.0:
            parts.append(f"at {self.rate_scale:g} x its rate")
        if self.limit:
            parts.append(f"at most {self.limit} requests")
        return ", ".join(parts)


class Trace:
    """A trace being replayed; ``rows_skipped`` counts what ``skip_invalid`` left out of the part read so far."""

    def __init__(self, config: TraceConfig, base_dir: Path) -> None:
        self._config, self._base_dir = config, base_dir
        self._form = FORMATS[config.format]
        self.hash_block_tokens = config.hash_block_tokens or self._form.hash_block_tokens
        self.rows_skipped = 0
        self._zero_ps = 0  # time zero on the clock of the file
        self._first_skipped: InputError | None = None

    def notes(self) -> list[str]:
        if not self.rows_skipped:
            return []
        return [f"{self.rows_skipped} rows of {self._config.path} skipped as invalid; the first: {self._first_skipped}"]

    def requests(self) -> Iterator[Request]:
        """Lazily, in order of arrival; the file is read again for each repetition. Raises InputError."""
        return islice(self._all(), self._config.limit)

    def _all(self) -> Iterator[Request]:
        scale, index = self._config.rate_scale, 0
        period_ps = num_hashes = 0  # measured on the first copy
        for copy in range(self._config.repeat):
            shift_ps, hash_shift = copy * period_ps, copy * num_hashes
            first_ps = time_ps = 0
            for _, time_ps, prompt_tokens, output_tokens, cached_tokens, hashes in self._window(first_pass=copy == 0):
                if copy == 0:
                    first_ps = time_ps if index == 0 else first_ps
                    num_hashes = max(num_hashes, max(hashes) + 1) if hashes else num_hashes
                elif hashes:
                    hashes = tuple([item + hash_shift for item in hashes])
                arrival_ps = time_ps - self._zero_ps + shift_ps
                if scale != 1.0:
                    arrival_ps = round(arrival_ps / scale)
                yield Request(index, arrival_ps, prompt_tokens, output_tokens, cached_tokens, hashes)
                index += 1
            if copy == 0:
                period_ps = self._period_ps(index, time_ps - first_ps)

    def _period_ps(self, num_rows: int, span_ps: int) -> int:
        """Duration of the trace: its span plus one mean gap, so that repetition keeps the rate."""
        config = self._config
        if num_rows == 0:
            from_s = f" from start_s={config.start_s:g} on" if config.start_s else ""
            fix = "start earlier" if config.start_s else "check the file"
            raise InputError("workload.trace.path", config.path, f"must have at least one usable row{from_s}", fix)
        if num_rows == 1:
            if config.repeat > 1:
                raise InputError(
                    "workload.trace.repeat", config.repeat, "must be 1 for a trace of one request", "try 1"
                )
            return 0
        return span_ps * num_rows // (num_rows - 1)

    def _window(self, first_pass: bool) -> Iterator[Row]:
        """The usable rows from ``start_s`` on, in order; sets ``_zero_ps`` before the first."""
        config, form = self._config, self._form
        origin_ps = before_ps = None
        for row in read_rows(config.path, self._base_dir, config.format):
            if isinstance(row, Row) and row.prefix_hashes:
                row = self._check_hashes(row)
            if isinstance(row, Broken):
                if first_pass:
                    self._skip_or_raise(row)
                continue
            time_ps = row.time_ps
            if origin_ps is None or before_ps is None:
                origin_ps = time_ps if form.absolute else 0
                self._zero_ps = origin_ps + ps(config.start_s)
            elif time_ps < before_ps:
                raise self._back_in_time(row.line, time_ps - origin_ps, before_ps - origin_ps)
            before_ps = time_ps
            if time_ps >= self._zero_ps:
                yield row

    def _check_hashes(self, row: Row) -> Row | Broken:
        if not self.hash_block_tokens:
            raise InputError(
                "workload.trace.hash_block_tokens",
                None,
                f"must be given, because line {row.line} of {self._config.path} has {self._form.hashes}",
                "try 16 (blocks of vLLM) or 512 (blocks of Mooncake)",
            )
        if len(row.prefix_hashes) <= -(-row.prompt_tokens // self.hash_block_tokens):
            return row
        rule = f"must be at most one per {self.hash_block_tokens} of {row.prompt_tokens} prompt tokens"
        return Broken(row.line, f"number of {self._form.hashes}", len(row.prefix_hashes), rule)

    def _skip_or_raise(self, broken: Broken) -> None:
        error = row_error(self._config.path, broken, "correct the row, or set workload.trace.skip_invalid: true")
        if not self._config.skip_invalid:
            raise error
        if not self.rows_skipped:
            self._first_skipped = row_error(self._config.path, broken, "")
            warnings.warn(f"skip_invalid leaves out {self._first_skipped}", stacklevel=2)
        self.rows_skipped += 1

    def _back_in_time(self, line: int, time_ps: int, before_ps: int) -> InputError:
        """Times since the trace's zero."""
        value = round(seconds(time_ps), 9)
        rule = f"must not go back in time, from {seconds(before_ps):.9g} s in the row above"
        if self._form.absolute:
            rule += " (counted from the first row)"
        return row_error(self._config.path, Broken(line, self._form.time, value, rule), "sort the rows by arrival time")
