"""The fields of YAML blocks as rows for people: name, what may be written, default, meaning; docs and lists are made of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_UNITS = {
    "_gb_per_s": "GB/s", "_per_s": "1/s", "_s": "s", "_gib": "GiB", "_tokens": "tokens", "_frac": "share", "_steps": "steps",
}  # fmt: skip
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


class FieldRow(NamedTuple):
    """unit: "" where there is none. allowed: kind of value and its bounds. default: "required" where there is none."""

    name: str
    unit: str
    allowed: str
    default: str
    meaning: str


def field_rows(model: type[BaseModel], base: type[BaseModel] | None = None) -> Iterator[FieldRow]:
    """Rows of a block's own fields: without `kind`, those of `base`, and what is no part of the YAML."""
    inherited = base.model_fields if base else {}
    for name, field in model.model_fields.items():
        same = name in inherited and inherited[name].default == field.default
        if name != "kind" and not field.exclude and not same:
            yield FieldRow(name, unit(name), _allowed(field), default_text(field), field.description or "")


def kind_of(model: type[BaseModel]) -> str:
    """The `kind` that chooses this block."""
    return str(model.model_fields["kind"].default)


def first_sentence(model: type[BaseModel]) -> str:
    """Of the class's docstring, without its final stop."""
    text = " ".join((inspect.getdoc(model) or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".")


def unit(name: str) -> str:
    """Of a field, by the end of its name; "" where it has none."""
    return next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "")


def _allowed(field: FieldInfo) -> str:
    bounds: dict[str, Any] = {}
    metadata = [*_metadata(field.annotation), *field.metadata]
    for item in metadata:
        for name in _BOUNDS:
            if getattr(item, name, None) is not None:
                bounds[name] = getattr(item, name)
    limits = ", ".join(f"{sign} {short_number(bounds[name])}" for name, sign in _BOUNDS.items() if name in bounds)
    kind = _kind(field.annotation)
    return f"{kind} {limits}".strip()


def _metadata(annotation: Any) -> list[Any]:
    """Of the Annotated types inside an optional one."""
    found = list(getattr(annotation, "__metadata__", ()))
    for part in get_args(annotation):
        found += _metadata(part)
    return [item for entry in found for item in (getattr(entry, "metadata", None) or [entry])]


def _kind(annotation: Any) -> str:
    if annotation in _NAMES:
        return _NAMES[annotation]
    if get_origin(annotation) is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) in (list, tuple):
        return "list of numbers" if float in parts else "list"
    if get_origin(annotation) is dict:
        return "mapping"
    kinds = dict.fromkeys(_kind(part) for part in parts)
    return next(iter(kinds), "value")


def short_number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def default_text(field: FieldInfo) -> str:
    """As one would write it in YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        return f"({', '.join(f'{item:.3g}' for item in value[:2])}, ... {len(value)} in all)"
    if value is None or value in ({}, []):
        return "none"
    if isinstance(value, BaseModel):
        return f"{{kind: {kind_of(type(value))}}}" if "kind" in type(value).model_fields else "{}"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value) or "empty"
