"""What plain vLLM 0.6 takes beyond the simulation in KV-Compress's runs, by decode step and by prompt token.

    python benchmarks/kv_compress_steps.py

256 prompts at once, 500 output tokens each; the published rates count both. Where prompts fill the pool, steps grow with prompt tokens, so
either column may be the cause and most runs do not say which. Runs with as many steps and other prompts do: the L4's with one sequence at
a time, whose difference the last line prints. `preempted`: how often the simulation preempts.
"""

from __future__ import annotations

from kvsim.api import simulate
from kvsim.scenario import parse_scenario
from kvsim.validation import kv_compress

PROMPTS, OUTPUT_TOKENS, PLAIN = 256, 500, "vLLM "


def main() -> None:
    alone: list[tuple[int, float, int]] = []
    for case in kv_compress.cases(quick=False):
        if not case.name.startswith(PLAIN) or case.truths[0].metric != "total_tok_s":
            continue
        prompt = int(case.name.removeprefix(PLAIN).partition("+")[0])
        policy = next(iter(simulate(parse_scenario(case.scenario)).policies.values()))
        columns = policy.log.step_columns()
        decodes = columns["prefill_tokens"] == 0
        steps = int(columns["num_steps"][decodes].sum())
        batch = float((columns["num_steps"] * columns["num_decodes"])[decodes].sum()) / steps
        measured_s, simulated_s = PROMPTS * (prompt + OUTPUT_TOKENS) / case.truths[0].value, policy.log.end_ps / 1e12
        excess_s = measured_s - simulated_s
        print(
            f"{case.group:22s} {case.name:15s} measured {measured_s:7.0f} s, simulated {simulated_s:7.0f} s, batch {batch:4.1f}, "
            f"preempted {policy.log.num_preemptions:3d}: {1e3 * excess_s / steps:4.1f} ms a step or "
            f"{1e6 * excess_s / PROMPTS / prompt:3.0f} us a prompt token"
        )
        if batch == 1.0:
            alone.append((prompt, excess_s, steps))
    (short, less_s, steps), (long, more_s, _) = alone
    per_token_s = (more_s - less_s) / PROMPTS / (long - short)
    per_step_s = (less_s - per_token_s * PROMPTS * short) / steps
    print(f"one sequence at a time: {1e3 * per_step_s:.1f} ms a step and {1e6 * per_token_s:.0f} us a prompt token")


if __name__ == "__main__":
    main()
