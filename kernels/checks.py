"""Checks that `run` makes before any launch. Every refusal is a ValueError: argument, value, rule, what to do instead.

Of tensors on a GPU only shapes, dtypes, strides and devices are looked at: reading values would make every launch wait for the
device and could not be captured in a CUDA graph. What values must hold is documented with each `run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = range(1, 17)
HALF_DTYPES = (torch.float16, torch.bfloat16)


def refuse(name: str, value: object, rule: str, fix: str) -> NoReturn:
    raise ValueError(f"{name}={value} must {rule}; {fix}")


def require(condition: bool, name: str, value: object, rule: str, fix: str) -> None:
    if not condition:
        refuse(name, value, rule, fix)


def choice(name: str, value: object, allowed: Sequence[Any]) -> None:
    """Value is one of `allowed`."""
    require(value in allowed, name, repr(value), f"be one of {', '.join(map(str, allowed))}", "choose one of these")


def integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """A Python int (no bool) within [low, high]."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    bounds = f"be an integer >= {low}" + ("" if high is None else f" and <= {high}")
    require(good, name, repr(value), bounds, "pass such a Python int")


def positive(name: str, value: object) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
    require(good, name, repr(value), "be a finite number > 0", "pass such a number")


def tensor(
    name: str,
    value: object,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """A tensor of one of `dtypes`, of `shape` (None: any size) on `device`; dense row-major where `contiguous`."""
    if not isinstance(value, torch.Tensor):
        refuse(name, type(value).__name__, "be a torch.Tensor", "pass a tensor")
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    require(value.dtype in allowed, f"{name}.dtype", value.dtype, f"be {names}", f"convert it with {name}.to(...)")
    if shape is not None:
        actual = tuple(value.shape)
        fits = len(actual) == len(shape) and all(want in (None, have) for want, have in zip(shape, actual, strict=True))
        wanted = "(" + ", ".join("any" if want is None else str(want) for want in shape) + ")"
        require(fits, f"{name}.shape", actual, f"be {wanted}", "see the shapes in the docstring of run")
    if device is not None:
        require(value.device == device, f"{name}.device", value.device, f"be {device}, where the others are", "move it there")
    if contiguous:
        require(
            value.is_contiguous(), f"{name}.stride()", value.stride(), "be those of a contiguous tensor",
            f"pass {name}.contiguous()",
        )  # fmt: skip


def last_dim_dense(name: str, value: torch.Tensor) -> None:
    """Channels of a row lie side by side; other strides are free (views of a larger cache)."""
    require(value.stride(-1) == 1, f"{name}.stride(-1)", value.stride(-1), "be 1", f"pass {name}.contiguous()")


def head_dim(value: int) -> None:
    choice("head_dim", value, HEAD_DIMS)


def group_of(num_q_heads: int, kv_heads: int) -> int:
    """Query heads of a KV head; refuses counts that do not divide and groups past 16."""
    good = num_q_heads > 0 and num_q_heads % kv_heads == 0 and num_q_heads // kv_heads in GROUPS
    require(
        good, "q.shape[1]", num_q_heads, f"be 1 to {GROUPS[-1]} times the {kv_heads} KV heads",
        "pass q as [batch, q_heads, head_dim]",
    )  # fmt: skip
    return num_q_heads // kv_heads


def budget(name: str, value: int, length: int) -> None:
    """A number of kept tokens (channels) that does not exceed what there is."""
    require(0 <= value <= length, name, value, f"be within 0 and the length {length}", f"lower {name}")


def lengths(value: torch.Tensor, max_tokens: int) -> None:
    """Tokens of each head fit the cache. Looked at on the CPU only, where it costs no wait."""
    if value.device.type == "cpu" and value.numel():
        low, high = int(value.min()), int(value.max())
        require(low >= 0 and high <= max_tokens, "lengths", f"{low}..{high}", f"lie in 0..{max_tokens}, the cache's tokens", "trim them")
