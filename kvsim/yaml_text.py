"""YAML text as plain data. Refuses a key given twice, which plain YAML would silently overwrite."""

from __future__ import annotations

from typing import Any

import yaml

from kvsim.errors import InputError

MAX_DEPTH = 100
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key_node.start_mark)
            key = self.construct_object(key_node, deep=deep) if key_node.tag != _MERGE else "<<"
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(field: str, text: str, source: str) -> Any:
    """The data in `text`. field and source (a path, or the text itself) name it in the InputError for text that is no YAML."""
    try:
        _check_depth(field, text, source)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "syntax error"
        raise InputError(field, source, f"is not valid YAML{where}: {problem}", "correct that place") from None
    except ValueError as error:  # such as the date 2024-13-01
        raise InputError(field, source, f"is not valid YAML: {error}", "put such text in quotes") from None


def _check_depth(field: str, text: str, source: str) -> None:
    """libyaml builds nested data by recursion in C, which would end the process."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise InputError(field, source, f"is nested more than {MAX_DEPTH} deep", "check its brackets")
