"""Real kernels of the compression policies; installed as `kvsim.kernels`.

One module per kernel, each with the same names: `Shape`, `make_inputs(shape, rng, device)`, `reference(**inputs)` (plain torch,
float64 inside, any device), `run(**inputs)` (checks, allocates and launches the Triton kernel), `bytes_moved(shape)`,
`flops(shape)`, `TOLERANCE` (by dtype) and `compile_specs()`. Importing this package imports neither torch nor Triton.
"""

from importlib import import_module
from types import ModuleType

KERNELS = (
    "decode_attention",
    "decode_attention_scored",
    "prefill_scores",
    "select",
    "select_budgets",
    "compact",
    "metric_pool",
    "think_scores",
    "think_gather",
    "think_decode_attention",
    "kv_quantize",
    "kv_quant_decode_attention",
    "rerotate",
)
"""Module names of all kernels, the names that policies give in `PolicyKernel.kernel`."""

__all__ = ["KERNELS", "load"]


def load(name: str) -> ModuleType:
    """The module of a kernel; imports torch and Triton. Raises ValueError for a name that is not in KERNELS."""
    if name not in KERNELS:
        raise ValueError(f"name={name!r} must be a kernel; choose one of {', '.join(KERNELS)}")
    return import_module(f"kvsim.kernels.{name}")
