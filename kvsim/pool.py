"""The KV block pool, counted in units; with prefix caching, a pool that remembers what its free blocks hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain, count

from kvsim.batch import Sequence


class BlockPool:
    """A pool of units that nobody shares."""

    shares = False
    """Whether what has been computed must be told to `computed`."""

    def __init__(self, capacity_units: int) -> None:
        self.capacity_units = capacity_units
        self.free_units = capacity_units
        self.allocated = 0  # ever
        self.released = 0

    def take(self, units: int) -> None:
        """Allocates units; the caller has checked that they are free."""
        self.free_units -= units
        self.allocated += units
        assert self.free_units >= 0, "allocated more than the pool holds"

    def give(self, units: int) -> None:
        """Frees units."""
        self.free_units += units
        self.released += units
        assert self.free_units <= self.capacity_units, "freed more than was allocated"

    # A sequence's whole holdings: the prefix cache has more to do here.

    def match(self, sequence: Sequence) -> int:
        """Prompt tokens whose KV is in the pool already, of those that a hit may cover."""
        return 0

    def units_to_admit(self, sequence: Sequence, units: int) -> int:
        """Free units that a sequence of `units` takes, given what hits."""
        return units

    def admit(self, sequence: Sequence) -> None:
        """The sequence now holds the blocks that hit."""

    def computed(self, sequence: Sequence) -> None:
        """The sequence's prompt has been computed up to `computed_tokens`."""

    def preempt(self, sequence: Sequence, units: int, computed_tokens: int) -> None:
        """As `release`, by a sequence that will come back, with so many tokens in its cache."""
        self.release(sequence, units)

    def release(self, sequence: Sequence, units: int) -> None:
        """The sequence gives back all it holds, `units` in all."""
        self.free_units += units  # as `give`, once for every request
        self.released += units
        assert self.free_units <= self.capacity_units, "freed more than was allocated"


Key = int | tuple[int, int]
"""A known block: by its prefix hash, or, as part of one request alone, by (request, block)."""


class PrefixPool(BlockPool):
    """Blocks are reference-counted; those that nobody uses stay findable until their turn to be reused comes.

    As in vLLM v1: free blocks wait in one queue, least recently freed first, whether they hold a known prefix or not; a
    sequence frees its last block first. A hit covers whole blocks, never the last token to compute, and only what had been
    computed by the end of an earlier step. Where two sequences compute the same block at once, one copy is findable.
    What a preempted sequence had computed beyond its hashed prompt only it can ask for again, so that is noted when it leaves.
    One unit is one block. hash_block_tokens 0: the traffic has no hashes.
    """

    shares = True

    def __init__(self, capacity_units: int, block_size_tokens: int, hash_block_tokens: int) -> None:
        super().__init__(capacity_units)
        self.block_size = block_size_tokens
        self.blocks_per_hash = hash_block_tokens // block_size_tokens
        self._refs: dict[Key, int] = {}  # known blocks in use
        # Free blocks in order of reuse: a known block by its key, or, under a key of its own, a number of others.
        self._queue: OrderedDict[Key | tuple[str, int], int] = OrderedDict({("others", 0): capacity_units})
        self._ids = count(1)

    @classmethod
    def taking_over(cls, pool: BlockPool, block_size_tokens: int) -> PrefixPool:
        """A pool in the state of one that has not watched its blocks: nothing in it is known."""
        new = cls(pool.capacity_units, block_size_tokens, 0)
        new.free_units, new.allocated, new.released = pool.free_units, pool.allocated, pool.released
        new._queue = OrderedDict({("others", 0): pool.free_units} if pool.free_units else {})
        return new

    def take(self, units: int) -> None:
        super().take(units)
        queue = self._queue
        while units > 0:
            key, available = next(iter(queue.items()))
            if available > units:
                queue[key] = available - units
                return
            del queue[key]
            units -= available

    def give(self, units: int) -> None:
        super().give(units)
        if units:
            self._queue["others", next(self._ids)] = units

    def _keys(self, sequence: Sequence, start: int, stop: int) -> Iterator[int]:
        """Keys of the prompt's blocks start, start + 1, ... stop - 1, as far as its hashes go."""
        hashes, per_hash = sequence.request.prefix_hashes, self.blocks_per_hash
        for block in range(start, min(stop, per_hash * len(hashes))):
            value, part = divmod(block, per_hash)
            yield hashes[value] * per_hash + part

    def _hits(self, sequence: Sequence) -> list[Key]:
        last = (sequence.prefill_tokens - 1) // self.block_size
        hashed = min(last, sequence.request.prompt_tokens // self.block_size)
        hits: list[Key] = []
        for key in chain(self._keys(sequence, 0, hashed), self._own_keys(sequence, last)):
            if key not in self._refs and key not in self._queue:
                break
            hits.append(key)
        return hits

    def _own_keys(self, sequence: Sequence, stop: int) -> Iterator[Key]:
        """Keys of the blocks after those with hashes; without a preemption there are none to be found."""
        if sequence.num_preemptions:
            request = sequence.request
            hashed = min(self.blocks_per_hash * len(request.prefix_hashes), request.prompt_tokens // self.block_size)
            for block in range(hashed, stop):
                yield request.index, block

    def match(self, sequence: Sequence) -> int:
        return len(self._hits(sequence)) * self.block_size

    def units_to_admit(self, sequence: Sequence, units: int) -> int:
        # Hits that wait in the queue leave it, so only those in use come for nothing.
        return units - sum(key in self._refs for key in self._hits(sequence))

    def admit(self, sequence: Sequence) -> None:
        hits = self._hits(sequence)
        sequence.shared_blocks = [*hits]
        for key in hits:
            if key in self._refs:
                self._refs[key] += 1
            else:
                del self._queue[key]
                self._refs[key] = 1
                super().take(1)

    def computed(self, sequence: Sequence) -> None:
        stop = min(sequence.computed_tokens, sequence.request.prompt_tokens) // self.block_size
        for key in self._keys(sequence, len(sequence.shared_blocks), stop):
            if key in self._refs or key in self._queue:
                sequence.shared_blocks.append(None)
            else:
                self._refs[key] = 1
                sequence.shared_blocks.append(key)

    def release(self, sequence: Sequence, units: int) -> None:
        self.give(units - len(sequence.shared_blocks))
        self._release_shared(sequence)

    def preempt(self, sequence: Sequence, units: int, computed_tokens: int) -> None:
        shared = len(sequence.shared_blocks)
        own = [(sequence.request.index, block) for block in range(shared, computed_tokens // self.block_size)]
        self.give(units - shared - len(own))
        for key in reversed(own):
            if key in self._queue:  # an older copy of the same block: one of the two is findable
                self.give(1)
            else:
                self._queue[key] = 1
                super().give(1)
        self._release_shared(sequence)

    def _release_shared(self, sequence: Sequence) -> None:
        for key in reversed(sequence.shared_blocks):
            if key is None:
                self.give(1)
                continue
            self._refs[key] -= 1
            if not self._refs[key]:
                del self._refs[key]
                self._queue[key] = 1
                super().give(1)
        sequence.shared_blocks = []
