"""`kvsim calibrate import`: others' measurements become a profile."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click


@click.group("import", no_args_is_help=False)
def import_() -> None:
    """Turn others' measurements into a profile (docs/profiles.md)."""


def _import_options(default_engine: str | None = None) -> Any:
    """Options of every import; default_engine None: --engine must be given."""

    engine: Any = {"required": True} if default_engine is None else {"default": default_engine, "show_default": True}

    def decorate(command: Any) -> Any:
        for option in (
            click.option("--out", metavar="FILE", help="Profile to write; default: GPU-ENGINE-VERSION.json here."),
            click.option("--engine", metavar="NAME==VERSION", help="Whose kernels were measured.", **engine),
            click.option("--gpu", required=True, help="The GPU they ran on, as in `kvsim list gpus`."),
        ):
            command = option(command)
        return command

    return decorate


@import_.command("aiconfigurator")
@_import_options()
@click.option("--root", metavar="DIR", help="Unpacked aiconfigurator-core; default: the installed package.")
def import_aiconfigurator(gpu: str, engine: str, out: str | None, root: str | None) -> None:
    """Kernel tables of the package aiconfigurator-core, for one GPU and engine; without a version its newest."""
    from pathlib import Path

    from kvsim.calibrate.import_command import split_engine
    from kvsim.calibrate.importers import aiconfigurator
    from kvsim.hardware import load_gpu

    chosen, (name, version) = load_gpu(gpu), split_engine(engine)
    _write_import(chosen, aiconfigurator.read(chosen, name, version, None if root is None else Path(root)), out)


@import_.command("csv")
@_import_options()
@click.option("--only-engine", metavar="TEXT", help="Only rows whose column engine is this.")
@click.option("--only-gpu", metavar="TEXT", help="Only rows whose column gpu is this.")
@click.option("--source", default="", help="Who measured, for the profile's provenance.")
@click.argument("path")
def import_csv(
    gpu: str, engine: str, out: str | None, only_engine: str | None, only_gpu: str | None, source: str, path: str
) -> None:  # fmt: skip
    """Hand-made rows of a CSV (columns: docs/profiles.md)."""
    from pathlib import Path

    from kvsim.calibrate.import_command import mixture_lines, named_engine
    from kvsim.calibrate.importers import plain_csv
    from kvsim.hardware import load_gpu

    chosen, (name, version), file = load_gpu(gpu), named_engine(engine), Path(path)
    found = plain_csv.read(file, chosen, name, version, source, only_engine=only_engine, only_gpu=only_gpu)
    _write_import(chosen, found, out, mixture_lines(file, only_engine, only_gpu))


@import_.command("vidur")
@_import_options("vidur==2024")
@click.argument("path")
def import_vidur(gpu: str, engine: str, out: str | None, path: str) -> None:
    """Vidur's profiling CSVs: a file or a folder."""
    from pathlib import Path

    from kvsim.calibrate.import_command import named_engine
    from kvsim.calibrate.importers import vidur
    from kvsim.hardware import load_gpu

    chosen, (name, version) = load_gpu(gpu), named_engine(engine)
    _write_import(chosen, vidur.read(Path(path), chosen, name, version), out)


@import_.command("llmservingsim")
@_import_options()
@click.option("--model", required=True, help="The model that was profiled, as in `kvsim list models`.")
@click.option("--tp", type=click.IntRange(1, 8), default=1, show_default=True, help="GPUs that shared each layer.")
@click.argument("folder")
def import_llmservingsim(gpu: str, engine: str, out: str | None, model: str, tp: int, folder: str) -> None:
    """LLMServingSim's profiler output of one model."""
    from pathlib import Path

    from kvsim.calibrate.import_command import named_engine
    from kvsim.calibrate.importers import llmservingsim
    from kvsim.hardware import load_gpu
    from kvsim.model import load_model

    chosen, (name, version) = load_gpu(gpu), named_engine(engine)
    _write_import(chosen, llmservingsim.read(Path(folder), chosen, load_model(model), tp, name, version), out)


@import_.command("measure")
@_import_options("torch")
@click.argument("path")
def import_measure(gpu: str, engine: str, out: str | None, path: str) -> None:
    """What `kvsim calibrate measure` wrote on your own device; without a version, that of its torch."""
    from pathlib import Path

    from kvsim.calibrate.import_command import split_engine
    from kvsim.calibrate.importers import measure_rows
    from kvsim.hardware import load_gpu

    chosen, (name, version) = load_gpu(gpu), split_engine(engine)
    _write_import(chosen, measure_rows.read(Path(path), chosen, name, version or ""), out)


def _write_import(gpu: Any, found: Any, out: str | None, notes: Sequence[str] = ()) -> None:
    """Fits, writes and prints. The profile keeps the command as it was typed."""
    import shlex
    from pathlib import Path

    from kvsim.calibrate.import_command import TABLE_HEADS, TABLE_TITLE, make_profile
    from kvsim.reports.console import print_parts
    from kvsim.reports.tables import plain_table

    command = shlex.join(["kvsim", *click.get_current_context().find_root().obj])
    done = make_profile(gpu, found, command, None if out is None else Path(out))
    click.echo("\n".join([*done.lines, *notes]))
    print_parts([plain_table(TABLE_TITLE, TABLE_HEADS, done.tables, right=True)], sys.stdout)
    click.echo(f"wrote {done.path}; use it with `profile: {done.path}` in a scenario")
