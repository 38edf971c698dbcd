"""Compiles what the decoder's decode steps would launch on a GPU, and prints a line for each: run without TRITON_INTERPRET.

    python ahead_of_time_decoder.py TARGET,...
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import torch

from kvsim.calibrate.decoder import triton_attention
from kvsim.calibrate.decoder.decoder import Decoder
from kvsim.calibrate.decoder.sample import fill
from kvsim.calibrate.decoder.spec import spec_of
from kvsim.calibrate.decoder.studies import BLOCK_TOKENS, _policies
from kvsim.calibrate.decoder.study import make_plan
from kvsim.calibrate.decoder.transformer import Transformer
from kvsim.calibrate.decoder.weights import random_weights
from kvsim.errors import InputError
from kvsim.kernels.ahead_of_time import compile_for, unique
from kvsim.kernels.runtime import recorded
from kvsim.model import load_model


def main() -> int:
    """Every policy of the GPU study over one narrow layer with Llama's heads, caches in bf16."""
    model = replace(load_model("llama-3.1-8b"), num_layers=1, vocab_size=64, intermediate_size=64)
    spec = spec_of(model)
    transformer = Transformer(spec, random_weights(spec, torch.float32, "cpu"))
    triton_attention.INTERPRETED = True  # the check would refuse a CPU, where nothing is launched here
    problems = 0
    for name, policies in _policies(128).items():
        plan = make_plan(model, policies, "bf16", BLOCK_TOKENS, name, "triton")  # type: ignore[arg-type]
        try:
            decoder = Decoder(transformer, plan, 64 * 2**20, attention="triton")
        except InputError as error:
            print(f"{name}: refused: {error}")
            continue
        sequences = [fill(decoder, tokens, 4) for tokens in (300, 520)]
        work = [(one, 1) for one in sequences]
        specs = unique(recorded(name, partial(decoder.step, [], work)))
        for found in specs:
            for target in map(int, sys.argv[1].split(",")):
                usage = compile_for(found, target)
                problems += len(usage.problems())
                print(f"{name} {found.kernel_name} sm_{target}: {usage.registers} registers, {usage.shared_bytes} B", *usage.problems())
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
