"""Cache bytes by formula, as papers and logs print them. Largest batches are in `kv_compress`, where they are simulated."""

from __future__ import annotations

from kvsim.model import load_model
from kvsim.units import GIB
from kvsim.validation.cases import Bar, Row

NAME = "memory"
SCISSORHANDS_GIB = {"opt-175b": 1152.0, "bloom-176b": 980.0}
"""KV cache of 128 sequences of 2,048 tokens (Scissorhands, table 1; for BLOOM the formula's value, the paper prints another row's)."""
H2O_GIB = {("opt-6.7b", 24, 4096): 48.0, ("opt-13b", 4, 10000): 30.5, ("opt-30b", 1, 8024): 10.3}
"""Full caches of the H2O repository's FlexGen logs, to the digits printed there."""


def rows() -> list[Row]:
    found = []
    for name, gib in SCISSORHANDS_GIB.items():
        predicted = 128 * 2048 * load_model(name).kv_bytes_per_token() / GIB
        found.append(Row(NAME, "cache bytes", f"{name}, 128 x 2048 tokens", "GiB", gib, predicted, "Scissorhands, table 1"))
    for (name, batch, tokens), gib in H2O_GIB.items():
        predicted = batch * tokens * load_model(name).kv_bytes_per_token() / GIB
        case = f"{name}, {batch} x {tokens} tokens"
        found.append(Row(NAME, "cache bytes", case, "GiB", gib, round(predicted, 1), "H2O on FlexGen, logs"))
    return found


def bars(rows: list[Row]) -> list[Bar]:
    exact = [abs(row.error) for row in rows if row.group == "cache bytes"]
    return [Bar(NAME, "cache bytes: largest error", max(exact), 0.005)]
