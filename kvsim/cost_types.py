"""Plain data that schedulers, the cost model and the main loop hand to each other."""

from __future__ import annotations

from typing import NamedTuple


class Chunk(NamedTuple):
    """Prompt tokens of one sequence computed in one step, after `prior_tokens` that are in the cache."""

    new_tokens: int
    prior_tokens: int



Piece = tuple[int, int, int, int]
"""(start, first, growth, steps): steps of straight length inside a run, in picoseconds. They begin `start` after the run
does; the first takes `first`, each further one `growth` more. Those of a sawtooth share their start and interleave."""

Run = tuple[int, int, list[Piece]]
"""(steps, elapsed, pieces): a run of decode steps, how long it takes in picoseconds, and its pieces."""
