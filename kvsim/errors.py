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
        shown = "" if value is None else f"={_short(value)}"
        super().__init__(f"{field}{shown} {rule}" + (f"; {fix}" if fix else ""))


class DoesNotFitError(KvsimError):
    """The model, or one sequence of the workload, does not fit into GPU memory; the message says by how much."""


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
