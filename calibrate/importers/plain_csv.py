"""A documented CSV of hand-made rows: one measured launch a line, blank cells where a column does not apply.

Columns by kind (`docs/profiles.md` has an example); lines that begin with # are comments, further columns are ignored:

- every row: ``kind`` and one of ``time_us``, ``time_ms``, ``time_s``; no ``kind`` where every row is an all-reduce
- gemm: ``m, n, k, dtype`` (bf16, fp16, fp8, int8 or sq, int4 or int4_wo)
- decode_attention: ``batch, q_heads, kv_heads, head_dim, context_tokens``; ``kv_dtype`` (default bf16)
- prefill_attention: ``q_heads, kv_heads, head_dim, new_tokens``; ``batch`` (1), ``context_tokens`` cached before (0), ``kv_dtype``
- mixed_attention: as prefill, and ``n_decode, decode_context_tokens``
- elementwise: ``num_bytes``, or ``op, num_tokens`` and ``hidden``, or ``ffn, tp`` (1), with op one of ELEMENTWISE_WIDTHS
- sampling: ``library, which, rows, vocab_size``, top-k and top-p over fp32 logits
- all_reduce: ``n_gpu, message_bytes``; ``impl`` holding "eager" for launches outside a CUDA graph

``engine`` and ``gpu`` say whose rows they are, where a file holds those of several.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvsim.calibrate.importers.cells import Cells, LeftOut, csv_rows, positive, whole
from kvsim.calibrate.rows import SUSPECT_FRAC, Import, impossible
from kvsim.errors import InputError
from kvsim.hardware import Gpu
from kvsim.model import MAX_TP
from kvsim.ops import Collective, DecodeAttention, Elementwise, Gemm, LogitFilter, MixedAttention, Op, PrefillAttention

TIMES = {"time_us": 1e-6, "time_ms": 1e-3, "time_s": 1.0}
GEMM_DTYPES = {
    "bf16": "bf16", "fp16": "fp16", "16bit": "bf16", "fp8": "fp8", "int8": "int8", "sq": "int8", "int4": "int4", "int4_wo": "int4",
}  # fmt: skip
OTHER_GEMM_DTYPES = ("fp8_block", "int8_wo", "nvfp4")
"""Known, and not an Op of ours: other arithmetic."""
KV_DTYPES = {"": ("bf16", 2), "bf16": ("bf16", 2), "fp16": ("fp16", 2), "16bit": ("bf16", 2), "fp8": ("fp8", 1)}
ELEMENTWISE_WIDTHS = {
    "add": (3, "hidden"), "input_layernorm": (2, "hidden"), "layernorm": (2, "hidden"), "final_layernorm": (2, "hidden"),
    "mlp_act": (3, "ffn"), "act_fn": (3, "ffn"),
}  # fmt: skip
"""op → 16-bit numbers moved per token, in widths of a column (of `ffn` over `tp`): what is read once and written once."""
FILTER_LIBRARIES, FILTERS = ("pytorch", "triton", "flashinfer"), ("top_k", "top_p", "top_k_top_p")
MOSTLY = 0.5


def read(
    path: Path, gpu: Gpu, engine: str, version: str, source: str = "", *, only_engine: str | None = None, only_gpu: str | None = None
) -> Import:  # fmt: skip
    """All rows of the file that are possible on this GPU; the others with what is wrong with them, by line.

    only_engine, only_gpu: rows whose column ``engine``, ``gpu`` is exactly this text. Raises InputError for a missing file or
    column, for a file without such rows, and where most rows are wrong, which means a wrong unit or GPU.
    """
    found = Import(engine, version, source or f"{path.name} (own measurements)")
    wanted = {name: text for name, text in (("engine", only_engine), ("gpu", only_gpu)) if text is not None}
    timed: list[tuple[Op, str, float]] = []
    unread = 0
    for number, cells in csv_rows("csv", path, found):
        if not _is_wanted(cells, wanted):
            continue
        here = f"{path.name}:{number}"
        try:
            kind = _kind(path, cells)
            op = _MAKERS[kind](cells)
            column, time = _time(path, cells)
        except _OtherError as error:
            found.rejected.append(LeftOut(here, str(error)))
        except _AbsentError as error:
            raise InputError(
                "csv", str(path), f"must have a column {error} for rows of kind {kind} (line {number})", "add it, blank for other kinds"
            ) from None
        except ValueError as error:
            unread += 1
            found.rejected.append(LeftOut(here, str(error)))
        else:
            timed.append((op, column, time))
            # the table's name before the line: impossible rows speak of the others of their table
            found.add(op, time * TIMES[column], f"{path.name} {kind} {cells.get('dtype', '')}".rstrip() + f":{number}", gpu)
    if not timed and not unread:
        raise _nothing(path, wanted, found)
    if len(timed) + unread - len(found.rows) > MOSTLY * (len(timed) + unread):
        raise _mostly_wrong(path, found, timed, unread, gpu)
    return found


def texts(path: Path, column: str, wanted: Cells | None = None) -> list[str]:
    """The different texts of a column, in order of appearance; [] where there is no such column. wanted: of rows with these cells."""
    rows = (cells for _, cells in csv_rows("csv", path, None) if _is_wanted(cells, wanted or {}))
    return list(dict.fromkeys(cells[column] for cells in rows if cells.get(column)))


def _is_wanted(cells: Cells, wanted: Cells) -> bool:
    return all(cells.get(name) == text for name, text in wanted.items())


class _AbsentError(KeyError):
    """A column that a kind needs."""

    def __str__(self) -> str:
        return str(self.args[0])


class _OtherError(Exception):
    """A good row that is no Op of ours."""


def _kind(path: Path, cells: Cells) -> str:
    kind = cells.get("kind", "all_reduce" if {"n_gpu", "message_bytes"} <= cells.keys() else None)
    if kind is None:
        raise InputError("csv", str(path), f"must have a column kind; it has {', '.join(cells)}", f"kinds: {', '.join(_MAKERS)}")
    if kind not in _MAKERS:
        raise ValueError(f"kind is {kind or 'empty'}, which must be one of {', '.join(_MAKERS)}")
    return kind


def _time(path: Path, cells: Cells) -> tuple[str, float]:
    """(column, its number): the first of TIMES that is not blank."""
    columns = [name for name in TIMES if name in cells]
    if not columns:
        raise InputError("csv", str(path), "must have a column time_us, time_ms or time_s", "microseconds, milliseconds or seconds")
    column = next((name for name in columns if cells[name]), columns[0])
    return column, positive(cells, column)


def _whole(cells: Cells, name: str, *, default: int | None = None, least: int = 1) -> int:
    try:
        return whole(cells, name, default=default, least=least)
    except KeyError:
        raise _AbsentError(name) from None


def _gemm(cells: Cells) -> Op:
    if "dtype" not in cells:
        raise _AbsentError("dtype")
    dtype = cells["dtype"]
    if dtype in OTHER_GEMM_DTYPES:
        raise _OtherError(f"dtype is {dtype}: other arithmetic than our fp8, int8 and int4")
    if dtype not in GEMM_DTYPES:
        raise ValueError(f"dtype is {dtype or 'empty'}, which must be one of {', '.join(GEMM_DTYPES)}")
    return Gemm(_whole(cells, "m"), _whole(cells, "n"), _whole(cells, "k"), GEMM_DTYPES[dtype])


def _heads(cells: Cells) -> tuple[int, int, int]:
    q_heads, kv_heads, head_dim = (_whole(cells, name) for name in ("q_heads", "kv_heads", "head_dim"))
    if q_heads % kv_heads:
        raise ValueError(f"kv_heads is {kv_heads}, which must divide q_heads {q_heads}")
    if cells.get("dtype") == "fp8":
        raise _OtherError("dtype is fp8: attention computed in fp8, not only cached in it")
    return q_heads, kv_heads, head_dim


def _kv(cells: Cells) -> tuple[str, int]:
    dtype = cells.get("kv_dtype", "")
    if dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype is {dtype}, which must be one of {', '.join(filter(None, KV_DTYPES))}")
    return KV_DTYPES[dtype]


def _decode_attention(cells: Cells, batch: str = "batch", tokens: str = "context_tokens") -> DecodeAttention:
    """batch, tokens: the columns of sequences and of tokens that each has cached."""
    q_heads, kv_heads, dim = _heads(cells)
    stored, size = _kv(cells)
    sequences, cached = _whole(cells, batch), _whole(cells, tokens)
    return DecodeAttention(sequences, q_heads, kv_heads, dim, sequences * kv_heads * cached, cached, 2.0 * dim * size, stored)


def _prefill_attention(cells: Cells) -> PrefillAttention:
    q_heads, kv_heads, dim = _heads(cells)
    stored, _ = _kv(cells)
    prior, sequences = _whole(cells, "context_tokens", default=0, least=0), _whole(cells, "batch", default=1)
    return PrefillAttention(_whole(cells, "new_tokens"), prior, q_heads, kv_heads, dim, stored, sequences)


def _mixed_attention(cells: Cells) -> Op:
    prefill = _prefill_attention({**cells, "batch": ""})  # one chunk; `batch` would be that of n_decode
    return MixedAttention(prefill, _decode_attention(cells, "n_decode", "decode_context_tokens"))


def _elementwise(cells: Cells) -> Op:
    name = cells.get("op", "")
    if cells.get("num_bytes"):
        return Elementwise(name or "kernel", _whole(cells, "num_bytes"))
    if not name:
        if "num_bytes" in cells:
            raise ValueError("num_bytes is empty, and so is op")
        raise _AbsentError("num_bytes")
    if name not in ELEMENTWISE_WIDTHS:
        raise _OtherError(f"op is {name}: what it moves is not told by its columns, only by num_bytes")
    widths, column = ELEMENTWISE_WIDTHS[name]
    tokens, width = _whole(cells, "num_tokens"), _whole(cells, column)
    if column == "ffn":
        width //= _whole(cells, "tp", default=1)
    return Elementwise(name, 2 * tokens * widths * width)


def _sampling(cells: Cells) -> Op:
    library, which = cells.get("library", ""), cells.get("which", "")
    for name, value, known in (("library", library, FILTER_LIBRARIES), ("which", which, FILTERS)):
        if value not in known:
            raise ValueError(f"{name} is {value or 'empty'}, which must be one of {', '.join(known)}")
    return LogitFilter(library, which, _whole(cells, "rows"), _whole(cells, "vocab_size"))


def _all_reduce(cells: Cells) -> Op:
    num_gpus = _whole(cells, "n_gpu", least=2)
    if num_gpus > MAX_TP:
        raise _OtherError(f"n_gpu is {num_gpus}: beyond the {MAX_TP} GPUs of one node")
    return Collective("all_reduce", _whole(cells, "message_bytes"), num_gpus, "eager" in cells.get("impl", "").lower())


_MAKERS: dict[str, Callable[[Cells], Op]] = {
    "gemm": _gemm,
    "decode_attention": _decode_attention,
    "prefill_attention": _prefill_attention,
    "mixed_attention": _mixed_attention,
    "elementwise": _elementwise,
    "sampling": _sampling,
    "all_reduce": _all_reduce,
}


def _nothing(path: Path, wanted: Cells, found: Import) -> InputError:
    what = " of " + " and ".join(f"{name} {text}" for name, text in wanted.items()) if wanted else ""
    fix = "; ".join(f"its column {name} holds {', '.join(texts(path, name)) or 'nothing'}" for name in wanted)
    if not wanted and found.rejected:
        fix = f"{found.rejected[0].where} {found.rejected[0].reason}"
    return InputError("csv", str(path), f"must hold rows that are Ops of ours{what}", fix)


def _mostly_wrong(path: Path, found: Import, timed: list[tuple[Op, str, float]], unread: int, gpu: Gpu) -> InputError:
    """With the unit in which the times would be possible, if there is one."""
    first, wrong, seen = found.rejected[0], len(timed) + unread - len(found.rows), len(timed) + unread
    fix = "correct these rows"
    if unread < wrong / 2:
        first = next(row for row in found.rejected if not isinstance(row, LeftOut))
        fix = f"check the unit of its times and that they were taken on {gpu.name}"
        for unit, scale in TIMES.items():
            still = sum(bool(impossible(op, time * scale, gpu)) for op, _, time in timed)
            if still <= SUSPECT_FRAC * len(timed):
                fix = f"as {unit} they would be possible: is the column {timed[0][1]} named wrongly?"
                break
    rule = f"must hold mostly possible rows; {wrong} of {seen} are not ({first.where} {first.reason})"
    return InputError("csv", str(path), rule, fix)
