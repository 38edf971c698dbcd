"""vLLM 0.6.0's own engine on a CPU, with nothing but its GPU kernels taken out: what `vllm_v0_host.py` times.

Real: LLMEngine, Scheduler with the v1 block manager, GPUExecutor, Worker, ModelRunner with its input builder and FlashAttention metadata
builder, SamplingMetadata, LlamaForCausalLM, LogitsProcessor, Sampler, output processor, stop checker, incremental detokenizer, statistics.
Stood in for: kernels of `vllm._C` (C++ operators of the same schemas that do nothing), FlashAttention (an empty tensor of the answer's
shape), device set-up and memory profiling (gloo, a fixed number of blocks, no pinned memory), checkpoint and tokenizer (written here).
With fp8 weights also: compressed-tensors' linear layers with a scale a tensor, whose quantisation and product do nothing.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

VERSION = "0.6.0"
NUM_BLOCKS, MAX_MODEL_TOKENS, MAX_NUM_SEQS = 80_000, 8192, 256
TINY_VOCAB, TOKENIZER_VOCAB = 32, 128_000
"""Logits are over the first tokens only, so that arithmetic does not count; the tokenizer has as many as Llama 3's."""
A_SCALE_A_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
FP8_WEIGHTS = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "frozen", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": A_SCALE_A_TENSOR, "weights": A_SCALE_A_TENSOR}},
}  # fmt: skip
"""As in the config.json of neuralmagic's Meta-Llama-3.1-8B-Instruct-FP8."""

NO_OPS = """
#include <torch/library.h>
using at::Tensor;
static void rms_norm(Tensor& out, const Tensor& x, const Tensor& w, double eps) {}
static void fused_add_rms_norm(Tensor& x, Tensor& r, const Tensor& w, double eps) {}
static void silu_and_mul(Tensor& out, const Tensor& x) {}
static void rotary_embedding(const Tensor& p, Tensor& q, Tensor& k, int64_t d, const Tensor& c, bool neox) {}
static void static_scaled_fp8_quant(Tensor& out, const Tensor& x, const Tensor& scale) {}
static void cutlass_scaled_mm(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& sa, const Tensor& sb,
                              const c10::optional<Tensor>& bias) {}
static bool cutlass_scaled_mm_supports_fp8(int64_t capability) { return true; }
static void reshape_and_cache_flash(const Tensor& k, const Tensor& v, Tensor& kc, Tensor& vc, const Tensor& slots,
                                    const std::string& dtype, double ks, double vs) {}
TORCH_LIBRARY(_C, m) {
  m.def("rms_norm(Tensor! out, Tensor x, Tensor w, float eps) -> ()");
  m.impl("rms_norm", c10::kCPU, &rms_norm);
  m.def("fused_add_rms_norm(Tensor! x, Tensor! r, Tensor w, float eps) -> ()");
  m.impl("fused_add_rms_norm", c10::kCPU, &fused_add_rms_norm);
  m.def("silu_and_mul(Tensor! out, Tensor x) -> ()");
  m.impl("silu_and_mul", c10::kCPU, &silu_and_mul);
  m.def("rotary_embedding(Tensor p, Tensor! q, Tensor! k, int d, Tensor c, bool neox) -> ()");
  m.impl("rotary_embedding", c10::kCPU, &rotary_embedding);
  m.def("static_scaled_fp8_quant(Tensor! out, Tensor x, Tensor scale) -> ()");
  m.impl("static_scaled_fp8_quant", c10::kCPU, &static_scaled_fp8_quant);
  m.def("cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor sa, Tensor sb, Tensor? bias) -> ()");
  m.impl("cutlass_scaled_mm", c10::kCPU, &cutlass_scaled_mm);
  m.def("cutlass_scaled_mm_supports_fp8", &cutlass_scaled_mm_supports_fp8);
}
TORCH_LIBRARY(_C_cache_ops, m) {
  m.def("reshape_and_cache_flash(Tensor k, Tensor v, Tensor! kc, Tensor! vc, Tensor slots, str dtype, float ks, float vs) -> ()");
  m.impl("reshape_and_cache_flash", c10::kCPU, &reshape_and_cache_flash);
}
"""


