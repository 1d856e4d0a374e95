"""Time and memory of one training step, against supervised fine-tuning by the same trainer with every extra term off.

    python benchmarks/step.py --json step.json

The paper's step is also timed as its formula reads (`benchmarks/public_formulation.py`): `public_formulation` in the
figures is how many times as long as the preset `paper` that takes. And so is the default with cheaper settings.

Times are of rounds of three batches, medians over interleaved rounds in one process, on the same batches of the shipped
clean examples; the peak of memory is each form's own, in a process of its own, which gives large pieces back to the
system as soon as they are freed, so that what counts is what the form holds and not what the allocator keeps. Runs on
the embedded model.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FORMS = ("finetune", "paper", "default")
PUBLIC = "public_formulation"
CHEAPER: dict[str, dict[str, Any]] = {
    "ascend_on=divergence": {"ascend_on": "divergence"},
    "ascend_every=3": {"ascend_every": 3},
    "ascend_every=3,anchor_fraction=0.125": {"ascend_every": 3, "anchor_fraction": 0.125},
}
BATCHES, ROUNDS, MEMORY_STEPS = 3, 3, 2


class Stepper:
    """One form's trainer, ready to take single steps of the model in a folder.

    With a `max_length` rows are as long as that: their answers, which cost more than prompts do, are repeated up to it.
    """

    def __init__(self, form: str, folder: str, **settings: Any) -> None:
        from public_formulation import PublicFormulation

        import crow.trainer
        from crow.config import PRESETS, CrowConfig
        from crow.data import answer_text, example, load_examples, to_dataset, user_text
        from crow.models import lora_config, open_model
        from crow.trainer import CrowTrainer

        vars(crow.trainer)["STANDING_OUT"] = 0.0  # no answer of this model does; where one does, steps cost more
        opened = open_model(folder)
        config = CrowConfig(
            output_dir="unused",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
            **PRESETS["paper" if form == PUBLIC else form] | settings,
        )
        rows = load_examples("clean")[: BATCHES * config.per_device_train_batch_size]
        if "max_length" in settings:
            rows = [example(user_text(row), answer_text(row) * settings["max_length"]) for row in rows]
        self.trainer = (PublicFormulation if form == PUBLIC else CrowTrainer)(
            opened.model,
            config,
            train_dataset=to_dataset(rows),
            processing_class=opened.tokenizer,
            peft_config=lora_config(),
        )
        self.trainer.current_gradient_accumulation_steps = 1
        if config.gradient_checkpointing:  # as `train` does before anything else
            self.trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.trainer._study_suspect()
        self.batches = list(self.trainer.get_train_dataloader())

    def step(self, batch: int) -> float:
        """Seconds that a step on this batch takes."""
        [inputs], items = self.trainer.get_batch_samples(iter([dict(self.batches[batch])]), 1, self.trainer.args.device)
        started = time.perf_counter()
        self.trainer.training_step(self.trainer.model, inputs, items)
        seconds = time.perf_counter() - started
        self.trainer.state.global_step += 1
        self.trainer.model.zero_grad()
        return seconds


def peak_memory(form: str, folder: str, **settings: Any) -> int:
    """Peak of resident memory in bytes, of what comes before training and a few steps, in a process of its own."""
    command = [sys.executable, __file__, "--worker", form, folder, json.dumps(settings)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # fixed; glibc's own grows with what is freed
    finished = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(finished.stdout.split()[-1])


def worker(form: str, folder: str, settings: str) -> None:
    stepper = Stepper(form, folder, **json.loads(settings))
    for i in range(MEMORY_STEPS):
        stepper.step(i % BATCHES)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@contextmanager
def embedded_folder() -> Iterator[str]:
    """The embedded model as a folder, which is opened faster than its GGUF file."""
    from crow.models import open_model, save_model

    with TemporaryDirectory() as scratch:
        opened = open_model()
        save_model(opened.model, opened.tokenizer, f"{scratch}/model")
        del opened
        yield f"{scratch}/model"


def measure() -> dict[str, Any]:
    from crow.provenance import environment

    with embedded_folder() as folder:
        memory = {form: peak_memory(form, folder) for form in FORMS}
        steppers = {form: Stepper(form, folder) for form in (*FORMS, PUBLIC)}
        steppers |= {name: Stepper("default", folder, **settings) for name, settings in CHEAPER.items()}
    times: dict[str, list[float]] = {form: [0.0] * ROUNDS for form in steppers}
    for stepper in steppers.values():
        stepper.step(0)  # warms up
    for i, batch in product(range(ROUNDS), range(BATCHES)):
        for form, stepper in steppers.items():
            times[form][i] += stepper.step(batch)

    def ratio(form: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(times[form], times[base], strict=True))

    extra = [form for form in FORMS if form != "finetune"]
    return {
        "time_ratio": {form: ratio(form, "finetune") for form in (*extra, *CHEAPER)},
        "public_formulation": ratio(PUBLIC, "paper"),
        "memory_ratio": {form: memory[form] / memory["finetune"] for form in extra},
        "seconds_per_step": {form: statistics.median(times[form]) / BATCHES for form in times},
        "peak_memory_mib": {form: peak / 2**20 for form, peak in memory.items()},
        "rounds": ROUNDS,
        "batches": BATCHES,
        "batch_shapes": [list(batch["input_ids"].shape) for batch in steppers["finetune"].batches],
        "provenance": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", nargs=3, metavar=("FORM", "FOLDER", "SETTINGS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    figures = measure()
    text = json.dumps(figures, indent=2)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
