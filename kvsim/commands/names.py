"""Names that options take, completed by the shell; nothing heavy is imported before the shell asks."""

from __future__ import annotations

import re
from typing import Any

import click
from click.shell_completion import CompletionItem

from kvsim.errors import InputError


class CatalogueName(click.ParamType):
    """A name of `kvsim list gpus` or models, or a path; the command that loads it checks it."""

    def __init__(self, folder: str) -> None:
        self.folder, self.name = folder, folder.rstrip("s")

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from kvsim.catalogue import names

        if incomplete.startswith((".", "/", "~")):
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(name) for name in names(self.folder) if name.startswith(incomplete)]


class PolicyKinds(click.ParamType):
    """Kinds of policies with commas between compositions and + inside them."""

    name = "policies"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))
        if not names:
            raise InputError("--policies", value, "must name at least one policy", "try full,snapkv")
        return names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from kvsim.policies import POLICIES
        from kvsim.schema import kind_of

        *before, last = re.split(r"(?<=[,+])", incomplete)
        return [CompletionItem("".join(before) + kind_of(p)) for p in POLICIES if kind_of(p).startswith(last)]


def policies_of_scenario(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the policies in the scenario that the command line names; none where it cannot be read."""
    from kvsim.errors import KvsimError
    from kvsim.scenario import load_scenario

    # While the option's own value is missing, click leaves the arguments unparsed.
    for word in (ctx.params.get("scenario"), *ctx.args):
        try:
            names = list(load_scenario(word or "").policies)
        except KvsimError:
            continue
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return []


def scenario_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]
