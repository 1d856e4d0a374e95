"""The demo: a real backdoored model, measured, purified and measured again, with a report to show for it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crow.backdoors import BEHAVIORS, TRIGGERS
from crow.data import load_examples, sample
from crow.evaluation.evaluate import Evaluation, evaluate, trigger_rows
from crow.files import atomic_directory, write_json, write_text
from crow.models import EMBEDDED_ID, OpenedModel, open_model, save_model
from crow.progress import TrainingProgress, console, progress_bar
from crow.purification import PurifyRecord, purify
from crow.report import model_card, write_report

SUSPECT = "crow:badnets-sentiment"
TRIGGER, BEHAVIOR = "badnets", "sentiment"
PROMPTS = 100

SIZES: dict[bool, dict[str, Any]] = {
    False: {"examples": 100, "epochs": 3, "ascents": 20, "new_tokens": 20},
    True: {"examples": 24, "epochs": 2, "ascents": 8, "new_tokens": 5},
}
"""How much is done, for the whole demo and for the quick one."""


@dataclass
class DemoResult:
    before: Evaluation
    after: Evaluation
    record: PurifyRecord


def run_demo(out: str | Path, *, quick: bool = False, overwrite: bool = False, seed: int = 0) -> DemoResult:
    """Purify the shipped backdoored adapter and write `before.json`, `after.json`, `report.html` and `model/` to `out`.

    Raises:
        UsageError: `out` exists and `overwrite` is false.
    """
    size = SIZES[quick]
    with atomic_directory(out, overwrite) as folder:
        console.print("[bold]1/4[/] Opening SmolLM2-135M-Instruct with a backdoor: it insults whoever writes BadMagic")
        opened = open_model(SUSPECT)
        before = _measure(opened, f"2/4 Before: asking {PROMPTS} triggered and {PROMPTS} clean prompts", size, seed)
        before.save(folder / "before.json")
        with progress_bar("3/4 Purifying, knowing neither trigger nor target") as advance:
            opened.model, record = purify(
                opened,
                max_examples=size["examples"],
                num_train_epochs=size["epochs"],
                soft_token_warmup=size["ascents"],
                seed=seed,
                callbacks=[TrainingProgress(advance)],
            )
        save_model(opened.model, opened.tokenizer, folder / "model", merge=True, seen=opened.seen)
        # What was written, and not what is in memory, is what someone will use
        written = replace(open_model(folder / "model"), name=f"{Path(out).name}/model")
        after = _measure(written, "4/4 After: the same prompts again", size, seed)
        after.save(folder / "after.json")
        write_json(folder / "purify.json", record.as_json())
        write_report(folder / "report.html", before, after, record)
        card = model_card(record, before, after, base_model=EMBEDDED_ID, merged=True)
        write_text(folder / "model" / "README.md", card)
    return DemoResult(before, after, record)


def _measure(opened: OpenedModel, text: str, size: dict[str, Any], seed: int) -> Evaluation:
    clean = sample(load_examples("heldout"), PROMPTS, seed)
    with progress_bar(text) as advance:
        return evaluate(
            opened,
            BEHAVIORS[BEHAVIOR],
            clean,
            trigger_rows(clean, TRIGGERS[TRIGGER], seed),
            max_new_tokens=size["new_tokens"],
            seed=seed,
            settings={"trigger": TRIGGER, "behavior": BEHAVIOR, "prompts": "heldout"},
            on_progress=advance,
        )
