"""`kvsim list`: GPUs, models, policies and engines to choose from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from kvsim.reports.console import print_parts
from kvsim.reports.tables import plain_table
from kvsim.schema import field_rows, first_sentence, kind_of

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import RenderableType


def print_catalogue(what: str, file: TextIO | None = None) -> None:
    """what: a key of TABLES."""
    print_parts(TABLES[what](), sys.stdout if file is None else file)


def gpus() -> Iterator[RenderableType]:
    from kvsim.hardware import list_gpus, load_gpu

    found = [(name, load_gpu(name)) for name in list_gpus()]
    rows = [
        (name, f"{g.hbm_bytes / 2**30:,.0f}", f"{g.hbm_bandwidth_bytes_per_s / 1e9:,.0f}",
         f"{g.peak_flops('bf16') / 1e12:,.0f}", f"{g.gpu_link_bytes_per_s / 1e9:,.0f}" if g.has_gpu_link else "-")
        for name, g in found
    ]  # fmt: skip
    yield plain_table("GPUs", ("gpu", "GiB", "HBM GB/s", "bf16 TFLOP/s", "link GB/s"), rows, right=True)


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
    from kvsim.policies import POLICIES

    for policy in POLICIES:
        acts = "" if policy.dimension == "none" else f" ({policy.dimension})"
        yield _entry(f"{kind_of(policy)}{acts}", first_sentence(policy), _fields(policy))


def engines() -> Iterator[RenderableType]:
    from kvsim.engines import ENGINES
    from kvsim.engines.base import Engine

    for engine in ENGINES:
        yield _entry(kind_of(engine), first_sentence(engine), _fields(engine, Engine))
    yield _entry("every engine", "Fields of all of them", _fields(Engine))


def _entry(name: str, meaning: str, fields: str) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    lines = [Text(line) for line in (meaning, fields) if line]
    return Group(Text(name, style="bold"), Padding(Group(*lines), (0, 0, 0, 4)))


def _fields(model: type[BaseModel], base: type[BaseModel] | None = None) -> str:
    return ", ".join(f"{row.name}: {row.default}" for row in field_rows(model, base))


TABLES: dict[str, Callable[[], Iterator[RenderableType]]] = {
    "gpus": gpus, "models": models, "policies": policies, "engines": engines,
}  # fmt: skip
