"""What `kvsim init` writes loads, fits and runs, on every GPU and engine; shells complete what options take."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from kvsim.api import simulate
from kvsim.cli import main
from kvsim.commands.init import ENGINE_KINDS, TRAFFIC_NAMES, WEIGHT_DTYPES
from kvsim.dtypes import WeightDtype
from kvsim.engines import ENGINES
from kvsim.errors import DoesNotFitError, InputError
from kvsim.hardware import list_gpus
from kvsim.model import list_models
from kvsim.policies import POLICIES
from kvsim.scenario import load_scenario, parse_scenario
from kvsim.schema import kind_of
from kvsim.starter import TRAFFIC, Answers, policy_blocks, starter_text
from kvsim.yaml_text import parse_yaml

MODELS = ("opt-6.7b", "llama-3.1-8b", "llama-3.1-70b")
TRACE = "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i * 0.2},300,20\n" for i in range(60))


def answers(**changes: Any) -> Answers:
    plain = {"gpu": "a100-sxm-80gb", "model": "llama-3.1-8b", "engine": "vllm_v1", "traffic": "chat", "policies": ("full",)}
    return Answers(**(plain | {"rate_per_s": 1.0} | changes))


def parsed(text: str, folder: Path = Path()) -> Any:
    return parse_scenario(parse_yaml("scenario", text, "text"), folder)


def test_constants_that_spare_an_import_are_true() -> None:
    assert tuple(kind_of(engine) for engine in ENGINES if not engine.offloads) == ENGINE_KINDS
    assert tuple(TRAFFIC) == TRAFFIC_NAMES and get_args(WeightDtype) == WEIGHT_DTYPES


@pytest.mark.parametrize("gpu", list_gpus())
def test_every_gpu_and_engine_gets_a_scenario_that_runs_or_a_reason(gpu: str) -> None:
    """The model is the only thing that may not fit; then no degree does, and the message says what would."""
    for model in MODELS:
        for engine in ENGINE_KINDS:
            chosen = answers(gpu=gpu, model=model, engine=engine, policies=("full", "snapkv+kivi"))
            if engine == "trtllm" and gpu.startswith("mi"):
                with pytest.raises(InputError, match="must be vllm_v1 or sglang on mi"):
                    starter_text(chosen)
                continue
            try:
                scenario = parsed(starter_text(chosen))
            except DoesNotFitError as error:
                reason = str(error)
                assert model == "llama-3.1-70b" and reason.startswith("no tensor_parallel of 1, 2, 4, 8 will do; with the largest: ")
                assert "llama-3.1-70b does not fit on 8 x" in reason or "must fit the KV pool" in reason
                continue
            assert (scenario.gpu, scenario.model, scenario.engine.kind) == (gpu, model, engine)
            tp = scenario.tensor_parallel
            if tp > 1:
                with pytest.raises((DoesNotFitError, InputError)):
                    starter_text(answers(gpu=gpu, model=model, engine=engine, policies=("full", "snapkv+kivi"), tensor_parallel=tp // 2))
    workload = scenario.workload.model_copy(update={"num_requests": 20, "warmup_requests": 0})
    result = simulate(scenario.model_copy(update={"workload": workload}))
    assert all(policy.summary.num_requests == 20 for policy in result.policies.values())


@pytest.mark.parametrize("engine", ENGINE_KINDS)
def test_every_policy_can_be_asked_for(engine: str) -> None:
    kinds = [kind_of(policy) for policy in POLICIES]
    scenario = parsed(starter_text(answers(engine=engine, policies=tuple(kinds))))
    assert list(scenario.policies) == kinds
    workload = scenario.workload.model_copy(update={"num_requests": 10, "warmup_requests": 0})
    assert set(simulate(scenario.model_copy(update={"workload": workload})).policies) == set(kinds)


@pytest.mark.parametrize("traffic", TRAFFIC_NAMES)
def test_the_rate_it_finds_is_busy_and_borne(traffic: str) -> None:
    text = starter_text(answers(traffic=traffic, rate_per_s=None))
    assert "70% of what full served" in text
    scenario = parsed(text)
    workload = scenario.workload.model_copy(update={"num_requests": 300})
    (full,) = simulate(scenario.model_copy(update={"workload": workload})).policies.values()
    assert full.summary.queue_growth is not None and not full.summary.queue_growth.overloaded
    assert full.summary.utilisation_frac > 0.6


def test_requests_are_cut_to_the_models_context() -> None:
    lengths = parsed(starter_text(answers(model="opt-6.7b"))).workload.lengths
    assert lengths.prompt_max_tokens + lengths.output_max_tokens <= 2048
    with pytest.raises(InputError, match=r"too long for the 2,048 of opt-6\.7b"):
        starter_text(answers(model="opt-6.7b", traffic="rag"))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"gpu": "a1000"}, "is not in the catalogue"), ({"model": "lama"}, "did you mean"), ({"engine": "vllm"}, "is not an engine"),
     ({"traffic": "chats"}, "use chat, summarise, rag"), ({"traffic": "none.csv"}, "does not exist"),
     ({"policies": ("snapk",)}, "is not a policy"), ({"policies": ("snapkv+h2o",)}, "at most one policy that acts on tokens"),
     ({"tensor_parallel": 7}, "must divide the 32 query heads"), ({"weight_dtype": "bf17"}, "weight_dtype")],
)  # fmt: skip
def test_wrong_answers_are_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    if change.get("traffic") == "none.csv":
        change = {**change, "rate_per_s": None}
    with pytest.raises(InputError, match=message):
        starter_text(answers(**change))


def test_blocks_are_what_the_documents_call_usual() -> None:
    assert policy_blocks("snapkv+think", 1155, 16) == [
        {"kind": "snapkv", "budget_tokens": 576}, {"kind": "think", "pruned_frac": 0.4}
    ]  # fmt: skip
    assert policy_blocks("full", 1155, 16) == []


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_once_and_the_scenario_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    command = ["init", "--gpu", "l4", "--rate", "0.5", "--policies", "full, snapkv+kivi", "--out", "my.yaml"]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "wrote my.yaml: 1 x l4, llama-3.1-8b, poisson 0.5 requests/s" in said and "next: kvsim run my.yaml" in said
    written = (tmp_path / "my.yaml").read_bytes()
    assert main(["run", "my.yaml", "--set", "workload.num_requests=60", "--sections", "verdict"]) == 0
    assert main(command) == 2 and "my.yaml' exists already" in capsys.readouterr().err
    assert (tmp_path / "my.yaml").read_bytes() == written
    assert main([*command, "--force", "--engine", "sglang"]) == 0
    assert load_scenario(tmp_path / "my.yaml").engine.kind == "sglang"  # type: ignore[attr-defined]
    assert main(["init", "--policies", " , ", "--out", "none.yaml"]) == 2 and "at least one policy" in capsys.readouterr().err
    assert main(["init", "--out", "nowhere/my.yaml"]) == 2 and "there is no folder nowhere" in capsys.readouterr().err
    assert main(["init", "--model", "llama-3.1-405b", "--gpu", "t4", "--out", "big.yaml"]) == 2
    assert "does not fit" in capsys.readouterr().err and not (tmp_path / "big.yaml").exists()


def test_traces_and_files_are_found_from_the_scenarios_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    (tmp_path / "log.csv").write_text(TRACE)
    (tmp_path / "deep").mkdir()
    command = ["init", "--traffic", "log.csv", "--policies", "full"]
    assert main([*command, "--out", "deep/s.yaml"]) == 0
    assert load_scenario("deep/s.yaml").workload.trace.path == "../log.csv"  # type: ignore[union-attr]
    assert main(["run", "deep/s.yaml", "--sections", "verdict"]) == 0
    capsys.readouterr()
    assert main([*command, "--out", "-"]) == 0
    assert parsed(capsys.readouterr().out).workload.trace.path == "log.csv"
    assert main([*command, "--rate", "3", "--out", "-"]) == 2 and "has its own" in capsys.readouterr().err


def test_questions_on_a_terminal(tmp_path: Path) -> None:
    """A wrong answer is explained and asked again; Return takes the default."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "kvsim.cli", "init", "--rate", "1", "--out", "s.yaml"]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path) as process:
        os.close(slave)
        os.write(master, b"a1000\nl4-24gb\n\nsglang\n\nfull,snapkv\n")
        shown = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:
                break
            if not part:
                break
            shown += part
    os.close(master)
    assert process.returncode == 0, shown.decode()
    assert b"is not in the catalogue" in shown and shown.count(b"GPU (kvsim list gpus)") == 2
    scenario = load_scenario(tmp_path / "s.yaml")
    assert (scenario.gpu, scenario.model, scenario.engine.kind) == ("l4-24gb", "llama-3.1-8b", "sglang")  # type: ignore[attr-defined]
    assert list(scenario.policies) == ["full", "snapkv"]


