"""What `kvsim calibrate decode` runs: models, policies, batches and contexts of a device, in an order that may end anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import torch

from kvsim.calibrate.decoder.capacity import largest_batch
from kvsim.calibrate.decoder.decoder import Decoder
from kvsim.calibrate.decoder.launching import default_attention
from kvsim.calibrate.decoder.memory import PeakMemory
from kvsim.calibrate.decoder.sample import sample_decode, sample_end, sample_prefill
from kvsim.calibrate.decoder.spec import spec_of
from kvsim.calibrate.decoder.storage import OutOfBlocks
from kvsim.calibrate.decoder.transformer import Transformer
from kvsim.calibrate.decoder.weights import random_weights
from kvsim.calibrate.device.op_json import op_from_json, op_to_json
from kvsim.calibrate.device.rows_file import OK, Row, RowFile
from kvsim.calibrate.rows import MeasuredRow
from kvsim.engines.torch_decoder import TorchDecoder
from kvsim.errors import InputError
from kvsim.model import Model
from kvsim.policies.base import CacheShape, Policy
from kvsim.policies.compose import CachePlan, Composition

STEP = "step"
"""Status of the row that ends a timed case: what the plain step took."""
NO_MEMORY, REFUSED = "out of memory", "refused"
FIT, DECODE = "largest batch", "decode step"
"""Kinds of cases; the first is also the status of its row."""
ROWS_VERSION = 5
"""Of what the rows of a case hold."""
FIT_STEPS = 8
"""Decoded by the largest batch: enough for a share of the sequences to take further blocks."""
END_REPEATS = 9
"""Of a prompt's end, which takes a few milliseconds."""
FOLDER = "decode"
"""Of the rows, inside the calibration's folder."""
ELEMENT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One configuration. prior_tokens None: a decode step of `batch` sequences of `tokens`; else a chunk of `tokens` after so many.
    batch 0: the compression of one prompt of `tokens`. pool_bytes: the largest batch of such prompts that so many hold.
    """

    model: str
    policy: str
    batch: int
    tokens: int
    prior_tokens: int | None = None
    pool_bytes: int | None = None

    @property
    def kind(self) -> str:
        if self.pool_bytes is not None:
            return FIT
        if not self.batch:
            return "prompt's end"
        return DECODE if self.prior_tokens is None else "prompt chunk"

    @property
    def key(self) -> str:
        if self.pool_bytes is not None:
            return f"{self.model}/{self.policy}/fit/{self.tokens}@{self.pool_bytes}"
        if not self.batch:
            return f"{self.model}/{self.policy}/end/{self.tokens}"
        if self.prior_tokens is None:
            return f"{self.model}/{self.policy}/decode/{self.batch}x{self.tokens}"
        return f"{self.model}/{self.policy}/prefill/{self.tokens}+{self.prior_tokens}"


@dataclass(frozen=True)
class Study:
    """models by name; cases are all combinations, but of `chunks` each policy has every `chunk_stride`-th, from another one on in each
    model: with at least so many models, every policy has every chunk.
    """

    models: Mapping[str, Model]
    policies: Mapping[str, Sequence[Policy]]
    batches: Sequence[int]
    contexts: Sequence[int]
    chunks: Sequence[int]
    priors: Sequence[int]
    weight_dtype: str = "fp32"
    block_size_tokens: int = 16
    pool_bytes: int = 2 * 2**30
    steps: int = 4
    attention: str | None = None
    """The backend of decode attention; None: the device's default."""
    prefills: bool = True
    """Whether the prompts of decode steps are computed, and timed; else their caches are filled with random numbers."""
    chunk_stride: int = 1
    fit_models: Sequence[str] = ()
    fit_contexts: Sequence[int] = ()
    fit_pool_bytes: int = 0
    """Of the pool that is filled to find the largest batch, whose sequences then decode FIT_STEPS steps."""

    def cases(self) -> list[Case]:
        """In an order that is random but always the same: wherever time ends, what was measured is spread over all."""
        found = [
            Case(model, policy, batch, tokens)
            for model in self.models for policy in self.policies for batch in self.batches for tokens in self.contexts
        ]  # fmt: skip
        found += [
            Case(model, policy, 1, tokens, prior)
            for row, model in enumerate(self.models) for column, policy in enumerate(self.policies)
            for tokens in self.chunks[(row + column) % self.chunk_stride :: self.chunk_stride] for prior in self.priors
        ]  # fmt: skip
        found += [
            Case(model, policy, 0, tokens)
            for model in self.models for policy, chosen in self.policies.items() if _compresses(chosen) for tokens in self.contexts
        ]  # fmt: skip
        found += [
            Case(model, policy, 0, tokens, pool_bytes=self.fit_pool_bytes)
            for model in self.models if model in self.fit_models for policy in self.policies for tokens in self.fit_contexts
        ]  # fmt: skip
        order = np.random.default_rng(0).permutation(len(found))
        return [found[index] for index in order]


