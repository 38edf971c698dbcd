"""Tensor parallelism without NVLink says how quick it takes PCIe to be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import kvsim
from kvsim.api import simulate
from kvsim.hardware import load_gpu
from kvsim.ops import Collective
from kvsim.profiles import load_profile
from kvsim.scenario import parse_scenario
from kvsim.serving import LINK_NOTE_BYTES


def notes(gpu: str, tp: int, base_dir: Path = Path()) -> str:
    scenario = {
        "gpu": gpu, "model": "llama-3.1-8b", "tensor_parallel": tp, "policies": {"full": []}, "engine": {"kind": "vllm_v1"},
        "workload": {
            "arrivals": {"kind": "all_at_once"}, "num_requests": 1,
            "lengths": {"kind": "fixed", "prompt_tokens": 64, "output_tokens": 4},
        },
    }  # fmt: skip
    return " ".join(simulate(parse_scenario(scenario, base_dir)).policies["full"].notes)


@pytest.mark.parametrize(("gpu", "tp"), [("l40s", 1), ("h100", 4)])
def test_nothing_is_said_where_no_message_crosses_pcie(gpu: str, tp: int) -> None:
    assert "NVLink" not in notes(gpu, tp)


@pytest.mark.parametrize("tp", [2, 8])
def test_the_rate_is_that_of_the_priced_message(tp: int) -> None:
    """Each of n GPUs sends 2 (n - 1) / n of a ring all-reduce's message."""
    found = re.search(r"all-reduces cross PCIe, at ([0-9.]+) GB/s", notes("l40s", tp))
    assert found is not None
    seconds = load_profile("auto", load_gpu("l40s"), "vllm").answer(Collective("all_reduce", LINK_NOTE_BYTES, tp)).seconds
    assert float(found[1]) == pytest.approx(2 * (tp - 1) / tp * LINK_NOTE_BYTES / seconds / 1e9, rel=0.05)


def test_a_gpu_file_with_the_machines_rate_ends_the_note(tmp_path: Path) -> None:
    own = yaml.safe_load((Path(kvsim.__file__).parent / "data" / "gpus" / "l40s-48gb.yaml").read_text(encoding="utf-8"))
    own |= {"name": "switched", "gpu_link_gb_per_s": 25.0}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    assert "NVLink" not in notes("own.yaml", 4, tmp_path)


def test_over_pcie_the_machine_counts_and_not_the_card() -> None:
    """Cards without a table, on the same PCIe, are taken for alike; none is quicker than its link, NVLink-C2C being none to other GPUs."""
    message = Collective("all_reduce", LINK_NOTE_BYTES, 4)
    cards = ("rtx-3090", "rtx-4090", "a40", "l4", "a100-pcie-80gb")
    seconds = [load_profile("auto", load_gpu(card), "vllm").answer(message).seconds for card in cards]
    assert max(seconds) == pytest.approx(min(seconds), rel=0.01)
    for card in (*cards, "h100-pcie-80gb", "rtx-5090", "gh200"):
        answer = load_profile("auto", load_gpu(card), "vllm").answer(message)
        assert 1.5 * LINK_NOTE_BYTES / answer.seconds < 0.7 * min(load_gpu(card).host_link_bytes_per_s, 63e9), card
        assert "b200" not in answer.source and "h100-sxm" not in answer.source
