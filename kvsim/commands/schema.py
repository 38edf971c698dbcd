"""`kvsim schema`."""

from __future__ import annotations

import click


@click.command(short_help="Print a scenario's JSON Schema.")
@click.argument("what", type=click.Choice(("scenario",)), default="scenario")
def schema(what: str) -> None:
    """Print the JSON Schema of a scenario, with which editors complete, explain and check fields.

    Save it as kvsim.schema.json beside a scenario whose first line is `# yaml-language-server: $schema=kvsim.schema.json`.
    """
    import json

    from kvsim.json_schema import scenario_schema

    click.echo(json.dumps(scenario_schema(), indent=2, ensure_ascii=False))
