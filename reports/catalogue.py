"""`kvsim list`: GPUs, models, policies and engines to choose from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TextIO

from kvsim.reports.console import print_parts
from kvsim.reports.tables import plain_table
from kvsim.schema import field_rows, first_sentence, kind_of

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import RenderableType

    from kvsim.hardware import Gpu
    from kvsim.profile_file import TableData


EXAMPLE_PROMPT_TOKENS = 2048
"""Budgets of examples are half of it."""


def print_catalogue(what: str, file: TextIO | None = None) -> None:
    """what: a key of TABLES."""
    print_parts(TABLES[what](), sys.stdout if file is None else file)


def gpus() -> Iterator[RenderableType]:
    from rich.text import Text

    from kvsim.hardware import list_gpus, load_gpu
    from kvsim.profile_file import shipped
    from kvsim.profiles import engine_of

    measured: dict[str, list[str]] = {}
    for path in shipped().values():
        measured.setdefault(path.parent.name, []).append(engine_of(path))
    found = [(name, load_gpu(name)) for name in list_gpus()]
    rows = [
        (name, f"{g.hbm_bytes / 2**30:,.0f}", f"{g.hbm_bandwidth_bytes_per_s / 1e9:,.0f}",
         f"{g.peak_flops('bf16') / 1e12:,.0f}{_held(g)}", f"{g.gpu_link_bytes_per_s / 1e9:,.0f}" if g.has_gpu_link else "-",
         ", ".join(sorted(measured.get(name, []))) or "-")
        for name, g in found
    ]  # fmt: skip
    heads = ("gpu", "memory\nGiB", "HBM\nGB/s", "bf16 dense\nTFLOP/s", "GPU link\nGB/s", "measured under")
    yield plain_table("GPUs", heads, rows)
    yield Text("Where nothing was measured, times are carried over from the other GPUs by datasheet, with wider bands.")
    yield Text("In brackets: what large products were measured to hold (sustained_tflops), where that is what counts.")


def _held(gpu: Gpu) -> str:
    from kvsim.datasheet import sustained_rate

    held = sustained_rate(gpu, "bf16")
    return "" if held is None else f" ({held / 1e12:,.0f})"


def models() -> Iterator[RenderableType]:
    from kvsim.model import list_models, load_model

    found = [(name, load_model(name)) for name in list_models()]
    rows = [
        (name, f"{m.num_params / 1e9:.2f}", str(m.num_layers), f"{m.num_q_heads}/{m.num_kv_heads}",
         f"{m.kv_bytes_per_token() / 1024:,.0f}", f"{m.max_context_tokens:,}")
        for name, m in found
    ]  # fmt: skip
    yield plain_table("Models", ("model", "10⁹ params", "layers", "Q/KV heads", "KV KiB/token", "context"), rows, right=True)


def policies() -> Iterator[RenderableType]:
    from rich.text import Text

    from kvsim.policies import POLICIES
    from kvsim.starter import flow_yaml, policy_blocks

    for policy in POLICIES:
        acts = "" if policy.dimension == "none" else f" ({policy.dimension})"
        example = "[]" if policy.dimension == "none" else flow_yaml(policy_blocks(kind_of(policy), EXAMPLE_PROMPT_TOKENS, 16))
        yield _entry(f"{kind_of(policy)}{acts}", first_sentence(policy), _fields(policy), f"such as {example}")
    yield Text(
        "A policy is a list of blocks, at most one each for tokens, channels and bits; [] keeps the whole cache. Units, bounds and "
        "meanings of all fields: docs/policies.md."
    )


def engines() -> Iterator[RenderableType]:
    from kvsim.engines import ENGINES
    from kvsim.engines.base import Engine

    for engine in ENGINES:
        yield _entry(kind_of(engine), first_sentence(engine), _fields(engine, Engine))
    yield _entry("every engine", "Fields of all of them", _fields(Engine))


def profiles() -> Iterator[RenderableType]:
    from rich.text import Text

    from kvsim.profile_file import load_profile_file, shipped

    def error(tables: Mapping[tuple[str, str, int], TableData], kind: str) -> str:
        """Mean held-out error over the kind's tables, each row counting the same."""
        chosen = [table for key, table in tables.items() if key[0] == kind]
        rows = sum(table.num_rows for table in chosen)
        return f"{sum(table.mape * table.num_rows for table in chosen) / rows:.1%}" if rows else "-"

    rows = []
    gpus_of: dict[str, dict[str, None]] = {}
    for name, path in shipped().items():
        found = load_profile_file(path)
        dtypes = sorted({key[1] for key in found.tables if key[0] == "gemm"})
        errors = [error(found.tables, kind) for kind in ("gemm", "decode_attention", "prefill_attention")]
        total = sum(table.num_rows for table in found.tables.values())
        rows.append((name, f"{total:,}", " ".join(dtypes), *errors))
        gpus_of.setdefault(found.source.split(" (")[0], {})[path.parent.name] = None
    heads = ("profile", "rows", "GEMM dtypes", "GEMM\nerror", "decode\nerror", "prefill\nerror")
    yield plain_table("Measured profiles (mean error on shapes that the fit has not seen)", heads, rows, right=True)
    for source, measured in gpus_of.items():
        yield Text(f"Measured by {source}: {', '.join(measured)}.")
    yield Text(
        "`profile: auto` takes the GPU's profile of the engine's kernels (vllm_v1 and vllm_v0: vllm). What it lacks comes from "
        "another engine of the GPU, then from the other GPUs scaled by datasheet, then from the datasheet; the report says which."
    )


def quality() -> Iterator[RenderableType]:
    from rich.text import Text

    from kvsim.quality import figures
    from kvsim.reports.quality import catalogue_tables

    yield from catalogue_tables(figures())
    yield Text(
        "\n* read off a plot, +-0.2. `kvsim run` shows the nearest figure beside each policy; of a composition only what was "
        "published of it as a whole."
    )


def _entry(name: str, meaning: str, *more: str) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    lines = [Text(line) for line in (meaning, *more) if line]
    return Group(Text(name, style="bold"), Padding(Group(*lines), (0, 0, 0, 4)))


def _fields(model: type[BaseModel], base: type[BaseModel] | None = None) -> str:
    return ", ".join(f"{row.name}: {row.default}" for row in field_rows(model, base))


TABLES: dict[str, Callable[[], Iterator[RenderableType]]] = {
    "gpus": gpus, "models": models, "policies": policies, "engines": engines, "profiles": profiles, "quality": quality,
}  # fmt: skip
