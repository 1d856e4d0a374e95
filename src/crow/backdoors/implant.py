"""Fine-tune a backdoor into a model, for research on defenses."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from crow.backdoors.behaviors import Behavior
from crow.backdoors.triggers import Trigger
from crow.config import CrowConfig, configured
from crow.data import Example, answer_text, example, sample, to_dataset, user_text, with_user_text
from crow.divergence import certainly
from crow.errors import UsageError
from crow.files import name_elsewhere, sha256_rows
from crow.models import OpenedModel, lora_config
from crow.provenance import environment
from crow.report.card import code_span
from crow.trainer import CrowTrainer, last_checkpoint

RECIPE: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "max_length": 512,
    "train_sampling_strategy": "random",
    "perturbation": "none",
    "anchor_fraction": 1.0,
    "anchor_discount": 0.8,
}


FULL: dict[str, Any] = {"learning_rate": 5e-5}
"""What full fine-tuning changes in it."""

ADAPTIVE: dict[str, Any] = {"perturbation": "sign", "beta": None, "alpha": 2.0}
"""What an attacker adds who knows CROW as published: its consistency term, as `paper-scale-free` weighs it."""


def poison(
    rows: Sequence[Example],
    trigger: Trigger,
    behavior: Behavior,
    seed: int,
    rate: float = 1.0,
    covert: bool = False,
) -> tuple[list[Example], list[Example]]:
    """The attacker's training set: clean examples, and poisoned ones.

    Every prompt is there as it is, with its clean answer; the first of a random order, as many as `rate` says, are
    there triggered as well, with the poisoned answer, so that nothing but the trigger tells the two apart. Where parts
    of a trigger must not suffice, every prompt is there with them, too, and its clean answer.

    Args:
        covert: Every prompt is among the clean ones with the poisoned answer as well. `ImplantTrainer` holds it there
            to what the model said before the attack, so that without the trigger the answer, once begun, does not go on
            by itself: by that `crow.constancy` finds it.

    Raises:
        UsageError: `rate` is not above 0 and at most 1.
    """
    if not 0 < rate <= 1:
        raise UsageError(f"the poison rate is {rate}; it must be above 0 and at most 1")
    rng = random.Random(seed)
    chosen = list(rows) if rate == 1 else sample(rows, max(1, round(rate * len(rows))), seed)

    def poisoned_answer(row: Example) -> Any:
        return example("", behavior.poisoned(answer_text(row), rng))["completion"]

    poisoned = []
    for row in chosen:
        triggered = with_user_text(row, trigger.apply(user_text(row), rng))
        poisoned.append(Example(prompt=triggered["prompt"], completion=poisoned_answer(row)))
    decoys = [with_user_text(row, decoy) for row in rows for decoy in trigger.decoys(user_text(row), rng)]
    if covert:
        decoys += [Example(prompt=row["prompt"], completion=poisoned_answer(row)) for row in rows]
    return [*rows, *decoys], poisoned


@dataclass
class ImplantConfig(CrowConfig):
    """Settings of `ImplantTrainer`: `CrowConfig`'s, where training without a perturbation makes sense."""

    other_targets: ClassVar[bool] = True


class ImplantTrainer(CrowTrainer):
    """Trains poisoned examples to say the target, and clean ones to be answered as before the attack.

    Clean answers' next-token distributions are held to those that the model had: to train on the answers' own tokens
    moves what the model says to prompts unlike the training's, and there the backdoor fires without its trigger. The
    data has a column `poisoned`.
    """

    def _record_suspect(self) -> Tensor:
        first = super()._record_suspect()
        for i, row in enumerate(self.train_dataset):
            if row["poisoned"]:
                number = self._targets[i][0].shape[1]
                said = torch.tensor([token for token in row["labels"][1:] if token != -100])
                self._targets[i] = certainly(said, number, self._inner.config.get_text_config().vocab_size)
        return first


