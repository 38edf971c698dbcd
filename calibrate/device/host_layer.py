"""A decoder layer as transformers runs it eagerly, so narrow that its time is what the host needs to launch it."""

from __future__ import annotations

import torch
from torch import nn

HIDDEN, HEAD_DIM = 16, 8
"""Two query heads and one KV head."""
CACHED_TOKENS = 8


class Norm(nn.Module):
    """RMSNorm in fp32, six kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6)).to(dtype)


class Attention(nn.Module):
    """Projections, rotary embedding, a cache grown by concatenation, attention in five kernels with an fp32 softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(HIDDEN, HEAD_DIM, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, HEAD_DIM)
        q, k, v = (project(x).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (t * cos + _rotate_half(t) * sin for t in (q, k))
        keys, values = (torch.cat((cache, t), dim=2) for t in (k, v))
        keys, values = (_repeat(t, q.shape[1] // t.shape[1]) for t in (keys, values))
        weights = torch.matmul(q, keys.transpose(2, 3)) * HEAD_DIM**-0.5
        weights = nn.functional.softmax(weights + mask, dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, values).transpose(1, 2).contiguous()
        return self.o_proj(out.reshape(*x.shape[:-1], -1).contiguous())


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, 2 * HIDDEN, bias=False) for _ in range(2))
        self.down_proj, self.act = nn.Linear(2 * HIDDEN, HIDDEN, bias=False), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Takes (x [1, 1, HIDDEN], cos and sin [1, 1, 1, HEAD_DIM], mask, cache [1, 1, tokens, HEAD_DIM])."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.post_norm, self.mlp = Norm(), Attention(), Norm(), Mlp()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_norm(x))


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _repeat(x: torch.Tensor, times: int) -> torch.Tensor:
    batch, heads, tokens, dim = x.shape
    return x[:, :, None].expand(batch, heads, times, tokens, dim).reshape(batch, heads * times, tokens, dim)
