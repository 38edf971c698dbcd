"""The command line. Everything heavy is imported by the command that needs it, so that ``kvsim --help`` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from kvsim.errors import InputError, KvsimError

if TYPE_CHECKING:
    from kvsim.scenario import Scenario

DONE, BUG, BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
MISSED = 1
"""Of `kvsim validate`: some bar is missed. A bug ends with 1 too, and a traceback."""
EXIT_CODES = """\b
Exit codes:
  0    done
  1    a bug in kvsim: it ends with a traceback, please report it
  2    bad input: one line on standard error says field, value, rule and fix;
       nothing has been written
  130  interrupted (Ctrl-C); nothing has been written
  141  the reader of the output closed the pipe, as `| head` does
"""
SECTION_NAMES = (
    "title", "latency", "means", "capacity", "gains", "bands", "slo", "time", "ledger", "full_ledger", "basis", "notes", "warnings",
    "verdict",
)  # fmt: skip
"""Those of kvsim.reports.terminal, without importing it (a test compares them)."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code (see EXIT_CODES)."""
    try:
        args = sys.argv[1:] if argv is None else list(argv)
        # Not cli.main(), which makes exit codes of its own out of what is caught below.
        with cli.make_context("kvsim", list(args), obj=args) as context:  # profiles keep the command that made them
            code = cli.invoke(context)
        sys.stdout.flush()
        return code if isinstance(code, int) else DONE
    except click.exceptions.Exit as stopped:  # --help and --version
        return stopped.exit_code
    except BrokenPipeError:
        # Whoever read has had enough; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KvsimError as error:
        return _complain(str(error))
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "kvsim"
        return _complain(f"{error.format_message().rstrip('.')}; `{command} --help` shows how")
    except click.ClickException as error:
        return _complain(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        click.echo("kvsim: interrupted", err=True)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in _STDOUT_ERRORS:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _complain(f"standard output cannot be written ({error.strerror}); free some space")


_STDOUT_ERRORS = (28, 122)
"""ENOSPC and EDQUOT; files of --out have errors of their own."""


def _complain(text: str) -> int:
    click.echo("kvsim: error: " + " ".join(text.split()), err=True)
    return BAD_INPUT


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(package_name="kvsim")
def cli() -> None:
    """What KV-cache compression will do on your GPU, model and traffic, before deployment."""


class _Settings(click.ParamType):
    """``field=value``, the value read as YAML."""

    name = "field=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        field, equals, text = value.partition("=")
        if not equals or not field.strip():
            raise InputError("--set", value, "must be field=value", "try --set engine.max_num_seqs=64")
        from kvsim.yaml_text import parse_yaml

        return field.strip(), parse_yaml(f"--set {field.strip()}", text, text)


class _Sections(click.ParamType):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:
        if isinstance(value, list):
            return value
        names = [name.strip() for name in value.split(",") if name.strip()]
        for name in names or [""]:
            if name not in SECTION_NAMES:
                raise InputError("--sections", name, "must be a section of the report", f"use {', '.join(SECTION_NAMES)}")
        return names


def _scenario_options(command: Any) -> Any:
    for option in (
        click.option(
            "--policy", "names", metavar="NAME", multiple=True, help="Only this policy of the scenario; may be repeated."
        ),
        click.option(
            "--set", "overrides", type=_Settings(), metavar="FIELD=VALUE", multiple=True,
            help="Override a field: --set engine.max_num_seqs=64 (the value is YAML); may be repeated.",
        ),
        click.argument("scenario"),
    ):  # fmt: skip
        command = option(command)
    return command


@cli.command(epilog=EXIT_CODES)
@_scenario_options
@click.option("--out", metavar="DIR", help="Write summary.json, a row per request, plots and (on request) a trace there.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON in place of the tables.")
@click.option(
    "--requests-format", type=click.Choice(("csv", "parquet")), default="csv", show_default=True,
    help="Of the row per request in DIR; parquet needs kvsim[parquet].",
)  # fmt: skip
@click.option("--no-plots", is_flag=True, help="No plots in DIR.")
@click.option("--perfetto", is_flag=True, help="A trace for https://ui.perfetto.dev in DIR.")
@click.option(
    "--sections", type=_Sections(), metavar="NAME,...",
    help="Parts of the report: " + ", ".join(SECTION_NAMES) + "; by default all but full_ledger.",
)  # fmt: skip
@click.option(
    "--uncertainty", type=click.IntRange(min=2), metavar="N",
    help="Simulate N more times under drawn calibration errors and show error bands; on all cores.",
)  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="No report and no progress bar: only the files of DIR.")
def run(
    scenario: str, overrides: tuple[tuple[str, Any], ...], names: tuple[str, ...], out: str | None, as_json: bool,
    requests_format: str, no_plots: bool, perfetto: bool, sections: list[str] | None, uncertainty: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Simulate every policy of SCENARIO, a YAML file, and compare them."""
    loaded = _load(scenario, overrides, names)
    if out is None:
        for option, given in (("--perfetto", perfetto), ("--requests-format", requests_format == "parquet")):
            if given:
                raise InputError(option, None, "writes a file, so it needs --out", "add --out DIR")
    else:
        from kvsim.reports.files import check_outputs

        check_outputs(out, requests_format)
    from kvsim.api import simulate
    from kvsim.progress import progress_bar

    with progress_bar(loaded, shown=not quiet) as progress:
        result = simulate(loaded, progress)
    if uncertainty is not None:
        from dataclasses import replace

        from kvsim.progress import draws_bar
        from kvsim.uncertainty import error_bands

        with draws_bar(uncertainty, shown=not quiet) as tell:
            result = replace(result, bands=error_bands(loaded, uncertainty, os.cpu_count() or 1, tell))
    if out is not None:
        from kvsim.reports.files import write_outputs

        for path in write_outputs(result, out, requests_format=requests_format, plots=not no_plots, perfetto=perfetto):
            if not (quiet or as_json):
                click.echo(f"wrote {path}", err=True)
    if as_json:
        from kvsim.reports.files import to_json

        click.echo(to_json(result).encode(), nl=False)
    elif not quiet:
        from kvsim.reports.terminal import print_report

        print_report(result, sections=sections)


@cli.command()
@_scenario_options
def show(scenario: str, overrides: tuple[tuple[str, Any], ...], names: tuple[str, ...]) -> None:
    """What SCENARIO resolves to, without simulating: GPU memory line by line, KV bytes and blocks of every policy."""
    loaded = _load(scenario, overrides, names)
    from kvsim.reports.resolved import print_resolved

    print_resolved(loaded)


@cli.command("list")
@click.argument("what", type=click.Choice(("gpus", "models", "policies", "engines", "profiles")))
def list_(what: str) -> None:
    """What there is to choose from: gpus, models, policies, engines or profiles."""
    from kvsim.reports.catalogue import print_catalogue

    print_catalogue(what)


@cli.command()
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
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "measured" if measured is None else Path(measured)
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


@cli.group(no_args_is_help=False)
def calibrate() -> None:
    """Measure a device."""


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


@calibrate.group("import", no_args_is_help=False)
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


def _load(path: str, overrides: tuple[tuple[str, Any], ...], names: tuple[str, ...]) -> Scenario:
    from kvsim.scenario import load_scenario, select_policies

    scenario = load_scenario(path, dict(overrides))
    return select_policies(scenario, names) if names else scenario


if __name__ == "__main__":
    sys.exit(main())
