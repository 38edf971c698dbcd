"""A documented CSV of hand-made rows: one measured launch a line, blank cells where a column does not apply.

Columns by kind (`docs/profiles.md` has an example); lines that begin with # are comments, further columns are ignored:

- every row: ``kind`` and one of ``time_us``, ``time_ms``, ``time_s``
- gemm: ``m, n, k, dtype`` (bf16, fp16, fp8, int8 or sq, int4 or int4_wo)
- decode_attention: ``batch, q_heads, kv_heads, head_dim, context_tokens``; ``kv_dtype`` (default bf16)
- prefill_attention: ``q_heads, kv_heads, head_dim, new_tokens``; ``batch`` (1), ``context_tokens`` cached before (0), ``kv_dtype``
- mixed_attention: as prefill, and ``n_decode, decode_context_tokens``
- elementwise: ``num_bytes``, or ``op, num_tokens, hidden, ffn, tp`` with op one of ELEMENTWISE_WIDTHS
- all_reduce: ``n_gpu, message_bytes``; ``impl`` holding "eager" for launches outside a CUDA graph
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

from kvsim.calibrate.rows import Import, Rejected
from kvsim.errors import InputError
from kvsim.hardware import Gpu
from kvsim.ops import Collective, DecodeAttention, Elementwise, Gemm, MixedAttention, Op, PrefillAttention

TIMES = {"time_us": 1e-6, "time_ms": 1e-3, "time_s": 1.0}
GEMM_DTYPES = {
    "bf16": "bf16", "fp16": "fp16", "16bit": "bf16", "fp8": "fp8", "int8": "int8", "sq": "int8", "int4": "int4", "int4_wo": "int4",
}  # fmt: skip
OTHER_GEMM_DTYPES = ("fp8_block", "int8_wo", "nvfp4")
"""Known, and not an Op of ours: other arithmetic."""
KV_DTYPES = {"": ("bf16", 2), "bf16": ("bf16", 2), "fp16": ("fp16", 2), "16bit": ("bf16", 2), "fp8": ("fp8", 1)}
ELEMENTWISE_WIDTHS = ("add", "input_layernorm", "layernorm", "final_layernorm", "mlp_act", "act_fn")
MOSTLY = 0.5


def engines(path: Path) -> list[str]:
    """The values of the column ``engine``, in order of appearance; [] where there is none."""
    return list(dict.fromkeys(cells["engine"] for _, cells in _lines(path) if cells.get("engine")))


def read(
    path: Path, gpu: Gpu, engine: str, version: str, *, only_engine: str | None = None, source: str = ""
) -> Import:
    """All rows of the file that are possible on this GPU; the others with what is wrong, by line.

    only_engine: rows whose column ``engine`` holds this text. Raises InputError for a missing file or column, a kind that is none,
    and where most rows are impossible, which means a wrong unit or GPU.
    """
    found = Import(engine, version, source or f"{path.name} (own measurements)")
    seen = 0
    for number, cells in _lines(path):
        if only_engine is not None and cells.get("engine") != only_engine:
            continue
        where = f"{path.name} {cells['kind']} {cells.get('dtype', '')}:{number}"
        try:
            made = _op(path, cells)
            if made is None:
                continue
            seen += 1
            found.add(made, _seconds(path, cells), where, gpu)
        except ValueError as error:
            seen += 1
            found.rejected.append(Rejected(where, str(error)))
    if not seen:
        what = f" of engine {only_engine}" if only_engine else ""
        raise InputError("csv", str(path), f"must hold rows{what}", f"its engines are {', '.join(engines(path)) or 'not stated'}")
    if len(found.rejected) > MOSTLY * seen:
        first = found.rejected[0]
        raise InputError(
            "csv", str(path), f"must hold mostly possible rows; {len(found.rejected)} of {seen} are not ({first.where}: {first.reason})",
            f"check the unit of its times and that they were taken on {gpu.name}",
        )  # fmt: skip
    return found


def _lines(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("csv", str(path), f"must be a text file that can be read ({error})") from error
    kept = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if not kept:
        raise InputError("csv", str(path), "must hold a header and rows")
    reader = csv.DictReader(line for _, line in kept)
    names = reader.fieldnames or []
    if "kind" not in names:
        raise InputError("csv", str(path), f"must have a column kind; it has {', '.join(names)}", "kinds: " + ", ".join(_MAKERS))
    if not any(name in names for name in TIMES):
        raise InputError("csv", str(path), "must have a column time_us, time_ms or time_s")
    return [(number, {k: v or "" for k, v in cells.items() if k}) for (number, _), cells in zip(kept[1:], reader, strict=True)]


def _seconds(path: Path, cells: Mapping[str, str]) -> float:
    for name, scale in TIMES.items():
        if cells.get(name):
            return _number(cells, name) * scale
    raise ValueError("has no time")


def _number(cells: Mapping[str, str], name: str) -> float:
    try:
        value = float(cells[name])
    except KeyError:
        raise _Absent(name) from None
    except ValueError:
        raise ValueError(f"{name} is {cells[name] or 'empty'}, which must be a number") from None
    if not 0 < value < 1e15 and not (value == 0 and name == "context_tokens"):
        raise ValueError(f"{name} is {cells[name]}, which must be above 0")
    return value


class _Absent(Exception):
    """A column that a kind needs."""


def _whole(cells: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not cells.get(name):
        return default
    return int(_number(cells, name))


def _op(path: Path, cells: Mapping[str, str]) -> Op | None:
    maker = _MAKERS.get(cells["kind"])
    if maker is None:
        raise InputError("csv", str(path), f"kind {cells['kind']!r} must be one of {', '.join(_MAKERS)}")
    try:
        return maker(cells)
    except _Absent as missing:
        raise InputError("csv", str(path), f"must have a column {missing} for rows of kind {cells['kind']}") from None


def _gemm(cells: Mapping[str, str]) -> Op | None:
    dtype = cells.get("dtype", "")
    if dtype in OTHER_GEMM_DTYPES:
        return None
    if dtype not in GEMM_DTYPES:
        raise ValueError(f"dtype is {dtype or 'empty'}, which must be one of {', '.join(GEMM_DTYPES)}")
    return Gemm(_whole(cells, "m"), _whole(cells, "n"), _whole(cells, "k"), GEMM_DTYPES[dtype])


def _kv(cells: Mapping[str, str]) -> tuple[str, int]:
    dtype = cells.get("kv_dtype", "")
    if dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype is {dtype}, which must be one of {', '.join(filter(None, KV_DTYPES))}")
    return KV_DTYPES[dtype]


def _decode_op(cells: Mapping[str, str], batch: int, tokens: int) -> DecodeAttention:
    stored, size = _kv(cells)
    q_heads, kv_heads, dim = (_whole(cells, name) for name in ("q_heads", "kv_heads", "head_dim"))
    return DecodeAttention(batch, q_heads, kv_heads, dim, batch * kv_heads * tokens, tokens, 2.0 * dim * size, stored)


def _decode(cells: Mapping[str, str]) -> Op | None:
    return None if cells.get("dtype") == "fp8" else _decode_op(cells, _whole(cells, "batch"), _whole(cells, "context_tokens"))


def _prefill_op(cells: Mapping[str, str]) -> PrefillAttention:
    stored, _ = _kv(cells)
    return PrefillAttention(
        _whole(cells, "new_tokens"), _whole(cells, "context_tokens", 0), _whole(cells, "q_heads"), _whole(cells, "kv_heads"),
        _whole(cells, "head_dim"), stored, _whole(cells, "batch", 1),
    )  # fmt: skip


def _prefill(cells: Mapping[str, str]) -> Op | None:
    if cells.get("dtype") == "fp8":  # fp8 arithmetic, not only an fp8 cache
        return None
    op = _prefill_op(cells)
    return None if op.num_sequences > 1 and op.prior_tokens else op


def _mixed(cells: Mapping[str, str]) -> Op:
    decode = _decode_op(cells, _whole(cells, "n_decode"), _whole(cells, "decode_context_tokens"))
    return MixedAttention(_prefill_op({**cells, "batch": "1"}), decode)


def _elementwise(cells: Mapping[str, str]) -> Op | None:
    if cells.get("num_bytes"):
        return Elementwise(cells.get("op") or "kernel", _whole(cells, "num_bytes"))
    name = cells.get("op", "")
    if name not in ELEMENTWISE_WIDTHS:  # rotary embedding, samplers: what they move is not told by these columns
        return None
    tokens, hidden = _whole(cells, "num_tokens"), _whole(cells, "hidden")
    wide = _whole(cells, "ffn") // _whole(cells, "tp", 1)
    width = 3 * hidden if name == "add" else 3 * wide if name in ("mlp_act", "act_fn") else 2 * hidden
    return Elementwise(name, 2 * tokens * width)


def _all_reduce(cells: Mapping[str, str]) -> Op:
    return Collective("all_reduce", _whole(cells, "message_bytes"), _whole(cells, "n_gpu"), "eager" in cells.get("impl", ""))


_MAKERS: dict[str, Callable[[Mapping[str, str]], Op | None]] = {
    "gemm": _gemm,
    "decode_attention": _decode,
    "prefill_attention": _prefill,
    "mixed_attention": _mixed,
    "elementwise": _elementwise,
    "all_reduce": _all_reduce,
}
