"""Batched decode attention: both backends against each other and against sequences one at a time, rows that come and go."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the decoder needs torch")
pytest.importorskip("triton", reason="one of the backends is made of Triton kernels")

from test_decoder import POOL_BYTES, STEADY, TINY, UNEVEN, plan_of, tokens, transformer  # noqa: E402

from kvsim.calibrate.decoder import attention, torch_attention  # noqa: E402
from kvsim.calibrate.decoder.decoder import Decoder  # noqa: E402
from kvsim.calibrate.decoder.launching import default_attention  # noqa: E402
from kvsim.calibrate.decoder.sequence import CachedSequence  # noqa: E402
from kvsim.calibrate.decoder.torch_attention import TorchAttention  # noqa: E402
from kvsim.calibrate.decoder.triton_attention import joined  # noqa: E402
from kvsim.errors import InputError  # noqa: E402
from kvsim.policies.base import Policy  # noqa: E402
from kvsim.policies.kv_quant import KVQuant  # noqa: E402

POLICIES = STEADY | UNEVEN | {"snapkv + int8": [*STEADY["snapkv"], KVQuant(dtype="int8")]}
SHALLOW = replace(TINY, num_layers=2)
REFUSED = {
    "streaming_llm": "move positions", "streaming_llm + int8": "move positions", "snapkv + think + int8": "pruned channels",
    "h2o + fp8": "scores over quantised", "keyformer + int4": "scores over quantised", "scissorhands + int4": "scores over quantised",
}  # fmt: skip
"""What there is no kernel for, and words of the refusal."""
VARIANTS = {
    "scissorhands, later layers", "int8 by token", "kivi4", "pyramid_kv + think", "kv_compress, interval 4", "keyformer, code's schedule",
    "snapkv + int8",
}  # fmt: skip
"""Of policies whose kernels another case runs."""
TOLERANCE = 0.02
"""Of logits over their standard deviation: 16-bit queries, probabilities and outputs in two layers, a few parts in 1000 each."""

CODES_TOLERANCE = 0.1
"""Over codes: keys and values that differ in their last place may get another code, a fifteenth of their range in 4 bits."""


def make(policies: list[Policy], backend: str, dtype: torch.dtype | None = torch.float16) -> Decoder:
    return Decoder(transformer(SHALLOW), plan_of(policies, SHALLOW), POOL_BYTES, dtype, attention=backend)


def twin_of(decoder: Decoder, running: list[CachedSequence]) -> tuple[Decoder, list[CachedSequence]]:
    """Copies of both, attended to by torch. Weights, noise and angles are shared."""
    shared = (decoder.transformer, decoder.generator, decoder.how, decoder.plan, *decoder.rules)
    twin, sequences = copy.deepcopy((decoder, running), {id(one): one for one in shared})
    twin.attention = TorchAttention(twin.batch, twin.how, twin.scoring, twin.generator)
    return twin, sequences


def run_ragged(decoder: Decoder, each: object, steps: int = 6) -> None:
    """Sequences of unlike lengths join while others decode, one leaves early, one skips steps; `each` is called before every step."""
    running: list[CachedSequence] = []
    for start, number in enumerate((20, 75, 41)):
        sequence = decoder.open(number, max_steps=20)
        each(running)  # type: ignore[operator]
        decoder.step([(sequence, tokens(number, number))], [(other, 7 + start) for other in running])
        running.append(sequence)
    for step in range(steps):
        if step == 2:
            decoder.close(running.pop(0))
        if step == 3:
            sequence = decoder.open(33, max_steps=20)
            decoder.step([(sequence, tokens(33, 5))], [])
            running.insert(0, sequence)
        now = running[1:] if step == 4 else running
        each(now)  # type: ignore[operator]
        decoder.step([], [(one, 7 + step) for one in now])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in POLICIES if name not in REFUSED]
)
def test_the_kernels_give_the_logits_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is also made by torch on a copy of all caches: so rounding cannot add up to another choice of tokens."""
    decoder = make(POLICIES[name], "triton")
    expected: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    original = Decoder.step

    def before(running: list[CachedSequence]) -> None:
        before.running = running  # type: ignore[attr-defined]

    def step(self: Decoder, chunks: object, decodes: list[tuple[CachedSequence, int]]) -> torch.Tensor:
        if decodes and not chunks:
            twin, copies = twin_of(self, [sequence for sequence, _ in decodes])
            theirs = original(twin, [], [(one, token) for one, (_, token) in zip(copies, decodes, strict=True)])
            logits = original(self, chunks, decodes)
            off = (logits - theirs).abs().max() / theirs.std()
            assert off < (CODES_TOLERANCE if self.residual_tokens or self._quantises else TOLERANCE), (name, off)
            expected.append(theirs)
            for mine, other in zip((one for one, _ in decodes), copies, strict=True):
                for ours, torchs in zip(mine.layers, other.layers, strict=True):
                    if ours.scores is not None and self.scoring.decode_statistic != "gumbel":
                        near = (ours.scores.float() - torchs.scores.float()).abs()
                        assert (near > 0.02).float().mean() <= (0.05 if ours.scores.dtype == torch.int16 else 0), name
                        scores.append(ours.scores)
            return logits
        return original(self, chunks, decodes)

    monkeypatch.setattr(Decoder, "step", step)
    run_ragged(decoder, before)
    assert len(expected) == 6
    if decoder.scoring is not None and decoder.scoring.decode_statistic not in (None, "gumbel"):
        assert scores


