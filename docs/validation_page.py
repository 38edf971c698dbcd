"""Writes docs/validation.md from the last run: `kvsim validate --out DIR`, then `python docs/validation_page.py DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

HEAD = """# Validation: predictions beside what others measured

Made by `docs/validation_page.py` from the files of `kvsim validate --out DIR`; do not edit the tables by hand. No constant of the
simulator is tuned to a row in here: hardware profiles come from kernel tables alone, and of the serving rows only the `calibrate`
groups chose anything, the client protocol of their source. The naive model reads weights and cache once at the datasheet's
bandwidth and computes prompts at its peak: no engine, no capacity, no launch.

"""

TAIL = """
## What is missed, and what we know of why

- **KV-Compress, throughput.** Largest batches agree (median error 0 % and 1.5 %), but kvsim is 20-30 % too fast for plain vLLM 0.6 already
  and more so at high compression, where prefill dominates. On the L4 the published rates imply some 30 TFLOP/s in prefill, a quarter of
  its peak: the card runs at 72 W, its profile is carried from the L40S and RTX 4090 by board power, and says 60. On the H100 (the 94 GB
  card, carried from the SXM one) FP8 prefill of a 2024 vLLM ran at some 370 TFLOP/s, ours says 650 from vLLM 0.24. The fork's own work
  during prefill (squared attention in Python, sorting all metrics) is not modelled beyond its bytes.
- **TTFT on H100.** It is the client's queue: SGLang's, whose prefill-first order keeps clients in step, is 11 % off; TensorRT-LLM's grows
  with the answer's length in the source in a way that no simple client explains (some 40 requests a second is the most its
  front end seems to take), and vLLM's means lie between those of a burst and of a steady closed loop.
- **SGLang on one GPU** held fewer tokens than its own memory formula leaves, so its queue was longer: TTFT 82 % too low there.
- **TensorRT-LLM, 8B over 8 GPUs** is limited by its host; kvsim assumes host work (0.8 ms and 6 us a sequence, hidden behind the device).
- **Keyformer's absolute rates** are 33 % too high: what Hugging Face's `cat`, `index_select` and softmax chain reach of the bandwidth
  is not measured on an A100 yet. The speed-ups, all six, are within 12 %.
- **Not modelled**: FlexGen (H2O's A100 logs, T4 offloading rows). KIVI's and ThinK's headlines are not scored.

A peer simulator over the same kernel tables reported TPOT 13.1 % and TTFT 53.9 % on 562 of the H100 rows; a peer with a profile of every
layer, on the RTX 4090 run, +0.6 % in mean TTFT, +0.2 % in TPOT and +0.5 % in E2E.
"""


def main() -> int:
    tables = Path(sys.argv[1]) / "tables.md"
    page = Path(__file__).with_name("validation.md")
    page.write_text(HEAD + tables.read_text(encoding="utf-8") + TAIL, encoding="utf-8")
    print(f"written: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
