"""The errors a user can meet. Every one is one line: field, value, rule, fix."""

from __future__ import annotations


class KvsimError(Exception):
    """Base of every error that kvsim raises on purpose; the command line prints it and exits with code 2."""


class InputError(KvsimError):
    """A field of the user's input breaks a rule.

    Attributes: field (dotted path such as ``policies.kivi.bits``), value (as given), rule ("must be ..."), fix (what to do).
    """

    def __init__(self, field: str, value: object, rule: str, fix: str = "") -> None:
        self.field, self.value, self.rule, self.fix = field, value, rule, fix
        # The arguments as they were: SimPy raises a copy made of them.
        super().__init__(field, value, rule, fix)

    def __str__(self) -> str:
        shown = "" if self.value is None else f"={_short(self.value)}"
        return f"{self.field}{shown} {self.rule}" + (f"; {self.fix}" if self.fix else "")


class DoesNotFitError(KvsimError):
    """The model, or one sequence of the workload, does not fit into GPU memory; the message says by how much."""


class _Null:
    """A null in the user's YAML."""

    def __repr__(self) -> str:
        return "null"


NULL = _Null()
"""Shown as null where an error's value None would show nothing."""


def _short(value: object, limit: int = 80) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
