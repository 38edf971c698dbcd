"""`kvsim calibrate`: measure a device, and tell how wrong a profile is."""

from __future__ import annotations

import sys

import click

from kvsim.commands.calibrate_decoder import decode, serve
from kvsim.commands.calibrate_device import device
from kvsim.commands.calibrate_import import import_
from kvsim.commands.exit_codes import DONE
from kvsim.errors import InputError


@click.group(no_args_is_help=False)
def calibrate() -> None:
    """Measure a device."""


for command in (device, decode, serve, import_):
    calibrate.add_command(command)


@calibrate.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.pass_context
def measure(context: click.Context) -> int:
    """Time single Ops on this machine's GPU or CPU (docs/measure.md); options as `python -m kvsim.calibrate.measure`."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError(
            "kvsim calibrate measure", None, "needs torch, which is not installed", "pip install 'kvsim[calibrate]'"
        ) from None
    from kvsim.calibrate.measure import main as measure_main

    try:
        return measure_main(context.args)
    except SystemExit as stopped:  # argparse has said what is wrong
        return stopped.code if isinstance(stopped.code, int) else DONE


@calibrate.command("report")
@click.argument("profile")
@click.option("--aiconfigurator", "use_package", is_flag=True, help="Compare with the package's rows that it was fitted to.")
@click.option("--root", metavar="DIR", help="Unpacked aiconfigurator-core; implies --aiconfigurator.")
@click.option("--csv", metavar="FILE", help="Compare with the rows of a plain CSV.")
@click.option("--plot", metavar="DIR", help="Write plots of predicted against measured; needs rows to compare with.")
def calibrate_report(profile: str, use_package: bool, root: str | None, csv: str | None, plot: str | None) -> None:
    """How wrong PROFILE is, by Op and size: a name of `kvsim list profiles`, or a path."""
    from pathlib import Path

    from kvsim.calibrate.report_command import Comparison, find_profile, measured_rows, stored_lines
    from kvsim.reports.console import print_parts
    from kvsim.reports.tables import plain_table

    found, compares = find_profile(profile), use_package or root is not None or csv is not None
    if plot is not None and not compares:
        raise InputError("--plot", plot, "needs rows to compare with", "add --aiconfigurator, --root DIR or --csv FILE")
    heads = ("op and size", "rows", "shapes", "error", "16-84 % of real/predicted", "2.5-97.5 %")
    print_parts([plain_table(f"{found.title}: errors on shapes held out", heads, stored_lines(found))], sys.stdout)
    click.echo(f"{found.source}; made {found.made} by `{found.command}`, rows {found.rows_sha256[:12]}")
    if not compares:
        click.echo("No rows to compare with: add --aiconfigurator, --root DIR or --csv FILE.")
        return
    rows = measured_rows(found, None if root is None else Path(root), None if csv is None else Path(csv))
    comparison = Comparison(found, rows)
    heads = ("op and size", "rows", "mean error", "median", "90 % below", "bias")
    print_parts([plain_table("The profile's answers beside the rows, shapes it has seen", heads, comparison.lines())], sys.stdout)
    if plot is not None:
        for path in comparison.plot(Path(plot), found.title):
            click.echo(f"wrote {path}", err=True)
