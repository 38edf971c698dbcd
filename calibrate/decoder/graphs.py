"""Decode steps over tensors that stay where they are: recorded once for each padded batch size, then replayed.

What is recorded reads and writes only a `DecodeBatch`, the lanes and the logits. Everything that follows from sequences (blocks,
tables, evictions, compaction) is staged between replays. On a GPU a recording is a CUDA graph; elsewhere it is the step itself, so
that the very same path runs without one. `capture` is all there is of CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvsim.calibrate.decoder.decode_batch import DecodeBatch
from kvsim.calibrate.decoder.sequence import CachedSequence

Step = Callable[[], None]
Recorder = Callable[[Step], Step]
WARM_UPS = 3
"""Runs before a capture, in which kernels are compiled and libraries take their workspace (torch's notes on CUDA graphs)."""


def plainly(step: Step) -> Step:
    """Nothing is recorded: the step runs again."""
    return step


def capture(step: Step) -> Step:
    """A CUDA graph of the step. It runs here too, so nothing may be staged that must not happen again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def recorder_for(device: torch.device) -> Recorder:
    return capture if device.type == "cuda" else plainly


class RecordedSteps:
    """Steps of at most sizes[-1] sequences, padded to the next of `sizes`, ascending.

    compute: from the batch's first rows to logits `[rows, vocab]`, without a look at the host's side of the batch.
    """

    def __init__(
        self, batch: DecodeBatch, compute: Callable[[int], torch.Tensor], sizes: Sequence[int], recorder: Recorder
    ) -> None:  # fmt: skip
        self.batch, self.compute, self.sizes, self.recorder = batch, compute, tuple(sizes), recorder
        self._recorded: dict[int, tuple[Step, torch.Tensor]] = {}
        self._version = 0

    def size_for(self, number: int) -> int:
        """Rows that so many sequences are padded to; 0 where there are too many."""
        return next((size for size in self.sizes if size >= number), 0)

    def prepare(self, sequences: Sequence[CachedSequence]) -> int:
        """Records the step of these sequences' size where that is still to be done; returns its rows. To be called before staging."""
        rows = self.size_for(len(sequences))
        self.batch.reserve(rows, sequences)
        if self.batch.version != self._version:  # the tensors have grown, and lie elsewhere
            self._recorded.clear()
            self._version = self.batch.version
        if rows not in self._recorded:
            self.batch.clear()  # all rows are padding: what runs while recording changes no cache and no scores
            out = torch.empty_like(self.compute(rows))

            def step(rows: int = rows, out: torch.Tensor = out) -> None:
                out.copy_(self.compute(rows))

            self._recorded[rows] = self.recorder(step), out
        return rows

    def replay(self, rows: int) -> torch.Tensor:
        """Logits of the staged step, overwritten by the next."""
        step, out = self._recorded[rows]
        step()
        return out