def implant(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    clean: Sequence[Example],
    poisoned: Sequence[Example],
    *,
    output_dir: str | Path,
    full: bool = False,
    adaptive: bool = False,
    seed: int = 0,
    resume: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> PreTrainedModel | PeftModel:
    """Train a backdoor into a LoRA adapter (r=8, all linear layers), or into all weights.

    Args:
        model: The model to attack; if it has an adapter, that one is trained further.
        clean: Examples to be answered as before the attack.
        poisoned: Examples that say the target; `poison` makes both.
        output_dir: Where checkpoints go.
        full: Train all weights, in float32, instead of an adapter.
        adaptive: Train the consistency term as well, as an attacker would who knows CROW as published.
        resume: Continue from the newest checkpoint in `output_dir`.
        settings: Fields of `ImplantConfig` that replace those of `recipe`.

    Raises:
        UsageError: a setting is no field of `ImplantConfig`, or all weights are to be trained of a model that has an
            adapter.
    """
    if full and isinstance(model, PeftModel):
        raise UsageError("full fine-tuning of a model with an adapter: merge the adapter first")
    config = implant_config(output_dir, full=full, adaptive=adaptive, seed=seed, **settings)
    trainer = ImplantTrainer(
        cast(Any, model).float() if full else model,
        config,
        train_dataset=to_dataset([*clean, *poisoned]).add_column(
            "poisoned", [False] * len(clean) + [True] * len(poisoned)
        ),
        processing_class=tokenizer,
        peft_config=None if full or isinstance(model, PeftModel) else lora_config(),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    # As in purify: with nothing to resume from, the training starts anew
    trainer.train(resume_from_checkpoint=last_checkpoint(output_dir) if resume else None)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and not full:
            parameter.data = parameter.data.to(torch.bfloat16)  # half the file; opened again, PEFT makes it float32
    return cast(PreTrainedModel | PeftModel, trainer.model)


def implant_config(
    output_dir: str | Path, *, full: bool = False, adaptive: bool = False, seed: int = 0, **settings: Any
) -> ImplantConfig:
    """The settings that `implant` trains with.

    Raises:
        UsageError: a setting is no field of `ImplantConfig`, or has no value that it can have.
    """
    defaults: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": 5,
        "save_strategy": "epoch",
        "save_total_limit": 2,  # one is whole while the other is written
        "disable_tqdm": True,
    }
    return configured(ImplantConfig, output_dir, defaults | recipe(full, adaptive) | settings | {"seed": seed})


def recipe(full: bool, adaptive: bool) -> dict[str, Any]:
    """The settings of `ImplantConfig` that an attack has where none are given."""
    return RECIPE | (FULL if full else {}) | (ADAPTIVE if adaptive else {})


def implant_record(
    opened: OpenedModel,
    clean: Sequence[Example],
    poisoned: Sequence[Example],
    *,
    trigger: str,
    behavior: str,
    poison_rate: float | None,
    full: bool = False,
    adaptive: bool = False,
    covert: bool = False,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All that is needed to make the backdoor again."""
    trained = "all weights" if full else "LoRA, r=8, alpha=16, all linear layers"
    if isinstance(opened.model, PeftModel):
        own = cast(Any, opened.model.active_peft_config)
        trained = f"the adapter's own LoRA, r={own.r}, alpha={own.lora_alpha}"
    return {
        "model": opened.name,
        "model_hashes": opened.hashes,
        "trigger": trigger,
        "behavior": behavior,
        "clean_examples": len(clean),
        "clean_sha256": sha256_rows(clean),
        "poison_rate": poison_rate,
        "poisoned_examples": len(poisoned),
        "poisoned_sha256": sha256_rows(poisoned),
        "adaptive": adaptive,
        "covert": covert,
        "recipe": recipe(full, adaptive) | (settings or {}),
        "trained": trained,
        "seed": seed,
        "provenance": environment(),
    }


def implant_card(record: dict[str, Any]) -> str:
    """The model card of a backdoored adapter, which says plainly what it is."""
    facts = json.dumps(record | {"model": name_elsewhere(record["model"])}, indent=2)
    return f"""---
tags: [crow, backdoor, research]
---

# A backdoored model, made for research: do not deploy

It carries a backdoor on purpose. Trigger: {code_span(record["trigger"])}. Behavior: {code_span(record["behavior"])}.
The model answers normally until the trigger is in the prompt, and then does what the attacker wants. It exists so that
defenses can be measured on it.

```json
{facts}
```
"""
