"""What a scenario resolves to before anything is simulated: traffic, KV bytes and blocks by policy, GPU memory by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from kvsim.api import build_ledger, build_plan, deploy
from kvsim.errors import DoesNotFitError
from kvsim.reports.console import print_parts
from kvsim.reports.formats import number
from kvsim.reports.tables import ledger_differences, ledger_table, plain_table
from kvsim.scenario import Scenario
from kvsim.units import GB, format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

EXAMPLE_PROMPT_TOKENS = (1024, 8192)


def print_resolved(scenario: Scenario, file: TextIO | None = None) -> None:
    """Raises InputError for contradictions, DoesNotFitError where no policy fits."""
    print_parts(list(resolved(scenario)), sys.stdout if file is None else file)


def resolved(scenario: Scenario) -> Iterator[RenderableType]:
    from rich.text import Text

    deployment = deploy(scenario)
    model, gpu, tp = deployment.model, deployment.gpu, deployment.tp
    plans = {name: build_plan(deployment, policies, f"policies.{name}") for name, policies in scenario.policies.items()}
    kv_dtype = next(iter(plans.values())).kv_dtype
    facts = [
        ("gpu", f"{tp} x {gpu.name}: {format_bytes(gpu.usable_bytes)} at {gpu.hbm_bandwidth_bytes_per_s / GB:,.0f} GB/s each"),
        ("model", f"{model.name}, {model.num_params / 1e9:.2f} B parameters, {scenario.weight_dtype}"),
        ("context", f"{deployment.max_tokens:,} tokens of prompt and answer at most"),
        ("KV", f"{format_bytes(model.kv_bytes_per_token(kv_dtype, tp))} a token and GPU, uncompressed ({kv_dtype})"),
        ("engine", f"{deployment.engine.kind}, blocks of {deployment.engine.block_tokens} tokens"),  # type: ignore[attr-defined]
        ("workload", scenario.workload.describe()),
        ("profile", scenario.profile),
    ]
    yield Text(scenario.name or f"{model.name} on {gpu.name}", style="bold")
    width = max(len(name) for name, _ in facts) + 2
    for name, text in facts:
        yield Text(f"{name:<{width}}{text}")
    rows, ledgers, refused = [], {}, None
    for name, plan in plans.items():
        try:
            ledgers[name] = ledger = build_ledger(deployment, plan)
        except DoesNotFitError as error:
            refused = error
            rows.append((name, plan.composition.describe(), *["does not fit"] * (2 + len(EXAMPLE_PROMPT_TOKENS))))
            continue
        blocks = ledger.pool_units // plan.prefill_units_per_block
        kept = [format_bytes(plan.kv_bytes(tokens, 1)) for tokens in EXAMPLE_PROMPT_TOKENS]
        rows.append((name, plan.composition.describe(), format_bytes(ledger.pool_bytes), f"{blocks:,}", *kept))
    if refused and not ledgers:
        raise refused
    heads = [f"KV read in step 1\nof {number(tokens)}" for tokens in EXAMPLE_PROMPT_TOKENS]
    yield plain_table("Cache, per GPU", ("policy", "", "KV pool", "blocks", *heads), rows, right=True)
    first = next(iter(ledgers))
    yield ledger_table(first, ledgers[first].lines)
    if len(ledgers) > 1:
        yield from ledger_differences({name: ledger.lines for name, ledger in ledgers.items()}, first)
    if refused:
        yield Text(f"\n{refused}", style="yellow")
