"""Studies that `kvsim calibrate decode` runs where no scenario is given: small models on a CPU, layers of real ones on a GPU."""

from __future__ import annotations

from dataclasses import replace

from kvsim.calibrate.decoder.study import Study
from kvsim.model import Model, load_model
from kvsim.policies.ada_kv import AdaKV
from kvsim.policies.h2o import H2O
from kvsim.policies.keyformer import Keyformer
from kvsim.policies.kivi import KIVI
from kvsim.policies.kv_compress import KVCompress
from kvsim.policies.kv_quant import KVQuant
from kvsim.policies.pyramid_kv import PyramidKV
from kvsim.policies.scissorhands import Scissorhands
from kvsim.policies.snapkv import SnapKV
from kvsim.policies.streaming_llm import StreamingLLM
from kvsim.policies.think import ThinK
from kvsim.policies.window import Window
from kvsim.units import GIB, MIB

BLOCK_TOKENS = 32
"""KIVI's key groups are of 32 tokens, and a block holds whole groups."""

POOL_FRAC = 0.35
"""Of a GPU's memory: a cache of keys of two widths allocates it twice, and weights and activations want their own."""


def _policies(budget: int) -> dict[str, list[object]]:
    return {
        "full": [],
        "window": [Window(window_tokens=budget)],
        "streaming_llm": [StreamingLLM(window_tokens=budget - 4)],
        "h2o": [H2O(budget_tokens=budget)],
        "keyformer": [Keyformer(kept_frac=0.5)],
        "scissorhands": [Scissorhands(budget_tokens=budget)],
        "snapkv": [SnapKV(budget_tokens=budget, window_tokens=16)],
        "pyramid_kv": [PyramidKV(budget_tokens=budget, window_tokens=16)],
        "ada_kv": [AdaKV(budget_tokens=budget, window_tokens=16)],
        "kv_compress": [KVCompress(compression_ratio=4, min_kept_tokens=64, block_size_tokens=BLOCK_TOKENS)],
        "think": [ThinK()],
        "kivi2": [KIVI(bits=2, residual_tokens=64)],
        "int8": [KVQuant(dtype="int8")],
        "int4": [KVQuant(dtype="int4")],
        "fp8": [KVQuant(dtype="fp8")],
    }


def _small(name: str, layers: int, hidden: int, heads: int, kv_heads: int, wide: int, vocab: int) -> Model:
    return Model(name, layers, hidden, heads, kv_heads, 64, wide, vocab, 8192)


CPU_MODELS = (
    _small("small", 6, 512, 8, 2, 1408, 4000), _small("medium", 3, 768, 12, 4, 2048, 8000), _small("wide", 2, 1024, 8, 8, 2816, 8000),
)  # fmt: skip
CPU_UNSEEN = _small("unseen", 4, 640, 10, 5, 1792, 6000)
"""A shape between the others, for checking what was fitted to them."""


def cpu_study() -> Study:
    """fp32, as CPUs compute. Batches are close to each other: products of a few rows have steps (`kvsim.calibrate.fit.WHOLE`). So are
    chunks, which differ from policy to policy: their products do not.
    """
    models = {model.name: model for model in CPU_MODELS}
    sizes = ((1, 2, 3, 4, 6, 8), (64, 200, 500, 1200), (16, 24, 32, 48, 64, 96, 128, 192, 256), (0, 128, 512))
    fits = {"chunk_stride": 3, "fit_models": ("small",), "fit_contexts": (200, 500, 1200), "fit_pool_bytes": 16 * MIB}
    return Study(models, _policies(128), *sizes, "fp32", BLOCK_TOKENS, **fits)


def gpu_study(memory_bytes: int) -> Study:
    """Two layers of models of the catalogue: steps of whole ones are as many times as long. memory_bytes: the device's."""
    models = {name: replace(load_model(name), num_layers=2) for name in ("llama-3.1-8b", "llama-2-7b", "qwen2.5-7b")}
    sizes = ((1, 4, 16, 64), (512, 2048, 8192), (128, 512, 2048), (0, 2048, 8192))
    fits = {"fit_models": ("llama-3.1-8b",), "fit_contexts": (2048, 8192), "fit_pool_bytes": 2 * GIB}
    return Study(models, _policies(1024), *sizes, "bf16", BLOCK_TOKENS, int(POOL_FRAC * memory_bytes), **fits)
