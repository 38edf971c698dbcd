"""`kvsim validate`."""

from __future__ import annotations

import os
import sys

import click

from kvsim.commands.exit_codes import DONE, MISSED
from kvsim.errors import InputError


@click.command()
@click.argument("suites", nargs=-1, type=click.Choice(("all", "memory", "published", "requests", "silicon")))
@click.option("--measured", metavar="DIR", help="Folder of measured serving runs; default: ../shared/measured beside the project.")
@click.option("--out", metavar="DIR", help="Write validation.json, rows.csv, tables.md and plots there.")
@click.option("--json", "json_out", is_flag=True, help="Print rows and bars as JSON in place of the tables.")
@click.option("--quick", is_flag=True, help="A sample of each suite.")
def validate(suites: tuple[str, ...], measured: str | None, out: str | None, json_out: bool, quick: bool) -> int:
    """Predictions beside experiments that others ran; exit code 1 where a bar is missed."""
    from pathlib import Path

    from kvsim.reports.validation import as_json, print_validation, write_validation
    from kvsim.validation.run import SUITES
    from kvsim.validation.run import validate as run_suites

    chosen = SUITES if not suites or "all" in suites else tuple(suite for suite in SUITES if suite in suites)
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "measured" if measured is None else Path(measured)
    if measured is not None and not folder.is_dir():
        raise InputError("--measured", measured, "must be a folder", "it holds the CSV files of measured serving runs")
    report = run_suites(chosen, folder, os.cpu_count() or 1, quick)
    if out is not None:
        try:
            for path in write_validation(report, Path(out)):
                click.echo(f"wrote {path}", err=True)
        except OSError as error:
            raise InputError("--out", out, f"must be a folder that can be written ({error.strerror})") from error
    if json_out:
        click.echo(as_json(report), nl=False)
    else:
        print_validation(report, sys.stdout)
    return DONE if all(bar.met for bar in report.bars) else MISSED
