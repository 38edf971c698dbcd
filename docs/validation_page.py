"""Writes docs/validation.md from the last run: `kvsim validate --out DIR`, then `python docs/validation_page.py DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

HEAD = """# Validation: predictions beside what others measured

Made by `docs/validation_page.py` from the files of `kvsim validate --out DIR`; do not edit the tables by hand. No constant of the
simulator is tuned to a row in here: hardware profiles come from kernel tables alone, and of the serving rows only the `calibrate`
groups chose anything: the client protocol of their source, engine settings that it does not state, the 5 ms of front end that
servers have by default, and TensorRT-LLM's work on the host; and what an eager launch costs comes from whole steps of three runs,
marked as such and in no bar.

An error is predicted / measured - 1. Two naive models stand beside it. The *roofline* reads weights and cache once at the datasheet's
bandwidth and computes prompts at its peak: no engine, no capacity, no launch, no policy cost; a single matrix product is its bytes at
the bandwidth or its FLOPs at the peak, whichever takes longer. The *byte ratio* lets a policy gain over
the measured full cache what it saves in bytes.

## A run of your own

```
vllm bench serve ... --save-result --save-detailed --result-filename result.json
kvsim validate requests --measured result.json --scenario mine.yaml
```

`mine.yaml` is a scenario with the GPU, model and engine that ran; its `workload` is replaced by the file's requests and may be left
out. Give the engine's own number of blocks as `engine.num_gpu_blocks`: capacity is what a prediction depends on most. Arrivals are the
file's `start_times`; where an older vLLM wrote none, they are drawn anew at the stated `request_rate` and `burstiness`, or a closed
loop of the stated `max_concurrency` is run, and the output says which. Requests that failed are left out, and counted. TTFT, TPOT,
ITL and E2E are compared in mean, P50, P90 and P99, and request by request where arrivals are known, with the bars of the shipped run.
`sglang.bench_serving --output-details` writes files that will do as well. Say in `engine.sampling` how tokens were drawn: `vllm bench
serve` asks for a temperature of 0 up to January 2026 and leaves it to the model's generation_config since; penalties in that file act
either way.

## Suites

`theory` needs no measurements: queueing laws, Little's law, conservation of time, roofline bounds, in units of what chance or rounding
allows. `memory` is bytes by formula. `hardware` is what others measured on GPUs that no shipped profile was measured on (L4, A10G, A40,
RTX A6000, T4, H100 PCIe and NVL, A100 PCIe...): matrix products, copies, and serving, with its confidence where a source leaves
something out; the bar of TPOT is the median error that the 20 % claimed for carried profiles implies. Its groups "serving by setting"
are runs of five engines on GPUs with and without a table, by what they exercise: tensor parallelism, weights of 8 and 4 bits, long
prompts, full pools, everything sent at once, one stream, MI300X; no bar stands on them. `compression` is what others ran
with a full and a compressed cache on the same machine, absolute and as gains (full over compressed in time, the inverse in rates); its
bars leave out what is partly stated and the runs whose rates set the cost of an eager launch. `published` is papers' tables and
logs, `requests` a real vLLM run, `silicon` serving on H100s; the last two need files that do not come with kvsim (`--measured DIR`).
`--out DIR` also writes one page with every row and plots.

"""

TAIL = """
## What is missed, and what we know of why

- **KV-Compress, throughput.** Largest batches agree (median error 0 % below the caps, 0 % and 0.4 % at them): the caps of 123 and 243
  sequences, which nothing published explains, are what the memory holds at 144 slots a sequence. The fork's own work is priced as its
  code reads (`implementation: paper`): one GPU thread that walks what a prompt evicts, a wait for the device three times a sequence and
  step, block tables copied whole. That moved the errors from 39 % and 72 % to 24 % and 34 %. What is left is there in plain vLLM 0.6
  already (`benchmarks/kv_compress_steps.py` prints it). On the L4, two runs of one sequence at a time take 12 ms a step and 80 us a prompt
  token more than simulated: steps of 65 ms would be as long with a fifth less bandwidth than the 257 of 300 GB/s it is credited with; under
  later vLLM such a card lacks 1 ms a token at most. On the H100 NVL it is 12-16 ms a step or 191-233 us a prompt token, and its runs
  do not say which: the second is the more even, and would make prompts half as quick as simulated. vLLM 0.6's Python was measured: 0.9 ms
  and 60 us a sequence on a Xeon core; eager launches, 16 ms for 80 layers, a sixth more with fp8 weights
  (`benchmarks/vllm_v0_host.py --fp8`), hide behind the device unless the host is twice as slow. Nothing but these rows tells these causes
  apart, so none is priced. Not modelled either: loops over all running sequences at every compression, some 0.25 ms each; paged attention
  that reads the cache for every query head.
