"""What the simulator says about the steps that `sample.py` runs: the same state, through the cost model."""

from __future__ import annotations

from kvsim.batch import Sequence, decode_batch
from kvsim.calibrate.decoder.sample import packed
from kvsim.cost import StepCosts
from kvsim.cost_types import Chunk
from kvsim.engines.torch_decoder import TorchDecoder
from kvsim.model import Model
from kvsim.policies.compose import CachePlan
from kvsim.profile import Profile
from kvsim.requests import Request
from kvsim.units import PS_PER_S

_POOL_SLOTS = 1 << 32
"""More than any state here reads: no curve ends before it."""


class Predictor:
    """Steps of one model under one plan, as a profile answers them."""

    def __init__(
        self, model: Model, plan: CachePlan, profile: Profile, weight_dtype: str = "fp32", engine: TorchDecoder | None = None
    ) -> None:  # fmt: skip
        self.plan = plan
        self.costs = StepCosts(model, 1, weight_dtype, engine or TorchDecoder(), plan, profile, _POOL_SLOTS)

    def decode_s(self, batch: int, context_tokens: int, first_step: int = 2, steps: int = 10) -> float:
        """Mean seconds of these decode steps of equal sequences whose prompts had `context_tokens`."""
        total = 0
        for step in range(first_step, first_step + steps):
            state = decode_batch(self.plan)
            for index in range(batch):
                sequence = Sequence(Request(index, 0, context_tokens, steps + first_step + 1))
                sequence.generated = step
                state.join(sequence, step - 1)
            total += self.costs.decode_step(state)
        return total / steps / PS_PER_S

    def end_s(self, prompt_tokens: int) -> float:
        """The compression of a prompt."""
        return self.costs.compression[prompt_tokens, prompt_tokens].total_ps / PS_PER_S

    def prefill_s(self, new_tokens: int, prior_tokens: int) -> float:
        """A chunk in the middle of a prompt: nobody gets a token."""
        return self.costs.prefill_step(None, [Chunk(new_tokens, prior_tokens)], 0, []) / PS_PER_S

    def prompts_s(self, batch: int, prompt_tokens: int) -> float:
        """The prefill of so many prompts, in the steps that `sample.prefill_all` runs."""
        total = 0
        for step in packed(batch, prompt_tokens):
            ended = [(prompt_tokens, prompt_tokens) for _, new, prior in step if prior + new == prompt_tokens]
            total += self.costs.prefill_step(None, [Chunk(new, prior) for _, new, prior in step], len(ended), ended)
        return total / PS_PER_S

    def cache_bytes(self, batch: int, prompt_tokens: int, step: int) -> int:
        """What equal sequences hold of the pool after their decode step `step`."""
        return batch * self._held_units(prompt_tokens, step) * self.plan.unit_bytes

    def largest_batch(self, pool_bytes: int, prompt_tokens: int, steps: int) -> int:
        """Sequences that the simulator's pool admits one after the other, the last still uncompressed, and carries for `steps`."""
        units = pool_bytes // self.plan.unit_bytes
        first = self.plan.segment(prompt_tokens, prompt_tokens, 1).held_units
        admitted = (units - self.plan.prefill_units(prompt_tokens)) // first + 1
        most = max(self._held_units(prompt_tokens, step) for step in range(1, steps + 1))
        return max(0, min(admitted, units // most))

    def _held_units(self, prompt_tokens: int, step: int) -> int:
        segment = self.plan.segment(prompt_tokens, prompt_tokens, step)
        return self.plan.lane_held(segment.tokens, segment.d_tokens, 1)
