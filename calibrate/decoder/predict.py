"""What the simulator says about the steps that `sample.py` runs: the same state, through the cost model."""

from __future__ import annotations

from kvsim.batch import Sequence, decode_batch
from kvsim.cost import StepCosts
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

    def __init__(self, model: Model, plan: CachePlan, profile: Profile, weight_dtype: str = "fp32") -> None:
        self.plan = plan
        self.costs = StepCosts(model, 1, weight_dtype, TorchDecoder(), plan, profile, _POOL_SLOTS)

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
        return self.costs.compression[prompt_tokens, prompt_tokens].total_ps / PS_PER_S  # type: ignore[no-any-return]

    def prefill_s(self, new_tokens: int, prior_tokens: int) -> float:
        """A chunk in the middle of a prompt: nobody gets a token."""
        return self.costs.prefill_step(None, [(new_tokens, prior_tokens)], 0, []) / PS_PER_S  # type: ignore[list-item]
