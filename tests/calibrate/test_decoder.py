"""The real decoder: against Hugging Face, against the kernels' references, and its cache against what simulations predict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the decoder needs torch")
pytest.importorskip("triton", reason="packing is shared with the Triton kernels")

from kvsim.calibrate.decoder.attention import SCORE_ROWS, column_scores  # noqa: E402
from kvsim.calibrate.decoder.decoder import Decoder  # noqa: E402
from kvsim.calibrate.decoder.rules.base import best, in_place  # noqa: E402
from kvsim.calibrate.decoder.sequence import CachedSequence  # noqa: E402
from kvsim.calibrate.decoder.spec import DecoderSpec, spec_from_hf, spec_of  # noqa: E402
from kvsim.calibrate.decoder.storage import OutOfBlocks  # noqa: E402
from kvsim.calibrate.decoder.transformer import Transformer  # noqa: E402
from kvsim.calibrate.decoder.weights import hf_weights, random_weights  # noqa: E402
from kvsim.errors import InputError  # noqa: E402
from kvsim.kernels import decode_attention, prefill_scores, select  # noqa: E402
from kvsim.model import Model, load_model  # noqa: E402
from kvsim.policies.ada_kv import AdaKV  # noqa: E402
from kvsim.policies.base import CacheShape, Policy, SequenceShape  # noqa: E402
from kvsim.policies.compose import CachePlan, Composition  # noqa: E402
from kvsim.policies.h2o import H2O  # noqa: E402
from kvsim.policies.keyformer import Keyformer  # noqa: E402
from kvsim.policies.kivi import KIVI  # noqa: E402
from kvsim.policies.kv_compress import KVCompress  # noqa: E402
from kvsim.policies.kv_quant import KVQuant  # noqa: E402
from kvsim.policies.pyramid_kv import PyramidKV  # noqa: E402
from kvsim.policies.scissorhands import Scissorhands  # noqa: E402
from kvsim.policies.snapkv import SnapKV  # noqa: E402
from kvsim.policies.streaming_llm import StreamingLLM  # noqa: E402
from kvsim.policies.think import ThinK  # noqa: E402
from kvsim.policies.window import Window  # noqa: E402

TINY = Model("tiny", 3, 64, 4, 2, 64, 96, 101, 4096)
POOL_BYTES = 8_000_000
SPREAD = 0.2
"""Of random matrices: with transformers' 0.02 attention is so even that every policy keeps the same tokens by accident."""

STEADY: dict[str, list[Policy]] = {
    "full": [],
    "h2o": [H2O(kept_frac=0.4)],
    "keyformer": [Keyformer(kept_frac=0.5)],
    "scissorhands": [Scissorhands(budget_tokens=40, recent_tokens=4, history_window_tokens=20)],
    "scissorhands, later layers": [
        Scissorhands(budget_tokens=40, recent_tokens=4, history_window_tokens=20, later_layer_weight=2.0)
    ],
    "snapkv": [SnapKV(budget_tokens=32, window_tokens=8)],
    "pyramid_kv": [PyramidKV(budget_tokens=32, window_tokens=8)],
    "streaming_llm": [StreamingLLM(sink_tokens=4, window_tokens=28)],
    "window": [Window(window_tokens=32)],
    "int4": [KVQuant(dtype="int4")],
    "int8 by token": [KVQuant(dtype="int8", scales="token")],
    "fp8": [KVQuant(dtype="fp8")],
    "kivi2": [KIVI(bits=2, residual_tokens=32, group_size_tokens=16)],
    "kivi4": [KIVI(bits=4, residual_tokens=16, group_size_tokens=16)],
    "think": [ThinK(recent_tokens=8)],
    "snapkv + think": [SnapKV(budget_tokens=32, window_tokens=8), ThinK(recent_tokens=8)],
    "snapkv + think + int8": [SnapKV(budget_tokens=32, window_tokens=8), ThinK(recent_tokens=8), KVQuant(dtype="int8")],
    "pyramid_kv + think": [PyramidKV(budget_tokens=32, window_tokens=8), ThinK(recent_tokens=8)],
    "h2o + fp8": [H2O(budget_tokens=30), KVQuant(dtype="fp8")],
    "keyformer + int4": [Keyformer(kept_frac=0.5), KVQuant(dtype="int4")],
    "scissorhands + int4": [
        Scissorhands(budget_tokens=40, recent_tokens=4, history_window_tokens=20), KVQuant(dtype="int4")
    ],
    "streaming_llm + int8": [StreamingLLM(sink_tokens=4, window_tokens=28), KVQuant(dtype="int8")],
}  # fmt: skip
UNEVEN: dict[str, list[Policy]] = {
    "ada_kv": [AdaKV(budget_tokens=32, window_tokens=8, head_shares=(1.0,))],
    "ada_kv + int8": [AdaKV(budget_tokens=32, window_tokens=8, head_shares=(1.0,)), KVQuant(dtype="int8")],
    "kv_compress": [KVCompress(compression_ratio=2, min_kept_tokens=32, protected_tokens=16, head_shares=(1.0,))],
    "kv_compress, interval 4": [
        KVCompress(compression_ratio=2, min_kept_tokens=32, protected_tokens=16, interval_steps=4, head_shares=(1.0,))
    ],
    "keyformer, code's schedule": [Keyformer(kept_frac=0.5, schedule="code")],
}  # fmt: skip
"""Whose heads differ as the data has it, or whose blocks are reserved for a whole tooth: equal on average, or bounded."""


