"""vLLM 0.12.0's own V1 engine on a CPU, with nothing but its GPU taken out: what `vllm_v1_host.py` times.

Real: EngineCore with its loop and its output thread, Scheduler with prefix caching, UniProcExecutor, WorkerWrapperBase, Worker,
GPUModelRunner with its persistent batch, FlashAttention metadata builder, dispatcher and wrapper of CUDA graphs, LogitsProcessor, Sampler,
OutputProcessor with detokenizer, statistics. The platform is CudaPlatformBase: whatever asks is told that this is a Hopper GPU, whose
device is the CPU. Stood in for: the captured graph (replay does nothing; steps with prompts get empty hidden states without running the
model), the matrix product of the logits (an empty tensor of its shape), CUDA events and streams, `get_scheduler_metadata` of FlashAttention
3 (a C++ operator of the same schema that returns an empty tensor), the copy of the block table (one number: on a GPU it is the copy
engine's work), device set-up and memory profiling, the cache's memory (never touched), checkpoint and tokenizer (written here, as for
vLLM 0.6.0).
"""

from __future__ import annotations

import os
import queue
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_v0_engine import MAX_MODEL_TOKENS, MAX_NUM_SEQS, NUM_BLOCKS, write_checkpoint

VERSION = "0.12.0"
NUM_LAYERS, MAX_BATCHED_TOKENS, VOCAB = 32, 8192, 2
"""Logits are over two tokens: over 32, noise for 256 sequences would take a CPU 0.2 ms."""
OUTPUT_PATH = "ipc://{folder}/outputs"
COMPILED = ("vllm._C", "vllm._moe_C", "vllm.cumem_allocator", "vllm.vllm_flash_attn._vllm_fa2_C", "vllm.vllm_flash_attn._vllm_fa3_C")
"""Extension modules of the wheel: empty here."""
UNSUPPORTED = ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8", "cutlass_group_gemm_supported")
"""Questions to `vllm._C` on import: answered with no."""

NO_OPS = """
#include <ATen/ops/empty.h>
#include <torch/library.h>
using at::Tensor;
using OptTensor = std::optional<Tensor>;
static Tensor get_scheduler_metadata(
    int64_t batch, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, at::ScalarType, const Tensor& seqused_k, const OptTensor&,
    const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&, std::optional<int64_t>, int64_t, bool, int64_t, int64_t, bool,
    int64_t, std::optional<bool>, int64_t) { return at::empty({batch + 1}, seqused_k.options()); }
TORCH_LIBRARY(_C, m) { m.def("silu_and_mul(Tensor! out, Tensor x) -> ()"); }  // asked for, never called
TORCH_LIBRARY(_vllm_fa3_C, m) {
  m.def("get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, int headdim, "
        "int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, "
        "Tensor? seqused_q, Tensor? leftpad_k, int? page_size, int max_seqlen_k_new, bool is_causal, int window_size_left, "
        "int window_size_right, bool has_softcap, int num_splits, bool? pack_gqa, int sm_margin) -> Tensor");
  m.impl("get_scheduler_metadata", c10::kCPU, &get_scheduler_metadata);
}
"""

waits: list[Callable[[], None]] = []
"""Called where the engine waits for the device."""


class Event:
    """A CUDA event."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None:
        for wait in waits:
            wait()


class Stream:
    """A CUDA stream."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


class Graph:
    """A captured graph."""

    num_replays = 0

    def replay(self) -> None:
        Graph.num_replays += 1


