"""The base of every YAML block: immutable, unknown keys rejected, numbers finite and never true or false."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Frozen(BaseModel):
    """A YAML block."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, data: Any) -> Any:
        """Python would take true for 1."""
        for name, value in data.items() if isinstance(data, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields:
                annotation = cls.model_fields[name].annotation
                if {int, float} & {annotation, *get_args(annotation)}:
                    raise ValueError(f"{name}={str(value).lower()} must be a number; true and false are none")
        return data
