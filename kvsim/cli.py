"""The command line. Everything heavy is imported by the command that needs it, so that ``kvsim --help`` answers at once."""

from __future__ import annotations

import errno
import os
import sys

import click

from kvsim.commands.calibrate import calibrate
from kvsim.commands.catalogue import list_
from kvsim.commands.completion import answered, completion
from kvsim.commands.exit_codes import BAD_INPUT, DONE, EXIT_CODES, INTERRUPTED, PIPE_CLOSED
from kvsim.commands.init import init
from kvsim.commands.plan import plan
from kvsim.commands.report import compare, report
from kvsim.commands.run import run, show
from kvsim.commands.schema import schema
from kvsim.commands.sweep import sweep
from kvsim.commands.validate import validate
from kvsim.errors import KvsimError

COMMANDS: tuple[click.Command, ...] = (init, run, plan, show, report, compare, list_, schema, sweep, validate, calibrate, completion)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code (see EXIT_CODES)."""
    args = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv is None and answered(cli):
            return DONE
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
        named = f"kvsim {args[0]}" if args and args[0] in cli.commands else "kvsim"
        command = error.ctx.command_path if error.ctx else named
        return _complain(f"{error.format_message().rstrip('.')}; `{command} --help` shows how")
    except click.ClickException as error:
        return _complain(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        click.echo("kvsim: interrupted", err=True)
        return INTERRUPTED
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _complain(f"{str(error.filename)[:40]}...: the path is too long; give a shorter one")
        if error.errno not in _STDOUT_ERRORS:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _complain(f"standard output cannot be written ({error.strerror}); free some space")


START = """\b
Start here:
  kvsim init                 asks for GPU, model, engine, traffic and policies
  kvsim show scenario.yaml   what it resolves to: memory, KV bytes, deployment
  kvsim run scenario.yaml    simulates its policies and compares them
\n"""
_STDOUT_ERRORS = (28, 122)
"""ENOSPC and EDQUOT; files of --out have errors of their own."""


def _complain(text: str) -> int:
    click.echo("kvsim: error: " + " ".join(text.split()), err=True)
    return BAD_INPUT


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]}, epilog=START + EXIT_CODES)
@click.version_option(package_name="kvsim")
def cli() -> None:
    """What KV-cache compression will do on your GPU, model and traffic, before deployment."""


for command in COMMANDS:
    cli.add_command(command)


if __name__ == "__main__":
    sys.exit(main())
