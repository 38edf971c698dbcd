"""The datasheet profile: every Op answered by a roofline over the GPU's datasheet and efficiencies generic across GPUs.

Each formula is ``launch + (bandwidth term ⊕ compute term)`` with ``a ⊕ b = sqrt(a² + b²)``: overlap is good but never
perfect, and the sum is at least the larger. The efficiencies are medians over the GPUs that were measured
(``benchmarks/fit_datasheet_efficiencies.py``), so errors are those of a GPU that was not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any

from kvsim.dtypes import WEIGHT_DTYPES, check_weight_dtype, matrix_bytes
from kvsim.efficiencies import Efficiencies, load_efficiencies
from kvsim.errors import InputError
from kvsim.hardware import Gpu
from kvsim.ops import (
    Collective,
    Copy,
    DecodeAttention,
    Elementwise,
    Gemm,
    HostWork,
    LogitFilter,
    MixedAttention,
    Op,
    PolicyKernel,
    PrefillAttention,
)
from kvsim.profile import Answer, LogBias

GEMM_TILE_M, GEMM_TILE_N = 16, 128
"""A GEMM computes whole tiles: 16 rows of a tensor-core instruction, 128 columns of a thread block."""
UNPACKED_ROWS = 15
"""Rows up to which a CPU's library takes the weights as they lie and reads them for each tile, in part from a cache; beyond it packs them.
On one thread of a Xeon with AVX-512 and torch 2.13 an fp32 product steps up at 4, 7, 10 and 13 rows, and 16 are quicker than 12:
`for m in $(seq 1 16); do OMP_NUM_THREADS=1 python -m timeit -s "import torch; w, x = torch.randn(3584, 640), torch.randn($m, 640)"
"torch.nn.functional.linear(x, w)"; done`
"""
ATTENTION_TILE_ROWS = 128
"""Query rows of one thread block of a FlashAttention prefill kernel."""
DECODE_TILE_ROWS = 64
"""Decode kernels pad the query heads of a group to one tensor-core tile (FlashAttention, FlashInfer)."""
MEASURED_GROUP = 4
"""Query heads per KV head of the measured mixed batches: re-reading is not extrapolated beyond it."""
PACKING_GENERATIONS = (9, 10)
"""Compute capabilities whose prefill kernels (FlashAttention 3, TensorRT-LLM's for Blackwell) put the query heads of a group into one
block; FlashAttention 2 does so in launches of decodes alone (mha_varlen_fwd: seqlenq_ngroups_swapped needs max_seqlen_q == 1)."""
ROWS_SORTED_ALONE = 128
"""From so many rows on `torch.sort` sorts each by a thread block of its own, below all at once (aten SortStable.cu)."""
SORT_BYTES, SORT_BYTES_ALONE = 156.0, 176.0
"""A logit and its position through `torch.sort`, once written. All rows at once: four digits of 8 bits at 24 bytes and a histogram, one of
the row's number at 16 and another, gathered and written. Each alone: six digits of 5 or 6 bits, read for a histogram and then moved."""
FILTER_BYTES = {
    "pytorch": {"top_k": 38.0, "top_p": 62.0, "top_k_top_p": 76.0},
    "triton": {"top_k": 16.0, "top_p": 16.0, "top_k_top_p": 16.0},
    "flashinfer": {"top_k": 28.0, "top_p": 28.0, "top_k_top_p": 40.0},
}
"""Per logit, after the sort. pytorch: mask and its use 14, softmax, cumulative sum, mask and its use 38, scatter 24, as vLLM's
apply_top_k_top_p has them. The others, at the least: three passes and what stays; a softmax and three passes, a fourth where both act."""
BEST_OF_PEAK = 0.81
"""What the best large 16-bit product reaches of the datasheet's peak on a GPU with a table: the median over the shipped tables
(tests/test_measured_profile.py). Attention's efficiencies are of a peak of which so much can be had."""
OF_SUSTAINED = ", large products at the sustained_tflops of its file"
_PRODUCTS = (Gemm.kind, PrefillAttention.kind, MixedAttention.kind)
_OF_A_WIDTH = {"fp16": "bf16", "bf16": "fp16", "fp8": "int8", "int8": "fp8"}
_ACTIVATION_BYTES = {"fp8": 1, "int8": 1, "fp32": 4}
KNOT_RATIO, LAST_KNOT_SLOTS = 2**0.25, 2**33
LARGE_ELEMENTWISE_BYTES, LARGE_MESSAGE_BYTES = 4 * 2**20, 2**20

_KV_FORMAT = re.compile(r"(bf16|fp16|fp32)|(fp8(?:_e4m3|_e5m2)?)|[a-z]+?([1-8])")


def kv_format_class(kv_format: str) -> str:
    """ "16bit" (fp32 too), "fp8", or "subbyte": integers such as int8, int4, kivi2, and pruned formats such as bf16+think80."""
    stored, _, pruned = kv_format.partition("+")
    match = _KV_FORMAT.fullmatch(stored)
    if match is None:
        raise InputError("kv_format", kv_format, "must be bf16, fp16, fp8, or end in its bits: int4, kivi2")
    if match[1] and not pruned:
        return "16bit"
    return "fp8" if match[2] and not pruned else "subbyte"


def sustained_rate(gpu: Gpu, dtype: str) -> float | None:
    """FLOP/s that the best large product is known to hold, if it is. Of two dtypes of a width one stands in for the other."""
    found = gpu.sustained_flops_per_s.get(dtype)
    other = _OF_A_WIDTH.get(dtype, dtype)
    if found is None and other in gpu.sustained_flops_per_s:
        return gpu.sustained_flops_per_s[other] * gpu.peak_flops(dtype) / gpu.peak_flops(other)
    return found


def usual_peak(gpu: Gpu, dtype: str) -> float:
    """FLOP/s: the peak that attention's efficiencies are shares of. The datasheet's, or what stands for it where it is known what is
    sustained: attention is held back as products are."""
    sustained = sustained_rate(gpu, dtype)
    return gpu.peak_flops(dtype) if sustained is None else sustained / BEST_OF_PEAK


class DatasheetProfile:
    """Answers every Op for one GPU. Immutable; safe to share."""

    def __init__(self, gpu: Gpu, efficiencies: Efficiencies | None = None) -> None:
        self.gpu = gpu
        self.efficiencies = e = load_efficiencies() if efficiencies is None else efficiencies
        self._hbm = gpu.hbm_bandwidth_bytes_per_s
        self._peak_16bit = usual_peak(gpu, "bf16")
        self._labels: dict[tuple[str, str], tuple[str, LogBias, str]] = {
            key: (e.bias_sources[key] + (OF_SUSTAINED if gpu.sustained_flops_per_s and key[0] in _PRODUCTS else ""), bias, key[1])
            for key, bias in e.log_biases.items()
        }
        self._answerers: dict[type, Callable[[Any, float], tuple[float, str]]] = {
            Gemm: self._gemm,
            PrefillAttention: self._prefill,
            DecodeAttention: self._decode,
            MixedAttention: self._mixed,
            Elementwise: self._elementwise,
            LogitFilter: self._filter,
            Collective: self._collective,
            Copy: self._copy,
            PolicyKernel: self._policy,
            HostWork: self._host,
        }
        self._gemm_rates = {
            dtype: self._gemm_rate(dtype) for dtype in WEIGHT_DTYPES if dtype != "fp32" or "fp32" in gpu.peak_flops_per_s
        }
        self._fp32_tile_rows, self._fp32_packed_reads = e["gemm.fp32.tile_rows"], e["gemm.fp32.packed_reads"]
        self._fp32_second_tile_reads, self._fp32_tile_reads = e["gemm.fp32.second_tile_reads"], e["gemm.fp32.tile_reads"]
        self._prefill_launch_s = e["prefill_attention.launch_s"]
        self._prefill_flops_per_s = e["prefill_attention.compute_frac"] * self._peak_16bit
        self._prefill_bytes_per_s = e["prefill_attention.memory_frac"] * self._hbm
        self._prefill_walk = e["prefill_attention.walk_frac"] * gpu.num_sms
        self._decode_launch_s = e["decode_attention.launch_s"]
        self._decode_sequence_s = e["decode_attention.sequence_s"]
        self._decode_split_s = e["decode_attention.split_s"]
        self._decode_split_tokens = e["decode_attention.split_tokens"]
        self._decode_block_s = e["decode_attention.block_s"] / gpu.num_sms
        # Beside 16-bit caches a decode kernel's products are the loop of a prompt's kernel; what is stored in fewer bits is widened before.
        # With up to 71 query heads for a KV head they bind on no GPU with a table, but where matrix rate is low for the bandwidth (an
        # RTX 3090): the tile of DECODE_TILE_ROWS is computed whole. No measurement tells the rate over smaller formats where it binds.
        assumed = e["decode_attention.compute_frac"] * self._peak_16bit
        self._decode_flops_per_s = {"16bit": max(assumed, self._prefill_flops_per_s), "fp8": assumed, "subbyte": assumed}
        self._decode_bytes_per_s = {
            name: e[f"decode_attention.memory_frac.{name}"] * self._hbm for name in ("16bit", "fp8", "subbyte")
        }
        self._format_classes: dict[str, str] = {}
        self._mixed_reread = e["mixed_attention.reread_frac"]
        self._mixed_block_s = e["mixed_attention.block_s"] / gpu.num_sms
        self._rereads_from_hbm = gpu.compute_capability is None or gpu.compute_capability[0] not in PACKING_GENERATIONS
        self._elementwise_launch_s = e["elementwise.launch_cycles"] / gpu.boost_clock_hz
        self._elementwise_bytes_per_s = e["elementwise.memory_frac"] * self._hbm
        self._policy_bytes_per_s = e["policy.memory_frac"] * self._hbm
        self._policy_flops_per_s = e["policy.compute_frac"] * self._peak_16bit
        self._load_s = e["policy.load_cycles"] / gpu.boost_clock_hz
        self._host_parts = {
            (engine, part): (e[f"host.{engine}.{part}.base_s"], e[f"host.{engine}.{part}.per_sequence_s"])
            for engine in e.children("host")
            for part in e.children(f"host.{engine}")
        }

    @property
    def name(self) -> str:
        return f"datasheet:{self.gpu.name}"

    @property
    def log_biases(self) -> Mapping[tuple[str, str], LogBias]:
        return self.efficiencies.log_biases

    def answer(self, op: Op, hbm_share: float = 1.0) -> Answer:
        """Time of one launch with this share of the HBM bandwidth."""
        if not 0.0 < hbm_share <= 1.0:
            raise InputError("hbm_share", hbm_share, "must lie in (0, 1]")
        seconds, size_class = self._answerers[type(op)](op, hbm_share)
        source, log_bias, size_class = self._labels[op.kind, size_class]
        return Answer(seconds, source, log_bias, size_class)

    def kv_knots(self, op: DecodeAttention) -> Sequence[int]:
        """0, then geometric from one slot per (sequence, KV head): between them linear to within 1 % of the formula."""
        first = max(1, op.batch * op.kv_heads)
        count = math.ceil(math.log(max(LAST_KNOT_SLOTS / first, 2.0), KNOT_RATIO))
        return (0, *sorted({round(first * KNOT_RATIO**i) for i in range(count + 1)}))

    def decode_curve(self, op: DecodeAttention, kv_slots: Sequence[int], hbm_share: float = 1.0) -> list[float]:
        form = self._format(op.kv_format)
        return self._decode_s(op, form, op.batch, kv_slots, hbm_share)

    def terms(self, op: Gemm | PrefillAttention | DecodeAttention) -> tuple[float, float]:
        """(seconds of HBM traffic, seconds of arithmetic) of an Op that could be bound by either."""
        if isinstance(op, Gemm):
            _, _, memory_s, compute_s = self._gemm_terms(op, 1.0)
            return memory_s, compute_s
        if isinstance(op, PrefillAttention):
            return self._prefill_terms(op, 1.0)
        form = self._format(op.kv_format)
        rows = max(op.q_heads / op.kv_heads, DECODE_TILE_ROWS)
        return op.bytes_moved / self._decode_bytes_per_s[form], 4.0 * op.kv_slots * op.head_dim * rows / self._decode_flops_per_s[form]

    # GEMM ---------------------------------------------------------------------------------------------------------

    def _gemm_rate(self, dtype: str) -> tuple[str, float, float, float, int]:
        """Class, launch, bytes/s, flop/s and bytes of an activation element for weights of this dtype."""
        name = "16bit" if dtype in ("fp16", "bf16") else dtype
        if name in ("fp8", "int8") and name not in self.gpu.peak_flops_per_s:
            name = f"{name}_widened"  # no such units: weights are widened on the fly, like int4's
        shape = "int4" if name.endswith("_widened") else name
        operands = "bf16" if shape == "int4" else dtype
        launch_s, memory_frac, compute_frac = (
            self.efficiencies[f"gemm.{shape}.{key}"] for key in ("launch_s", "memory_frac", "compute_frac")
        )
        flops_per_s = compute_frac * self.gpu.peak_flops(operands)
        sustained = sustained_rate(self.gpu, operands)
        if sustained is not None:  # 4-bit weights, and 8-bit ones that are widened, stay as far behind as the efficiencies have them
            behind = compute_frac / self.efficiencies["gemm.16bit.compute_frac"] if shape == "int4" else 1.0
            flops_per_s = sustained * min(behind, 1.0)
        return name, launch_s, memory_frac * self._hbm, flops_per_s, _ACTIVATION_BYTES.get(name, 2)

    def _gemm(self, op: Gemm, share: float) -> tuple[float, str]:
        name, launch_s, memory_s, compute_s = self._gemm_terms(op, share)
        size = "m<=16" if op.m <= 16 else "m<=512" if op.m <= 512 else "m>512"
        return launch_s + sqrt(memory_s * memory_s + compute_s * compute_s), f"{name} {size}"

    def _gemm_terms(self, op: Gemm, share: float) -> tuple[str, float, float, float]:
        """Class, launch, and seconds of traffic and of arithmetic."""
        rate = self._gemm_rates.get(op.weight_dtype)
        if rate is None:
            self.gpu.peak_flops(check_weight_dtype(op.weight_dtype))
            raise AssertionError(op.weight_dtype)
        name, launch_s, bytes_per_s, flops_per_s, activation_bytes = rate
        m, n, k = op.m, op.n, op.k
        weights = 2.0 * n * k if name == "16bit" else matrix_bytes(n, k, op.weight_dtype)
        memory_s = (weights + activation_bytes * m * k + max(activation_bytes, 2.0) * m * n) / (bytes_per_s * share)
        rows, columns = -(-m // GEMM_TILE_M) * GEMM_TILE_M, -(-n // GEMM_TILE_N) * GEMM_TILE_N
        if name == "fp32":  # vector units have no tiles to fill, but a CPU's library reads the matrix again for every few rows
            rows, columns = m, n
            tiles = math.ceil(m / self._fp32_tile_rows)
            if m > UNPACKED_ROWS:
                launch_s += self._fp32_packed_reads * weights / (bytes_per_s * share)  # before arithmetic begins
            elif tiles > 1:
                memory_s *= 1 + self._fp32_second_tile_reads + (tiles - 2) * self._fp32_tile_reads
        return name, launch_s, memory_s, 2.0 * rows * columns * k / flops_per_s

    # Attention ----------------------------------------------------------------------------------------------------

    def _format(self, kv_format: str) -> str:
        found = self._format_classes.get(kv_format)
        if found is None:
            found = self._format_classes[kv_format] = kv_format_class(kv_format)
        return found

    def _prefill_s(self, op: PrefillAttention, share: float) -> float:
        memory_s, compute_s = self._prefill_terms(op, share)
        return self._prefill_launch_s + compute_s + memory_s

    def _prefill_terms(self, op: PrefillAttention, share: float) -> tuple[float, float]:
        """Seconds of traffic, and of all tiles at the GPU's rate with part of one block's walk over the whole KV (few blocks)."""
        kv_bytes, flops_per_s = 2.0 if self._format(op.kv_dtype) == "16bit" else 1.0, self._prefill_flops_per_s
        tokens = op.new_tokens + op.prior_tokens
        walk_flops = 4.0 * ATTENTION_TILE_ROWS * op.head_dim * tokens * self._prefill_walk
        traffic = 4.0 * op.q_heads * op.new_tokens + 2.0 * kv_bytes * op.kv_heads * tokens
        if op.kv_dtype == "fp32":
            traffic, flops_per_s = 2.0 * traffic, flops_per_s * self.gpu.peak_flops("fp32") / self._peak_16bit
        memory_s = traffic * op.num_sequences * op.head_dim / (self._prefill_bytes_per_s * share)
        return memory_s, (op.flops + walk_flops) / flops_per_s

    def _prefill(self, op: PrefillAttention, share: float) -> tuple[float, str]:
        return self._prefill_s(op, share), "new<=512" if op.new_tokens <= 512 else "new>512"

    def _decode(self, op: DecodeAttention, share: float) -> tuple[float, str]:
        form = self._format(op.kv_format)
        (seconds,) = self._decode_s(op, form, op.batch, (op.kv_slots,), share)
        if op.max_kv_tokens * op.batch * op.kv_heads > op.kv_slots:  # skew: one long sequence can bind
            longest = min(op.kv_slots, op.max_kv_tokens * op.kv_heads)
            seconds = max(seconds, *self._decode_s(op, form, 1, (longest,), share))
        cold = op.kv_slots * op.slot_bytes > 2.0 * self.gpu.l2_bytes
        return seconds, f"{form} {'kv>2xL2' if cold else 'kv<=2xL2'}"

    def _decode_s(
        self, op: DecodeAttention, form: str, batch: int, kv_slots: Sequence[int], share: float
    ) -> list[float]:
        """Launch, a split that saturates with the length, and KV traffic ⊕ the fixed cost of each thread block."""
        blocks = batch * op.kv_heads
        bytes_per_s = self._decode_bytes_per_s[form] * share
        slot_s, query_s = op.slot_bytes / bytes_per_s, 4.0 * batch * op.q_heads * op.head_dim / bytes_per_s
        rows = max(op.q_heads / op.kv_heads, DECODE_TILE_ROWS)
        flops_per_s = self._decode_flops_per_s[form]
        if op.kv_format == "fp32":
            rows = op.q_heads / op.kv_heads
            flops_per_s = self._decode_flops_per_s["fp8"] * self.gpu.peak_flops("fp32") / self._peak_16bit
        compute_s = 4.0 * op.head_dim * rows / flops_per_s
        block_s = blocks * self._decode_block_s
        launch_s = self._decode_launch_s + batch * self._decode_sequence_s
        split_s, split_slots = self._decode_split_s, self._decode_split_tokens * blocks
        found = []
        for slots in kv_slots:
            stream_s, bound_s = slots * slot_s + query_s, slots * compute_s
            if bound_s > stream_s:
                stream_s = bound_s
            found.append(launch_s + split_s * slots / (slots + split_slots) + sqrt(stream_s * stream_s + block_s * block_s))
        return found

    def _mixed(self, op: MixedAttention, share: float) -> tuple[float, str]:
        """The prefill kernel with decode rows in it: a block per *query* head, the heads of a group re-reading KV."""
        decode = op.decode
        group = decode.q_heads / decode.kv_heads
        reread = 1.0 + self._mixed_reread * (min(group, MEASURED_GROUP) - 1.0)
        if self._rereads_from_hbm and decode.bytes_moved > decode.kv_heads * self.gpu.l2_bytes:
            # Blocks start sequence by sequence, then head by head. Heads of a group that run at once read KV together; those that
            # come after the whole batch find nothing in the L2.
            abreast = min(max(self.gpu.num_sms / decode.batch, 1.0), group)
            reread = max(reread, group / abreast)
        bytes_per_s = self._decode_bytes_per_s[self._format(decode.kv_format)] * share
        seconds = self._prefill_s(op.prefill, share) + reread * decode.bytes_moved / bytes_per_s
        return seconds + decode.batch * decode.q_heads * self._mixed_block_s, "any"

    # Streams, links, host -----------------------------------------------------------------------------------------

    def _elementwise(self, op: Elementwise, share: float) -> tuple[float, str]:
        seconds = self._elementwise_launch_s + op.bytes_moved / (self._elementwise_bytes_per_s * share)
        return seconds, "<=4MiB" if op.bytes_moved <= LARGE_ELEMENTWISE_BYTES else ">4MiB"

    def _filter(self, op: LogitFilter, share: float) -> tuple[float, str]:
        """A thread block walks each row, some abreast on a multiprocessor; bound by traffic where that takes longer."""
        library = op.library
        e, name, clock_hz, logits = self.efficiencies, f"sampling.{library}", self.gpu.boost_clock_hz, op.rows * op.vocab_size
        waves = max(1.0, op.rows / (self.gpu.num_sms * e[f"{name}.abreast"]))
        logit_cycles, bytes_moved = e[f"{name}.{op.which}.logit_cycles"], FILTER_BYTES[library][op.which]
        if library != "pytorch":
            walk_s = waves * (e[f"{name}.{op.which}.row_cycles"] + logit_cycles * op.vocab_size) / clock_hz
            return max(walk_s, bytes_moved * logits / (self._elementwise_bytes_per_s * share)), library
        busy_s = 0.0
        if op.rows >= ROWS_SORTED_ALONE:
            logit_cycles, bytes_moved = logit_cycles + e[f"{name}.sort_row_cycles"], bytes_moved + SORT_BYTES_ALONE
        else:
            busy_s, bytes_moved = logits * e[f"{name}.sort_cycles"] / (self.gpu.num_sms * clock_hz), bytes_moved + SORT_BYTES
        if op.rows > 1:  # scans of a single row are spread over the device, and bound by launches
            busy_s += waves * logit_cycles * op.vocab_size / clock_hz
        return e[f"{name}.launch_s"] + max(busy_s, bytes_moved * logits / (self._elementwise_bytes_per_s * share)), library

    def _policy(self, op: PolicyKernel, share: float) -> tuple[float, str]:
        memory_s = op.bytes_moved / (self._policy_bytes_per_s * share)
        busy_s = max(memory_s, op.flops / self._policy_flops_per_s, op.dependent_loads * self._load_s)
        return op.num_launches * self._elementwise_launch_s + busy_s, "any"

    def _copy(self, op: Copy, share: float) -> tuple[float, str]:
        launch_s = self.efficiencies["copy.launch_s"]
        if op.link == "hbm":
            return launch_s + 2.0 * op.num_bytes / (self.efficiencies["copy.hbm_frac"] * self._hbm * share), "hbm"
        if op.link != "host":
            raise InputError("copy.link", op.link, "must be hbm or host")
        return launch_s + op.num_bytes / (self.efficiencies["copy.host_frac"] * self.gpu.host_link_bytes_per_s), "host"

    def _collective(self, op: Collective, share: float) -> tuple[float, str]:
        """Latency growing with log2(GPUs) plus ring traffic; without an NVLink-like link, over PCIe."""
        if op.name not in ("all_reduce", "all_gather"):
            raise InputError("collective.name", op.name, "must be all_reduce or all_gather")
        size = "<=1MiB" if op.message_bytes <= LARGE_MESSAGE_BYTES else ">1MiB"
        link = "link" if self.gpu.has_gpu_link else "pcie"
        mode = "eager" if op.eager else "graph"
        size_class = "pcie" if link == "pcie" else "all_gather" if op.name == "all_gather" else f"{mode} {size}"
        if op.num_gpus < 2:
            return 0.0, size_class
        e = self.efficiencies
        passes = (op.num_gpus - 1) * (2.0 / op.num_gpus if op.name == "all_reduce" else 1.0)
        link_bytes_per_s = self.gpu.gpu_link_bytes_per_s  # PCIe, where there is nothing better
        latency_s = e[f"collective.{link}.{mode}_s"] + e[f"collective.{link}.per_doubling_s"] * math.log2(op.num_gpus)
        traffic_s = passes * op.message_bytes / (e[f"collective.{link}.bus_frac"] * link_bytes_per_s)
        return latency_s + traffic_s, size_class

    def _host(self, op: HostWork, share: float) -> tuple[float, str]:
        part = self._host_parts.get((op.engine, op.part))
        if part is None:
            known = ", ".join(f"{engine} {part}" for engine, part in self._host_parts)
            raise InputError("host_work", f"{op.engine} {op.part}", "must be a known engine and part", known)
        if op.part not in ("eager_launch", "compiled_launch"):
            return part[0] + part[1] * op.batch, op.engine
        own = f"{op.engine} {op.part}"  # of an engine whose own launches were measured
        return part[0] + part[1] * op.batch, own if (op.kind, own) in self._labels else "eager_launch"