def stand_in(sources: Path, folder: Path) -> None:
    """Makes `import vllm` work from the extracted wheel `sources`; builds the operator in `folder`."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sys.path.insert(0, str(sources))
    import torch
    from torch.utils.cpp_extension import load

    torch.set_num_threads(1)
    torch.Event, torch.cuda.Stream = Event, Stream  # type: ignore[assignment, misc]
    source = folder / "no_ops.cpp"
    source.write_text(NO_OPS, encoding="utf-8")
    load("no_ops", [str(source)], build_directory=str(folder), is_python_module=False)
    for name in COMPILED:
        sys.modules[name] = types.ModuleType(name)
    _replace_platform()
    import vllm._custom_ops as custom_ops
    import vllm.model_executor.layers.utils as layers
    import vllm.model_executor.models.registry as registry
    import vllm.vllm_flash_attn.flash_attn_interface as flash
    from vllm.config import CompilationConfig

    for name in UNSUPPORTED:
        setattr(custom_ops, name, lambda *_: False)
    registry._run_in_subprocess = lambda function: function()  # a process of its own would not know the platform
    layers.default_unquantized_gemm = lambda layer, x, weight, bias=None: x.new_empty(len(x), len(weight))
    CompilationConfig.init_backend = lambda *_: "eager"  # never called: the model is not run
    flash.is_fa_version_supported = lambda version, device=None: version in (2, 3)


def _replace_platform() -> None:
    import vllm.platforms as platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Platform(CudaPlatformBase):
        device_name = device_type = "cpu"
        dispatch_key, dist_backend = "CPU", "gloo"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "none"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return False

        @classmethod
        def get_current_memory_usage(cls, device: Any = None) -> float:
            return 0.0

        @classmethod
        def get_global_graph_pool(cls) -> None:
            return None

    platforms._current_platform = Platform()


def make_runner(config: Any) -> Any:
    """GPUModelRunner on a CPU."""
    import torch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    class Runner(GPUModelRunner):
        def _init_device_properties(self) -> None:
            self.num_sms = 132

        def _sync_device(self) -> None: ...

        def _allocate_kv_cache_tensors(self, kv_cache_config: Any) -> dict[str, torch.Tensor]:
            """Nobody reads or writes it, so that it takes no memory."""
            tensors = kv_cache_config.kv_cache_tensors
            return {name: torch.empty(tensor.size, dtype=torch.int8) for tensor in tensors for name in tensor.shared_by}

        def capture(self) -> None:
            """A graph of every decode batch that vLLM would capture."""
            from vllm.compilation.cuda_graph import CUDAGraphEntry
            from vllm.config import CUDAGraphMode

            hidden = torch.zeros(self.max_num_tokens, self.model_config.get_hidden_size(), dtype=self.dtype)
            graphs = self.model
            graphs.unwrap().forward = lambda input_ids, **_: hidden[: len(input_ids)]
            for key in self.cudagraph_dispatcher.cudagraph_keys[CUDAGraphMode.FULL]:
                graphs.concrete_cudagraph_entries[key] = CUDAGraphEntry(key, Graph(), hidden[: key.num_tokens])
            for table in self.input_batch.block_table.block_tables:
                shorten_copy(table.block_table)

    return Runner(config, torch.device("cpu"))


def shorten_copy(buffer: Any) -> None:
    """Has a CpuGpuBuffer's copy issued as it is, but of one number."""
    target, source = buffer.gpu.flatten()[:1], buffer.cpu.flatten()[:1]

    def copy_to_gpu(n: int) -> Any:
        gpu, _ = buffer.gpu[:n], buffer.cpu[:n]
        target.copy_(source, non_blocking=True)
        return gpu

    buffer.copy_to_gpu = copy_to_gpu


def __getattr__(name: str) -> Any:
    """CpuWorker, by which vLLM finds it, once vLLM can be imported."""
    if name != "CpuWorker":
        raise AttributeError(name)
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment

    class CpuWorker(Worker):
        def init_device(self) -> None:
            init_worker_distributed_environment(
                self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, current_platform.dist_backend
            )
            self.model_runner = make_runner(self.vllm_config)

        def determine_available_memory(self) -> int:
            return NUM_BLOCKS * sum(spec.page_size_bytes for spec in self.get_kv_cache_spec().values())

        def compile_or_warm_up_model(self) -> None:
            self.model_runner.capture()

    globals()[name] = CpuWorker
    return CpuWorker


def make_engine(folder: Path) -> tuple[Any, Any]:
    """(EngineCore in the loop of EngineCoreProc without its sockets, configuration), on the checkpoint written into `folder`."""
    import vllm.envs as envs
    from vllm.config import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.executor.abstract import Executor
    from vllm.version import __version__

    if __version__ != VERSION:
        raise SystemExit(f"sources are vLLM {__version__}: must be {VERSION}")

    class Core(EngineCore):
        _process_input_queue = EngineCoreProc._process_input_queue
        _process_engine_step = EngineCoreProc._process_engine_step
        _handle_client_request = EngineCoreProc._handle_client_request
        process_output_sockets = EngineCoreProc.process_output_sockets

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.engines_running = False
            self.input_queue: queue.Queue[Any] = queue.Queue()
            self.output_queue: queue.Queue[Any] = queue.Queue()

        def one_round(self) -> None:
            """Of `run_busy_loop`."""
            self._process_input_queue()
            self._process_engine_step()

    write_checkpoint(folder, NUM_LAYERS, VOCAB)
    arguments = EngineArgs(
        model=str(folder), dtype="bfloat16", load_format="dummy", max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_TOKENS,
        max_num_batched_tokens=MAX_BATCHED_TOKENS, seed=0,
    )  # fmt: skip
    config = arguments.create_engine_config()
    config.parallel_config.worker_cls = f"{__name__}.CpuWorker"
    core = Core(config, Executor.get_class(config), True)
    envs.enable_envs_cache()  # as EngineCoreProc does when it is ready
    assert not config.scheduler_config.async_scheduling and config.cache_config.enable_prefix_caching
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
    return core, config
