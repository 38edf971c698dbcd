"""`kvsim list`."""

from __future__ import annotations

import click


@click.command("list", short_help="What there is to choose from.")
@click.argument("what", type=click.Choice(("gpus", "models", "policies", "engines", "profiles", "quality")))
def list_(what: str) -> None:
    """What there is to choose from: gpus, models, policies, engines, profiles or quality."""
    from kvsim.reports.catalogue import print_catalogue

    print_catalogue(what)
