"""Keyformer's table 1: MPT-7B on an A100-80GB under Hugging Face generate, beam 4, eager; the reference code's schedule."""

from __future__ import annotations

from typing import Any

from kvsim.validation.cases import Bar, Case, Row, Truth
from kvsim.validation.loads import at_once, fixed
from kvsim.validation.naive import BYTES, ROOFLINE, byte_ratio, roofline

NAME = "published"
GROUP = "Keyformer table 1"
SOURCE = "Keyformer (MLSys 2024), table 1"
POLICIES: dict[str, list[dict[str, Any]]] = {
    "full": [],
    "H2O 90 %": [{"kind": "h2o", "kept_frac": 0.9}],
    "Keyformer 50 %": [{"kind": "keyformer", "kept_frac": 0.5, "schedule": "code"}],
}
KEPT_FRAC = {"H2O 90 %": 0.9, "Keyformer 50 %": 0.5}
BEAMS = 4
TABLE = {
    (1024, 1): {"full": 24.9, "H2O 90 %": 27.8, "Keyformer 50 %": 32.0},
    (2048, 1): {"full": 15.0, "H2O 90 %": 20.5, "Keyformer 50 %": 24.3},
    (4096, 1): {"full": 8.3, "H2O 90 %": 14.1, "Keyformer 50 %": 17.0},
    (4096, 2): {"Keyformer 50 %": 19.85},
}
"""(prompt and output tokens, batch) → tokens a second."""


def cases() -> list[Case]:
    found = []
    for (tokens, batch), by_policy in TABLE.items():
        for policy, rate in by_policy.items():
            scenario = {
                "gpu": "a100-sxm-80gb", "model": "mpt-7b-storywriter", "weight_dtype": "fp16", "policies": {"p": POLICIES[policy]},
                "engine": {
                    "kind": "huggingface", "batch_size": batch, "num_beams": BEAMS, "gpu_memory_utilization": 1.0,
                    "attn_implementation": "eager",
                },
                "workload": at_once(batch, fixed(tokens, tokens)),
            }  # fmt: skip
            name = f"{policy} {tokens}+{tokens} batch {batch}"
            full_tokens = tokens + tokens / 2
            kept = KEPT_FRAC[policy] * tokens if policy in KEPT_FRAC else full_tokens
            reads = roofline("a100-sxm-80gb", "mpt-7b-storywriter", 1, "fp16", BEAMS * batch, tokens, tokens, kept)
            naive = {ROOFLINE: {"output_tok_s": reads["output_tok_s"] / BEAMS}}
            if policy in KEPT_FRAC and "full" in by_policy:
                naive[BYTES] = byte_ratio("output_tok_s", by_policy["full"], full_tokens, kept)
            found.append(Case(NAME, GROUP, name, scenario, (Truth("output_tok_s", rate),), SOURCE, naive))
    return found


def bars(rows: list[Row]) -> list[Bar]:
    """Speed-ups over full at each length."""
    mine = {row.case: row for row in rows if row.group == GROUP}
    found = []
    for tokens in (1024, 2048, 4096):
        full = mine[f"full {tokens}+{tokens} batch 1"]
        for policy in ("H2O 90 %", "Keyformer 50 %"):
            row = mine[f"{policy} {tokens}+{tokens} batch 1"]
            published, simulated = row.truth / full.truth, row.predicted / full.predicted
            text = f"Keyformer table 1: speed-up of {policy} at {tokens}, {published:.2f}x published, {simulated:.2f}x simulated"
            found.append(Bar(NAME, text, abs(simulated / published - 1), 0.12))
    return found
