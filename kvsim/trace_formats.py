"""Formats of request traces as data (``FORMATS``): the names of their columns and how their clocks read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

from kvsim.units import PS_PER_S
from kvsim.workload_fields import MAX_TIME_S, MAX_TOKENS


class Row(NamedTuple):
    """One request as its trace has it, on the trace's own clock."""

    line: int
    time_ps: int
    prompt_tokens: int
    output_tokens: int
    cached_prompt_tokens: int
    prefix_hashes: tuple[int, ...]


@dataclass(frozen=True)
class Broken:
    """A row that cannot be used: the value of ``column`` breaks ``rule``."""

    line: int
    column: str
    value: Any
    rule: str


class BrokenValue(ValueError):
    """Raised with (column, value, rule)."""


@dataclass(frozen=True)
class Format:
    """Columns of a trace; ``time_ps`` turns a raw time into picoseconds, which ``absolute`` counts from some epoch."""

    time: str
    prompt: str
    output: str
    time_ps: Callable[[Any], int]
    time_rule: str
    json: bool = False
    absolute: bool = False
    cached: str = ""
    hashes: str = ""
    hash_block_tokens: int = 0

    @property
    def needed(self) -> tuple[str, ...]:
        return self.time, self.prompt, self.output

    @property
    def columns(self) -> tuple[str, ...]:
        return self.time, self.prompt, self.output, self.cached, self.hashes

    def parse(self, line: int, record: tuple[Any, ...]) -> Row | Broken:
        """Checks the raw values of ``columns``; None or "" stands for an optional one that is absent."""
        time, prompt, output, cached, hashes = record
        try:
            prompt_tokens, output_tokens = whole(self.prompt, prompt), whole(self.output, output)
            cached_tokens = 0 if cached is None or cached == "" else whole(self.cached, cached, 0)
            if cached_tokens > prompt_tokens:
                raise BrokenValue(self.cached, cached_tokens, f"must be at most {self.prompt}={prompt_tokens}")
            known = () if hashes is None or hashes == "" else _hashes(self.hashes, hashes)
            return Row(line, self.time_ps(time), prompt_tokens, output_tokens, cached_tokens, known)
        except BrokenValue as broken:
            return Broken(line, *broken.args)
        except (ValueError, TypeError, ArithmeticError):
            return Broken(line, self.time, time, self.time_rule)


def whole(column: str, value: Any, least: int = 1) -> int:
    """A whole number of tokens from text or JSON; ``374.0`` will do, as pandas writes it. Raises BrokenValue."""
    try:
        number = int(value) if isinstance(value, str) and value.isdecimal() else _integral(value)
        if least <= number <= MAX_TOKENS:
            return number
    except (ValueError, TypeError, ArithmeticError):
        pass
    raise BrokenValue(column, value, f"must be a whole number from {least} to {MAX_TOKENS:,}")


def _integral(value: Any) -> int:
    if type(value) is int:
        return value
    number = _decimal(value)
    if abs(number) > MAX_TOKENS or number != number.to_integral_value():
        raise ValueError
    return int(number)


def _decimal(value: Any) -> Decimal:
    if not isinstance(value, str | int | float | Decimal) or isinstance(value, bool):
        raise TypeError
    return Decimal(value)


def _hashes(column: str, value: Any) -> tuple[int, ...]:
    """A JSON list of integers, or text of integers with spaces between. Raises BrokenValue."""
    try:
        hashes = tuple(map(int, value.split())) if isinstance(value, str) else tuple(value)
    except (ValueError, TypeError):
        hashes = (-1,)
    if hashes and not (all(type(item) is int for item in hashes) and min(hashes) >= 0):
        raise BrokenValue(column, value, "must be whole numbers of at least 0, separated by spaces or in a JSON list")
    return hashes


def _since_start_ps(value: Any, unit_ps: int = PS_PER_S) -> int:
    """A decimal number, exactly as written, rounded once to whole picoseconds."""
    time_ps = _decimal(value) * unit_ps
    if not 0 <= time_ps <= MAX_TIME_S * PS_PER_S:
        raise ValueError
    return int(time_ps.to_integral_value())


_SECONDS_AND_ZONE = re.compile(r":([0-5]\d)(?:\.(\d{1,12}))?(?:Z|([+-]\d\d):?(\d\d))?")
_EPOCH = datetime(1970, 1, 1)


@lru_cache(maxsize=64)
def _minute_s(text: str) -> int:
    return round((datetime.fromisoformat(text) - _EPOCH).total_seconds())


def _timestamp_ps(value: str) -> int:
    """``2023-11-16 18:15:46.6805900`` (7 fractional digits, more than datetime reads) to picoseconds since 1970; a zone
    is optional, as the 2024 traces have one."""
    text = value.strip()
    match = _SECONDS_AND_ZONE.fullmatch(text, 16)
    if match is None:
        raise ValueError
    time_s = _minute_s(text[:16]) + int(match[1])
    if match[3]:
        time_s -= int(match[3]) * 3600 + int(match[3][0] + match[4]) * 60
    return time_s * PS_PER_S + (int(match[2].ljust(12, "0")) if match[2] else 0)


_PLAIN = Format(
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    _since_start_ps,
    f"must be seconds since the start of the trace, a number from 0 to {MAX_TIME_S:,}",
    cached="cached_prompt_tokens",
    hashes="prefix_hashes",
)
FORMATS = {
    "azure": Format(
        "TIMESTAMP",
        "ContextTokens",
        "GeneratedTokens",
        _timestamp_ps,
        "must be a date and time such as 2023-11-16 18:15:46.6805900",
        absolute=True,
    ),
    "mooncake": Format(
        "timestamp",
        "input_length",
        "output_length",
        lambda value: _since_start_ps(value, PS_PER_S // 1000),
        f"must be milliseconds since the start of the trace, a number from 0 to {MAX_TIME_S * 1000:,}",
        json=True,
        hashes="hash_ids",
        hash_block_tokens=512,
    ),
    "csv": _PLAIN,
    "jsonl": replace(_PLAIN, json=True),
}