def transformer(model: Model = TINY, spread: float = SPREAD) -> Transformer:
    spec = spec_of(model)
    return Transformer(spec, random_weights(spec, torch.float32, "cpu", 0, spread))


def plan_of(policies: list[Policy], model: Model = TINY, block_size: int = 16) -> CachePlan:
    shape = CacheShape(model.num_layers, model.num_q_heads, model.num_kv_heads, model.head_dim, 2.0, block_size)
    return CachePlan(Composition(policies), shape, "bf16")


def tokens(number: int, seed: int = 0, vocab: int = 101) -> torch.Tensor:
    return torch.randint(0, vocab, (number,), generator=torch.Generator().manual_seed(seed))


def held_bytes(sequence: CachedSequence, plan: CachePlan) -> float:
    """Real bytes of keys and values, and the state that the policies declare for the blocks that are held."""
    shape, policies = plan.shape, plan.composition.policies
    per_block = sum(p.state_bytes_per_slot(shape) * shape.block_size_tokens + p.state_bytes_per_block(shape) for p in policies)
    blocks = sum(rows.num_blocks for layer in sequence.layers for rows in (layer.full, layer.pruned) if rows is not None)
    rings = sum(layer.ring.num_bytes for layer in sequence.layers if layer.ring is not None)
    reserved_rings = -(-rings // plan.unit_bytes) * plan.unit_bytes  # the pool reserves them in whole units
    return sequence.held_bytes() - rings + reserved_rings + per_block * blocks


# -- the cache is what simulations say --------------------------------------------------------------------------------


def test_heads_of_a_prompt_as_long_as_the_budget_evict_their_own_tokens() -> None:
    """From the first step on, each in a slot of its own: their positions must not share memory, as those of a prompt may."""
    decoder = Decoder(transformer(), plan_of([H2O(budget_tokens=32)]), POOL_BYTES)
    sequence, ids = decoder.open(32, max_steps=6), tokens(32)
    logits, differ = decoder.step([(sequence, ids)], []), False
    for step in range(1, 6):
        logits = decoder.step([], [(sequence, int(logits.argmax()))])
        for layer in sequence.layers:
            positions = [set(row) for row in layer.positions.tolist()]
            assert all(len(held) == 32 and {*range(16 + step, 32 + step)} <= held for held in positions)
            differ |= positions[0] != positions[1]
    assert differ


@pytest.mark.parametrize("name", [*STEADY, *UNEVEN])
@pytest.mark.parametrize("prompt", [20, 75])
def test_every_policy_holds_the_predicted_tokens_and_bytes(name: str, prompt: int) -> None:
    """Step by step over 40 steps, prompts below and above the budgets, computed in two chunks."""
    policies = (STEADY | UNEVEN)[name]
    plan = plan_of(policies)
    decoder = Decoder(transformer(), plan, POOL_BYTES)
    sequence, seq = decoder.open(prompt, max_steps=40), SequenceShape(prompt, prompt)
    ids, rule = tokens(prompt), plan.composition.tokens
    decoder.step([(sequence, ids[:13])], [])
    logits = decoder.step([(sequence, ids[13:])], [])
    held, all_reserved, resident = [], [], []
    for step in range(1, 41):
        logits = decoder.step([], [(sequence, int(logits[0].argmax()))])
        assert torch.isfinite(logits).all()
        real = sum(map(sum, sequence.lengths()))
        predicted = sum(group.num_pairs * rule.resident(seq, group, step).value for group in plan.groups)
        segment = plan.segment(prompt, prompt, step)
        reserved = plan.lane_held(segment.tokens, segment.d_tokens, 1) * plan.unit_bytes
        if name in STEADY:
            assert real == predicted and held_bytes(sequence, plan) == reserved, step
        else:  # a head's tokens end anywhere in a block: at most one block of each differs
            per_head = plan.unit_bytes * plan.prefill_units_per_block
            assert abs(held_bytes(sequence, plan) - reserved) <= per_head, step
            assert real == predicted or name.startswith("kv_compress"), step
            held.append(held_bytes(sequence, plan)), all_reserved.append(reserved), resident.append(real / predicted)
    if name in UNEVEN:
        assert sum(resident) / 40 == pytest.approx(1, abs=0.05)
        assert sum(held) <= 1.05 * sum(all_reserved), "more memory than is predicted"
    assert prompt + 40 == sequence.num_tokens
    decoder.close(sequence)
    assert len(decoder.full.free) == decoder.full.num_blocks, "blocks were lost"


@pytest.mark.parametrize("name", ["h2o", "kivi2", "snapkv + think", "keyformer", "kv_compress"])
def test_sequences_in_one_batch_do_not_touch_each_other(name: str) -> None:
    """Three of different lengths, started one after the other, give the logits that each gives alone."""
    policies = (STEADY | UNEVEN)[name]
    lengths, steps = (20, 75, 41), 12
    alone = []
    for number in lengths:
        decoder = Decoder(transformer(), plan_of(policies), POOL_BYTES)
        sequence = decoder.open(number, max_steps=steps)
        rows = [decoder.step([(sequence, tokens(number, number))], [])[0]]
        rows += [decoder.step([], [(sequence, 7)])[0] for _ in range(steps)]
        alone.append(rows)
    decoder = Decoder(transformer(), plan_of(policies), POOL_BYTES)
    running: list[tuple[CachedSequence, int]] = []
    for start, number in enumerate(lengths):  # a prompt joins while the others decode
        sequence = decoder.open(number, max_steps=steps)
        logits = decoder.step([(sequence, tokens(number, number))], [(other, 7) for other, _ in running])
        running.append((sequence, start))
    for _ in range(4):
        logits = decoder.step([], [(sequence, 7) for sequence, _ in running])
    for row, (sequence, start) in enumerate(running):
        expected = alone[start][4 + len(lengths) - 1 - start]
        if name != "keyformer":  # whose noise differs from run to run
            torch.testing.assert_close(logits[row], expected, rtol=2e-3, atol=2e-3)
        assert sequence.step == 4 + len(lengths) - 1 - start


def test_a_pool_that_is_too_small_says_so_and_frees_everything() -> None:
    plan = plan_of([])
    decoder = Decoder(transformer(), plan, 3 * plan.plain_block_bytes)
    sequence = decoder.open(64)
    with pytest.raises(OutOfBlocks, match="blocks are needed"):
        decoder.step([(sequence, tokens(64))], [])
    decoder.close(sequence)
    assert len(decoder.full.free) == decoder.full.num_blocks


@pytest.mark.parametrize(
    "policies",
    [
        [SnapKV(budget_tokens=64), KIVI(residual_tokens=32, group_size_tokens=16)],
        [H2O(kept_frac=0.5), ThinK()],
        [AdaKV(budget_tokens=64), ThinK()],
    ],
    ids=["snapkv + kivi", "h2o + think", "ada_kv + think"],
)
def test_compositions_that_no_cache_of_slots_can_hold_are_refused(policies: list[Policy]) -> None:
    with pytest.raises(InputError, match="decoder"):
        Decoder(transformer(), plan_of(policies), POOL_BYTES)


# -- the numbers ------------------------------------------------------------------------------------------------------

FAMILIES = {
    "llama": TINY,
    "qwen3": replace(TINY, qk_norm=True, qkv_bias=True),
    "mpt": replace(TINY, num_kv_heads=4, norm="layer", position="alibi", gated_mlp=False, tied_embeddings=True),
    "opt": replace(
        TINY, num_kv_heads=4, norm="layer", norm_bias=True, position="learned", num_learned_positions=4098, gated_mlp=False,
        qkv_bias=True, o_bias=True, mlp_bias=True,
    ),
    "gpt-j": replace(TINY, num_kv_heads=4, norm="layer", norm_bias=True, norms_per_layer=1, gated_mlp=False, lm_head_bias=True),
    "bloom": replace(TINY, num_kv_heads=4, norm="layer", norm_bias=True, position="alibi", embedding_norm=True, gated_mlp=False),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_one_prefill(family: str) -> None:
    """Token by token, in chunks and at once: the same logits (16-bit keys and values round the first two)."""
    model = FAMILIES[family]
    ids, by = tokens(40), {}
    for name, cuts in {"at once": [40], "chunks": [17, 16, 7], "tokens": [25, *[1] * 15]}.items():
        decoder = Decoder(transformer(model), plan_of([], model), POOL_BYTES, torch.float32)
        sequence, first = decoder.open(25 if name == "tokens" else 40, max_steps=15), 0
        for number in cuts:
            part = ids[first : first + number]
            first += number
            decodes = name == "tokens" and number == 1
            logits = decoder.step([], [(sequence, int(part[0]))]) if decodes else decoder.step([(sequence, part)], [])
        by[name] = logits[0]
    torch.testing.assert_close(by["chunks"], by["at once"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by["tokens"], by["at once"], rtol=1e-4, atol=1e-4)


HF = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
}


@pytest.mark.parametrize("family", HF)
def test_logits_equal_hugging_face(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle of the logits")
    config = transformers.AutoConfig.for_model(
        family, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=101,
        max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=False, **HF[family],
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    theirs.save_pretrained(tmp_path)
    spec = spec_from_hf(tmp_path)
    ours = Transformer(spec, hf_weights(spec, tmp_path, torch.float32, "cpu"))
    ids = tokens(30)
    decoder = Decoder(ours, plan_of([], spec.model), POOL_BYTES, torch.float32)
    sequence = decoder.open(20, max_steps=10)
    rows = [decoder.step([(sequence, ids[:20])], [])[0]]
    rows += [decoder.step([], [(sequence, int(token))])[0] for token in ids[20:]]
    with torch.inference_mode():
        expected = theirs(ids[None]).logits[0, 19:]
    torch.testing.assert_close(torch.stack(rows), expected, rtol=1e-3, atol=1e-3)


def sinks_and_window(model: Model, num_sink: int, window: int, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of every decode step by StreamingLLM's rule as its reference code has it: keys are cached before rotation and all of them
    are rotated in every step by their place in the cache, the query by the last place. In float64, by complex numbers."""
    ours, d = transformer(model), model.head_dim
    frequencies = 10_000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    rotary, ours.rotary = ours.rotary, None  # queries and keys come as they are

    def turned(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """x `[tokens, heads, d]` at these places, where positions are rotary."""
        if rotary is None:
            return x.double()
        pairs = x.double().unflatten(2, (-1, 2)) if rotary.interleaved else x.double().unflatten(2, (2, -1)).transpose(2, 3)
        by = torch.polar(torch.ones(1, dtype=torch.float64), places.double()[:, None] * frequencies)
        out = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * by[:, None])
        return out.flatten(2) if rotary.interleaved else out.transpose(2, 3).flatten(2)

    caches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    slopes = 2.0 ** (-8 / model.num_q_heads * torch.arange(1, model.num_q_heads + 1).double()) * (model.position == "alibi")

    def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if index in caches:
            k, v = (torch.cat(pair) for pair in zip(caches[index], (k, v), strict=True))
            if len(k) > num_sink + window:
                k, v = (torch.cat((x[:num_sink], x[-window:])) for x in (k, v))
        caches[index] = k, v
        places = torch.arange(len(k))
        keys, queries = turned(k, places), turned(q, places[-len(q) :])
        group = model.num_q_heads // model.num_kv_heads
        distance = places - places[-len(q) :, None]
        logits = torch.einsum("qhd,khd->hqk", queries, keys.repeat_interleave(group, 1)) * d**-0.5 + slopes[:, None, None] * distance
        weights = logits.masked_fill(distance > 0, -torch.inf).softmax(2)
        return torch.einsum("hqk,khd->qhd", weights, v.double().repeat_interleave(group, 1)).to(q.dtype)

    with torch.inference_mode():
        ours.hidden(ids[:prompt], torch.arange(prompt), attend)
        for index, cache in caches.items():
            caches[index] = tuple(torch.cat((x[:num_sink], x[max(num_sink, prompt - window) :])) for x in cache)  # type: ignore[assignment]
        steps = range(prompt, len(ids))
        return torch.cat([ours.logits(ours.hidden(ids[at : at + 1], torch.tensor([at]), attend)) for at in steps])


@pytest.mark.parametrize("family", ["llama", "gpt-j", "mpt"])
@pytest.mark.parametrize(("prompt", "chunk"), [(9, 9), (50, 50), (50, 13)])
def test_positions_are_those_in_the_cache(family: str, prompt: int, chunk: int) -> None:
    """StreamingLLM and its window without sinks, while the cache fills and long after: 60 steps with a window of 12."""
    model = FAMILIES[family]
    ids = tokens(prompt + 60)
    for num_sink in (4, 0):
        decoder = Decoder(
            transformer(model), plan_of([StreamingLLM(sink_tokens=num_sink, window_tokens=12)], model), POOL_BYTES, torch.float32
        )
        sequence = decoder.open(prompt, max_steps=60)
        for first in range(0, prompt, chunk):
            decoder.step([(sequence, ids[first : min(first + chunk, prompt)])], [])
        rows = [decoder.step([], [(sequence, int(token))])[0] for token in ids[prompt:]]
        expected = sinks_and_window(model, num_sink, 12, ids, prompt)
        torch.testing.assert_close(torch.stack(rows), expected, rtol=2e-3, atol=2e-3)


def test_a_folder_without_the_tensors_is_refused(tmp_path: Path) -> None:
    spec: DecoderSpec = spec_of(TINY)
    with pytest.raises(InputError, match="safetensors"):
        hf_weights(spec, tmp_path, torch.float32, "cpu")


# -- against the kernels ----------------------------------------------------------------------------------------------


def filled(policies: list[Policy], prompt: int) -> tuple[Decoder, CachedSequence]:
    decoder = Decoder(transformer(), plan_of(policies), POOL_BYTES)
    sequence = decoder.open(prompt, max_steps=0)  # so that nothing is compressed yet
    decoder.step([(sequence, tokens(prompt))], [])
    return decoder, sequence


def test_the_cache_has_the_layout_of_the_kernels() -> None:
    """Decode attention of the kernels' float64 reference over the very blocks and tables of the decoder."""
    from kvsim.calibrate.decoder import attention

    decoder, sequence = filled([], 50)
    layer, q = sequence.layers[1], torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    out, _ = attention.decode([layer], q[None], [49], decoder.how)
    lanes = (codec.rows[:, :, None] for codec in (decoder.full.keys, decoder.full.values))
    lengths = torch.tensor([layer.full.lengths], dtype=torch.int32)
    expected, _ = decode_attention.reference(q[None], *lanes, lengths, layer.full.table[None].int())
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["full", "int4", "fp8"])
@pytest.mark.parametrize("lengths", [(20, 20), (37, 5)])
@pytest.mark.parametrize("holes", [False, True])
def test_compaction_moves_rows_as_they_are_stored(name: str, lengths: tuple[int, int], holes: bool) -> None:
    """Nothing is rounded a second time, whether heads keep equally many tokens or not, and blocks behind are free."""
    decoder, sequence = filled(STEADY[name], 50)
    rows, generator = sequence.layers[1].full, torch.Generator().manual_seed(5)
    before = rows.read()
    free = len(decoder.full.free)
    kept = [torch.randperm(50, generator=generator)[:number].sort().values for number in lengths]
    kept[0] = kept[0][torch.randperm(len(kept[0]), generator=generator)]  # in any order: rows move over each other
    kept[1][0] = 0  # one that stays where it is
    rows.keep(kept, holes)
    for old, new in zip(before, rows.read(), strict=True):
        for head, slots in enumerate(kept):
            assert torch.equal(new[head, : len(slots)], old[head, slots])
    assert len(decoder.full.free) - free == 2 * 4 - sum(-(-number // 16) for number in lengths)


def test_what_leaves_is_replaced_from_behind() -> None:
    """The best stay as by sorting, and one row moves for each hole."""
    generator = torch.Generator().manual_seed(6)
    lengths, budgets = [50, 33, 20, 9, 0], [32, 32, 20, 3, 0]
    scores = torch.rand(5, 50, generator=generator)
    for head, places in enumerate(in_place(scores, lengths, budgets)):
        length, budget = lengths[head], budgets[head]
        kept = best(scores[head : head + 1, :length], budget, 0)[0].tolist()
        assert sorted(places.tolist()) == kept
        assert int((places != torch.arange(budget)).sum()) == sum(slot >= budget for slot in kept)
    with pytest.raises(AssertionError):
        in_place(scores, lengths, [51, 32, 20, 3, 0])


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_prompt_tokens_are_chosen_as_the_kernels_choose(name: str) -> None:
    policies: list[Policy] = [SnapKV(budget_tokens=32, window_tokens=8)] if name == "snapkv" else [H2O(budget_tokens=32)]
    decoder, sequence = filled(policies, 60)
    rule = decoder.rules[0]
    expected = []
    for layer in sequence.layers:
        keys = layer.full.read()[0][None]
        lengths = torch.tensor([layer.full.lengths], dtype=torch.int32)
        if name == "snapkv":
            assert layer.window is not None
            q = layer.window.transpose(0, 1)[None]
            scores = prefill_scores.reference(q, keys, lengths, pooling="mean", pool_tokens=5, num_unpooled=8)
            recent = 8
        else:
            assert layer.scores is not None
            scores, recent = layer.scores[None].double(), 16
        expected.append(select.reference(scores[0].float(), 32, num_recent=recent)[0])
        layer.positions = torch.arange(60).expand(2, -1)
    rule.prompt_ends(sequence)
    for layer, kept in zip(sequence.layers, expected, strict=True):
        assert layer.positions is not None
        assert layer.positions.tolist() == kept.tolist()


@pytest.mark.parametrize(("cached", "prior", "new"), [(100, 0, 100), (160, 90, 70), (51, 50, 1), (40, 90, 1), (40, 90, 70)])
@pytest.mark.parametrize("slopes", [False, True])
def test_column_scores_are_those_of_whole_rows(cached: int, prior: int, new: int, slopes: bool) -> None:
    """Whatever of them is computed at once, and skipped above the diagonal. cached below prior + new: tokens have left."""
    assert new > SCORE_ROWS or new == 1
    decoder, sequence = filled([H2O(budget_tokens=300)], cached)
    layer = sequence.layers[0]
    keys = layer.full.read()[0]  # [heads, tokens, d]
    how = replace(decoder.how, slopes=torch.tensor([0.5, 0.25, 0.1, 0.05]) if slopes else None)
    q = torch.randn(new, 2 * len(keys), keys.shape[2], generator=torch.Generator().manual_seed(0))
    logits = torch.einsum("qhgd,htd->hgqt", q.unflatten(1, (len(keys), 2)), keys) / keys.shape[2] ** 0.5
    at = torch.arange(prior, prior + new)[:, None]
    if slopes:
        logits = logits + how.slopes.unflatten(0, (2, 2))[..., None, None] * (torch.arange(cached) - at)
    alpha = logits.masked_fill(torch.arange(cached) > at, -torch.inf).softmax(3)
    for statistic, expected in (("sum", alpha), ("square", alpha**2), ("count", (alpha > 1 / (at + 1)).float())):
        found = column_scores(layer, q, prior, statistic, how)
        torch.testing.assert_close(found, expected.sum((1, 2)), rtol=1e-4, atol=1e-5)


def test_catalogue_models_have_a_decoder() -> None:
    for name in ("llama-3.1-8b", "mpt-7b", "opt-6.7b", "gpt-j-6b", "qwen3-8b"):
        try:
            model = load_model(name)
        except InputError:
            continue
        small = replace(
            model, num_layers=1, vocab_size=64, hidden_size=64, intermediate_size=64, num_q_heads=2, head_dim=64,
            num_kv_heads=1 if model.num_kv_heads < model.num_q_heads else 2, max_context_tokens=min(model.max_context_tokens, 78),
            num_learned_positions=min(model.num_learned_positions, 80),
        )  # fmt: skip
        decoder = Decoder(transformer(small), plan_of([], small), POOL_BYTES)
        sequence = decoder.open(10)
        assert torch.isfinite(decoder.step([(sequence, tokens(10, vocab=64))], [])).all()
