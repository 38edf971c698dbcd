"""`kvsim init`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvsim.commands.exit_codes import EXIT_CODES
from kvsim.commands.names import CatalogueName, PolicyKinds
from kvsim.errors import InputError, KvsimError

if TYPE_CHECKING:
    from kvsim.starter import Answers

ENGINE_KINDS = ("vllm_v1", "vllm_v0", "trtllm", "sglang", "huggingface", "torch_decoder")
TRAFFIC_NAMES = ("chat", "summarise", "rag")
WEIGHT_DTYPES = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
"""Those of kvsim.engines (less those that offload: their batches are given outright), kvsim.starter and kvsim.dtypes,
without importing them (a test compares)."""
DEFAULTS = {
    "gpu": "a100-sxm-80gb", "model": "llama-3.1-8b", "engine": "vllm_v1", "traffic": "chat", "policies": "full,snapkv,kivi,kv_quant",
}  # fmt: skip


@click.command(epilog=EXIT_CODES, short_help="Write a commented scenario.")
@click.option("--gpu", type=CatalogueName("gpus"), metavar="NAME", help="Name of `kvsim list gpus`, or a YAML file.")
@click.option("--model", type=CatalogueName("models"), metavar="NAME", help="Name of `kvsim list models`, or a config.json.")
@click.option("--engine", type=click.Choice(ENGINE_KINDS), help="Serving engine.")
@click.option("--traffic", metavar="KIND", help=f"{', '.join(TRAFFIC_NAMES)}, or a trace (.csv, .jsonl).")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), metavar="R", help="Requests per second; default: 70 % of capacity.")
@click.option("--policies", type=PolicyKinds(), metavar="A,B+C", help="Kinds to compare, + between those that compose.")
@click.option("--tensor-parallel", type=click.IntRange(1, 8), metavar="N", help="GPUs; default: the fewest that hold the model.")
@click.option("--weight-dtype", type=click.Choice(WEIGHT_DTYPES), default="bf16", show_default=True, help="Of the layers' matrices.")
@click.option("--out", default="scenario.yaml", show_default=True, metavar="FILE", help="The file to write; - for standard output.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
def init(
    gpu: str | None, model: str | None, engine: str | None, traffic: str | None, rate: float | None,
    policies: tuple[str, ...] | None, tensor_parallel: int | None, weight_dtype: str, out: str, force: bool,
) -> None:  # fmt: skip
    """Write a commented scenario: asks on a terminal for what no option gives, and takes defaults elsewhere."""
    path = None if out == "-" else Path(out)
    if path is not None:
        _check_writable(path, force)
    given = {"gpu": gpu, "model": model, "engine": engine, "traffic": traffic, "policies": policies}
    chosen = _ask(given) if sys.stdin.isatty() else {name: DEFAULTS[name] if v is None else v for name, v in given.items()}
    chosen["policies"] = PolicyKinds().convert(chosen["policies"], None, None)
    from kvsim.starter import Answers, starter_text

    folder = Path() if path is None else path.parent
    answers = Answers(**chosen, rate_per_s=rate, tensor_parallel=tensor_parallel, weight_dtype=weight_dtype, folder=folder)
    text = starter_text(answers)
    if path is None:
        click.echo(text, nl=False)
        return
    _write(path, text, force)
    click.echo(f"wrote {path}: {_summary(answers, text)}\nnext: kvsim run {path}", err=True)


def _ask(given: dict[str, Any]) -> dict[str, Any]:
    """Questions for what is not given; a wrong answer is explained and asked again."""
    from kvsim.hardware import load_gpu
    from kvsim.model import load_model
    from kvsim.starter import policy_blocks

    def policies(text: str) -> str:
        for name in PolicyKinds().convert(text, None, None):
            policy_blocks(name, 1024, 16)
        return text

    questions: dict[str, tuple[str, Any]] = {
        "gpu": ("GPU (kvsim list gpus)", _checked(load_gpu)), "model": ("Model (kvsim list models)", _checked(load_model)),
        "engine": ("Engine", click.Choice(ENGINE_KINDS)),
        "traffic": (f"Traffic: {', '.join(TRAFFIC_NAMES)}, or the path of a .csv or .jsonl trace", None),
        "policies": ("Policies (kvsim list policies)", _checked(policies)),
    }  # fmt: skip
    answers = dict(given)
    for name, (question, check) in questions.items():
        if given[name] is None:
            kind = {"type": check} if isinstance(check, click.ParamType) else {"value_proc": check}
            answers[name] = click.prompt(question, default=DEFAULTS[name], err=True, **kind)
    return answers


def _checked(load: Callable[[str], object]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        try:
            load(text)
        except KvsimError as error:
            raise click.UsageError(str(error)) from None
        return text

    return convert


def _summary(answers: Answers, text: str) -> str:
    from kvsim.scenario import parse_scenario
    from kvsim.yaml_text import parse_yaml

    scenario = parse_scenario(parse_yaml("scenario", text, "what was written"), answers.folder)
    return f"{scenario.tensor_parallel} x {scenario.gpu}, {scenario.model}, {scenario.workload.describe()}"


def _check_writable(path: Path, force: bool) -> None:
    if path.is_dir():
        raise InputError("--out", str(path), "is a folder", "give the name of a file")
    if path.exists() and not force:
        raise InputError("--out", str(path), "exists already", "choose another name, or add --force to overwrite it")
    if not path.parent.is_dir():
        raise InputError("--out", str(path), f"cannot be written: there is no folder {path.parent}", "make it first")


def _write(path: Path, text: str, force: bool) -> None:
    """The whole text or nothing."""
    try:
        with path.open("w" if force else "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise InputError("--out", str(path), f"cannot be written ({error.strerror or error})", "choose another name") from error