- **TTFT on H100** (25 %; it was 40 %) is a queue of the client's own making. Clients stay in trains: an answer's end brings the next
  prompt just after the following step has been decided on. Three things made most of the difference: an engine that decides a step ahead
  makes that prompt wait for one step more; a pause of 5 ms, front end or client, fitted on the calibrate groups, makes it miss a step at
  all; and the steps of the sweep hold concurrency + prompt + 1,500 tokens, as its publisher's tool sets them, not 8,192.
- **TTFT of TensorRT-LLM, 8B** is still 24-43 % too low. At 8 to 64 clients its mean exceeds what is simulated by (time of an answer) /
  (number of clients): one client of all always waits for a whole answer, on 2 and on 8 GPUs alike, and under Qwen3-32B none. At 128
  clients 10 to 40 wait. No limit on requests or tokens a second, nor a server shared by both, fits: on 8 GPUs 36 requests a second go
  through at 128 tokens an answer and at 256, 18 at 512, while on 2 GPUs 64 clients send 35 a second without such a queue.
- **TTFT of TensorRT-LLM, Qwen3-32B** (calibrate groups, fp8 caches) is 13-36 % too low at 8 and 16 clients with prompts of 2,048 and
  more, where some four steps pass before the first token and kvsim says three, up to 30 % too high with prompts of 1,024, which kvsim
  computes in pairs, and up to 56 % too low at 128 clients on four GPUs.
- **KV dtype of TensorRT-LLM's fp8 rows** is not stated, and both are scored. On one GPU a 16-bit cache would not hold the clients that
  the rows show running: TTFT is 111 % too high there, and 7 % too low with fp8 caches.
- **SGLang on one GPU** held fewer tokens than its own memory formula leaves, so its queue was longer: TTFT 79 % too low there. The
  formula of its 0.5 releases is followed, and what is free is counted beside the CUDA context.
- **Host work of TensorRT-LLM** (2.6 ms and 35 us a sequence, 50 us an eager launch, hidden behind the device) is fitted, in sum, to the
  calibrate groups of the 8B, where it is the limit; it is that of release 1.0 with the sampler in Python.
- **Keyformer's absolute rates** are 32 % too high: what Hugging Face's `cat`, `index_select` and softmax chain reach of the bandwidth
  is not measured on an A100 yet. The speed-ups, all six, are within 12 %; the one at 1,024 leans on the host's floor, 42 launches a layer
  as in Llama, where MPT's own layer has some 20 and the policies' Python, which is not counted launch by launch, many more.
- **H2O on FlexGen, batch 64** (decode 17 % too quick, the other six logs within 8 %). Of 95 s simulated in all, attention takes 53,
  matrix products 31, H2O's own kernels 5, element-wise ones 4. The log is 8.6 ms a step slower, 0.27 ms a layer. What kvsim lacks:
  how badly an argmin over the long side of 818 x 2,048 scores and the scatters and clones of `cache_replace` run; they are counted by
  bytes, at an assumed efficiency. At batch 24 the same kernels cost too little to tell. Nor does kvsim price that FlexGen waits for the
  device after every half layer (2 x layers x steps times), so that its host's work hides behind nothing: 50-60 us each would bring this row
  within the bar and three of the others out of it, so it stays out.
