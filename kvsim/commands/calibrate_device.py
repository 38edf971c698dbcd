"""`kvsim calibrate device`: this machine's GPU or CPU becomes a device file and a profile."""

from __future__ import annotations

import shlex
import sys

import click

from kvsim.commands.exit_codes import DONE
from kvsim.errors import InputError


@click.command("device")
@click.option("--out", required=True, metavar="DIR", help="Folder of rows.jsonl, device.yaml, profile.json, kernels.json, report.md.")
@click.option("--device", type=click.Choice(("cuda", "cpu")), default="cuda", show_default=True, help="What to measure.")
@click.option("--plan", type=click.Choice(("full", "small")), default="full", show_default=True, help="small: a self-test of seconds.")
@click.option("--budget-s", type=float, default=420.0, show_default=True, help="Seconds of measuring; the fit takes some more.")
@click.option("--model", "models", multiple=True, metavar="MODEL", help="Measure this model's shapes too: a name or config.json.")
@click.option("--gpu", metavar="NAME", help="The catalogue's name of the GPU, where it does not say so itself.")
@click.option("--retry-failed", is_flag=True, help="Measure what failed or was skipped again.")
@click.option("--fit-only", is_flag=True, help="Fit the rows that are there; needs neither torch nor the device.")
@click.pass_context
def device(
    context: click.Context, out: str, device: str, plan: str, budget_s: float, models: tuple[str, ...], gpu: str | None,
    retry_failed: bool, fit_only: bool,
) -> int:  # fmt: skip
    """Measure this GPU or CPU and fit a profile to it (docs/calibration.md). Run again, it goes on where it stopped."""
    from pathlib import Path

    from kvsim.calibrate.device import report
    from kvsim.calibrate.device.conclude import conclude
    from kvsim.calibrate.device.supervise import supervise
    from kvsim.hardware import load_gpu
    from kvsim.model import load_model
    from kvsim.reports.console import print_parts
    from kvsim.reports.tables import plain_table

    if not budget_s > 0:
        raise InputError("--budget-s", budget_s, "must be > 0", "the default is 420")
    for model in models:
        load_model(model)  # what is wrong with it is said before anything is measured
    name = None if gpu is None else load_gpu(gpu).name
    folder = Path(out).expanduser()
    command = shlex.join(["kvsim", *(context.find_root().obj or ["calibrate", "device"])])
    if not fit_only:
        _require_torch(device)
        options = ["--device", device, "--plan", plan, *(part for model in models for part in ("--model", model))]
        options += ([] if name is None else ["--gpu", name]) + (["--retry-failed"] if retry_failed else [])
        supervise(folder, options, budget_s)
    found = conclude(folder, command, name)
    report.write_report(folder, found, command)
    parts = [plain_table("Errors on points that were not fitted", report.ERROR_HEADS, report.error_lines(found))]
    if found.skew:
        parts.append(plain_table("Decode attention over unlike lengths", report.SKEW_HEADS, report.skew_lines(found)))
    print_parts(parts, sys.stdout)
    for text in (*report.reasons(found.file.rows)[:10], *report.warnings(found)):
        click.echo(f"note: {text}")
    click.echo(f"wrote {folder}/device.yaml, profile.json, kernels.json and report.md, from {folder}/rows.jsonl")
    return DONE


def _require_torch(device: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in (("torch", "triton") if device == "cuda" else ("torch",)) if find_spec(name) is None]
    if missing:
        rule = f"needs {' and '.join(missing)}, which this Python does not have"
        raise InputError("kvsim calibrate device", None, rule, "pip install 'kvsim[kernels]'")
