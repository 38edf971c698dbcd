"""What a decoder needs to know of a model beyond its shape: activation, rotary embedding, epsilon."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsim.catalogue import read_text
from kvsim.errors import InputError
from kvsim.model import Model, load_model

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""Names in Hugging Face configurations → ours."""


@dataclass(frozen=True)
class DecoderSpec:
    """A model and the numbers that its shape leaves open.

    rotary_dim: channels that are rotated (GPT-J: 64 of 256), interleaved: in pairs side by side (GPT-J) or half and half (Llama).
    position_offset: added to learned positions (OPT: 2).
    """

    model: Model
    activation: str = "silu"
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rotary_dim: int = 0
    interleaved: bool = False
    position_offset: int = 0


def spec_of(model: Model) -> DecoderSpec:
    """The usual numbers of a model's family: what a step costs depends on none of them."""
    activation = "silu" if model.gated_mlp else "relu" if model.position == "learned" else "gelu"
    offset = max(0, model.num_learned_positions - model.max_context_tokens)
    return DecoderSpec(
        model, activation, rotary_dim=model.head_dim if model.position == "rope" else 0,
        interleaved=model.norms_per_layer == 1, position_offset=offset,
    )  # fmt: skip


def spec_from_hf(folder: Path) -> DecoderSpec:
    """Of a Hugging Face folder with ``config.json``. Raises InputError for rotary scalings that are not modelled."""
    model = load_model(folder)
    config: dict[str, Any] = json.loads(read_text("model", folder / "config.json"))
    name = config.get("hidden_act") or config.get("activation_function") or "silu"
    if name not in ACTIVATIONS:
        raise InputError("model.hidden_act", name, f"must be one of {', '.join(ACTIVATIONS)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError("model.rope_scaling", kind, "must be default", "scaled rotary embeddings are not modelled")
    usual = spec_of(model)
    return DecoderSpec(
        model, ACTIVATIONS[name], float(config.get("rms_norm_eps") or config.get("layer_norm_epsilon") or 1e-5),
        float(config.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        int(config.get("rotary_dim") or usual.rotary_dim), usual.interleaved, usual.position_offset,
    )  # fmt: skip