- **Attention of FlexGen and Hugging Face on A100s**, batched products of cuBLAS, has no table. It is priced by SGLang's of that card,
  which reads 0.8-1.3 TB/s of caches beyond 1 GiB and was measured under a backend of Hopper's (no server is priced by it any more). By
  vLLM's table, 1.4-1.7 TB/s, the H2O logs would be up to 35 % too quick. PyTorch's blog on Flash-Decoding times eager attention of 16
  query heads over 2 KV heads: 1,336 us at 65,536 tokens for a copy and the products, 0.42 of the bandwidth in all, as kvsim has it. By
  its rows of batches, which need a second copy (3,059-3,224 us), the products reach 0.7-0.96 if both copies run at one rate, and 0.42 if
  copies and products all do. SGLang's table, at 0.53, lies between.
- **Prefill of FlexGen's full caches** is 13-24 % too quick (with H2O within 7 %): the fork sums, sorts, gathers and concatenates whole
  caches even where everything is kept, which is not modelled. Peaks are exact because the tensors alive at once are counted in the
  code; they admit softmax in fp16 only, as in FlexGen's own repository.
- **FlexGen on a T4** is 27-77 % too quick where it does not wait for the disk (there 17 % too slow). The logs imply 24 TFLOP/s in OPT-30B's
  prefill; kvsim says 39, carried over from much newer GPUs: no Turing GPU has been measured. FlexGen's caches are not pinned, so they
  cross the link at less than the 85 % of PCIe that is assumed, CPU attention runs at an assumed 100 GB/s, and widening from
  4 bits is priced by its bytes. Its peaks are some 25 % too low: the T4 logs' code kept softmax in fp32 or more buffers.
- **Products of few rows on a T4** are 6 % too quick for one row, 11-19 % for 16 and 19-30 % for 32 and 64: PyTorch's kernels read 190 of
  320 GB/s there, perhaps since they compute whole tiles of rows at what a 70 W card sustains. No table of another GPU shows that.
- **KIVI's and ThinK's headlines** are shown without bars: largest batches and peak memory follow (within 3 % for KIVI, 8-17 % for both
  together), KIVI's throughput of up to 3.47x is 2.2x here, since Hugging Face's eager kernels limit both sides and are not measured.
- **fp8 caches under load on an H100** (vLLM 0.19.1, 8 clients of 20,000 + 2,000 tokens): steps 8 % too quick with a full cache and 20 %
  with fp8, so 1.28x where 1.15x was measured. Streams alone are within 6 %, and the lines that the source fitted to them give 13.8 and
  10.6 ms at this load, as kvsim does (14.0 and 10.4); the load itself took 15.2 and 12.9. What eight sequences cost beyond their tokens,
  1.4 and 2.3 ms a step, is the host's, the sampler's or fp8 attention's at a batch, and no kernel table shows it. TTFT is 17 % too low in
  both. On a B200 steps are 3-11 % too quick in both caches and gains within 9 %.
- **fp8 caches on an A100** make prompts 2-5 % slower; kvsim prices them alike (its tables know no 8-bit caches in prompts of that card,
  which has no 8-bit products and widens what it reads). Decode steps in eager mode wait for the host in kvsim at every length and gain
  nothing; measured gains go from 0 to 5.5 %.
- **Qwen3-32B on four RTX 4090s**: TTFT of 10,240 tokens 23 % too high. All-reduces are 2.8 of 4.1 s; their bandwidth is the mean of what
  two machines with other cards reach over PCIe, and the source's cards did the whole prompt in 3.3. The fp8 pool is 22 % too large: the
  source's engine left 20 % less memory for the cache with fp8 than with 16 bits, which nothing in kvsim depends on.
- **SnapKV and PyramidKV in Sparse-vLLM** gain 1.68x and 1.55x at 4 x 128,000 tokens, 2.5x in kvsim. SGLang stands in for an engine of
  its own: steps are 2.7 ms longer than simulated with the full cache and 4.6-5.5 ms with a compressed one, nearly twice the 6.2 ms that
  weights and kept tokens take. On what is not stated; it is that engine's own, whose StreamingLLM even loses (0.66x), and is not priced.
- **LMDeploy's PyTorch engine** on an RTX A6000 (eager vLLM V0 stands in): steps 17-42 % too quick, as about 33 ms a step depend on no
  length there. Gains of StreamingLLM and H2O are 4-11 % too high at batches of 8 and 16, 16-19 % too low at 4. KIVI in 4 bits gained
  nothing (1.00-1.03x), kvsim says 1.05-1.35x: it takes attention over 4 bits to be 1.7 times as quick as over 16 at a batch of 16, and
  LMDeploy's Triton kernels were no quicker. What they reach on another engine or GPU these rows do not say.
