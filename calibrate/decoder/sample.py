"""One configuration of the decoder, run for real: what a step takes, and where the time goes, as rows of Ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
import torch

from kvsim.calibrate.decoder.cache import LayerCache
from kvsim.calibrate.decoder.clock import NS, NoClock, OpClock, now_ns
from kvsim.calibrate.decoder.decoder import Decoder
from kvsim.calibrate.decoder.sample_rows import Rows, decode_rows, means, policy_rows, prefill_rows
from kvsim.calibrate.decoder.sequence import CachedSequence
from kvsim.calibrate.decoder.storage import OutOfBlocks
from kvsim.engines.torch_decoder import TorchDecoder

CHUNK_TOKENS: int = TorchDecoder.model_fields["max_num_batched_tokens"].default
"""Of prompts in one step, as the engine has it."""


@dataclass(frozen=True)
class DecodeSample:
    """Equal sequences, prefilled and decoding. step_s: the mean of plain steps. rows: from steps timed mark by mark.

    prefill_s: all prompts, in steps of at most CHUNK_TOKENS, and their compression; None where none was computed.
    spread_frac: (p80 - p20) / mean of the plain steps. cache_bytes: of the pool when the last step was done;
    cache_peak_bytes: the most, prompts before compression included.
    """

    batch: int
    context_tokens: int
    step_s: float
    rows: Rows
    prefill_s: float | None
    spread_frac: float
    cache_bytes: int
    cache_peak_bytes: int


def fill(decoder: Decoder, prompt_tokens: int, max_steps: int) -> CachedSequence:
    """A sequence as after the prefill of a prompt, compressed, its keys and values random: nothing is computed for them.

    Raises OutOfBlocks; the pool is then as it was.
    """
    sequence = prompt(decoder, prompt_tokens, max_steps)
    try:
        with torch.inference_mode():
            decoder.compress(sequence)
    except OutOfBlocks:
        decoder.close(sequence)
        raise
    return sequence


def prompt(decoder: Decoder, prompt_tokens: int, max_steps: int) -> CachedSequence:
    """The same, not yet compressed."""
    shape, device, generator = decoder.plan.shape, decoder.device, decoder.generator

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    @torch.inference_mode()
    def write(layer: LayerCache) -> None:
        k, v = (randn(shape.kv_heads, prompt_tokens, shape.head_dim) for _ in range(2))
        decoder.append(layer, k, v)
        if decoder.keeps_positions:
            layer.positions = torch.arange(prompt_tokens, device=device).repeat(shape.kv_heads, 1)
        if decoder.window_queries:
            layer.window = randn(min(prompt_tokens, decoder.window_queries), shape.q_heads, shape.head_dim)
        if decoder.scoring is not None and decoder.scoring.prompt_statistic:
            layer.scores = torch.rand(shape.kv_heads, prompt_tokens, generator=generator, device=device)

    sequence = decoder.open(prompt_tokens, max_steps=max_steps)
    try:
        for layer in sequence.layers:
            write(layer)
    except OutOfBlocks:
        decoder.close(sequence)
        raise
    sequence.num_tokens = prompt_tokens
    return sequence


def sample_end(decoder: Decoder, prompt_tokens: int, repeats: int = 3) -> tuple[float, Rows]:
    """(mean seconds, rows) of the compression of one prompt; no rows where the policies do nothing then."""
    seconds: list[float] = []
    rows: Rows = []
    ops = decoder.plan.compress_ops(prompt_tokens, prompt_tokens)
    for number in range(repeats + 1):
        sequence = prompt(decoder, prompt_tokens, 1)
        try:
            clock = OpClock(decoder.device)
            decoder.transformer.clock = clock
            begin = now_ns(decoder.device)
            clock.start()
            with torch.inference_mode():
                decoder.compress(sequence)
            if number:
                seconds.append((now_ns(decoder.device) - begin) * NS)
                rows += policy_rows(ops, clock)
        finally:
            decoder.transformer.clock = NoClock()
            decoder.close(sequence)
    return fmean(seconds), means(rows)


def packed(batch: int, prompt_tokens: int) -> Iterator[list[tuple[int, int, int]]]:
    """Steps of at most CHUNK_TOKENS that compute so many prompts one after the other: (sequence, new tokens, prior tokens)."""
    step: list[tuple[int, int, int]] = []
    left = CHUNK_TOKENS
    for index in range(batch):
        prior = 0
        while prior < prompt_tokens:
            new = min(left, prompt_tokens - prior)
            step.append((index, new, prior))
            prior, left = prior + new, left - new
            if not left:
                yield step
                step, left = [], CHUNK_TOKENS
    if step:
        yield step


def prefill_all(decoder: Decoder, sequences: Sequence[CachedSequence], prompt_tokens: int) -> float:
    """Seconds of the prefill of these empty caches' prompts, of random tokens."""
    vocab = decoder.transformer.spec.model.vocab_size
    ids = torch.randint(0, vocab, (prompt_tokens,), generator=decoder.generator, device=decoder.device)
    begin = now_ns(decoder.device)
    for step in packed(len(sequences), prompt_tokens):
        decoder.step([(sequences[index], ids[prior : prior + new]) for index, new, prior in step], [])
    return (now_ns(decoder.device) - begin) * NS


