"""What each policy does to a real cache, from its own fields and its paper's rules (not from the plan it is compared with).

A rule acts on the layers of one sequence: after a prompt chunk (statistics), when the prefill ends, before a decode step's token
is appended (eviction) and after its attention (scores). `RULES` names the rule of every policy that acts on tokens or channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvsim.calibrate.decoder.rules.at_prompt_end import AdaKV, KVCompress, PyramidKV, SnapKV, ThinK
from kvsim.calibrate.decoder.rules.base import Rule
from kvsim.calibrate.decoder.rules.while_decoding import HeavyHitters, Keyformer, Scissorhands, Window
from kvsim.policies.base import Policy

__all__ = ["RULES", "Rule", "rule_of"]

RULES: dict[str, Callable[[Any], Rule]] = {
    "h2o": HeavyHitters,
    "keyformer": Keyformer,
    "window": Window,
    "streaming_llm": Window,
    "scissorhands": Scissorhands,
    "snapkv": SnapKV,
    "pyramid_kv": PyramidKV,
    "ada_kv": AdaKV,
    "kv_compress": KVCompress,
    "think": ThinK,
}
"""By the policy's kind. Policies of bits have no rule: they are a codec (`decoder.lanes`)."""


def rule_of(policy: Policy) -> Rule:
    """Raises ValueError for a policy of tokens or channels that no rule is written for."""
    kind = getattr(policy, "kind", "full")
    if policy.dimension in ("none", "bits"):
        return Rule(policy)
    if kind not in RULES:
        raise ValueError(f"policy={kind} must have a rule in kvsim.calibrate.decoder.rules; write one and list it in RULES")
    return RULES[kind](policy)
