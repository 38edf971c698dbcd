"""Find and read catalogue files: YAML in, checked values out, every fault one InputError.

A number in a catalogue file is written ``{value: 2039, source: "NVIDIA A100 datasheet"}``. A user's own file has the
same layout, and there a plain ``2039`` will do (its source is then "user file").
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvsim.errors import InputError
from kvsim.yaml_text import parse_yaml

DATA = Path(__file__).parent / "data"
USER_SOURCE = "user file"


def names(folder: str) -> list[str]:
    """Names in one catalogue folder (``gpus`` or ``models``), sorted."""
    return sorted(path.stem for path in (DATA / folder).glob("*.yaml"))


def is_path(name_or_path: str | Path) -> bool:
    """Whether the user means a file: it exists, or it is written as one (a Path, a separator, a known suffix)."""
    text = str(name_or_path)
    return (
        isinstance(name_or_path, Path)
        or text.endswith((".yaml", ".yml", ".json"))
        or text.startswith((".", "/", "~"))
        or ("/" in text and Path(text).exists())
    )


def unknown_name(field: str, name: str, known: Iterable[str], listing: str) -> InputError:
    """The error for a name that no catalogue has: the closest names, and the command that lists all."""
    wanted = name.rsplit("/", 1)[-1].lower().replace("_", "-")
    close = difflib.get_close_matches(wanted, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    fix = f"{hint}`{listing}` shows all names; a file path also works"
    return InputError(field, name, "is not in the catalogue", fix)


def read_text(field: str, path: Path, fix: str = "give a catalogue name or the path of a file") -> str:
    """Text of a user's file, or an InputError that says why not; fix: what to give instead."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(field, str(path), "does not exist", fix) from None
    except IsADirectoryError:
        raise InputError(field, str(path), "is a folder", fix) from None
    except UnicodeDecodeError:
        raise InputError(field, str(path), "must be UTF-8 text", fix) from None
    except OSError as error:
        raise InputError(field, str(path), f"cannot be read ({error.strerror or error})", fix) from None


def read_yaml(field: str, path: Path, layout: str = "") -> dict[str, Any]:
    """A YAML file whose top level is a mapping; layout: as of `Fields`."""
    content = parse_yaml(field, read_text(field, path), str(path))
    if not isinstance(content, dict):
        raise InputError(field, str(path), "must hold a mapping (key: value lines)", layout)
    return content


class Fields:
    """Reads one mapping key by key; what is missing, of the wrong type, out of range or unknown is an InputError.

    ``needs_source`` demands ``{value, source}`` for every number (catalogue files); ``sources`` collects them by key.
    ``layout`` says how such a file is written; it ends every message that knows nothing better.
    """

    def __init__(self, content: Mapping[str, Any], prefix: str, *, needs_source: bool = False, layout: str = "") -> None:
        self._content, self._prefix, self._needs_source, self._layout = content, prefix, needs_source, layout
        self._known: set[str] = set()
        self.sources: dict[str, str] = {}

    def field(self, key: str) -> str:
        """Dotted name of a key for messages."""
        return f"{self._prefix}.{key}"

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, in the file's order; each must be text."""
        for key in self._content:
            if not isinstance(key, str):
                raise InputError(self._prefix, key, "must have keys of text", "put them in quotes")
        return tuple(self._content)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._content.get(key) is not None

    def raw(self, key: str) -> Any:
        """The value as written (null when absent), without its source."""
        self._known.add(key)
        entry = self._content.get(key)
        if not isinstance(entry, dict) or "value" not in entry:
            return entry
        if extra := set(entry) - {"value", "source"}:
            unknown = self.field(f"{key}.{min(map(str, extra))}")
            raise InputError(unknown, None, "is not a known key", "use value and source")
        return entry["value"]

    def sourced(self, key: str) -> Any:
        """The value as written, its source noted in ``sources``."""
        value, entry = self.raw(key), self._content.get(key)
        source = entry.get("source") if isinstance(entry, dict) else None
        if source is None and self._needs_source and key in self._content:
            raise self._error(key, entry, "must be written {value: ..., source: ...}")
        if key in self._content:
            self.sources[key] = str(source or USER_SOURCE)
        return value

    def _required(self, key: str, value: Any) -> Any:
        if value is None:
            raise self._error(key, None, "is missing" if key not in self._content else "must not be null")
        return value

    def _error(self, key: str, value: object, rule: str) -> InputError:
        return InputError(self.field(key), value, rule, self._layout)

    def number(self, key: str) -> float:
        """A finite number > 0."""
        value = self._required(key, self.sourced(key))
        return positive_number(self.field(key), value, self._layout)

    def optional_number(self, key: str) -> float | None:
        """A finite number > 0, or None where the file says null or nothing."""
        value = self.sourced(key)
        return None if value is None else positive_number(self.field(key), value, self._layout)

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number >= minimum."""
        value = self.sourced(key)
        value = self._required(key, default if value is None else value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._error(key, value, "must be a whole number")
        if value < minimum:
            raise self._error(key, value, f"must be >= {minimum}")
        return value

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self.raw(key)
        value = self._required(key, default if value is None else value)
        if not isinstance(value, bool):
            raise self._error(key, value, "must be true or false")
        return value

    def text(self, key: str, default: str | None = None, *, choices: tuple[str, ...] = ()) -> str:
        """A non-empty string, one of ``choices`` where given."""
        value = self.raw(key)
        value = self._required(key, default if value is None else value)
        if not isinstance(value, str) or not value.strip():
            raise InputError(self.field(key), value, "must be text", "put it in quotes")
        if choices and value not in choices:
            raise self._error(key, value, f"must be one of {', '.join(choices)}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings, empty when absent."""
        value = self.raw(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._error(key, value, "must be a list of text")
        return tuple(value)

    def mapping(self, key: str) -> Fields:
        """A nested mapping."""
        value = self._required(key, self.raw(key))
        if not isinstance(value, dict):
            raise self._error(key, value, "must hold a mapping (key: value lines)")
        return Fields(value, self.field(key), needs_source=self._needs_source, layout=self._layout)

    def reject_unknown(self) -> None:
        """Complain about keys that nothing asked for: most are misspelt."""
        for key in self._content:
            if key not in self._known:
                close = difflib.get_close_matches(str(key), sorted(self._known), n=1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(self._known))}"
                raise InputError(self.field(str(key)), None, "is not a known key", hint)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def positive_number(field: str, value: object, layout: str = "") -> float:
    """A finite number > 0, else InputError (true and false are no numbers); layout: as of `Fields`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        fix = "write it without a unit, which is in the key's name" if isinstance(value, str) else layout
        if isinstance(value, str) and _is_number(value):  # YAML 1.1 takes 1e3 for text
            fix = "write it without quotes, and 1000 for 1e3"
        raise InputError(field, value, "must be a number", fix)
    if not math.isfinite(value) or value <= 0:
        raise InputError(field, value, "must be a finite number > 0", layout)
    return float(value)
