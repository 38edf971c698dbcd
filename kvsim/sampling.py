"""How tokens are chosen from logits: what requests ask for, and the Ops that samplers launch for it.

Greedy decoding reads the logits once or twice. Top-k and top-p look for a threshold in every row of the vocabulary, penalties count
the tokens of prompt and answer over it: at large batches and by a sort they take a tenth and more of a decode step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from kvsim.errors import InputError
from kvsim.frozen import Frozen
from kvsim.hardware import Gpu
from kvsim.ops import Elementwise, LogitFilter, Op

LOGIT_BYTES = 4
"""Logits are sampled in fp32."""

Passes = Sequence[float]
"""fp32 values that each kernel of a chain reads or writes per logit."""
TEMPERATURE: Passes = (2,)
"""Logits divided in place."""
DRAW: Passes = (4, 1, 3, 1)
"""A softmax over a row that fits no shared memory reads it three times; exponential noise, division by it, argmax (random_sample)."""
TOP_K_ALONE: Passes = (6, 1.25, 2.25)
"""`torch.topk` counts digits in four passes and gathers in two; then a mask and its use: what vLLM does without top-p."""
TRITON_ROWS = 8
"""Below, vLLM's Triton filter leaves the work to PyTorch (apply_top_k_top_p)."""


class Sampling(Frozen):
    """What requests ask of the sampler, under the names that APIs have for it. To time it matters which of these act, not how much.

    A temperature of 0 is greedy decoding.
    """

    temperature: float = Field(default=0.0, ge=0, description="0: greedy decoding")
    top_k: int | None = Field(default=None, gt=0, description="tokens that may be drawn")
    top_p: float = Field(default=1.0, gt=0, le=1, description="probability of the tokens that may be drawn")
    repetition_penalty: float = Field(default=1.0, gt=0, description="on tokens of the prompt and of the answer so far")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, description="on tokens of the answer so far")
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, description="on tokens of the answer so far, for each time")

    @field_validator("top_k", mode="before")
    @classmethod
    def _all_tokens(cls, value: object) -> object:
        """APIs write 0 or -1 for no top-k."""
        return None if value in (0, -1) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _filters_act(self) -> Sampling:
        if not self.temperature and self.filters:
            given = "top_k" if self.top_k is not None else "top_p"
            raise ValueError(f"must have temperature above 0 for {given} to act; try temperature: 0.7, or leave {given} out")
        return self

    @property
    def filters(self) -> str:
        """ "top_k", "top_p", "top_k_top_p", or "" where all tokens may be drawn."""
        return "_".join(name for name, acts in (("top_k", self.top_k is not None), ("top_p", self.top_p < 1)) if acts)

    @property
    def num_penalties(self) -> int:
        """Of the three, those that act."""
        return (self.repetition_penalty != 1) + (self.presence_penalty != 0) + (self.frequency_penalty != 0)

    @property
    def acts(self) -> bool:
        """Whether it is more than greedy decoding."""
        return self.temperature > 0 or self.num_penalties > 0


RequestedSampling = Annotated[Sampling, Field(
    description="what requests ask for: the client's parameters, or the model's generation_config, which the server takes where a client "
    "says nothing; left out: greedy decoding"
)]  # fmt: skip
"""The engines' field."""


def by_clients(sampling: Sampling, *names: str) -> str:
    """Parameters that are not their defaults, in words; names: of them, or all."""
    given = sampling.model_dump(exclude_defaults=True)
    return ", ".join(f"{name} {value:g}" for name, value in given.items() if not names or name in names)


def greedy_note(sampling: Sampling) -> tuple[str, ...]:
    """For reports, where nothing was asked for."""
    if sampling.acts:
        return ()
    return ("tokens are drawn greedily; servers draw by the model's generation_config unless clients say otherwise (engine.sampling)",)


def passes(kernels: Passes, rows: int, vocab_size: int, head_bytes: int = 0) -> Iterator[Op]:
    """Kernels that stream over `rows` rows of logits. head_bytes: of an element of the head's output, which the first one also reads."""
    logits = rows * vocab_size
    for num_values in kernels:
        yield Elementwise("sampler", round(logits * (head_bytes + num_values * LOGIT_BYTES)))
        head_bytes = 0


def backend_on(gpu: Gpu, chosen: str, others: Sequence[str], *, is_said: bool) -> str:
    """The library of the filters on this GPU: FlashInfer, where nobody says it (is_said), gives way to the first of others on another
    vendor's, and InputError where somebody does."""
    if chosen != "flashinfer" or gpu.compute_capability is not None:
        return chosen
    if is_said:
        raise InputError("engine.sampling_backend", chosen, f"must be {' or '.join(others)} on {gpu.name}", "FlashInfer is for CUDA")
    return others[0]


def sampler_ops(
    sampling: Sampling, library: str, greedy: Passes, penalties: Passes, rows: int, vocab_size: int, head_bytes: int
) -> Iterator[Op]:  # fmt: skip
    """A sampler in the order of vLLM's (vllm/v1/sample/sampler.py): fp32, penalties, temperature, filters, draw.

    library: of the filters, see `kvsim.ops.LogitFilter`. greedy: of greedy decoding, the first of which casts. penalties: of those that
    act. The host's part of them is not priced: vLLM makes a tensor of all answers so far in every step.
    """
    if not sampling.temperature:
        cast, *rest = greedy
        yield from passes((cast, *penalties, *rest), rows, vocab_size, head_bytes)
        return
    yield from passes((1, *penalties, *TEMPERATURE), rows, vocab_size, head_bytes)
    filters = sampling.filters
    if sampling.top_k is not None and sampling.top_k >= vocab_size:
        filters = filters.removeprefix("top_k").removeprefix("_")
    library = "pytorch" if library == "triton" and rows < TRITON_ROWS else library
    if library == "pytorch" and filters == "top_k":
        yield from passes(TOP_K_ALONE, rows, vocab_size)
    elif filters:
        yield LogitFilter(library, filters, rows, vocab_size)
        if library == "flashinfer":  # its kernel draws too
            return
    yield from passes(DRAW, rows, vocab_size)
