"""The largest batch that a pool holds, found by filling it: nothing here is worked out from sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvsim.calibrate.decoder.decoder import Decoder
from kvsim.calibrate.decoder.sample import fill
from kvsim.calibrate.decoder.sequence import CachedSequence
from kvsim.calibrate.decoder.storage import OutOfBlocks


@dataclass(frozen=True)
class LargestBatch:
    """held_bytes: of the pool, when it had done its last step. tries: how many batches were run for it."""

    batch: int
    held_bytes: int
    tries: int


def largest_batch(decoder: Decoder, prompt_tokens: int, steps: int) -> LargestBatch:
    """Sequences of so many prompt tokens that are admitted one after the other, and then all decode `steps` steps.

    As many as the empty pool admits is an upper bound; below it, the number that lives through the steps is found by bisection.
    Each prompt is in the pool as a whole before it is compressed, keys and values random. 0 where not even one fits.
    """
    upper = _admitted(decoder, prompt_tokens, steps)
    lower, held, tries, wanted = 0, 0, 0, upper
    while lower < upper:  # `lower` has been seen to fit, more than `upper` not to
        tries += 1
        found = _held_after(decoder, wanted, prompt_tokens, steps)
        if found is None:
            upper = wanted - 1
        else:
            lower, held = wanted, found
        wanted = (lower + upper + 1) // 2
    return LargestBatch(lower, held, tries)


def _admitted(decoder: Decoder, prompt_tokens: int, steps: int) -> int:
    sequences: list[CachedSequence] = []

    def fill_up() -> None:
        while True:
            sequences.append(fill(decoder, prompt_tokens, steps))

    _run(decoder, sequences, fill_up)
    return len(sequences)


def _held_after(decoder: Decoder, batch: int, prompt_tokens: int, steps: int) -> int | None:
    """Bytes held when all have decoded; None where the pool was too small."""
    sequences: list[CachedSequence] = []

    def decode() -> int:
        for _ in range(batch):
            sequences.append(fill(decoder, prompt_tokens, steps))
        for _ in range(steps):
            decoder.step([], [(sequence, 1) for sequence in sequences])
        return round(decoder.budget.held_bytes)

    return _run(decoder, sequences, decode)


def _run(decoder: Decoder, sequences: list[CachedSequence], work: Callable[[], int | None]) -> int | None:
    """What the work returns, or None where it ran out of blocks; the pool is empty afterwards."""
    try:
        return work()
    except OutOfBlocks:
        return None
    finally:
        for sequence in sequences:
            decoder.close(sequence)
