"""The matrices and vectors of a decoder: random ones for timing, or those of a Hugging Face folder of safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kvsim.calibrate.decoder.spec import DecoderSpec
from kvsim.errors import InputError

INITIALIZER_RANGE = 0.02
"""Of random matrices, as transformers' default."""


Norm = tuple[torch.Tensor, torch.Tensor | None]
"""Weight and bias."""


@dataclass
class Layer:
    """One layer; matrices are [outputs, inputs], fused as `kvsim.model.Model.gemms` lists them. Biases may be None."""

    matrices: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]
    norms: list[Norm]
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class Weights:
    """A whole model's."""

    layers: list[Layer]
    embedding: torch.Tensor
    positions: torch.Tensor | None
    embedding_norm: Norm | None
    final_norm: Norm
    head: torch.Tensor
    head_bias: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of all tensors, each counted once however often it is used."""
        found = [self.embedding, self.positions, *(self.embedding_norm or ()), *self.final_norm, self.head, self.head_bias]
        for layer in self.layers:
            found += [*layer.matrices.values(), *layer.biases.values(), *(part for norm in layer.norms for part in norm)]
            found += layer.qk_norms or ()
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in found if t is not None}.values())


def random_weights(
    spec: DecoderSpec, dtype: torch.dtype, device: str | torch.device, seed: int = 0, initializer_range: float = INITIALIZER_RANGE
) -> Weights:
    """Normal matrices, norms of ones, biases of zeros: the same numbers for a seed on every device of a kind."""
    model, generator = spec.model, torch.Generator(device).manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(initializer_range).to(dtype)

    def norm() -> Norm:
        ones = torch.ones(model.hidden_size, device=device, dtype=dtype)
        return ones, torch.zeros_like(ones) if model.norm_bias else None

    biased = {"qkv": model.qkv_bias, "o": model.o_bias, "gate_up": model.mlp_bias, "up": model.mlp_bias, "down": model.mlp_bias}
    layers = []
    for _ in range(model.num_layers):
        matrices = {gemm.name: matrix(gemm.n, gemm.k) for gemm in model.gemms()}
        biases = {
            gemm.name: torch.zeros(gemm.n, device=device, dtype=dtype) for gemm in model.gemms() if biased[gemm.name]
        }
        ones = torch.ones(model.head_dim, device=device, dtype=dtype)
        layers.append(
            Layer(matrices, biases, [norm() for _ in range(model.norms_per_layer)], (ones, ones.clone()) if model.qk_norm else None)
        )
    embedding = matrix(model.vocab_size, model.hidden_size)
    head = embedding if model.tied_embeddings else matrix(model.vocab_size, model.hidden_size)
    return Weights(
        layers, embedding, matrix(model.num_learned_positions, model.hidden_size) if model.num_learned_positions else None,
        norm() if model.embedding_norm else None, norm(), head,
        torch.zeros(model.vocab_size, device=device, dtype=dtype) if model.lm_head_bias else None,
    )  # fmt: skip


_LLAMA_LIKE = "model.layers.{}."


def hf_weights(spec: DecoderSpec, folder: Path, dtype: torch.dtype, device: str | torch.device) -> Weights:
    """Llama's layout of names (Llama, Mistral, Qwen2, Qwen3). Raises InputError where a tensor or safetensors is absent."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise InputError("--weights", str(folder), "needs safetensors, which is not installed", "pip install safetensors") from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError("--weights", str(folder), "must hold *.safetensors", "give the folder of a downloaded model")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= load_file(str(file))

    def take(*names: str) -> torch.Tensor:
        absent = [name for name in names if name not in tensors]
        if absent:
            raise InputError("--weights", str(folder), f"must hold {absent[0]}", "only Llama's names are known")
        return torch.cat([tensors[name] for name in names]).to(device, dtype)

    model, layers = spec.model, []
    for index in range(model.num_layers):
        p = _LLAMA_LIKE.format(index)
        qkv = [f"{p}self_attn.{part}_proj" for part in "qkv"]
        matrices = {
            "qkv": take(*(f"{name}.weight" for name in qkv)), "o": take(f"{p}self_attn.o_proj.weight"),
            "gate_up": take(f"{p}mlp.gate_proj.weight", f"{p}mlp.up_proj.weight"), "down": take(f"{p}mlp.down_proj.weight"),
        }  # fmt: skip
        biases = {}
        if model.qkv_bias:
            biases["qkv"] = take(*(f"{name}.bias" for name in qkv))
        if model.o_bias:
            biases["o"] = take(f"{p}self_attn.o_proj.bias")
        norms: list[Norm] = [(take(f"{p}{name}.weight"), None) for name in ("input_layernorm", "post_attention_layernorm")]
        qk = (take(f"{p}self_attn.q_norm.weight"), take(f"{p}self_attn.k_norm.weight")) if model.qk_norm else None
        layers.append(Layer(matrices, biases, norms, qk))
    embedding = take("model.embed_tokens.weight")
    head = embedding if model.tied_embeddings else take("lm_head.weight")
    return Weights(layers, embedding, None, None, (take("model.norm.weight"), None), head)
