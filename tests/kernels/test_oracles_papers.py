"""Policies without an oracle elsewhere against their papers' pseudo-code, written out in plain loops of NumPy and Python.

The transcriptions share no code with kernels/: probabilities, noise, rankings and evictions are their own. Where a paper
leaves open which of equal scores stays, the earliest token does. Grouped queries: scores are summed over the group.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kvsim.kernels import compact, decode_attention_scored, prefill_scores, select
from kvsim.kernels.select_budgets import block_budgets, freeable_blocks
from kvsim.policies.base import CacheShape, SequenceShape
from kvsim.policies.h2o import H2O
from kvsim.policies.keyformer import Keyformer
from kvsim.policies.kv_compress import KVCompress
from kvsim.policies.scissorhands import Scissorhands

KV_HEADS, GROUP, HEAD_DIM = 2, 2, 64
SHAPE = CacheShape(1, KV_HEADS * GROUP, KV_HEADS, HEAD_DIM, 2, 16)


def drawn(rng: np.random.Generator, *size: int) -> np.ndarray:
    """fp16 numbers, of a spread that makes attention uneven."""
    return (1.3 * rng.standard_normal(size)).astype(np.float16)


def softmax_row(query: np.ndarray, keys: np.ndarray, noise: list[float] | None = None, tau: float = 1.0) -> list[float]:
    """Probabilities of one query over the keys it sees."""
    logits = []
    for j in range(len(keys)):
        logit = float(query.astype(np.float64) @ keys[j].astype(np.float64)) / math.sqrt(HEAD_DIM)
        logits.append((logit + (noise[j] if noise else 0.0)) / tau)
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def keep_best(scores: list[float], candidates: list[int], count: int) -> list[int]:
    """The `count` candidates of largest score, taken one at a time, the earliest first among equals."""
    left, kept = list(candidates), []
    for _ in range(count):
        best = left[0]
        for token in left:
            if scores[token] > scores[best]:
                best = token
        left.remove(best)
        kept.append(best)
    return sorted(kept)


def on(device: str, *arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array).to(device) for array in arrays]


def lengths_of(length: int, device: str) -> torch.Tensor:
    return torch.full((1, KV_HEADS), length, dtype=torch.int32, device=device)


def kept_lists(scores: torch.Tensor, budget, **options) -> list[list[int]]:
    kept, counts = select.run(scores, budget, **options)
    return [row[:count].tolist() for row, count in zip(kept, counts.tolist(), strict=True)]


@pytest.mark.parametrize(("prompt", "kept_frac"), [(40, 0.5), (33, 0.3), (7, 0.4)])
def test_h2o_over_prompt_and_decoding(prompt: int, kept_frac: float, device: str) -> None:
    """Algorithm 1 (arXiv 2306.14048): accumulated probabilities; in each step the lowest token that is not recent leaves.

    The step's own token takes part in its attention and is then recent. Ours: prefill_scores, select and an in-place
    compact at the end of the prompt, decode_attention_scored and the same selection in every step.
    """
    rng = np.random.default_rng(prompt)
    steps = 6
    policy, seq = H2O(kept_frac=kept_frac), SequenceShape(prompt, prompt)
    budget, recent = policy.kept_tokens(seq), policy.kept_tokens(seq) - policy.heavy_tokens(seq)
    q = drawn(rng, 1, KV_HEADS * GROUP, prompt + steps, HEAD_DIM)
    k, v = (drawn(rng, 1, KV_HEADS, prompt + steps, HEAD_DIM) for _ in range(2))

    expected = []
    for head in range(KV_HEADS):
        score = [0.0] * (prompt + steps)
        resident, history = list(range(prompt)), []
        for step in range(steps + 1):
            if step == 0:
                for member in range(GROUP):
                    for i in range(prompt):
                        row = softmax_row(q[0, head * GROUP + member, i], k[0, head, : i + 1])
                        for j, p in enumerate(row):
                            score[j] += p
            else:
                resident.append(prompt + step - 1)
                for member in range(GROUP):
                    row = softmax_row(q[0, head * GROUP + member, prompt + step - 1], k[0, head][resident])
                    for j, p in zip(resident, row, strict=True):
                        score[j] += p
            newest = resident[len(resident) - recent :]
            resident = sorted(keep_best(score, resident[: len(resident) - recent], budget - recent) + newest)
            history.append(list(resident))
        expected.append(history)

    cache_k, cache_v, queries = (part.contiguous() for part in on(device, k.copy(), v.copy(), q))
    scores = prefill_scores.run(queries[:, :, :prompt].contiguous(), cache_k, lengths_of(prompt, device))
    names = torch.arange(prompt + steps, device=device).expand(KV_HEADS, -1).clone()  # the token in each slot
    length = prompt
    for step in range(steps + 1):
        if step:
            for cache, fresh in ((cache_k, k), (cache_v, v)):
                cache[:, :, length] = torch.from_numpy(fresh[:, :, prompt + step - 1]).to(device)
            names[:, length], scores[:, :, length] = prompt + step - 1, 0.0
            length += 1
            now = queries[:, :, prompt + step - 1].contiguous()
            decode_attention_scored.run(now, cache_k, cache_v, lengths_of(length, device), scores, "sum")
        kept, counts = select.run(scores[0, :, :length], budget, num_recent=recent)
        compact.run_in_place(cache_k, cache_v, kept[None], counts[None])
        scores[0, :, :budget] = scores[0].gather(1, kept.long())
        names[:, :budget] = names.gather(1, kept.long())
        length = budget
        assert names[:, :length].tolist() == [head[step] for head in expected]
        assert length == (policy.stored(seq, policy.head_groups(SHAPE)[0]) if step == 0 else
                          policy.resident(seq, policy.head_groups(SHAPE)[0], step).value)  # fmt: skip


def philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """Philox 4x32-10 of Salmon et al. (SC11), on Python integers."""
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ counter[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return counter


def test_philox_is_the_published_generator() -> None:
    """Known answers of Random123 1.14 (kat_vectors, philox4x32 10)."""
    assert philox([0] * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox([ones] * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def gumbel(seed: int, key: int, query: int, head: int) -> float:
    bits = philox([key, query, head, 0], (seed & 0xFFFFFFFF, seed >> 32))[0]
    return -math.log(-math.log(((bits >> 9) + 0.5) / 2**23))


@pytest.mark.parametrize(("prompt", "kept_frac", "tau"), [(48, 0.5, 1.0), (31, 0.3, 1.6), (5, 0.6, 2.0)])
def test_keyformer_at_the_end_of_the_prompt(prompt: int, kept_frac: float, tau: float, device: str) -> None:
    """Algorithm 1 (arXiv 2403.09054): f += softmax((x + ζ)/τ); the recent w stay and the best k − w of the others."""
    rng, seed = np.random.default_rng(prompt), 0x1234_5678_9ABC
    policy, seq = Keyformer(kept_frac=kept_frac), SequenceShape(prompt, prompt)
    budget, recent = policy.kept_tokens(seq), policy.recent_tokens(seq)
    q, k = drawn(rng, 1, KV_HEADS * GROUP, prompt, HEAD_DIM), drawn(rng, 1, KV_HEADS, prompt, HEAD_DIM)
    expected, plain = [], []
    for head in range(KV_HEADS):
        for noisy, results in ((True, expected), (False, plain)):
            f = [0.0] * prompt
            for q_head in range(head * GROUP, head * GROUP + GROUP):
                for i in range(prompt):
                    noise = [gumbel(seed, j, i, q_head) for j in range(i + 1)] if noisy else None
                    for j, p in enumerate(softmax_row(q[0, q_head, i], k[0, head, : i + 1], noise, tau)):
                        f[j] += p
            newest = list(range(prompt - recent, prompt))
            results.append(sorted(keep_best(f, list(range(prompt - recent)), budget - recent) + newest))
    queries, keys = on(device, q, k)
    lengths = lengths_of(prompt, device)
    scores = prefill_scores.run(queries, keys, lengths, statistic="gumbel", temperature=tau, seed=seed)
    assert kept_lists(scores[0], budget, num_recent=recent) == expected
    assert policy.stored(seq, policy.head_groups(SHAPE)[0]) == len(expected[0])
    assert prompt < 20 or expected != plain, "noise changes who stays"


@pytest.mark.parametrize(("prompt", "budget", "window"), [(50, 32, 12), (61, 24, 400), (23, 22, 5)])
def test_scissorhands_over_prompt_and_decoding(prompt: int, budget: int, window: int, device: str) -> None:
    """Algorithms 1 and 2 (arXiv 2305.17118): count α > 1/t over the last w steps; drop m = B/2 where the cache exceeds B."""
    rng = np.random.default_rng(prompt)
    policy, seq = Scissorhands(budget_tokens=budget, history_window_tokens=window, recent_tokens=4), SequenceShape(prompt, prompt)
    q, k = drawn(rng, 1, KV_HEADS * GROUP, prompt, HEAD_DIM), drawn(rng, 1, KV_HEADS, prompt, HEAD_DIM)
    keep = policy.stored(seq, policy.head_groups(SHAPE)[0])
    expected = []
    for head in range(KV_HEADS):
        importance = [0.0] * prompt
        for q_head in range(head * GROUP, head * GROUP + GROUP):
            for t in range(max(0, prompt - window), prompt):
                for j, alpha in enumerate(softmax_row(q[0, q_head, t], k[0, head, : t + 1])):
                    importance[j] += alpha > 1 / (t + 1)
        dropped: list[int] = []
        while prompt - len(dropped) > keep:  # the lowest leaves; of equal ones the latest
            lowest = None
            for j in range(prompt - 4):
                if j not in dropped and (lowest is None or importance[j] <= importance[lowest]):
                    lowest = j
            dropped.append(lowest)
        expected.append([j for j in range(prompt) if j not in dropped])
    queries, keys = on(device, q[:, :, -min(window, prompt) :].copy(), k)
    scores = prefill_scores.run(queries, keys, lengths_of(prompt, device), statistic="count")
    assert kept_lists(scores[0], keep, num_recent=4) == expected
    assert keep == budget - budget // 2


@pytest.mark.parametrize(("prompt", "block", "protected", "share"), [(70, 4, 8, 0.5), (41, 16, 5, 0.4), (64, 16, 32, 1.0)])
def test_kv_compress_evicts_blocks_of_all_layers(prompt: int, block: int, protected: int, share: float, device: str) -> None:
    """Section 3 (arXiv 2410.00161): squared attention of the last w queries, summed over the group and max-pooled; blocks of
    all layers and heads compete by the largest metric that freeing them evicts, empty tail slots first; the cheapest go.
    """
    rng, num_layers, window = np.random.default_rng(block), 2, 8
    q = drawn(rng, num_layers, KV_HEADS * GROUP, window, HEAD_DIM)
    k = drawn(rng, num_layers, KV_HEADS, prompt, HEAD_DIM)
    heads = [(layer, head) for layer in range(num_layers) for head in range(KV_HEADS)]
    metrics = []
    for layer, head in heads:
        raw = [0.0] * prompt
        for q_head in range(head * GROUP, head * GROUP + GROUP):
            for i in range(window):
                for j, p in enumerate(softmax_row(q[layer, q_head, i], k[layer, head, : prompt - window + i + 1])):
                    raw[j] += p * p
        metrics.append([max(raw[max(0, j - 3) : j + 4]) for j in range(prompt)])

    empty = [-prompt % block] * len(heads)
    # Cheapest first, of equal metrics the latest, so that the earliest stay.
    queues = [sorted(range(prompt - protected), key=lambda j, m=m: (m[j], -j)) for m in metrics]
    evicted: list[list[int]] = [[] for _ in heads]
    to_free = int(share * int(freeable_blocks(torch.tensor([prompt] * len(heads)), block, protected).sum()))
    for _ in range(to_free):
        best, best_cost = None, math.inf
        for index, queue in enumerate(queues):
            wanted = block - empty[index]
            if wanted <= len(queue):
                cost = metrics[index][queue[wanted - 1]]  # the largest of those that must go
                if cost < best_cost:
                    best, best_cost = index, cost
        assert best is not None
        wanted = block - empty[best]
        evicted[best] += queues[best][:wanted]
        queues[best], empty[best] = queues[best][wanted:], 0
    expected = [[j for j in range(prompt) if j not in gone] for gone in evicted]

    scores = []
    for layer in range(num_layers):
        queries, keys = on(device, q[layer : layer + 1].copy(), k[layer : layer + 1].copy())
        options = {"statistic": "square", "pooling": "max", "pool_tokens": 7}
        scores.append(prefill_scores.run(queries, keys, lengths_of(prompt, device), **options)[0])
    pooled = torch.cat(scores)
    lengths = torch.full((1, len(heads)), prompt, dtype=torch.int32, device=device)
    budgets = block_budgets(
        pooled[None], lengths, blocks_to_free=torch.tensor([to_free], dtype=torch.int32, device=device),
        block_size_tokens=block, protected_tokens=protected,
    )  # fmt: skip
    options = {"max_budget_tokens": prompt, "num_recent": protected}
    assert kept_lists(pooled, budgets[0].contiguous(), **options) == expected
    assert share in (0.4, 1.0) or len({len(tokens) for tokens in expected}) > 1, "heads keep as many as the data say"


def test_kv_compress_counts_are_the_simulators(device: str) -> None:
    """Freed down to the policy's target on average, heads hold whole blocks and as many in all as the policy declares."""
    prompt, shape = 160, CacheShape(1, 4, 2, 64, 2, 16)
    policy = KVCompress(compression_ratio=2, min_kept_tokens=32, protected_tokens=32, head_shares=(0.5, 1.5))
    seq = SequenceShape(prompt, prompt)
    target = policy.target_tokens(seq)
    scores = torch.from_numpy(np.random.default_rng(0).random((1, 2, prompt), dtype=np.float32)).to(device)
    lengths = torch.full((1, 2), prompt, dtype=torch.int32, device=device)
    blocks = torch.tensor([2 * (prompt - target) // 16], dtype=torch.int32, device=device)
    budgets = block_budgets(scores, lengths, blocks_to_free=blocks, block_size_tokens=16, protected_tokens=32)
    assert int(budgets.sum()) == sum(group.num_pairs * policy.stored(seq, group) for group in policy.head_groups(shape))
    assert (budgets % 16 == 0).all()
    assert (budgets >= policy.floor_tokens).all()
