"""The wheel: the rooms that stand at the top of the repository install inside kvsim, with all data and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, without a network: the build backend is in the environment."""
    source, target = tmp_path_factory.mktemp("source") / "kvsim", tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "out", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=skipped)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def expected(folder: str, package: str) -> set[str]:
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".json", ".typed", ".jinja", ".html", ".css", ".js")
        and not {"__pycache__", "results"} & set(path.relative_to(ROOT).parts)
    }


def test_every_file_of_every_room_is_inside_kvsim(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    rooms = {"kvsim": "kvsim", "kernels": "kvsim/kernels", "calibrate": "kvsim/calibrate", "reports": "kvsim/reports"}
    assert names == set().union(*(expected(folder, package) for folder, package in rooms.items()))
    assert {"kvsim/kernels/__init__.py", "kvsim/calibrate/measure.py", "kvsim/reports/files.py", "kvsim/py.typed"} <= names
    assert {"kvsim/data/gpus/a100-sxm-80gb.yaml", "kvsim/data/models/llama-3.1-8b.yaml"} <= names
    assert "kvsim/data/profiles/datasheet_efficiencies.yaml" in names
    assert {"kvsim/reports/html/style.css", "kvsim/reports/html/sort.js", "kvsim/reports/html/templates/page.html"} <= names


def test_no_other_name_at_the_top(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"kvsim", f"kvsim-{PROJECT['version']}.dist-info"}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    folder = f"kvsim-{PROJECT['version']}.dist-info"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    core = [line for line in needed if "extra ==" not in line]
    assert len(core) == len(PROJECT["dependencies"])
    assert not [line for line in core if "torch" in line or "triton" in line]
    assert "kvsim = kvsim.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_the_wheel_runs_without_the_repository(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); sys.meta_path[:] = "
        "[f for f in sys.meta_path if 'editable' not in repr(f)]; import kvsim, kvsim.reports.files, kvsim.kernels;"
        "from kvsim.cli import main; print(kvsim.__file__); sys.exit(main(['list', 'gpus']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(str(tmp_path / "site")) and "a100-sxm-80gb" in done.stdout


def test_every_direct_dependency_is_pinned_once() -> None:
    """Names and versions only: no address of any registry."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines) and "torch" in pins
    extras = PROJECT["optional-dependencies"]
    named = ("parquet", "notebook", "sweep", "ray", "calibrate", "kernels", "oracles", "test")
    direct = [*PROJECT["dependencies"], *(item for name in named for item in extras[name])]
    names = {item.split(">")[0].split("=")[0].split("[")[0].lower() for item in direct}
    assert names <= {pin.lower() for pin in pins}
