"""The attention backend "triton": the kernels of `kvsim.kernels` over the decoder's own blocks, one launch a layer for all rows.

Which kernel runs follows from the cache: `decode_attention`, with scores `decode_attention_scored`, over codes
`kv_quant_decode_attention`, over pruned keys `think_decode_attention`. ThinK's prompt and its recent tokens lie in lanes of their
own, values too, which are attended by a launch each and joined by their log-sum-exps. Rows without a sequence have length 0.
"""

from __future__ import annotations

import torch

from kvsim.calibrate.decoder.attention import Positions
from kvsim.calibrate.decoder.clock import Clock
from kvsim.calibrate.decoder.decode_batch import DecodeBatch
from kvsim.calibrate.decoder.rules import Rule
from kvsim.errors import InputError
from kvsim.kernels import checks, decode_attention, decode_attention_scored, kv_quant_decode_attention, think_decode_attention
from kvsim.kernels.runtime import INTERPRETED
from kvsim.policies.compose import CachePlan

STATISTICS = {"sum": "sum", "square": "squared_sum", "count": "threshold_count", "gumbel": "gumbel"}
"""Of rules → of the kernel."""


def check(plan: CachePlan, dtype: torch.dtype, how: Positions, scored: bool, device: torch.device) -> None:
    """Raises InputError for what the kernels cannot do, with the way out."""
    shape, policies = plan.shape, plan.composition.describe()
    field, fix = "attention", "use attention=torch"
    quantises = plan.composition.bits.dimension == "bits"
    refused = (
        (device.type != "cuda" and not INTERPRETED, "needs a CUDA device, or TRITON_INTERPRET=1 to interpret kernels on the CPU"),
        (dtype not in checks.HALF_DTYPES, f"needs a cache of 16 bits, not {str(dtype).removeprefix('torch.')}"),
        (shape.head_dim not in checks.HEAD_DIMS, f"has kernels for heads of {checks.HEAD_DIMS}, not {shape.head_dim}"),
        (shape.q_heads // shape.kv_heads not in checks.GROUPS, f"takes up to {checks.GROUPS[-1]} query heads a KV head"),
        (shape.block_size_tokens & (shape.block_size_tokens - 1) != 0, "needs blocks of a power of two of tokens"),
        (how.slopes is not None, "has no kernel with ALiBi's slopes"),
        (how.move, f"cannot move positions as it reads them, which {policies} asks for"),
        (scored and quantises, f"has no kernel that scores over quantised keys, which {policies} asks for"),
        (plan.prunes and quantises, f"has no kernel over quantised keys with pruned channels, which {policies} asks for"),
    )
    for applies, rule in refused:
        if applies:
            raise InputError(field, "triton", rule, fix)


class TritonAttention:
    """Raises InputError as `check` does."""

    name = "triton"

    def __init__(self, batch: DecodeBatch, plan: CachePlan, dtype: torch.dtype, how: Positions, scoring: Rule | None, seed: int) -> None:
        check(plan, dtype, how, scoring is not None and scoring.decode_statistic is not None, batch.device)
        self.batch, self.dtype, self.scoring, self.seed = batch, dtype, scoring, seed
        self.residual_tokens, self.quantises = plan.window_tokens, plan.composition.bits.dimension == "bits"
        self._noise_step = 0

    def attend(self, index: int, q: torch.Tensor, clock: Clock) -> torch.Tensor:
        """Queries `[rows, q_heads, head_dim]` over the caches of one layer, rows past the members giving 0; scores are added to."""
        narrow = q.to(self.dtype)
        if self.quantises:
            out = self._codes(index, narrow)
        elif self.batch.pruned is not None:
            out = self._pruned(index, narrow)
        elif self.scoring is not None and self.scoring.decode_statistic:
            out = self._scored(index, narrow, clock)
        else:
            out = decode_attention.run(narrow, *self._cache(index, len(q)))[0]
        return out.to(q.dtype)

    def _cache(self, index: int, rows: int, first: int = 0) -> tuple[torch.Tensor, ...]:
        """(k, v, lengths, table) of the full lane."""
        batch = self.batch
        k, v = (codec.tensors[0][:, :, None] for codec in (batch.full.keys, batch.full.values))
        return k, v, batch.lengths[index, first : first + rows], batch.tables[index, first : first + rows]

    def _scored(self, index: int, q: torch.Tensor, clock: Clock) -> torch.Tensor:
        assert self.scoring is not None and self.scoring.decode_statistic
        statistic = STATISTICS[self.scoring.decode_statistic]

        def run(first: int, rows: int, temperature: float = 1.0) -> torch.Tensor:
            k, v, lengths, table = self._cache(index, rows, first)
            here = slice(first, first + rows)
            return decode_attention_scored.run(
                q[here], k, v, lengths, self.batch.scores[index, here], statistic, table,
                num_seen=self.batch.seen[here] if statistic == "threshold_count" else None, temperature=temperature,
                seed=self.seed, step=self._noise_step, attended=lambda: clock.mark("attention"),
            )[0]  # fmt: skip

        if statistic == "gumbel":
            self._noise_step += 1
            out = torch.cat([run(*part) for part in self._by_temperature()])
        else:
            out = run(0, len(q))
        clock.mark("decode_attention_scored")
        return out

    def _by_temperature(self) -> list[tuple[int, int, float]]:
        """(first row, rows, temperature) of neighbours that share one: it is an argument of the launch."""
        assert self.scoring is not None
        found: list[tuple[int, int, float]] = []
        for row, sequence in enumerate(self.batch.members):
            temperature = self.scoring.temperature(sequence)
            if found and found[-1][2] == temperature:
                found[-1] = found[-1][0], found[-1][1] + 1, temperature
            else:
                found.append((row, 1, temperature))
        return found

    def _codes(self, index: int, q: torch.Tensor) -> torch.Tensor:
        keys, values = self.batch.full.keys, self.batch.full.values
        _, _, lengths, table = self._cache(index, len(q))
        parts = [tensor[:, :, None] for codec in (keys, values) for tensor in (codec.codes, codec.params)]
        rings = self._rings(index, lengths) if self.residual_tokens else {}
        return kv_quant_decode_attention.run(
            q, *parts, keys.format, values.format, lengths, table, **rings
        )[0]  # fmt: skip

    def _rings(self, index: int, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rings of all members side by side, copied, and how many of each one's tokens are codes."""
        layers = [sequence.layers[index] for sequence in self.batch.members]
        rings = [layer.ring for layer in layers]
        counts = [(layer.quantized, max(0, layer.full.lengths[0] - self.residual_tokens)) for layer in layers]
        k_quantized, v_quantized = (
            torch.tensor(side, dtype=torch.int32, device=lengths.device)[:, None].expand_as(lengths).contiguous()
            for side in zip(*counts, strict=True)
        )
        k_ring, v_ring = (torch.stack([getattr(ring, name) for ring in rings]) for name in "kv")
        return {"k_quantized": k_quantized, "v_quantized": v_quantized, "k_ring": k_ring, "v_ring": v_ring}

    def _pruned(self, index: int, q: torch.Tensor) -> torch.Tensor:
        batch, rows = self.batch, len(q)
        assert batch.pruned is not None
        k, v, lengths, table = self._cache(index, rows)
        pruned_k, pruned_v = (codec.tensors[0][:, :, None] for codec in (batch.pruned.keys, batch.pruned.values))
        none = torch.zeros_like(lengths)  # its own recent tokens have values in the other lane
        old = think_decode_attention.run(
            q, pruned_k, k, pruned_v, batch.channels[index, :rows], batch.pruned_lengths[index, :rows], none,
            batch.pruned_tables[index, :rows], table,
        )  # fmt: skip
        new = decode_attention.run(q, k, v, lengths, table)
        return joined(old, new)


def joined(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Attention over two sets of tokens from that over each: (output, log-sum-exp), −inf for an empty set."""
    whole = torch.logaddexp(first[1], second[1])
    shares = [torch.where(part[1] > -torch.inf, torch.exp(part[1] - whole), 0.0)[..., None] for part in (first, second)]
    return (first[0] * shares[0] + second[0] * shares[1]).to(first[0].dtype)
