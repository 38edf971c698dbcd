"""`kvsim calibrate decode` and `kvsim calibrate serve`: the real decoder."""

from __future__ import annotations

import sys
from typing import Any

import click

from kvsim.commands.options import load, scenario_options
from kvsim.errors import InputError

DEVICES = click.Choice(("cpu", "cuda"))


def _need_torch(command: str) -> None:
    from importlib.util import find_spec

    absent = [name for name in ("torch", "triton") if find_spec(name) is None]
    if absent:
        rule = f"needs {' and '.join(absent)}, which is not installed"
        raise InputError(f"kvsim calibrate {command}", None, rule, "pip install 'kvsim[calibrate]'")


@click.command()
@click.option("--device", type=DEVICES, default="cpu", show_default=True, help="Where to decode.")
@click.option("--out", metavar="DIR", required=True, help="The folder of kvsim calibrate device; rows and profile go there.")
@click.option(
    "--budget-s", type=click.FloatRange(min=0), default=420.0, show_default=True,
    help="Time to measure; what is left is measured when the command is run again. 0: only fit.",
)  # fmt: skip
@click.option(
    "--attention", type=click.Choice(("torch", "triton")),
    help="What decode steps attend with; default: triton (the kernels, and CUDA graphs) on cuda, torch on cpu.",
)  # fmt: skip
def decode(device: str, out: str, budget_s: float, attention: str | None) -> None:
    """Run full decoding with every policy applied, fit a profile of it, and say how wrong it is (docs/calibration.md).

    Prints prefill and step times, tokens/s, memory and the largest batch that a pool holds, each beside the simulator's number.
    """
    _need_torch("decode")
    import shlex
    from pathlib import Path

    from kvsim.calibrate.decode_command import HEADS, conclude, device_gpu, error_lines, pick_device, run_study
    from kvsim.calibrate.decode_report import DECODE_HEADS, FILE, FIT_HEADS, decode_lines, fit_lines, notes
    from kvsim.progress import count_bar
    from kvsim.reports.console import print_parts
    from kvsim.reports.tables import plain_table

    folder, chosen = Path(out), pick_device(device)
    device_gpu(folder)
    with count_bar("decoding", shown=budget_s > 0) as tell:
        study = run_study(chosen, folder, budget_s, tell, attention)
    command = shlex.join(["kvsim", *click.get_current_context().find_root().obj])
    done = conclude(study, chosen, folder, command)
    shown, lines = next(iter(study.models)), fit_lines(done.reports)
    tables = [plain_table(f"Decoding of model {shown}", DECODE_HEADS, decode_lines(done.reports, shown), right=True)]
    if lines:
        tables.append(plain_table("Largest batch that a pool holds, found by filling it", FIT_HEADS, lines, right=True))
    title = "Steps measured as a whole beside the profile's sums"
    print_parts([*tables, plain_table(title, HEADS, error_lines(done.errors), right=True)], sys.stdout)
    for line in notes(done.reports):
        click.echo(line)
    click.echo(f"wrote {folder / FILE}: all models, batches and contexts")
    click.echo(f"wrote {done.path}; use it with `gpu: {folder / 'device.yaml'}`, `profile: {done.path}` and engine torch_decoder")


@click.command()
@scenario_options
@click.option("--device", type=DEVICES, default="cpu", show_default=True, help="Where to decode.")
@click.option("--weights", metavar="DIR", help="Hugging Face folder of the scenario's model; default: random weights.")
@click.option("--out", metavar="FILE.csv", help="Write a row for each request there.")
def serve(
    scenario: str, overrides: tuple[tuple[str, Any], ...], names: tuple[str, ...], device: str, weights: str | None, out: str | None
) -> None:  # fmt: skip
    """Serve SCENARIO for real (engine torch_decoder) beside its simulation: same requests, same scheduler."""
    loaded = load(scenario, overrides, names)
    _need_torch("serve")
    from pathlib import Path

    from kvsim.calibrate.decode_command import pick_device
    from kvsim.calibrate.serve_command import HEADS, write_requests
    from kvsim.calibrate.serve_command import serve as serve_real
    from kvsim.reports.console import print_parts
    from kvsim.reports.tables import plain_table

    if out is not None and Path(out).suffix != ".csv":
        raise InputError("--out", out, "must end in .csv")
    if weights is not None and not Path(weights).is_dir():
        raise InputError("--weights", weights, "must be a folder", "give the folder of a downloaded model")
    served = serve_real(loaded, pick_device(device), None if weights is None else Path(weights))
    for one in served:
        print_parts([plain_table(one.policy, HEADS, one.lines(), right=True)], sys.stdout)
        off = one.median_errors()
        click.echo(f"steps that only decode: {one.launch}")
        click.echo(f"median over requests of |simulated - measured| / measured: TTFT {off['ttft']:.1%}, E2E {off['e2e']:.1%}\n")
    if out is not None:
        try:
            write_requests(served, Path(out))
        except OSError as error:
            raise InputError("--out", out, f"cannot be written ({error.strerror})") from error
        click.echo(f"wrote {out}", err=True)
