"""What `kvsim calibrate decode` runs: models, policies, batches and contexts of a device, in an order that may end anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import torch

from kvsim.calibrate.decoder.decoder import Decoder
from kvsim.calibrate.decoder.sample import sample_decode, sample_end, sample_prefill
from kvsim.calibrate.decoder.spec import spec_of
from kvsim.calibrate.decoder.storage import OutOfBlocks
from kvsim.calibrate.decoder.transformer import Transformer
from kvsim.calibrate.decoder.weights import random_weights
from kvsim.calibrate.device.op_json import op_from_json, op_to_json
from kvsim.calibrate.device.rows_file import OK, Row, RowFile
from kvsim.calibrate.rows import MeasuredRow
from kvsim.model import Model
from kvsim.policies.base import CacheShape, Policy
from kvsim.policies.compose import CachePlan, Composition

STEP = "step"
"""Status of the row that ends a case: what the plain step took."""
END_REPEATS = 9
"""Of a prompt's end, which takes a few milliseconds."""
FOLDER = "decode"
"""Of the rows, inside the calibration's folder."""
ELEMENT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One configuration. prior_tokens None: a decode step of `batch` sequences of `tokens`; else a chunk of `tokens` after so many.
    batch 0: the compression of one prompt of `tokens`.
    """

    model: str
    policy: str
    batch: int
    tokens: int
    prior_tokens: int | None = None

    @property
    def key(self) -> str:
        if not self.batch:
            return f"{self.model}/{self.policy}/end/{self.tokens}"
        if self.prior_tokens is None:
            return f"{self.model}/{self.policy}/decode/{self.batch}x{self.tokens}"
        return f"{self.model}/{self.policy}/prefill/{self.tokens}+{self.prior_tokens}"


@dataclass(frozen=True)
class Study:
    """models by name; cases are all combinations."""

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

    def cases(self) -> list[Case]:
        """In an order that is random but always the same: wherever time ends, what was measured is spread over all."""
        found = [
            Case(model, policy, batch, tokens)
            for model in self.models for policy in self.policies for batch in self.batches for tokens in self.contexts
        ]  # fmt: skip
        found += [
            Case(model, policy, 1, tokens, prior)
            for model in self.models for policy in self.policies for tokens in self.chunks for prior in self.priors
        ]  # fmt: skip
        found += [
            Case(model, policy, 0, tokens)
            for model in self.models for policy, chosen in self.policies.items() if _compresses(chosen) for tokens in self.contexts
        ]  # fmt: skip
        order = np.random.default_rng(0).permutation(len(found))
        return [found[index] for index in order]


def _compresses(policies: Sequence[Policy]) -> bool:
    """Whether something happens when a prefill ends. Codes are written as tokens come, and are part of their steps."""
    return any(policy.dimension in ("tokens", "channels") for policy in policies)


def make_plan(model: Model, policies: Sequence[Policy], weight_dtype: str, block_size_tokens: int, name: str) -> CachePlan:
    shape = CacheShape(
        model.num_layers, model.num_q_heads, model.num_kv_heads, model.head_dim, ELEMENT_BYTES[weight_dtype], block_size_tokens
    )
    return CachePlan(Composition(policies, f"policies.{name}"), shape, weight_dtype)


class Bench:
    """Decoders of a study, made when they are asked for; weights are shared by a model's."""

    def __init__(self, study: Study, device: torch.device) -> None:
        self.study, self.device = study, device
        self._transformers: dict[str, Transformer] = {}
        self._decoders: dict[tuple[str, str], Decoder] = {}

    def decoder(self, model: str, policy: str) -> Decoder:
        """Raises InputError for compositions that the decoder cannot hold."""
        found = self._decoders.get((model, policy))
        if found is None:
            study = self.study
            if model not in self._transformers:
                spec = spec_of(study.models[model])
                self._transformers[model] = Transformer(spec, random_weights(spec, TORCH_DTYPES[study.weight_dtype], self.device))
            plan = make_plan(study.models[model], study.policies[policy], study.weight_dtype, study.block_size_tokens, policy)
            found = self._decoders[model, policy] = Decoder(self._transformers[model], plan, study.pool_bytes)
        return found

    def run(self, case: Case) -> tuple[float, list[Row]]:
        """(seconds of the plain step, rows). Raises OutOfBlocks and torch's out-of-memory errors."""
        decoder, dtype = self.decoder(case.model, case.policy), self.study.weight_dtype
        if not case.batch:
            step_s, found = sample_end(decoder, case.tokens, END_REPEATS)
        elif case.prior_tokens is None:
            sample = sample_decode(decoder, case.batch, case.tokens, self.study.steps, dtype)
            step_s, found = sample.step_s, sample.rows
        else:
            step_s, found = sample_prefill(decoder, case.tokens, case.prior_tokens, self.study.steps, dtype)
        rows = [
            {"key": f"{case.key}#{number}", "status": OK, "work": "decoder", "op": op_to_json(op), "seconds": seconds}
            for number, (op, seconds) in enumerate(found)
        ]  # fmt: skip
        return step_s, rows


def measure(study: Study, device: torch.device, file: RowFile, budget_s: float, tell: Callable[[int, int], None]) -> None:
    """Runs the cases that the file lacks until the time is over. What does not fit into memory is a row that says so.

    tell: told (cases done, of so many).
    """
    bench, begin, cases = Bench(study, device), monotonic(), study.cases()
    for done, case in enumerate(cases):
        tell(done, len(cases))
        if case.key in file.keys:
            continue
        if monotonic() - begin > budget_s:
            return
        try:
            step_s, rows = bench.run(case)
        except (OutOfBlocks, torch.OutOfMemoryError) as error:
            file.add({"key": case.key, "status": "out of memory", "reason": str(error).splitlines()[0]})
            continue
        for row in rows:
            file.add(row)
        file.add({"key": case.key, "status": STEP, "seconds": step_s})
    tell(len(cases), len(cases))


def measured_rows(file: RowFile) -> list[MeasuredRow]:
    """Rows of cases that were finished; a case that was cut short and run again counts once."""
    finished = {row["key"] for row in file.rows if row["status"] == STEP}
    rows = {row["key"]: row for row in file.measured("decoder") if row["key"].rpartition("#")[0] in finished}
    return [MeasuredRow(op_from_json(row["op"]), row["seconds"], row["key"].replace("#", ":")) for row in rows.values()]


def step_times(file: RowFile) -> Iterator[tuple[str, float]]:
    """(case, seconds) of every plain step."""
    return ((row["key"], row["seconds"]) for row in file.rows if row["status"] == STEP)


def open_rows(folder: Path, study: Study, device: torch.device) -> RowFile:
    """Rows of this study on this device, to be begun or gone on with. Raises InputError where the folder holds another's."""
    identity = {
        "device_type": device.type, "torch": torch.__version__, "weight_dtype": study.weight_dtype,
        "models": sorted(study.models), "block_size_tokens": study.block_size_tokens,
        "policies": {name: [policy.model_dump(mode="json") for policy in policies] for name, policies in study.policies.items()},
    }  # fmt: skip
    return RowFile(folder / FOLDER, identity)
