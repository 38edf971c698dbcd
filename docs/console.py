"""Runs the ```console blocks of docs/tutorial.md and writes their outputs back: `python docs/console.py`.

Each line that starts with "$ " is run by bash, one after the other, in one empty folder; what follows it is its output.
tests/test_tutorial.py does the same and compares.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parent / "tutorial.md"
BLOCK = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)


def commands(block: str) -> list[str]:
    """The commands of one block; a line that ends with a backslash goes on in the next."""
    joined = block.replace("\\\n", "\\\0")
    return [line[2:].replace("\\\0", "\\\n") for line in joined.splitlines() if line.startswith("$ ")]


def run(command: str, folder: Path) -> str:
    """What the command prints, errors included."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def refreshed(text: str, folder: Path) -> str:
    """The page with every output as it is now."""

    def block(match: re.Match[str]) -> str:
        parts = [f"$ {command}\n{run(command, folder).strip(chr(10))}".rstrip() + "\n" for command in commands(match[0])]
        return "\n".join(parts)

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8"), Path(name)), encoding="utf-8")
