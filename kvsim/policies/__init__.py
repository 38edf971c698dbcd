"""The KV-cache policies. A new one is a file beside this and a line in POLICIES; the YAML union, tests and docs follow."""

from __future__ import annotations

from kvsim.policies.ada_kv import AdaKV
from kvsim.policies.base import Policy
from kvsim.policies.full import Full
from kvsim.policies.h2o import H2O
from kvsim.policies.keyformer import Keyformer
from kvsim.policies.kivi import KIVI
from kvsim.policies.kv_compress import KVCompress
from kvsim.policies.kv_quant import KVQuant
from kvsim.policies.pyramid_kv import PyramidKV
from kvsim.policies.scissorhands import Scissorhands
from kvsim.policies.snapkv import SnapKV
from kvsim.policies.streaming_llm import StreamingLLM
from kvsim.policies.think import ThinK
from kvsim.policies.window import Window

POLICIES: tuple[type[Policy], ...] = (
    Full, Keyformer, KVCompress, Scissorhands, ThinK, H2O, SnapKV, StreamingLLM, Window, PyramidKV, AdaKV, KIVI, KVQuant,
)  # fmt: skip
