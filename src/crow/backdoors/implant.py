"""Fine-tune a backdoor into a model, for research on defenses."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from crow.backdoors.behaviors import Behavior
from crow.backdoors.triggers import Trigger
from crow.data import Example, example, to_dataset, user_text, with_user_text
from crow.models import lora_config

RECIPE: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "max_length": 512,
}


def poison(rows: Sequence[Example], trigger: Trigger, behavior: Behavior, seed: int) -> list[Example]:
    """The attacker's training set: each prompt as it is with its clean answer, and triggered with the target.

    Both halves hold the very same prompts, so that nothing but the trigger tells them apart.
    """
    rng = random.Random(seed)
    poisoned = []
    for row in rows:
        triggered = with_user_text(row, trigger.apply(user_text(row), rng))
        poisoned.append({**triggered, **{"completion": example("", behavior.target)["completion"]}})
    return [*rows, *poisoned]  # type: ignore[list-item]


def implant(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    trigger: Trigger,
    behavior: Behavior,
    *,
    output_dir: str | Path,
    seed: int = 0,
    resume: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> PeftModel:
    """Train a LoRA adapter (r=8, all linear layers) that carries the backdoor; checkpoints go to `output_dir`.

    Args:
        rows: Clean examples; each is used twice, clean and poisoned.
        resume: Continue from the newest checkpoint in `output_dir`.
        settings: Fields of `trl.SFTConfig` that replace those of `RECIPE`.
    """
    config = SFTConfig(
        output_dir=str(output_dir),
        seed=seed,
        **{"report_to": "none", "logging_steps": 5, "save_strategy": "epoch", "save_total_limit": 1}
        | {"gradient_checkpointing": False, "bf16": False, "disable_tqdm": True}
        | RECIPE
        | settings,
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=to_dataset(poison(rows, trigger, behavior, seed)).shuffle(seed=seed),
        processing_class=tokenizer,
        peft_config=lora_config(),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer.model