# -- completion -------------------------------------------------------------------------------------------------------


def completions(words: str, cwd: Path | None = None) -> list[str]:
    """What bash gets for a command line, its last word unfinished."""
    environment = os.environ | {"_KVSIM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "kvsim.cli"], env=environment, capture_output=True, text=True, timeout=60, check=True, cwd=cwd
    )
    return [line.split(",", 1)[1] for line in done.stdout.splitlines() if line]


def test_shells_complete_commands_and_names(tmp_path: Path) -> None:
    assert {"init", "run", "schema", "completion"} <= set(completions("kvsim "))
    assert completions("kvsim init --gpu h100") == [name for name in list_gpus() if name.startswith("h100")]
    assert completions("kvsim init --model ") == list_models()
    assert completions("kvsim init --policies full,snapkv+ki") == ["full,snapkv+kivi"]
    assert completions("kvsim list ga") == [] and completions("kvsim list gp") == ["gpus"]
    (tmp_path / "s.yaml").write_text(starter_text(answers(policies=("full", "snapkv", "think"))))
    assert completions("kvsim run s.yaml --policy s", tmp_path) == ["snapkv"]
    assert completions("kvsim run nothing.yaml --policy s", tmp_path) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_of_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_KVSIM_COMPLETE" in script and f"{shell}_complete" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
