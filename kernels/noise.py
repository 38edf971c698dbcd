"""Standard Gumbel noise from a counter: the same (key, query, head) always has the same noise, so none is stored.

Keyformer (arXiv 2403.09054) adds noise to each logit in two passes over QKᵀ that must agree. Philox 4x32-10 (Salmon et al.,
SC11; Triton's own generator) of the counter (key, query, query head, 0) under a seed gives 32 bits, of which the top 23 make a
uniform u in (0, 1), and ζ = −log(−log u).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@triton.jit
def gumbel_noise(seed, key, query, head):
    """ζ of each (key, query, head), broadcast together; fp32, within 4e-6 of `gumbel_reference`."""
    shape = key + query + head
    bits, _, _, _ = tl.philox(
        seed, (shape * 0 + key).to(tl.uint32), (shape * 0 + query).to(tl.uint32), (shape * 0 + head).to(tl.uint32),
        (shape * 0).to(tl.uint32),
    )  # fmt: skip
    # u = (m + 1/2) / 2^23 with m the top 23 bits: exact in fp32 and never 0 or 1.
    u = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    # Near 1 a logarithm's absolute error would drown −log u, so there it is the series in v = 1 − u, which is exact.
    v = 1.0 - u
    series = v * (1.0 + v * (0.5 + v * (1.0 / 3 + v * (0.25 + v * (0.2 + v * (1.0 / 6 + v * (1.0 / 7)))))))
    return -tl.log(tl.where(v < 0.0625, series, -tl.log(u)))


def gumbel_reference(seed: int, key: torch.Tensor, query: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The same noise in float64, any shape the three int64 tensors broadcast to. Source: Salmon et al., SC11."""
    key, query, head = torch.broadcast_tensors(key, query, head)
    counter = [key.clone(), query.clone(), head.clone(), torch.zeros_like(key)]
    weak, strong = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        high0, low0 = _wide_product(counter[0], _MULTIPLIER[0])
        high1, low1 = _wide_product(counter[2], _MULTIPLIER[1])
        counter = [high1 ^ counter[1] ^ weak, low1, high0 ^ counter[3] ^ strong, low0]
        weak, strong = (weak + _WEYL[0]) & 0xFFFFFFFF, (strong + _WEYL[1]) & 0xFFFFFFFF
    uniform = ((counter[0] >> 9).double() + 0.5) / 2**23
    return -torch.log(-torch.log(uniform))


def _wide_product(values: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of uint32 products, in int64 halves that cannot overflow."""
    low = (values & 0xFFFF) * factor
    high = (values >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