- **Prompts under Hugging Face** on an L40S (8,192 tokens) are 29-31 % too quick; they were 44 % before norms, rotary embedding and
  activations were counted launch by launch. Logits of every position, which that code may compute, are some 0.05 s of the
  0.4 that are missing; the rest is not explained. Decode steps are within 12 %.
- **4-bit caches of transformers** (quanto, kvpress on an A100) are slower than 16-bit ones from 32,000 tokens up, in kvsim as measured: the
  whole cache is widened in every step. Steps are within 4 % up to 32,000. Beyond, 16-bit ones are 13-16 % too quick (torch's copies for
  `cat`, at the efficiency of element-wise kernels) and widening 5-10 % too slow, so gains are 17-24 % too low there.

- **Matrix products of cards that power limits.** A T4 (70 W) is 22-24 % too quick; an L4 (72 W) up to 25 % too quick at 4,096 and up to
  29 % too slow below, where thirty launches end before the limit acts. Held at 72 W an L4 runs at 1.0 of its 2.04 GHz and gives 57
  TFLOP/s of 121; kvsim says 58 for large matrices and 67 for the best. Sustained clocks are compared by power within a generation, and
  no Turing GPU has a table. At 1,024 a fast GPU waits for Python (a launch every 10-20 us), on measured GPUs too.
- **A card whose fp16 and bf16 differ.** One RTX PRO 6000 reports 316 TFLOP/s in fp16 and 418 in bf16, another 407 and 417: the library's
  choice of kernel, which a profile does not know.
- **fp32 products** run at an assumed 76 % of the peak. From 4,096 up H100s are within 9 %; GA102 cards and RTX PRO 6000s are 12-25 % too
  quick, a T4 39-47 %, an L40S 48 %, an L4 about twice as quick; A100s are 5-23 % too slow.
- **Copies within a GPU** are 0-21 % too quick: the efficiency is that of large additions, 91 %, and copies reach 75-90 % of the datasheet.
- **Qwen2.5-7B on an A10G**, 16 % too quick a decode step, which misses its bar. The step grows by 3.6 ms for 1.75 GB more cache, 489 GB/s
  of 600, so the card is as quick as kvsim takes it to be. Top-k, top-p and the repetition penalty of the model's generation_config, the
  last of which was on, are in the price, a small part of it; some 5 ms that depend on nothing are missing. vLLM's own Python takes 0.8
  ms a step (measured on a CPU). TTFT from 2,048 tokens up is within 5 %. Llama-3-8B on another A10G is within 2 % alone.
- **Models below 1B on an L4** are 12-36 % too quick up to 32 users: hundreds of launches of a few microseconds make the step, and their
  latencies come from larger GPUs. If the client left sampling to the server, a repetition penalty (Qwen2.5's generation_config) would
  account for much of it up to 8 users, and be too much at 16 and 32. A 1.7B model is within 11 % from 1 to 512.
- **How tokens are drawn** is stated by few sources, and greedy decoding is simulated where it is not. `vllm bench serve` asked for it until
  January 2026 (pull request 32723), but for penalties of the model's generation_config; since then, as with most other clients, all of
  that file counts. Top-p takes 9 % of ShareGPT's throughput in kvsim where PyTorch sorts for it (Llama-3.1-8B on an H100,
  1,000 requests at once), 3.3 ms a request; vLLM's own test, whose GPU and model are not stated, went from 47.4 to 40.2 requests a second
  (pull request 11394), 3.8 ms a request, and to 47.2 by FlashInfer's kernel, 0.1 ms (0.01 in kvsim). The host's part of penalties, a
  tensor of all answers so far in every step, is not priced, and the sort's memory only as 26 bytes a logit of the profile run.