def _compresses(policies: Sequence[Policy]) -> bool:
    """Whether something happens when a prefill ends. Codes are written as tokens come, and are part of their steps."""
    return any(policy.dimension in ("tokens", "channels") for policy in policies)


def make_plan(
    model: Model, policies: Sequence[Policy], weight_dtype: str, block_size_tokens: int, name: str, attention: str
) -> CachePlan:
    """attention: the backend that decodes attend with."""
    shape = CacheShape(
        model.num_layers, model.num_q_heads, model.num_kv_heads, model.head_dim, ELEMENT_BYTES[weight_dtype], block_size_tokens
    )
    composition = Composition(policies, f"policies.{name}")
    return CachePlan(composition, shape, weight_dtype, TorchDecoder(attention=attention).attention_layout(composition))


class Bench:
    """Decoders of a study, made when they are asked for; weights are shared by a model's, and one pool is there at a time."""

    def __init__(self, study: Study, device: torch.device) -> None:
        self.study, self.device = study, device
        self._transformers: dict[str, Transformer] = {}
        self._last: tuple[tuple[str, str, int], Decoder] | None = None

    def decoder(self, model: str, policy: str, pool_bytes: int | None = None) -> Decoder:
        """pool_bytes: None: the study's. Raises InputError for compositions that the decoder cannot hold."""
        study = self.study
        wanted = model, policy, study.pool_bytes if pool_bytes is None else pool_bytes
        if self._last is None or self._last[0] != wanted:
            self._last = None  # its pool makes room before the next is allocated
            attention = study.attention or default_attention(self.device)
            shape = study.models[model], study.policies[policy], study.weight_dtype, study.block_size_tokens
            plan = make_plan(*shape, policy, attention)
            self._last = wanted, Decoder(self._transformer(model), plan, wanted[2], attention=study.attention)
        return self._last[1]

    def _transformer(self, model: str) -> Transformer:
        if model not in self._transformers:
            spec = spec_of(self.study.models[model])
            weights = random_weights(spec, TORCH_DTYPES[self.study.weight_dtype], self.device)
            self._transformers[model] = Transformer(spec, weights)
        return self._transformers[model]

    def run(self, case: Case) -> list[Row]:
        """Rows of the case, the last of which ends it. Raises OutOfBlocks and torch's out-of-memory errors."""
        study, key = self.study, case.key
        decoder = self.decoder(case.model, case.policy, case.pool_bytes)
        if case.pool_bytes is not None:
            found = largest_batch(decoder, case.tokens, FIT_STEPS)
            return [{"key": key, "status": FIT, "batch": found.batch, "cache_bytes": found.held_bytes, "tries": found.tries}]
        peak, more = PeakMemory(self.device), {}
        if not case.batch:
            step_s, ops = sample_end(decoder, case.tokens, END_REPEATS)
        elif case.prior_tokens is None:
            sample = sample_decode(decoder, case.batch, case.tokens, study.steps, study.weight_dtype, study.prefills)
            step_s, ops = sample.step_s, sample.rows
            more = {
                "prefill_s": sample.prefill_s, "spread_frac": sample.spread_frac, "cache_bytes": sample.cache_bytes,
                "cache_peak_bytes": sample.cache_peak_bytes, "pool_bytes": decoder.allocated_bytes,
                "weight_bytes": decoder.transformer.weights.num_bytes, "launch": decoder.steps_note, **peak.read(),
            }  # fmt: skip
        else:
            step_s, ops = sample_prefill(decoder, case.tokens, case.prior_tokens, study.steps, study.weight_dtype)
        rows: list[Row] = [
            {"key": f"{key}#{number}", "status": OK, "work": "decoder", "op": op_to_json(op), "seconds": seconds}
            for number, (op, seconds) in enumerate(ops)
        ]  # fmt: skip
        return [*rows, {"key": key, "status": STEP, "seconds": step_s, **more}]


