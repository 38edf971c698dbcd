"""Models of the serving that is compared, where the catalogue lacks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": True}
_QWEN25 = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **_QWEN3, "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128,
    },
    "qwen3-1.7b": {
        **_QWEN3, "num_hidden_layers": 28, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128,
    },
    "qwen2.5-0.5b": {
        **_QWEN25, "num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "qwen2.5-1.5b": {
        **_QWEN25, "num_hidden_layers": 28, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "qwen3-4b": {
        **_QWEN3, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728,
        "num_attention_heads": 32,
    },
    "qwen3-14b": {
        **_QWEN3, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "num_hidden_layers": 40,
        "hidden_size": 5120, "intermediate_size": 17408, "num_attention_heads": 40,
    },
    "qwen2.5-72b": {
        "model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False,
        "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8,
    },
    "qwen2.5-7b-1m": {
        "model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 1010000, "tie_word_embeddings": False,
        "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "llama-33b": {
        "model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048, "num_hidden_layers": 60, "hidden_size": 6656,
        "intermediate_size": 17920, "num_attention_heads": 52,
    },
}  # fmt: skip
"""config.json of the Hugging Face repositories, for models that the catalogue lacks."""


def reference(name: str, folder: Path) -> str:
    """What a scenario calls a model by: its file in the folder of `write_models`, or its name in the catalogue."""
    return str(folder / f"{name}.json") if name in MODELS else name


def write_models(folder: Path) -> None:
    """MODELS as files that a scenario can name."""
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