def sample_decode(
    decoder: Decoder, batch: int, context_tokens: int, steps: int = 5, weight_dtype: str = "fp32", prefill: bool = True
) -> DecodeSample:
    """The prompts' prefill, then `steps` plain steps and as many timed ones, in turn, after one that warms up. Raises OutOfBlocks.

    prefill: False to fill the caches with random numbers instead, which takes a fraction of the time.
    """
    sequences: list[CachedSequence] = []
    plain: list[float] = []
    rows: Rows = []
    decoder.budget.peak_bytes = 0.0
    try:
        prefill_s = None
        for _ in range(batch):
            opened = decoder.open if prefill else partial(fill, decoder)
            sequences.append(opened(context_tokens, max_steps=2 * steps + 2))
        if prefill:
            prefill_s = prefill_all(decoder, sequences, context_tokens)
        work = [(sequence, 1) for sequence in sequences]
        decoder.step([], work)
        for _ in range(steps):
            begin = now_ns(decoder.device)
            decoder.step([], work).argmax(1).tolist()
            plain.append((now_ns(decoder.device) - begin) * NS)
            clock = OpClock(decoder.device)
            decoder.transformer.clock = clock
            clock.start()
            decoder.step([], work).argmax(1).tolist()
            clock.mark("sampler")
            decoder.transformer.clock = NoClock()
            rows += decode_rows(decoder.plan, decoder, sequences, clock, weight_dtype)
        held, peak = decoder.budget.held_bytes, decoder.budget.peak_bytes
    finally:
        decoder.transformer.clock = NoClock()
        for sequence in sequences:
            decoder.close(sequence)
    low, high = np.percentile(plain, (20, 80))
    step_s = fmean(plain)
    return DecodeSample(
        batch, context_tokens, step_s, means(rows), prefill_s, float(high - low) / step_s, round(held), round(peak)
    )


def sample_prefill(
    decoder: Decoder, new_tokens: int, prior_tokens: int, repeats: int = 3, weight_dtype: str = "fp32"
) -> tuple[float, Rows]:
    """(mean seconds, rows) of a chunk in the middle of a prompt: nothing is compressed after it."""
    vocab = decoder.transformer.spec.model.vocab_size
    seconds: list[float] = []
    rows: Rows = []
    for number in range(repeats + 1):
        sequence = decoder.open(prior_tokens + new_tokens + 1, max_steps=0)
        try:
            if prior_tokens:
                _seed_prior(decoder, sequence, prior_tokens)
            ids = torch.randint(0, vocab, (new_tokens,), generator=decoder.generator, device=decoder.device)
            clock = OpClock(decoder.device)
            decoder.transformer.clock = clock
            begin = now_ns(decoder.device)
            clock.start()
            decoder.step([(sequence, ids)], [])
            if number:  # the first warms up
                seconds.append((now_ns(decoder.device) - begin) * NS)
                rows += prefill_rows(decoder, new_tokens, prior_tokens, clock, weight_dtype)
        finally:
            decoder.transformer.clock = NoClock()
            decoder.close(sequence)
    return fmean(seconds), means(rows)


def _seed_prior(decoder: Decoder, sequence: CachedSequence, prior_tokens: int) -> None:
    shape = decoder.plan.shape
    with torch.inference_mode():
        for layer in sequence.layers:
            k, v = (torch.randn(shape.kv_heads, prior_tokens, shape.head_dim, generator=decoder.generator) for _ in range(2))
            decoder.append(layer, k.to(decoder.device), v.to(decoder.device))
            if decoder.scoring is not None and decoder.scoring.prompt_statistic:
                layer.scores = torch.zeros(shape.kv_heads, prior_tokens, device=decoder.device)
    sequence.num_tokens = prior_tokens
