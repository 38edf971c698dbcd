"""A scenario: YAML in, a frozen and validated `Scenario` out. Errors say field, value, rule and fix in one line."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvsim.engines import ENGINES, Engine
from kvsim.errors import InputError
from kvsim.policies import POLICIES, Policy
from kvsim.workload import WorkloadConfig

if TYPE_CHECKING:
    AnyPolicy = Policy
    AnyEngine = Engine
else:
    AnyPolicy = Annotated[reduce(or_, POLICIES), Field(discriminator="kind")]
    AnyEngine = Annotated[reduce(or_, ENGINES), Field(discriminator="kind")]


class Scenario(BaseModel):
    """Everything a simulation depends on. Paths inside are relative to `base_dir`, the folder of the scenario's file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", description="title of the report")
    gpu: str = Field(description="name in the catalogue (kvsim list gpus) or path of a GPU YAML")
    model: str = Field(description="name in the catalogue (kvsim list models), YAML, or a Hugging Face config.json")
    tensor_parallel: int = Field(1, ge=1, le=8, description="GPUs that share each layer")
    weight_dtype: str = Field("bf16", description="fp16, bf16, fp8, int8 or int4")
    profile: str = Field("datasheet", description="what answers Ops with seconds")
    engine: AnyEngine = Field(description="the serving engine and its settings")
    workload: WorkloadConfig = Field(description="traffic")
    policies: dict[str, list[AnyPolicy]] = Field(description="compositions of policies to compare, by name")
    slo: dict[str, float] = Field(default_factory=dict, description="latency limits such as ttft_p99_s: 2.0")
    base_dir: Path = Field(Path(), exclude=True)

    @field_validator("policies")
    @classmethod
    def _some_policies(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if not value:
            raise ValueError("must name at least one policy; try full: []")
        return value

    @field_validator("profile")
    @classmethod
    def _known_profile(cls, value: str) -> str:
        if value != "datasheet":
            raise ValueError("must be datasheet: no measured profile ships with this version; try datasheet")
        return value


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that refuses a key given twice, which plain YAML would silently overwrite."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_scenario(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Scenario:
    """Reads and validates a scenario file. overrides: dotted fields and their values, as ``kvsim run --set`` gives them.

    Raises InputError for a missing or unreadable file, YAML that is none, unknown keys and values out of range.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("scenario", str(path), "does not exist", "give the path of a scenario YAML") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("scenario", str(path), f"cannot be read: {error}") from None
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError("scenario", where, f"is not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        raise InputError("scenario", str(path), "must be a mapping of fields such as gpu, model, engine, workload, policies")
    for dotted, value in (overrides or {}).items():
        _override(data, dotted, value)
    return parse_scenario(data, path.parent)


def parse_scenario(data: Mapping[str, Any], base_dir: Path = Path()) -> Scenario:
    """Validates a scenario given as plain data."""
    try:
        return Scenario.model_validate({**data, "base_dir": base_dir})
    except ValidationError as error:
        raise _as_input_error(error) from None


def _override(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise InputError(dotted, value, f"cannot be set: {key} is not a mapping")
    data[last] = value


# -- pydantic's errors as one line of ours -------------------------------------------------------------------------

_RULES = {
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "finite_number": "must be a finite number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "float_parsing": "must be a number without a unit; the unit is in the field's name",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "dict_type": "must be a mapping",
    "list_type": "must be a list",
    "model_type": "must be a mapping of fields",
    "model_attributes_type": "must be a mapping of fields",
    "literal_error": "must be {expected}",
    "missing": "is missing",
}


def _as_input_error(error: ValidationError) -> InputError:
    """The first problem, with what it would take, and how many more there are."""
    problems = error.errors(include_url=False)
    # An unknown key is most often the cause of what else is wrong.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    kind, context = problem["type"], problem.get("ctx", {})
    location = [str(part) for part in problem["loc"]]
    field = ".".join(part for part in location if not _is_tag(part, location))
    value = problem.get("input")
    fix = ""
    if kind == "extra_forbidden":
        rule, close = "is not a known field", get_close_matches(location[-1], _fields_beside(location), n=1)
        fix = f"did you mean {close[0]}?" if close else "known here: " + ", ".join(sorted(_fields_beside(location)))
        value = None
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        expected = str(context.get("expected_tags", "")).replace("'", "") or _kinds(location)
        given = value.get("kind") if isinstance(value, dict) else value
        field, value = f"{field}.kind", given
        rule = "is not known" if kind == "union_tag_invalid" else "is missing"
        close = get_close_matches(str(given), expected.split(", "), n=1)
        fix = f"did you mean {close[0]}?" if close else f"use one of {expected}"
    elif kind == "value_error":
        text = str(context.get("error", problem["msg"]))
        rule, _, fix = text.partition("; ")
        if isinstance(value, dict | BaseModel):
            value = None
    elif kind == "missing":
        rule, value = _RULES[kind], None
    else:
        rule = _RULES.get(kind, problem["msg"]).format(**context)
        if kind == "literal_error":
            options = str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
            close = get_close_matches(str(value), options, n=1)
            fix = f"did you mean {close[0]}?" if close else ""
    if len(problems) > 1:
        fix = (fix + "; " if fix else "") + f"{len(problems) - 1} more problem{'s' if len(problems) > 2 else ''} after this"
    return InputError(field or "scenario", value, rule, fix)


def _kinds(location: list[str]) -> str:
    options: tuple[type[BaseModel], ...] = POLICIES if location[0] == "policies" else ENGINES
    return ", ".join(str(option.model_fields["kind"].default) for option in options)


def _is_tag(part: str, location: list[str]) -> bool:
    """Whether a part of pydantic's location names a union's alternative rather than a field."""
    place = location.index(part)
    if location[0] == "policies":
        return place >= 3 and part in _kinds(location).split(", ")
    return place >= 1 and location[0] == "engine" and part in _kinds(location).split(", ")


def _fields_beside(location: list[str]) -> list[str]:
    """Names of the fields that the unknown last part of a location might have meant."""
    model: type[BaseModel] = Scenario
    options: tuple[type[BaseModel], ...] = (*POLICIES, *ENGINES)
    for part in location[:-1]:
        tagged = [option for option in options if option.model_fields["kind"].default == part]
        if tagged:
            model = tagged[0]
        elif part in model.model_fields:
            annotation = model.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                model = annotation
    return [name for name in model.model_fields if name != "base_dir"]