@pytest.mark.parametrize("name", REFUSED)
def test_what_there_is_no_kernel_for_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"attention='triton' .*{REFUSED[name]}.*; use attention=torch"):
        make(POLICIES[name], "triton")
    make(POLICIES[name], "torch")


def test_other_refusals_and_the_default() -> None:
    with pytest.raises(InputError, match="16 bits, not float32"):
        make([], "triton", torch.float32)
    with pytest.raises(InputError, match="must be one of torch, triton"):
        make([], "flash")
    alibi = replace(TINY, num_kv_heads=4, norm="layer", position="alibi", gated_mlp=False)
    with pytest.raises(InputError, match="ALiBi"):
        Decoder(transformer(alibi), plan_of([], alibi), POOL_BYTES, attention="triton")
    narrow = replace(TINY, head_dim=16)
    with pytest.raises(InputError, match="not 16"):
        Decoder(transformer(narrow), plan_of([], narrow), POOL_BYTES, attention="triton")
    assert default_attention(torch.device("cuda")) == "triton"
    assert default_attention(torch.device("cpu")) == "torch" == make([], None).attention.name  # type: ignore[arg-type]


def test_keyformers_noise_adds_whole_softmaxes() -> None:
    """The kernel draws other noise than torch: each step adds one softmax a query head all the same."""
    decoder = make(STEADY["keyformer"], "triton")
    sequences = [decoder.open(number, max_steps=20) for number in (60, 60)]
    for sequence in sequences:
        decoder.step([(sequence, tokens(60, 1))], [])
    before = [layer.scores.sum(1) for sequence in sequences for layer in sequence.layers]  # type: ignore[union-attr]
    assert len(decoder.attention._by_temperature()) == 0  # type: ignore[union-attr]
    victims = []
    original = decoder.rules[0].before_step

    def note(sequence: CachedSequence) -> None:
        original(sequence)
        for layer in sequence.layers:
            heads = torch.arange(2)
            victims.append(layer.scores[heads, layer.overwrite])  # type: ignore[index]

    decoder.rules[0].before_step = note  # type: ignore[method-assign]
    decoder.step([], [(sequence, 3) for sequence in sequences])
    after = [layer.scores.sum(1) for sequence in sequences for layer in sequence.layers]  # type: ignore[union-attr]
    for old, gone, new in zip(before, victims, after, strict=True):
        torch.testing.assert_close(new, old - gone + 2, rtol=1e-3, atol=1e-3)  # two query heads a KV head
    assert len(decoder.attention._by_temperature()) == 1, "of one age, so of one temperature: one launch"  # type: ignore[union-attr]


