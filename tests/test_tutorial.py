"""The tutorial's commands run as they stand and print what is quoted; `python docs/console.py` writes the outputs anew."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"from_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="the tutorial's commands are for bash, grep and GNU sed")
def test_every_command_prints_what_the_tutorial_quotes(tmp_path: Path) -> None:
    console, compare = load(ROOT / "docs" / "console.py"), load(ROOT / "tests" / "golden" / "compare.py")
    text = console.PAGE.read_text(encoding="utf-8")
    found = console.refreshed(text, tmp_path)
    blocks = list(zip(console.BLOCK.findall(text), console.BLOCK.findall(found), strict=True))
    assert len(blocks) == 7 and sum(len(console.commands(expected)) for expected, _ in blocks) == 8
    for expected, now in blocks:
        difference = compare.difference(expected, now)
        assert not difference, f"{console.commands(expected)[0]}: {difference}; run python docs/console.py if that is meant"


def test_prose_and_prints_agree() -> None:
    """What the text concludes from the outputs is what they say."""
    console = load(ROOT / "docs" / "console.py")
    _, _, first, more, quality, _, deploy = console.BLOCK.findall(console.PAGE.read_text(encoding="utf-8"))
    assert "full does not" in first and "meet the SLO" in first
    assert "full *" in more and "kv_quant *" not in more
    assert "kv_quant  -" in quality and "--kv-cache-dtype fp8" in deploy and "# snapkv: not in the released engine" in deploy


def test_a_failing_command_is_told(tmp_path: Path) -> None:
    console = load(ROOT / "docs" / "console.py")
    assert console.commands("$ a \\\n  b\nout\n$ c\n") == ["a \\\n  b", "c"]
    with pytest.raises(RuntimeError, match="exit code 2"):
        console.run("kvsim run nothing.yaml", tmp_path)
