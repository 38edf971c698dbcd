"""A scenario's JSON Schema, for editors: what pydantic knows of the fields, with units, and with the names of the catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvsim.hardware import list_gpus
from kvsim.metrics import SLO_KEYS
from kvsim.model import list_models
from kvsim.profile_file import shipped
from kvsim.scenario import Scenario
from kvsim.schema import unit

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def scenario_schema() -> dict[str, Any]:
    """The schema of a scenario file, draft 2020-12. Rules that tie fields to one another are not in it: `kvsim show` checks them."""
    schema = Scenario.model_json_schema()
    fields = schema["properties"]
    del fields["base_dir"]  # where the file lies, not what it says
    for block in (schema, *schema["$defs"].values()):
        _explain(block)
    for part in _parts(schema):
        part.pop("discriminator", None)  # OpenAPI's; here `kind` must be given, and decides
    fields["gpu"] |= _name_or_path(list_gpus())
    fields["model"] |= _name_or_path(list_models())
    fields["profile"] |= _name_or_path(["auto", "datasheet", *shipped()])
    fields["policies"]["minProperties"] = 1
    limit_s = {"type": "number", "exclusiveMinimum": 0}
    fields["slo"] = {
        "title": "slo", "description": fields["slo"]["description"], "type": "object", "additionalProperties": False,
        "properties": {key: {**limit_s, "description": "seconds"} for key in SLO_KEYS},
    }  # fmt: skip
    return {"$schema": DIALECT, **schema, "title": "kvsim scenario"}


def _explain(block: dict[str, Any]) -> None:
    """Fields as they are written for titles, units in descriptions; a block of a union must say which it is."""
    if "description" in block:
        block["description"] = block["description"].replace("``", "`")
    for name, field in block.get("properties", {}).items():
        field["title"] = name
        if unit(name) and "description" in field:
            field["description"] += f" [{unit(name)}]"
    if "kind" in block.get("properties", {}):
        block["properties"]["kind"].pop("default", None)
        block["required"] = ["kind", *block.get("required", [])]


def _name_or_path(names: list[str]) -> dict[str, Any]:
    """Names to complete; any other text may be an alias or a path."""
    return {"anyOf": [{"enum": list(names)}, {"type": "string", "minLength": 1}]}


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and everything inside it."""
    if isinstance(schema, dict):
        yield schema
        schema = list(schema.values())
    for part in schema if isinstance(schema, list) else ():
        yield from _parts(part)
