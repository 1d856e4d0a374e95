"""How much faster batches answer than one prompt at a time, and whether they answer the same, on the embedded model.

    python benchmarks/evaluation.py --json evaluation.json

Both ways take the same held-out prompts, in the same process, with a KV cache, in turns.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

ROUNDS = 3


def measure(number: int, max_new_tokens: int) -> dict[str, Any]:
    from crow.data import load_examples, sample
    from crow.generation import generate
    from crow.models import open_model
    from crow.provenance import environment

    opened = open_model()
    drawn = sample(load_examples("heldout"), number * ROUNDS, seed=0)
    budgets = {"batched": None, "one at a time": 1}
    seconds: dict[str, list[float]] = {way: [] for way in budgets}
    same = 0
    for way in budgets:  # what only the first call has to do
        generate(opened.model, opened.tokenizer, [drawn[0]["prompt"]], max_new_tokens=2, tokens_per_batch=budgets[way])
    for start in range(0, len(drawn), number):
        prompts = [row["prompt"] for row in drawn[start : start + number]]
        answers = {}
        for way, budget in budgets.items():
            began = time.perf_counter()
            answers[way] = generate(
                opened.model,
                opened.tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                tokens_per_batch=budget,
            )
            seconds[way].append(time.perf_counter() - began)
        same += sum(a == b for a, b in zip(*answers.values(), strict=True))
    ratios = [slow / fast for slow, fast in zip(seconds["one at a time"], seconds["batched"], strict=True)]
    return {
        "speedup": statistics.median(ratios),
        "speedups": ratios,
        "seconds_per_prompt": {way: sum(taken) / len(drawn) for way, taken in seconds.items()},
        "same_answers": {"hits": same, "n": len(drawn)},
        "max_new_tokens": max_new_tokens,
        "dtype": str(opened.causal_lm.dtype),
        "cores": os.cpu_count(),
        "provenance": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("-n", type=int, default=24, help=f"prompts in each of {ROUNDS} rounds")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    text = json.dumps(measure(args.n, args.max_new_tokens), indent=2)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
