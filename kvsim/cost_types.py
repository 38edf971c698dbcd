"""Plain data that schedulers hand to the cost model."""

from __future__ import annotations

from typing import NamedTuple


class Chunk(NamedTuple):
    """Prompt tokens of one sequence computed in one step, after `prior_tokens` that are in the cache."""

    new_tokens: int
    prior_tokens: int
