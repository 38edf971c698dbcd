"""Rich's tables and texts on a terminal or in a pipe: plain text, no colour where nobody would see it."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType

PIPE_WIDTH = 100


def print_parts(parts: Iterable[RenderableType], file: TextIO) -> None:
    from rich.console import Console

    if file.isatty():
        console = Console(file=file, highlight=False, emoji=False, markup=False)
        for part in parts:
            console.print(part)
        return
    encoding, text = getattr(file, "encoding", None) or "utf-8", text_of(parts)
    if not encoding.lower().replace("-", "").startswith("utf"):
        text = text.replace("─", "-").encode(encoding, "replace").decode(encoding)
    file.write(text)


def text_of(parts: Iterable[RenderableType], width: int = PIPE_WIDTH) -> str:
    """Text without colour or trailing blanks."""
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(
        file=buffer, width=width, color_system=None, force_terminal=False, highlight=False, emoji=False, markup=False
    )
    for part in parts:
        console.print(part)
    return "".join(line.rstrip() + "\n" for line in buffer.getvalue().splitlines())
