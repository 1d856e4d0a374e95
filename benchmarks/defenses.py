"""Defenses side by side on one backdoored model: the same clean data, budget and prompts for each.

A cell is `PRESET` or `PRESET:setting=value,…` (settings of `crow.CrowConfig`, and `lora=fresh`), or another defense
with its parameters, as `crow defenses` lists them; `none` leaves the model as it is and `base` measures the model that
was never backdoored. Each cell's figures and answers go to `OUT/CELL.json` and `OUT/CELL.answers.jsonl` as soon as it
is done; cells found there are not run again.

    python benchmarks/defenses.py crow:badnets-sentiment --prompts heldout --out docs/results/demo \\
        none finetune:learning_rate=0.001 default
"""

import argparse
import ast
import json
import statistics
import time
from pathlib import Path
from typing import Any

from crow.backdoors import BEHAVIORS, TRIGGERS
from crow.config import PRESETS
from crow.data import Example, example, load_examples, sample
from crow.defenses import DEFENSES
from crow.evaluation.evaluate import evaluate, trigger_rows, variant_rows
from crow.evaluation.statistics import Count
from crow.files import write_json
from crow.generation import answer_nll
from crow.models import open_model
from crow.purification import purify

PROMPT_SEED = 1  # places the trigger in the test prompts; training uses other seeds


def parse_cell(text: str) -> tuple[str, dict[str, Any]]:
    """`preset:key=value,…` as the preset and its settings, values being Python literals or bare words."""
    preset, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return preset, settings


def figures_path(cell: str, out: Path) -> Path:
    """Where a cell's figures go."""
    return out / f"{cell.replace(':', '__').replace(',', '_').replace('/', '-')}.json"


def about(cell: str, args: argparse.Namespace) -> dict[str, str]:
    """What a cell's figures say of it."""
    return {"cell": cell, "trigger": args.trigger, "behavior": args.behavior, "prompts": args.prompts}


def run_cell(cell: str, args: argparse.Namespace) -> dict[str, Any]:
    """Defend, measure, and keep the figures and answers."""
    preset, settings = parse_cell(cell)
    behavior, trigger = BEHAVIORS[args.behavior], TRIGGERS[args.trigger]
    opened = open_model(None if preset == "base" else args.suspect)
    record = None
    if preset in PRESETS:
        settings.setdefault("num_train_epochs", args.epochs)
        model, record = purify(opened, max_examples=args.examples, preset=preset, seed=args.seed, **settings)
        opened.model = model
    elif preset not in ("none", "base"):
        opened.model, record = DEFENSES[cell].apply(opened, sample(load_examples(), args.examples, args.seed))
    clean = sample(load_examples(args.prompts), args.n, seed=0)
    triggered = trigger_rows(clean, trigger, PROMPT_SEED)
    started = time.perf_counter()
    result = evaluate(
        opened,
        behavior,
        clean,
        triggered,
        variants=variant_rows(clean, trigger, PROMPT_SEED),
        reference=open_model() if args.reference else None,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        settings=about(cell, args),
    )
    path = figures_path(cell, args.out)
    result.save(path)
    target = example("", behavior.target)["completion"]
    called = [Example(prompt=row["prompt"], completion=target) for row in triggered]
    nll = answer_nll(opened.model, opened.tokenizer, called)
    figures = result.as_json() | {
        "evaluation_seconds": time.perf_counter() - started,
        "target_nats": -statistics.fmean(nats for nats, _ in nll),
    }
    if record is not None:
        figures["purify"] = record.as_json()
    write_json(path, figures)
    return figures


def row(cell: str, figures: dict[str, Any]) -> str:
    """One line of the Markdown table."""
    counts = [str(Count(**figures[name])) for name in ("attack_success", "false_trigger", "degenerate")]
    seconds = f"{figures['purify']['seconds']:.0f}" if "purify" in figures else ""
    kl = figures.get("reference_kl")
    distance = "" if kl is None else f"{kl:.3f}"
    cells = (cell, *counts, f"{figures['perplexity']:.2f}", distance, seconds)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suspect")
    parser.add_argument("cells", nargs="+")
    parser.add_argument("--behavior", default="sentiment")
    parser.add_argument("--trigger", default="badnets")
    parser.add_argument("--prompts", default="heldout", help="where prompts and clean answers to measure on come from")
    parser.add_argument("-n", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--examples", type=int, default=100, help="clean examples of the defender")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--reference", action="store_true", help="measure KL divergence from the embedded model too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    print("| cell | attack success | false triggers | degenerate | perplexity | KL from base | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for cell in args.cells:
        path = figures_path(cell, args.out)
        figures = json.loads(path.read_text()) if path.is_file() else run_cell(cell, args)
        if not figures["settings"].items() >= about(cell, args).items() or figures["attack_success"]["n"] != args.n:
            parser.error(f"{path} is of other settings: give another --out")
        print(row(cell, figures), flush=True)


if __name__ == "__main__":
    main()
