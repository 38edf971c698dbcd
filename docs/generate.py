"""Writes docs/policies.md, docs/scenarios.md and the policies table of README.md from the code: `python docs/generate.py`.

With --check it writes nothing and exits with 1 where a file is out of date (tests/test_docs.py does the same).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel

from kvsim.engines import ENGINES
from kvsim.engines.base import Engine
from kvsim.metrics import SLO_METRICS, SLO_STATISTICS
from kvsim.policies import POLICIES
from kvsim.policies.base import Policy
from kvsim.reports.catalogue import EXAMPLE_PROMPT_TOKENS
from kvsim.routers import ROUTERS
from kvsim.sampling import Sampling
from kvsim.scenario import ReplicaGroup, Scenario
from kvsim.scenario_errors import models_in
from kvsim.schema import field_rows, first_sentence, kind_of
from kvsim.starter import flow_yaml, policy_blocks
from kvsim.traces import TraceConfig
from kvsim.workload import WorkloadConfig

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- policies: made by docs/generate.py -->", "<!-- end of policies -->"
NEEDS = {
    "nothing": "nothing",
    "window_queries": "the queries at the end of the prompt",
    "prompt_queries": "all queries of the prompt",
    "decode_probabilities": "attention probabilities in every step",
}


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def fields_table(model: type[BaseModel], base: type[BaseModel] | None = None) -> str:
    rows = [(f"`{r.name}`", r.unit, r.allowed, r.default, r.meaning) for r in field_rows(model, base)]
    return table(("field", "unit", "allowed", "default", "meaning"), rows) if rows else "No fields of its own.\n"


def prose(model: type) -> str:
    return re.sub(r"(?<!`)``(?!`)", "`", inspect.getdoc(model) or "")


# -- policies --------------------------------------------------------------------------------------------------------


def readme_policies() -> str:
    rows = []
    for policy in POLICIES:
        blocks = policy_blocks(kind_of(policy), EXAMPLE_PROMPT_TOKENS, 16)
        rows.append((f"`{kind_of(policy)}`", acts_on(policy), first_sentence(policy), f"`{flow_yaml(blocks)}`"))
    return table(("kind", "acts on", "what stays", "for example"), rows)


def acts_on(policy: type[Policy]) -> str:
    return "nothing" if policy.dimension == "none" else policy.dimension


def policies_page() -> Iterator[str]:
    yield """# Policies

Made by `docs/generate.py` from `kvsim/policies/`; do not edit by hand. A scenario's policy is a list of blocks: `[]` leaves
the cache whole, and blocks compose by what they act on, at most one each for tokens, channels and bits, such as
`[{kind: snapkv, budget_tokens: 1024}, {kind: think, pruned_frac: 0.4}]`. kvsim counts what a policy keeps, launches and
stores; what it does to the quality of answers is not simulated.
"""
    yield table(
        ("kind", "acts on", "needs from attention", "own length in every head", "shares blocks of a prefix cache"),
        ((f"[`{kind_of(p)}`](#{kind_of(p)})", acts_on(p), NEEDS[p.needs], "yes" if p.per_head_lengths else "",
          "yes" if p.blocks_shareable else "") for p in POLICIES),
    )  # fmt: skip
    for policy in POLICIES:
        module = inspect.getmodule(policy)
        title = " ".join((module.__doc__ or "").split()).rstrip(".") if module else ""
        yield f"## {kind_of(policy)}\n\n{title}.\n\n{prose(policy)}\n"
        yield fields_table(policy)


# -- scenarios -------------------------------------------------------------------------------------------------------


def scenarios_page() -> Iterator[str]:
    yield """# Scenarios

Made by `docs/generate.py` from the code; do not edit by hand. A scenario is a YAML file; `scenarios/a100_llama8b.yaml` is a
complete one. Units are in the names of the fields: seconds, GiB, tokens, shares from 0 to 1. Unknown keys are refused, paths
start from the scenario's folder, and `kvsim run --set workload.seed=1` overrides any field. A whole number without an upper
bound below may be up to 2,147,483,647. "none" as a default: the field is left out.

Editors that speak YAML (VS Code with the YAML extension, Neovim, Helix, JetBrains) complete, explain and check all of this: save the
JSON Schema with `kvsim schema > kvsim.schema.json` and make the scenario's first line

```yaml
# yaml-language-server: $schema=kvsim.schema.json
```
"""
    yield "## The file\n"
    yield fields_table(Scenario)
    metrics, statistics = ", ".join(SLO_METRICS), ", ".join(SLO_STATISTICS)
    yield f"`slo` limits are `METRIC_STATISTIC_s`, seconds: metrics {metrics}; statistics {statistics}.\n"
    yield "`policies` is described in [policies.md](policies.md).\n"
    yield "## engine: every kind\n"
    yield fields_table(Engine)
    for engine in ENGINES:
        yield f"## engine: {{kind: {kind_of(engine)}}}\n\n{prose(engine)} Where a shared field is here too, its default differs.\n"
        yield fields_table(engine, Engine)
    yield "## engine.sampling\n"
    yield f"Of `vllm_v1` and `sglang`. `vllm_v0` draws at a temperature without filters, the others decode greedily. {prose(Sampling)}\n"
    yield fields_table(Sampling)
    yield """## Several replicas

`replicas: 4` puts four engines as above behind a router; `fleet` does the same with groups of unlike ones, each a list item such
as `{replicas: 2, gpu: h100-sxm-80gb, weight: 2}`. The traffic is that of all of them together. Outstanding tokens are prompt
tokens and tokens generated so far of all requests sent to a replica and not yet answered; replicas that tie take turns.

"""
    for router in ROUTERS:
        yield f"### router: {{kind: {kind_of(router)}}}\n\n{prose(router)}\n"
        yield fields_table(router)
    yield f"### fleet: an item\n\n{prose(ReplicaGroup)}\n"
    yield fields_table(ReplicaGroup)
    yield f"## workload\n\n{prose(WorkloadConfig)}\n"
    yield fields_table(WorkloadConfig)
    for name in ("arrivals", "lengths"):
        for model in models_in(WorkloadConfig.model_fields[name].annotation):
            yield f"### workload.{name}: {{kind: {kind_of(model)}}}\n\n{prose(model)}\n"
            yield fields_table(model)
    yield f"### workload.trace\n\n{prose(TraceConfig)}\n"
    yield fields_table(TraceConfig)


# -- files -----------------------------------------------------------------------------------------------------------


def pages() -> dict[Path, str]:
    """Path → text of every generated file."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return {
        ROOT / "docs" / "policies.md": "\n".join(policies_page()),
        ROOT / "docs" / "scenarios.md": "\n".join(scenarios_page()),
        ROOT / "README.md": f"{head}{BEGIN}\n{readme_policies()}{END}{tail}",
    }


def main() -> int:
    stale = {path: text for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        print(f"{'out of date' if '--check' in sys.argv else 'written'}: {path.relative_to(ROOT)}")
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