def stand_in(sources: Path, folder: Path) -> None:
    """Makes `import vllm` work from the extracted wheel `sources`; builds the operators in `folder`."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sys.path.insert(0, str(sources))
    import torch
    from torch.utils.cpp_extension import load

    torch.set_num_threads(1)
    source = folder / "no_ops.cpp"
    source.write_text(NO_OPS, encoding="utf-8")
    load("no_ops", [str(source)], build_directory=str(folder), is_python_module=False)
    flash = types.ModuleType("vllm_flash_attn")
    flash.__spec__ = importlib.machinery.ModuleSpec("vllm_flash_attn", None)
    flash.flash_attn_varlen_func = lambda q, k, v, **_: torch.empty_like(q)  # type: ignore[attr-defined]
    flash.flash_attn_with_kvcache = lambda q, k, v, **_: torch.empty_like(q)  # type: ignore[attr-defined]
    sys.modules["vllm_flash_attn"] = flash
    import vllm
    import vllm._custom_ops as custom_ops
    import vllm.attention.selector as selector
    import vllm.model_executor.sampling_metadata as sampling_metadata
    from vllm.platforms import current_platform

    custom_ops.vllm = vllm
    type(current_platform).get_device_capability = staticmethod(lambda *_: (9, 0))  # asked by fp8 layers alone

    selector.which_attn_to_use = lambda *_: selector._Backend.FLASH_ATTN
    sampling_metadata.is_pin_memory_available = lambda: False


def write_checkpoint(folder: Path, num_layers: int, vocab_size: int = TINY_VOCAB, *, fp8: bool = False) -> None:
    """A Llama too small to cost arithmetic, and a byte-level BPE tokenizer of whole words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=num_layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=MAX_MODEL_TOKENS, bos_token_id=TOKENIZER_VOCAB,
        eos_token_id=TOKENIZER_VOCAB + 1,
    )  # fmt: skip
    if fp8:
        config.quantization_config = FP8_WEIGHTS
    config.save_pretrained(folder)
    letters = "etaoinshrdlucmfwypvbgkjqxz"

    def word(number: int) -> str:
        number += len(letters)
        text = ""
        while number:
            number, rest = divmod(number, len(letters))
            text += letters[rest]
        return text

    vocab = {f"\u0120{word(index)}": index for index in range(TOKENIZER_VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == vocab_size


def make_engine(folder: Path, num_layers: int, *, fp8: bool = False) -> Any:
    """An eager LLMEngine on the checkpoint written into `folder`, statistics on as under `vllm serve`."""
    import torch
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.engine.llm_engine import LLMEngine
    from vllm.executor.gpu_executor import GPUExecutor
    from vllm.model_executor.model_loader import get_model
    from vllm.version import __version__

    if __version__ != VERSION:
        raise SystemExit(f"sources are vLLM {__version__}: must be {VERSION}")

    class Executor(GPUExecutor):
        def _init_executor(self) -> None:
            store = f"file://{folder / 'store'}"
            init_distributed_environment(1, 0, store, 0, backend="gloo")
            ensure_model_parallel_initialized(1, 1, backend="gloo")
            worker = self.driver_worker = self._create_worker()
            worker.device = torch.device("cpu")
            runner = worker.model_runner
            runner.pin_memory = False
            runner.model = get_model(
                model_config=self.model_config, device_config=self.device_config, load_config=self.load_config, lora_config=None,
                parallel_config=self.parallel_config, scheduler_config=self.scheduler_config, cache_config=self.cache_config,
            )  # fmt: skip
            for module in runner.model.modules() if fp8 else ():  # the loader of dummy weights leaves this out
                method: Any = getattr(module, "quant_method", None)
                if hasattr(method, "process_weights_after_loading"):
                    method.process_weights_after_loading(module)

        def determine_num_available_blocks(self) -> tuple[int, int]:
            return NUM_BLOCKS, 256

        def initialize_cache(self, num_gpu_blocks: int, num_cpu_blocks: int) -> None:
            # One block for all: the operators that would write it do nothing.
            self.driver_worker.gpu_cache = [[torch.zeros(2, 1, 16, 1, 32) for _ in range(num_layers)]]

    write_checkpoint(folder, num_layers, fp8=fp8)
    arguments = EngineArgs(
        model=str(folder), device="cpu", dtype="bfloat16" if fp8 else "float32", load_format="dummy", enforce_eager=True,
        max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_TOKENS, enable_chunked_prefill=False, seed=0,
    )  # fmt: skip
    engine = LLMEngine(**arguments.create_engine_config().to_dict(), executor_class=Executor, log_stats=True)
    # Eager steps have no asynchronous output processing in this version: all parts of a step add up.
    assert not engine.model_config.use_async_output_proc
    assert not engine.scheduler_config.use_v2_block_manager
    return engine
