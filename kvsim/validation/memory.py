"""Cache bytes by formula, as papers and logs print them. Largest batches are in `kv_compress`, where they are simulated."""

from __future__ import annotations

from kvsim.hardware import load_gpu
from kvsim.model import Model, load_model
from kvsim.units import GIB
from kvsim.validation.cases import Bar, Row

NAME = "memory"
LLAMA_65B = Model(
    name="llama-65b", num_layers=80, hidden_size=8192, num_q_heads=64, num_kv_heads=64, head_dim=128, intermediate_size=22016,
    vocab_size=32000, max_context_tokens=2048, source="LLaMA (arXiv 2302.13971), table 2",
)  # fmt: skip
SCISSORHANDS_GIB = {"opt-175b": 1152.0, "llama-65b": 640.0, "bloom-176b": 980.0}
"""KV cache of 128 sequences of 2,048 tokens (Scissorhands, table 1; for BLOOM the formula's value, the paper prints another row's)."""
SCISSORHANDS_BATCH = {"opt-175b": 34.0, "llama-65b": 102.0, "bloom-176b": 36.0}
"""Largest batches on eight A100-80GB (table 2): the paper's own arithmetic, for BLOOM with GB taken for GiB."""
SEQUENCE_TOKENS = 2048
H2O_GIB = {("opt-6.7b", 24, 4096): 48.0, ("opt-13b", 4, 10000): 30.5, ("opt-30b", 1, 8024): 10.3}
"""Full caches of the H2O repository's FlexGen logs, to the digits printed there."""


def rows() -> list[Row]:
    found = []
    for name, gib in SCISSORHANDS_GIB.items():
        predicted = 128 * SEQUENCE_TOKENS * _model(name).kv_bytes_per_token() / GIB
        found.append(Row(NAME, "cache bytes", f"{name}, 128 x 2048 tokens", "GiB", gib, predicted, "Scissorhands, table 1"))
    room = 8 * load_gpu("a100-sxm-80gb").usable_bytes
    for name, batch in SCISSORHANDS_BATCH.items():
        model = _model(name)
        fits = float((room - model.weight_bytes("fp16")) // (SEQUENCE_TOKENS * model.kv_bytes_per_token()))
        source, confidence = "Scissorhands, table 2", "arithmetic of the paper, not measured"
        found.append(Row(NAME, "largest batch, no engine", name, "sequences", batch, fits, source, {}, "", confidence))
    for (name, batch, tokens), gib in H2O_GIB.items():
        predicted = batch * tokens * load_model(name).kv_bytes_per_token() / GIB
        case = f"{name}, {batch} x {tokens} tokens"
        found.append(Row(NAME, "cache bytes", case, "GiB", gib, round(predicted, 1), "H2O on FlexGen, logs"))
    return found


def _model(name: str) -> Model:
    return LLAMA_65B if name == LLAMA_65B.name else load_model(name)


def bars(rows: list[Row]) -> list[Bar]:
    exact = [abs(row.error) for row in rows if row.group == "cache bytes"]
    return [Bar(NAME, "cache bytes: largest error", max(exact), 0.005)]
