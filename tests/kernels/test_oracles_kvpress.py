"""What our kernels keep against NVIDIA's kvpress, on a tiny Llama of random weights, policy by policy.

Kernels get the model's own queries and keys (fp32, which the score kernels take for this purpose) and are set to kvpress'
conventions: means over a group's query heads, a prompt's share as the budget, PyramidKV's without "+ w". Its scores must
differ between tokens, hence initializer_range 0.2: with the default 0.02 attention is near uniform and all policies agree by
accident. Needs the `oracles` extra.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvsim.kernels import prefill_scores, select, think_scores
from kvsim.kernels.select_budgets import pooled_budgets, pyramid_layer_budgets
from kvsim.kernels.think_gather import kept_channels
from kvsim.policies.ada_kv import AdaKV
from kvsim.policies.base import CacheShape, SequenceShape
from kvsim.policies.pyramid_kv import PyramidKV
from kvsim.policies.snapkv import SnapKV
from kvsim.policies.streaming_llm import StreamingLLM
from kvsim.policies.think import ThinK

kvpress = pytest.importorskip("kvpress", reason="install the oracles extra: pip install -e .[oracles]")
transformers = pytest.importorskip("transformers")
rope = pytest.importorskip("transformers.models.llama.modeling_llama").apply_rotary_pos_emb

NUM_LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, WINDOW = 3, 4, 2, 64, 8
GROUP = Q_HEADS // KV_HEADS


class Prompt:
    """A model, a prompt, and the queries and keys of each layer after rotation."""

    def __init__(self, num_tokens: int, seed: int) -> None:
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            hidden_size=128, intermediate_size=128, num_hidden_layers=NUM_LAYERS, num_attention_heads=Q_HEADS,
            num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=97, initializer_range=0.2, max_position_embeddings=1024,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self.model = transformers.LlamaForCausalLM(config).eval()
        self.tokens = torch.randint(0, 97, (1, num_tokens))
        self.num_tokens = num_tokens
        self.q: list[torch.Tensor] = []
        hooks = [layer.self_attn.register_forward_pre_hook(self._capture, with_kwargs=True) for layer in self.model.model.layers]
        self.k = [layer.keys for layer in self.run().layers]
        for hook in hooks:
            hook.remove()
        self.lengths = torch.full((1, KV_HEADS), num_tokens, dtype=torch.int32)

    def _capture(self, attention: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        q = attention.q_proj(kwargs["hidden_states"]).view(1, -1, Q_HEADS, HEAD_DIM).transpose(1, 2)
        self.q.append(rope(q, q, *kwargs["position_embeddings"])[0].contiguous())

    def run(self, press=None):
        cache = transformers.DynamicCache()
        with torch.no_grad():
            if press is None:
                self.model(self.tokens, past_key_values=cache)
            else:
                with press(self.model):
                    self.model(self.tokens, past_key_values=cache)
        return cache

    def kept_by(self, press) -> list[list[list[int]]]:
        """Tokens kept by kvpress, for each layer and KV head, ascending: rows of K that are left, found among all rows."""
        kept = []
        for layer, after in enumerate(self.run(press).layers):
            same = (after.keys[0][:, :, None] == self.k[layer][0][:, None]).all(-1)
            assert (same.sum(-1) == 1).all(), "each row left is one of the prompt's"
            kept.append([sorted(head.int().argmax(-1).tolist()) for head in same])
        return kept

    def snapkv_scores(self, layer: int) -> torch.Tensor:
        """[KV heads, tokens], pooled before the window."""
        return prefill_scores.run(
            self.q[layer][:, :, -WINDOW:].contiguous(), self.k[layer], self.lengths, statistic="sum", group_mean=True,
            pooling="mean", pool_tokens=5, num_unpooled=WINDOW,
        )[0]  # fmt: skip


@pytest.fixture(scope="module", params=[(200, 0), (129, 1)], ids=["200 tokens", "129 tokens"])
def prompt(request: pytest.FixtureRequest) -> Prompt:
    return Prompt(*request.param)


def kept_of(scores: torch.Tensor, budgets, **options) -> list[list[int]]:
    kept, counts = select.run(scores, budgets, **options)
    return [row[:count].tolist() for row, count in zip(kept, counts.tolist(), strict=True)]


def sequence(prompt: Prompt) -> SequenceShape:
    return SequenceShape(prompt.num_tokens, prompt.num_tokens)


SHAPE = CacheShape(NUM_LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, 2, 16)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_snapkv_keeps_the_same_tokens(prompt: Prompt, ratio: float) -> None:
    expected = prompt.kept_by(kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=5))
    budget = len(expected[0][0])
    policy = SnapKV(budget_tokens=budget, window_tokens=WINDOW)
    assert policy.stored(sequence(prompt), policy.head_groups(SHAPE)[0]) == budget < prompt.num_tokens
    for layer in range(NUM_LAYERS):
        assert kept_of(prompt.snapkv_scores(layer), budget, num_recent=WINDOW) == expected[layer]
    assert expected[0] != expected[1], "layers and heads choose for themselves"


@pytest.mark.parametrize(("ratio", "beta"), [(0.5, 4), (0.4, 5), (0.4, 1)])
def test_pyramid_keeps_the_same_tokens(ratio: float, beta: int) -> None:
    """0.5: a pyramid as it is; 0.4: flattened, as the first layer's share exceeds the prompt; beta 1: all layers alike.

    kvpress reads C − w as the prompt's share and adds no window to the result: its counts are ours less w.
    """
    prompt = Prompt(200, 2)
    share = round(200 * (1 - ratio))
    ours = pyramid_layer_budgets(NUM_LAYERS, share + WINDOW, window_tokens=WINDOW, num_tokens=200, beta=beta)
    policy = PyramidKV(budget_tokens=share + WINDOW, window_tokens=WINDOW, beta=beta)
    assert ours == [policy.stored(sequence(prompt), group) for group in policy.head_groups(SHAPE)]
    expected = prompt.kept_by(kvpress.PyramidKVPress(ratio, window_size=WINDOW, kernel_size=5, beta=beta))
    for layer in range(NUM_LAYERS):
        assert kept_of(prompt.snapkv_scores(layer), ours[layer] - WINDOW, num_recent=WINDOW) == expected[layer]
    assert (len({len(heads[0]) for heads in expected}) == 1) == (beta == 1)


@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_streaming_llm_keeps_the_same_tokens(prompt: Prompt, ratio: float) -> None:
    expected = prompt.kept_by(kvpress.StreamingLLMPress(ratio, n_sink=4))
    budget = len(expected[0][0])
    policy = StreamingLLM(sink_tokens=4, window_tokens=budget - 4)
    assert policy.stored(sequence(prompt), policy.head_groups(SHAPE)[0]) == budget
    scores = torch.zeros(KV_HEADS, prompt.num_tokens)
    for layer in range(NUM_LAYERS):
        assert kept_of(scores, budget, num_sink=4, num_recent=budget - 4) == expected[layer]


@pytest.mark.parametrize(("ratio", "floor_frac"), [(0.5, 0.2), (0.7, 0.5), (0.5, 0.0)])
def test_ada_kv_gives_heads_the_same_counts_and_tokens(prompt: Prompt, ratio: float, floor_frac: float) -> None:
    snapkv = kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=5)
    prompt.run(kvpress.AdaKVPress(snapkv, alpha_safeguard=floor_frac))
    budget = max(1, int(prompt.num_tokens * (1 - ratio)))
    for layer, module in enumerate(prompt.model.model.layers):
        _, heads, tokens = module.self_attn.masked_key_indices
        pruned = set(zip(heads.tolist(), tokens.tolist(), strict=True))
        expected = [[token for token in range(prompt.num_tokens) if (head, token) not in pruned] for head in range(KV_HEADS)]
        scores = prompt.snapkv_scores(layer)
        floor = int(budget * floor_frac)
        budgets = pooled_budgets(scores[None], prompt.lengths, budget_tokens=budget, floor_tokens=floor, protected_tokens=WINDOW)
        assert budgets[0].tolist() == [len(head) for head in expected]
        options = {"max_budget_tokens": prompt.num_tokens, "num_recent": WINDOW}
        assert kept_of(scores, budgets[0].contiguous(), **options) == expected
        policy = AdaKV(budget_tokens=budget, window_tokens=WINDOW, head_shares=tuple(budgets[0].tolist()), floor_frac=0)
        stored = sum(group.num_pairs * policy.stored(sequence(prompt), group) for group in policy.head_groups(SHAPE))
        assert abs(stored / NUM_LAYERS - budgets.sum()) <= KV_HEADS, "a layer keeps C tokens a head, but for rounding"


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.7])
def test_think_keeps_the_same_channels(prompt: Prompt, ratio: float) -> None:
    """kvpress ranks by the mean square over a group, sets the others to zero, and divides by nothing we rank by."""
    layers = prompt.run(kvpress.ThinKPress(ratio, window_size=32)).layers
    budget = kept_channels(HEAD_DIM, ratio)
    assert budget == ThinK(pruned_frac=ratio).kept_channels(HEAD_DIM)
    for layer, after in enumerate(layers):
        expected = [head.any(0).nonzero().flatten().tolist() for head in after.keys[0]]
        q = prompt.q[layer][:, :, -32:].contiguous()
        scores = think_scores.run(q, prompt.k[layer], prompt.lengths, reduction="rms")[0]
        assert kept_of(scores, budget) == expected


def test_the_model_tells_tokens_apart(prompt: Prompt) -> None:
    """Scores near the boundary differ by far more than fp32 rounds: agreement is no accident."""
    for layer in range(NUM_LAYERS):
        for row in prompt.snapkv_scores(layer)[:, :-WINDOW]:
            ordered = np.sort(row.numpy())
            assert ordered[0] > 0
            assert ordered[-1] > 3 * np.median(ordered)
            assert np.median(np.diff(ordered) / ordered[1:]) > 1e-4