@pytest.mark.slow
def test_what_a_gpu_would_be_given_compiles() -> None:
    """The launches of a decode step under every policy of the study, for sm_90, with no GPU: no spills, nothing beyond limits."""
    script = Path(__file__).with_name("ahead_of_time_decoder.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), "90"], env=environment, cwd=script.parents[2], capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("split_kernel", "think_split_kernel", "quant_split_kernel", "accumulate_kernel", "gumbel_kernel", "join_kernel"):
        assert f" {kernel} sm_90" in done.stdout
    assert "streaming_llm: refused" in done.stdout


# -- torch, batched ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "h2o", "kivi2", "snapkv + think", "ada_kv", "int4", "streaming_llm", "kv_compress"])
def test_sequences_attended_together_are_as_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps with every sequence in a group of its own: equal to fp32's last digits."""
    logits: dict[bool, list[torch.Tensor]] = {}
    together = attention.alike
    for alone in (False, True):
        monkeypatch.setattr(attention, "alike", (lambda layer, how: None) if alone else together)
        decoder = make(POLICIES[name], "torch")
        assert isinstance(decoder.attention, torch_attention.TorchAttention)
        decoder.attention.groups_alike = True  # as on a GPU
        sequences = [decoder.open(number, max_steps=20) for number in (75, 41, 75, 70, 20)]
        for sequence in sequences:
            decoder.step([(sequence, tokens(sequence.shape.prompt_tokens, sequence.shape.prompt_tokens))], [])
        logits[alone] = [decoder.step([], [(one, 5 + step) for one in sequences]) for step in range(6)]
    for ours, theirs in zip(logits[False], logits[True], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_alike_caches_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: five sequences, three of which end in the same block, are three groups in every layer, and none over rings."""
    calls: list[int] = []
    original = attention.decode

    def count(layers: list[object], *rest: object) -> object:
        calls.append(len(layers))
        return original(layers, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "decode", count)
    for name, expected in (("full", [3, 1, 1]), ("kivi2", [1] * 5), ("streaming_llm", [1] * 5)):
        for grouped in (True, False):
            decoder = make(STEADY[name], "torch")
            assert isinstance(decoder.attention, torch_attention.TorchAttention) and not decoder.attention.groups_alike, "on a CPU"
            decoder.attention.groups_alike = grouped
            sequences = [decoder.open(number, max_steps=20) for number in (75, 41, 75, 70, 20)]
            for sequence in sequences:
                decoder.step([(sequence, tokens(sequence.shape.prompt_tokens))], [])
            calls.clear()
            decoder.step([], [(one, 5) for one in sequences])
            sizes = expected if grouped else [1] * 5
            assert sorted(calls[: len(sizes)], reverse=True) == sizes and len(calls) == 2 * len(sizes), name


# -- rows -------------------------------------------------------------------------------------------------------------


def test_rows_stay_dense_and_scores_go_with_their_sequence() -> None:
    decoder = make(STEADY["h2o"], "torch")
    sequences = [decoder.open(50, max_steps=30) for _ in range(4)]
    for number, sequence in enumerate(sequences):
        decoder.step([(sequence, tokens(50, number))], [])
    decoder.step([], [(one, 1) for one in sequences])
    held = [one.layers[0].scores.clone() for one in sequences]  # type: ignore[union-attr]
    batch = decoder.batch
    batch._seat([sequences[3], sequences[0]])
    assert batch.members == [sequences[0], sequences[3]], "the last moves into the hole"
    batch._seat([sequences[1], sequences[3], sequences[2]])
    assert set(map(id, batch.members)) == set(map(id, sequences[1:])) and batch.members[1] is sequences[3]
    for one, scores in zip(sequences, held, strict=True):
        assert torch.equal(one.layers[0].scores, scores)  # type: ignore[arg-type]
    decoder.step([], [(one, 1) for one in (sequences[2], sequences[1])])
    for one, scores in ((sequences[0], held[0]), (sequences[3], held[3])):
        assert torch.equal(one.layers[0].scores, scores), "a row's next sequence wrote into the last one's scores"  # type: ignore[arg-type]


def test_joined_parts_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, v = torch.randn(3, 2, 9, generator=generator), torch.randn(3, 2, 9, 5, generator=generator)

    def part(first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        if first == end:
            return torch.zeros(3, 2, 5), torch.full((3, 2), -torch.inf)
        rows = logits[..., first:end]
        return (rows.softmax(-1)[..., None] * v[..., first:end, :]).sum(-2), rows.logsumexp(-1)

    for cut in (0, 4, 9):
        torch.testing.assert_close(joined(part(0, cut), part(cut, 9)), part(0, 9)[0])
    assert joined(part(0, 0), part(0, 0)).eq(0).all(), "a row without tokens"
