"""Decode steps that are recorded and replayed: on a GPU CUDA graphs, here a tape of torch's operations and kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the decoder needs torch")
pytest.importorskip("triton", reason="one of the backends is made of Triton kernels")

from test_decoder import POOL_BYTES, STEADY, TINY, UNEVEN, plan_of, tokens, transformer  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402

from kvsim.calibrate.decoder import decoder as decoder_module  # noqa: E402
from kvsim.calibrate.decoder.clock import NoClock, OpClock  # noqa: E402
from kvsim.calibrate.decoder.decoder import Decoder  # noqa: E402
from kvsim.calibrate.decoder.graphs import capture, plainly, recorder_for  # noqa: E402
from kvsim.calibrate.decoder.launching import engine_sizes, steps_note  # noqa: E402
from kvsim.calibrate.decoder.sequence import CachedSequence  # noqa: E402
from kvsim.engines.torch_decoder import NOT_CAPTURED, TorchDecoder  # noqa: E402
from kvsim.kernels import checks, decode_attention, decode_attention_scored, kv_quant_decode_attention, splits  # noqa: E402
from kvsim.kernels import think_decode_attention as think  # noqa: E402
from kvsim.policies.base import Policy  # noqa: E402

POLICIES = STEADY | UNEVEN
SIZES = (1, 2, 4)
SHALLOW = replace(TINY, num_layers=2)
CAPTURED = ("full", "h2o", "int4", "snapkv + think", "kv_compress")
ALSO_CAPTURED = ("scissorhands", "ada_kv", "snapkv", "pyramid_kv", "window", "fp8", "think", "int8 by token")
SYNCING = {"_local_scalar_dense", "nonzero", "equal"}
"""Operations that wait for a device: a CUDA graph refuses them."""


class Tape(TorchDispatchMode):
    """What a CUDA graph keeps of a step: operations on the tensors that were there, and nothing of what the host decided.

    Replaying runs every operation again on the same tensors and puts what it gives where it was put before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        assert name not in SYNCING, f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            schema = getattr(func, "_schema", None)
            if schema is None:  # a kernel launch
                func(*args, **kwargs)
                continue
            given = {one.untyped_storage().data_ptr() for one in _tensors([*args, *kwargs.values()])}
            new = func(*args, **kwargs)
            for old, value in zip(_tensors(out), _tensors(new), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # a view is still one, and what was written in place is written
                    old.copy_(value)


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in lists, however deep."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [one for part in value for one in _tensors(part)] if isinstance(value, list | tuple) else []


@pytest.fixture
def on_tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tape]]:
    """Steps are recorded on tapes, which are returned."""
    tapes: list[Tape] = []
    running: list[Tape] = []
    real = splits.launch

    def launch(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():  # the interpreter computes with torch, a GPU does not
            real(*args, **kwargs)
        if running:
            running[-1].calls.append((real, args, kwargs, None))

    def record(step: Callable[[], None]) -> Callable[[], None]:
        step()  # as a capture warms up
        tape = Tape()
        running.append(tape)
        with tape:
            step()
        running.pop()
        tapes.append(tape)
        return tape.replay

    for module in (splits, decode_attention, decode_attention_scored, kv_quant_decode_attention, think):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(checks, "lengths", lambda value, most: None)  # which looks at values on a CPU alone
    monkeypatch.setattr(decoder_module, "recorder_for", lambda device: record)
    yield tapes


def make(policies: list[Policy], backend: str, sizes: tuple[int, ...] = ()) -> Decoder:
    return Decoder(transformer(SHALLOW), plan_of(policies, SHALLOW), POOL_BYTES, torch.float16, attention=backend, capture_sizes=sizes)


def drive(decoder: Decoder, short: bool = False) -> Iterator[torch.Tensor]:
    """Batches of 1, 2, 3, 5 (too many to replay), 2 and 3, prompts joining in steps of their own and beside decodes.

    short: of 1, 3 and 2.
    """
    running: list[CachedSequence] = []

    def join(number: int, beside: bool) -> None:
        sequence = decoder.open(number, max_steps=30)
        decoder.step([(sequence, tokens(number, number))], [(one, 3) for one in running] if beside else [])
        running.append(sequence)

    def decode(steps: int) -> Iterator[torch.Tensor]:
        for step in range(steps):
            yield decoder.step([], [(one, 5 + step + place) for place, one in enumerate(running)])

    join(20, False)
    if short:
        yield from decode(1)
        join(75, False), join(41, True)
        yield from decode(2)
        decoder.close(running.pop(0))
        yield from decode(2)
        return
    yield from decode(2)
    join(75, False)
    yield from decode(2)
    join(41, True)
    yield from decode(3)
    join(33, False), join(62, False)
    yield from decode(1)
    for place in (3, 0, 0):
        decoder.close(running.pop(place))
    yield from decode(2)
    join(50, True)
    yield from decode(2)


@pytest.mark.parametrize("name", ["full", "h2o", "int4", "snapkv + think", "ada_kv", "kv_compress", "scissorhands"])
def test_static_steps_are_plain_steps(name: str) -> None:
    """In torch, padded, in rows that come and go: the logits of the plain path, to the last digits."""
    plain, static = make(POLICIES[name], "torch"), make(POLICIES[name], "torch", SIZES)
    assert plain.recorded is None and static.recorded is not None
    for number, (ours, theirs) in enumerate(zip(drive(static), drive(plain), strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda text, number=number: f"step {number}: {text}")
    assert set(static.recorded._recorded) <= set(SIZES)


@pytest.mark.parametrize("name", [*CAPTURED, *(pytest.param(name, marks=pytest.mark.slow) for name in ALSO_CAPTURED)])
def test_a_tape_replays_what_is_staged(name: str, on_tape: list[Tape]) -> None:
    """Recorded over padding alone, with the kernels; whatever the host decided while recording must not matter in a replay."""
    plain, static = make(POLICIES[name], "triton"), make(POLICIES[name], "triton", SIZES)
    for number, (ours, theirs) in enumerate(zip(drive(static, True), drive(plain, True), strict=True)):
        assert torch.equal(ours, theirs) or (ours - theirs).abs().max() < 1e-2 * theirs.std(), (name, number)
    assert len(on_tape) >= len(SIZES)
    assert any(getattr(func, "_schema", None) is None for func, *_ in on_tape[0].calls), "no kernel was launched"


def test_a_tape_of_torchs_attention_is_stale(on_tape: list[Tape]) -> None:
    """The tape tells: torch's attention follows from the host's lists, so a replay of it is wrong, or waits for the device."""
    plain, static = make([], "torch"), make([], "torch", SIZES)
    with pytest.raises(AssertionError):
        for ours, theirs in zip(drive(static), drive(plain), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["full", "h2o", "int4", "snapkv + think"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_padding_writes_nothing_into_the_pool(name: str, backend: str) -> None:
    """A replay of three sequences in four rows changes their three slots of each head and layer, and the spare block."""
    decoder = make(POLICIES[name], backend, (4,))
    sequences = [decoder.open(number, max_steps=30) for number in (20, 40, 33)]
    for sequence in sequences:
        decoder.step([(sequence, tokens(sequence.shape.prompt_tokens))], [])
    decoder.step([], [(one, 2) for one in sequences])
    lanes = [lane for lane in (decoder.full, decoder.pruned) if lane is not None]
    before = [[tensor.clone() for codec in (lane.keys, lane.values) for tensor in codec.tensors] for lane in lanes]
    decoder.step([], [(one, 2) for one in sequences])
    assert decoder.recorded is not None and list(decoder.recorded._recorded) == [4]
    places = (part[:, :3].flatten().tolist() for part in (decoder.batch.write_blocks, decoder.batch.write_offsets))
    own = set(zip(*places, strict=True))
    assert len(own) == 2 * 3 * 2, "layers, sequences and heads have slots of their own"
    assert (decoder.batch.write_blocks[:, 3] == decoder.full.spare).all() and (decoder.batch.lengths[:, 3] == 0).all()
    for lane, old in zip(lanes, before, strict=True):
        for tensor, was in zip((t for codec in (lane.keys, lane.values) for t in codec.tensors), old, strict=True):
            changed = (tensor.view(torch.uint8) != was.view(torch.uint8)).flatten(2).any(2).nonzero().tolist()
            allowed = own if lane is decoder.full else set()
            assert all((block, offset) in allowed or block == lane.spare for block, offset in changed)


def test_the_spare_block_is_never_given_out() -> None:
    decoder = make([], "torch")
    taken = decoder.full.take(decoder.full.num_blocks)
    assert decoder.full.spare not in taken and not decoder.full.free


def test_what_outgrows_the_tables_is_recorded_again() -> None:
    decoder = make([], "torch", SIZES)
    short, long = decoder.open(10, max_steps=40), decoder.open(200, max_steps=40)
    decoder.step([(short, tokens(10))], [])
    decoder.step([], [(short, 1)])
    first = decoder.recorded._recorded[1]  # type: ignore[union-attr]
    decoder.step([], [(short, 1)])
    assert decoder.recorded._recorded[1] is first  # type: ignore[union-attr]
    decoder.step([(long, tokens(200))], [])
    decoder.step([], [(short, 1), (long, 1)])
    assert set(decoder.recorded._recorded) == {2}, "tables have moved, so what was recorded is void"  # type: ignore[union-attr]


# -- what is declared -------------------------------------------------------------------------------------------------


def test_sizes_and_policies_are_the_engines() -> None:
    """On a GPU a decoder records the sizes that the engine prices, under the policies for which it prices graphs."""
    engine = TorchDecoder(attention="triton")
    for name, policies in POLICIES.items():
        plan = plan_of(policies)
        decoder = Decoder(transformer(), plan, POOL_BYTES, torch.float16, attention="torch", capture_sizes=SIZES)
        captured = not engine.why_eager(plan)
        assert (decoder.recorded is not None) == captured, name
        assert (engine.for_plan(plan).captured_tokens > 0) == captured
        assert not Decoder(transformer(), plan, POOL_BYTES, torch.float16).recorded, "a CPU records nothing of itself"
        if name in CAPTURED + ALSO_CAPTURED:
            assert captured
        for device, attention in (("cuda", "triton"), ("cuda", "torch"), ("cpu", "triton")):
            recorded = captured and (device, attention) == ("cuda", "triton")
            assert engine_sizes(attention, plan, torch.device(device)) == (engine.capture_sizes if recorded else ()), name
    assert engine.capture_sizes
    assert recorder_for(torch.device("cuda")) is capture and recorder_for(torch.device("cpu")) is plainly
    assert {"keyformer", "kivi"} <= NOT_CAPTURED.keys()


def test_how_steps_are_launched_is_said() -> None:
    assert make([], "torch").steps_note == "torch, eager: no graphs on a CPU"
    assert make(STEADY["kivi2"], "triton", SIZES).steps_note.startswith("triton, eager: kivi: its rings")
    assert make([], "triton", SIZES).steps_note == "triton, recorded steps"
    gpu, full = torch.device("cuda"), plan_of([])
    assert steps_note("triton", full, gpu, True) == "triton, CUDA graphs"
    assert steps_note("torch", full, gpu, False) == "torch, eager: attention=torch groups caches on the host"
    assert "temperature changes" in steps_note("triton", plan_of(STEADY["keyformer"]), gpu, False)


def test_marked_steps_are_launched_one_by_one() -> None:
    decoder = make([], "torch", SIZES)
    sequence = decoder.open(10, max_steps=9)
    decoder.step([(sequence, tokens(10))], [])
    clock = decoder.transformer.clock = OpClock(torch.device("cpu"))
    clock.start()
    decoder.step([], [(sequence, 1)])
    assert not decoder.recorded._recorded and "attention" in clock.seconds  # type: ignore[union-attr]
    decoder.transformer.clock = NoClock()
    decoder.step([], [(sequence, 1)])
    assert decoder.recorded._recorded  # type: ignore[union-attr]
