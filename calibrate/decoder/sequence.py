"""One sequence of the decoder: its tokens so far and its cache."""

from __future__ import annotations

from kvsim.calibrate.decoder.attention import Positions
from kvsim.calibrate.decoder.cache import LayerCache
from kvsim.calibrate.decoder.clock import Clock
from kvsim.calibrate.decoder.transformer import Transformer
from kvsim.policies.base import SequenceShape


class CachedSequence:
    """One sequence: its tokens so far and its cache."""

    def __init__(
        self, shape: SequenceShape, layers: list[LayerCache], how: Positions, transformer: Transformer, max_steps: int
    ) -> None:  # fmt: skip
        self.shape, self.layers, self.how, self.transformer, self.max_steps = shape, layers, how, transformer, max_steps
        self.head_dim = transformer.spec.model.head_dim
        self.num_tokens = 0
        """Tokens computed, evicted ones too: the position of the next."""
        self.step = 0
        """Decode steps begun."""

    @property
    def clock(self) -> Clock:
        """The transformer's, which is exchanged where a step is timed."""
        return self.transformer.clock

    def lengths(self) -> list[list[int]]:
        """Tokens of each head of each layer."""
        return [layer.lengths for layer in self.layers]

    def held_bytes(self) -> int:
        return sum(layer.held_bytes() for layer in self.layers)
