"""Documents that are made of the code are current, and what README shows works."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from kvsim.catalogue import DATA
from kvsim.cli import main
from kvsim.commands.exit_codes import EXIT_CODES
from kvsim.hardware import load_gpu
from kvsim.scenario import Scenario
from kvsim.workload import WorkloadConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_documents_are_current(generate: ModuleType) -> None:
    for path, text in generate.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: run python docs/generate.py"


def test_every_key_of_a_gpu_file_is_described(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (DATA / "gpus").glob("*.yaml")]
    assert described == {key for content in files for key in content}
    example = tmp_path / "my-card.yaml"
    example.write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0], encoding="utf-8")
    assert load_gpu(example).sustained_flops_per_s == {"bf16": 160e12}


def test_every_field_of_a_scenario_is_described(generate: ModuleType) -> None:
    """With unit, bounds and default on the page, and a meaning in the code."""
    page = (ROOT / "docs" / "scenarios.md").read_text(encoding="utf-8")
    policies = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    blocks = {Scenario, WorkloadConfig}
    while True:
        found = {m for b in blocks for field in b.model_fields.values() for m in generate.models_in(field.annotation)}
        if found <= blocks:
            break
        blocks |= found
    assert len(blocks) > 25
    for block in blocks:
        for name, field in block.model_fields.items():
            if name == "kind" or field.exclude:
                continue
            assert field.description, f"{block.__name__}.{name} has no description"
            assert f"| `{name}` |" in page + policies, f"{block.__name__}.{name} is not in the documents"


def test_the_python_example_works(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = fenced("python")
    assert '"workload.num_requests": 300' in example
    small = example.replace('"workload.num_requests": 300', '"workload.num_requests": 110, "policies": {"full": [], "a": []}')
    exec(compile(small, "README.md", "exec"), {"__name__": "readme"})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(re.fullmatch(r"\S+ +\d+ tokens/s, p99 TTFT +[\d.]+ s", line) for line in lines)


def test_the_yaml_and_the_options_of_readme_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = fenced("yaml")
    WorkloadConfig.model_validate(yaml.safe_load(block)["workload"])
    assert main(["run", "--help"]) == 0
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", README)) <= options


def test_exit_codes_are_the_same_in_help_and_readme() -> None:
    codes = {int(code) for code in re.findall(r"^  (\d+) ", EXIT_CODES, re.MULTILINE)}
    assert codes == {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)} == {0, 1, 2, 130, 141}


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_numbers_quoted_from_the_data_are_those_of_the_data() -> None:
    from kvsim.hardware import list_gpus
    from kvsim.model import list_models

    assert f"{len(list_gpus())} GPUs and {len(list_models())} models" in README
    table = dict(re.findall(r"^\| ([^|]+?) \| (\d+\.\d) %", (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8"), re.MULTILINE))
    quoted = re.search(
        r"mean errors are (\d+) % for decode attention, (\d+)-(\d+) % for matrix\s+products and prefill attention, (\d+) % for all-reduce",
        README,
    )
    assert quoted is not None
    decode, least, most, reduce = map(int, quoted.groups())
    assert round(float(table["decode attention"])) == decode and round(float(table["all-reduce"])) == reduce
    others = [float(table[name]) for name in ("GEMM, 16 bit", "GEMM, fp8, int8, int4", "prefill attention")]
    assert least <= min(others) and round(max(others)) == most


def test_quoted_errors_are_those_of_shipped_profiles() -> None:
    """docs/profiles.md quotes benchmarks/profile_accuracy.py; the shipped tables of the same GPUs say the same to a point."""
    from kvsim.profile_file import load_profile_file, shipped

    table = dict(re.findall(r"^\| ([^|]+?) \| (\d+\.\d) %", (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8"), re.MULTILINE))
    gpus = ("a100-sxm-80gb", "h100-sxm-80gb", "rtx-4090-24gb")
    files = [load_profile_file(path) for path in shipped().values() if path.parent.name in gpus]
    for line, kind in (("decode attention", "decode_attention"), ("prefill attention", "prefill_attention"), ("all-reduce", "collective")):
        errors = [100 * table.mape for file in files for key, table in file.tables.items() if key[0] == kind]
        assert abs(sum(errors) / len(errors) - float(table[line])) < 1.0, line


def test_no_registry_is_named() -> None:
    for name in ("constraints.txt", "pyproject.toml", "Makefile", "README.md"):
        assert not re.search(r"index-url|find-links|pypi\.|/simple\b", (ROOT / name).read_text(encoding="utf-8")), name
