"""What the YAML blocks of a workload share: kinds of numbers and their bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

MAX_TOKENS = 2**31 - 1
"""No request is longer: the bound catches timestamps and identifiers read as token counts."""


Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]
NonNegativeCount = Annotated[int, Field(ge=0, strict=True)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS, strict=True)]
MAX_TIME_S = 9_000_000
"""104 days: picoseconds within 64 bits, and no Unix epoch taken for seconds since the start."""
PositiveTime = Annotated[Number, Field(gt=0, le=MAX_TIME_S)]
NonNegativeTime = Annotated[Number, Field(ge=0, le=MAX_TIME_S)]
# Gaps from a nanosecond to weeks: outside, the unit is a mistake, and a float would no longer hold picoseconds.
Rate = Annotated[Number, Field(ge=1e-6, le=1e9)]

Pairs = Iterator[tuple[int, int]]
"""(prompt tokens, output tokens), without end."""
