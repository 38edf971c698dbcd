"""The serving engines that can be simulated. A new one is a file beside this and a line here."""

from __future__ import annotations

from kvsim.engines.base import Engine
from kvsim.engines.flexgen import FlexGen
from kvsim.engines.huggingface import HuggingFace
from kvsim.engines.sglang import SgLang
from kvsim.engines.torch_decoder import TorchDecoder
from kvsim.engines.trtllm import TensorRtLlm
from kvsim.engines.vllm_v0 import VllmV0
from kvsim.engines.vllm_v1 import VllmV1

ENGINES: tuple[type[Engine], ...] = (VllmV1, VllmV0, TensorRtLlm, SgLang, HuggingFace, FlexGen, TorchDecoder)
