"""The forward pass over packed tokens of any number of sequences; attention over the cache is the caller's (`attend`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

from kvsim.calibrate.decoder.clock import Clock, NoClock
from kvsim.calibrate.decoder.spec import DecoderSpec
from kvsim.calibrate.decoder.weights import Layer, Weights

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q [tokens, q_heads, d], k and v [tokens, kv_heads, d]) → [tokens, q_heads, d]. Keys come as they are to be stored."""


class Transformer:
    """Llama, Mistral, Qwen, MPT, OPT, GPT-J and their kin."""

    def __init__(self, spec: DecoderSpec, weights: Weights) -> None:
        self.spec, self.weights = spec, weights
        self.clock: Clock = NoClock()
        device = weights.embedding.device
        self.rotary = Rotary(spec, device) if spec.rotary_dim else None
        model = spec.model
        self._splits = [model.num_q_heads * model.head_dim, *[model.num_kv_heads * model.head_dim] * 2]

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Last hidden states, normed, `[tokens, hidden]`. What is done once, and not in every layer, is marked as the embedding's."""
        spec, weights = self.spec, self.weights
        x = F.embedding(tokens, weights.embedding)
        if weights.positions is not None:
            x = x + weights.positions[positions + spec.position_offset]
        if weights.embedding_norm is not None:
            x = self._norm(x, weights.embedding_norm)
        turn = self.rotary.angles(positions) if self.rotary is not None else None
        mark = self.clock.mark
        mark("embedding")
        for index, layer in enumerate(weights.layers):
            normed = self._norm(x, layer.norms[0])
            mark("norm")
            mixed = self._attention(index, layer, normed, turn, attend)
            if len(layer.norms) == 1:  # attention and MLP beside each other (GPT-J)
                x = x + mixed + self._mlp(layer, normed)
            else:
                x = x + mixed
                normed = self._norm(x, layer.norms[1])
                mark("norm")
                x = x + self._mlp(layer, normed)
        mark("norm")
        x = self._norm(x, weights.final_norm)
        mark("embedding")
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        out = F.linear(hidden, self.weights.head, self.weights.head_bias)
        self.clock.mark("lm_head")
        return out

    def _attention(
        self, index: int, layer: Layer, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor] | None, attend: Attend
    ) -> torch.Tensor:  # fmt: skip
        model = self.spec.model
        packed = F.linear(x, layer.matrices["qkv"], layer.biases.get("qkv"))
        mark = self.clock.mark
        mark("qkv")
        q, k, v = (part.unflatten(1, (-1, model.head_dim)) for part in packed.split(self._splits, 1))
        if layer.qk_norms is not None:
            q, k = (F.rms_norm(part, part.shape[-1:], weight, self.spec.norm_eps)
                    for part, weight in zip((q, k), layer.qk_norms, strict=True))  # fmt: skip
        if turn is not None and self.rotary is not None:
            q, k = self.rotary.rotate(q, turn), self.rotary.rotate(k, turn)
        mark("rope_and_kv_write")
        mixed = attend(index, q, k, v).flatten(1)
        mark("attention")
        out = F.linear(mixed, layer.matrices["o"], layer.biases.get("o"))
        mark("o")
        return out

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        name = "gate_up" if "gate_up" in layer.matrices else "up"
        wide = F.linear(x, layer.matrices[name], layer.biases.get(name))
        self.clock.mark(name)
        if name == "gate_up":
            gate, up = wide.chunk(2, 1)
            wide = self._activate(gate) * up
        else:
            wide = self._activate(wide)
        self.clock.mark("activation")
        out = F.linear(wide, layer.matrices["down"], layer.biases.get("down"))
        self.clock.mark("down")
        return out

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        kind = self.spec.activation
        if kind in ("silu", "relu"):
            return F.silu(x) if kind == "silu" else F.relu(x)
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def _norm(self, x: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        weight, bias = norm
        if self.spec.model.norm == "rms":
            return F.rms_norm(x, x.shape[-1:], weight, self.spec.norm_eps)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.spec.norm_eps)


class Rotary:
    """Rotary embedding (arXiv 2104.09864) of the first `rotary_dim` channels."""

    def __init__(self, spec: DecoderSpec, device: torch.device) -> None:
        self.dim, self.interleaved = spec.rotary_dim, spec.interleaved
        self.frequencies = spec.rope_theta ** -(torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)
        self.head_dim = spec.model.head_dim
        self.turn = lru_cache(maxsize=256)(self._turn)
        """Kept, since all layers of a step ask for the same: one for each sequence of a batch."""

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) `[positions, rotary_dim/2]`."""
        angle = positions[:, None].float() * self.frequencies
        return angle.cos(), angle.sin()

    def _turn(self, positions: int) -> torch.Tensor:
        """fp32 `[d, d]`: what rows are multiplied by to be turned by so many positions."""
        device = self.frequencies.device
        every = torch.eye(self.head_dim, device=device)[:, None]
        return self.rotate(every, self.angles(torch.tensor([positions], device=device)))[:, 0]

    def rotate(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x `[tokens, heads, d]` at the angles of its tokens."""
        cos, sin = (part[:, None].to(x.dtype) for part in turn)
        turned, rest = x[..., : self.dim], x[..., self.dim :]
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
            out = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
        else:
            first, second = turned.chunk(2, -1)
            out = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return out if not rest.shape[-1] else torch.cat((out, rest), -1)


def alibi_slopes(num_heads: int, device: torch.device) -> torch.Tensor:
    """Slopes of ALiBi (arXiv 2108.12409): a geometric series from 2^(-8/n), with every other one of the next power of two between."""
    whole = 2 ** (num_heads - 1).bit_length()
    slopes = torch.tensor([2 ** (-8 * (i + 1) / whole) for i in range(whole)], device=device)
    if whole != num_heads:  # as MPT's code: the odd ones first, then the even ones
        slopes = torch.cat((slopes[1::2], slopes[::2]))[:num_heads]
    return slopes