def measuring(study: Study, device: torch.device, file: RowFile) -> Iterator[tuple[int, int]]:
    """Runs the cases that the file lacks, one whenever the next item is asked for: (cases done, of so many).

    What does not fit into memory, or what the attention backend cannot do, is a row that says so.
    """
    bench, cases = Bench(study, device), study.cases()
    for done, case in enumerate(cases):
        if case.key in file.keys:
            continue
        yield done, len(cases)
        try:
            rows = bench.run(case)
        except (OutOfBlocks, torch.OutOfMemoryError) as error:
            rows = [{"key": case.key, "status": NO_MEMORY, "reason": str(error).splitlines()[0]}]
        except InputError as error:
            rows = [{"key": case.key, "status": REFUSED, "reason": str(error)}]
        for row in rows:
            file.add(row)
    yield len(cases), len(cases)


def measure(study: Study, device: torch.device, file: RowFile, budget_s: float, tell: Callable[[int, int], None]) -> None:
    """The same until the time is over.

    tell: told (cases done, of so many).
    """
    begin = monotonic()
    for done, total in measuring(study, device, file):
        tell(done, total)
        if monotonic() - begin > budget_s:
            return


def measured_rows(file: RowFile) -> list[MeasuredRow]:
    """Rows of cases that were finished; a case that was cut short and run again counts once."""
    finished = {row["key"] for row in file.rows if row["status"] == STEP}
    rows = {row["key"]: row for row in file.measured("decoder") if row["key"].rpartition("#")[0] in finished}
    return [MeasuredRow(op_from_json(row["op"]), row["seconds"], row["key"].replace("#", ":")) for row in rows.values()]


def step_times(file: RowFile) -> Iterator[tuple[str, float]]:
    """(case, seconds) of every plain step."""
    return ((row["key"], row["seconds"]) for row in file.rows if row["status"] == STEP)


def ended_cases(study: Study, file: RowFile) -> list[tuple[Case, Row]]:
    """Cases that were run, in the study's order of models, policies, contexts and batches, and the row that ended each."""
    rows = {row["key"]: row for row in file.rows if row["status"] in (STEP, FIT, NO_MEMORY, REFUSED)}
    models, policies = list(study.models), list(study.policies)
    found = [(case, rows[case.key]) for case in study.cases() if case.key in rows]
    return sorted(found, key=lambda one: (models.index(one[0].model), policies.index(one[0].policy), one[0].tokens, one[0].batch))


def open_rows(folder: Path, study: Study, device: torch.device) -> RowFile:
    """Rows of this study on this device, to be begun or gone on with. Raises InputError where the folder holds another's."""
    identity = {
        "rows_version": ROWS_VERSION, "device_type": device.type, "attention": study.attention or default_attention(device),
        "torch": torch.__version__, "weight_dtype": study.weight_dtype,
        "models": sorted(study.models), "block_size_tokens": study.block_size_tokens,
        "policies": {name: [policy.model_dump(mode="json") for policy in policies] for name, policies in study.policies.items()},
    }  # fmt: skip
    return RowFile(folder / FOLDER, identity)
