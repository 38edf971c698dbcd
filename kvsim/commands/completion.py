"""`kvsim completion`."""

from __future__ import annotations

import os

import click

VARIABLE = "_KVSIM_COMPLETE"
"""Set by the shell's function to ask `kvsim` for completions, as click's scripts do."""


@click.command(short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  echo 'eval "$(kvsim completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(kvsim completion zsh)"' >> ~/.zshrc
    fish:  kvsim completion fish > ~/.config/fish/completions/kvsim.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "kvsim", VARIABLE).source())


def answered(command: click.Command) -> bool:
    """Whether the shell asked for completions; they have been printed then."""
    instruction = os.environ.get(VARIABLE)
    if not instruction:
        return False
    from click.shell_completion import shell_complete

    shell_complete(command, {}, "kvsim", VARIABLE, instruction)
    return True