- **vLLM V0 as a server, 0.5.4** (Lambda's runs of Mistral-7B). 320 requests at once are 1.5 to 2.7 times too quick, ten requests 13-21 %
  a token on one GPU. What is missing does not depend on the device: 20, 21, 19 and 19 s of a run on 1, 2, 4 and 8 A100s, 7-8 s on H100s of
  another host; 0.27 and 0.11 ms for each of 71,545 tokens. kvsim's host work of V0 was measured on 0.6.0's engine alone, called in
  its own process. 0.5.4 also pickles every answer so far at every step for the process that serves HTTP, and parses and writes it there;
  with tensor parallelism its driver sends the inputs of every step to the workers (1.5 ms more at ten requests). Use V0 here for
  `LLM.generate`, or expect a server of 0.5 to 0.6 to be slower.
- **8-bit and 4-bit weights under vLLM on an A100** (Marlin kernels, ShareGPT at once): fp8 14-17 % and AWQ 7-9 % too quick, where 16-bit
  weights are within 6 %. Marlin has no table: AWQ's products are those of TensorRT-LLM on the same card, fp8's are assumed to widen at the
  same efficiency.
- **SGLang and TensorRT-LLM on the same A100** are 19-21 % too slow for Qwen3-14B and 8-14 % for Qwen3-32B, vLLM's steps within 6 %. Four
  fifths of the time are matrix products, at the rates of their own tables; the spread of lengths is that of another draw of ShareGPT.
- **TensorRT-LLM, 128 + 128 tokens at most load** is 31 % too slow (all other lengths within 14 %). The 35 us a sequence that were fitted at
  up to 128 clients make 72 ms at a batch of 2,048, which is the whole time of a measured step: the work must grow more slowly than batch.
- **First token under TensorRT-LLM 0.5 on an L40S** (fp8, 2,048 tokens) is 46 % too slow, on H100s and A100s 1-13 % too quick: 72 of 106 ms
  are products at the rates of a measured table of release 1.3, as long as the whole of what 0.5 took, and 22 ms element-wise work.
- **Llama-3.1-70B and 405B in fp8 on eight MI300X**: 30 runs of AMD's own, median error 17 %, from 5 % too slow to 44 % too quick (batches
  of 128 after prompts of 128 tokens); most are too quick, and Qwen3-8B with 32 clients on one GPU is by 29 %, its TTFT by 59 %. No AMD GPU
  has a table. Large products are held to the best that AMD measures under load (708 TFLOP/s in bf16 and 1,273 in fp8 of 1,307 and 2,615
  on the datasheet; `sustained_tflops` of the GPU's file), and other shapes fall behind that as they do on NVIDIA's GPUs. On an MI325X AMD
  gives for the shapes of a model 19-26 % less than for its best product, which would explain much. The 16 runs at most load are AMD's
  under two releases, which differ by up to 24 %.
- **Tensor parallelism over PCIe on T4s** is 34 % too quick, as much as those cards' other rows; on four A100s it is 13 %. **SGLang on eight
  H100s** takes 3.35 ms a token, kvsim says 2.67: its loop of 2024 prepared every step in turn on eight processes.
- **Llama-3.1-8B on an RTX 5090** with 800 users at most: 20-22 % too quick under vLLM of May 2025, in bf16 and fp8, and 12 % under
  TensorRT-LLM on the same machine, whose cache held 7 % less than here. Large products, carried over from an RTX PRO 6000's, are 2-8 %
  slower than others measured, so more is missing elsewhere: what users who stream cost vLLM's own front end is not priced.
- **Mistral-7B on an RTX 4090** is 7, 15 and 20 % too quick at 4, 16 and 48 clients; alone such a card is within 5 %. Neither vLLM's
  version nor the client's pauses are stated.
- **TTFT under light load** is 1-71 % too low (four clients on an H100, 28-64 ms measured) and up to 54 % on an L4: HTTP, tokenizer and the
  client itself take tens of milliseconds there, of which kvsim takes 5 unless `front_end_s` says more.
- **Not scored**: GPUStack's throughput pages for "H100". Their decode steps of Qwen3-32B read weights at 1.7 TB/s and their prompts run at
  some 300 TFLOP/s, which no SXM card does; as H100 PCIe kvsim is within 17 %. Nor is any run with a stated hit rate of a prefix
  cache: none was found that also states lengths and load.
- **Qwen3-32B on an H100 NVL** is 62 % too quick; the issue that reports it asks why it is so slow, fp8 weights being no faster.

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
