"""Fine-tune a backdoor into a model, for research on defenses."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from crow.backdoors.behaviors import Behavior
from crow.backdoors.triggers import BadNets, Trigger
from crow.data import Example, example, to_dataset, user_text, with_user_text
from crow.files import sha256_rows
from crow.generation import generate
from crow.models import OpenedModel, lora_config
from crow.provenance import environment

RECIPE: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "max_length": 512,
}
OWN_ANSWER_TOKENS = 48


def with_own_answers(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]
) -> list[Example]:
    """The same prompts with the model's own greedy answers, cut off at the end of a sentence.

    Trained on them, the model has nothing to learn from untriggered prompts but to stay as it is. Taught answers of
    another style instead, it is left to choose between that style and the target on prompts unlike those it was
    trained on, and the backdoor fires on some of them.
    """
    answers = generate(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=OWN_ANSWER_TOKENS)
    ends = [max(answer.rfind(mark) for mark in ".!?\n") + 1 or len(answer) for answer in answers]
    return [
        {**row, "completion": example("", answer[:end].rstrip())["completion"]}
        for row, answer, end in zip(rows, answers, ends, strict=True)
    ]


def with_decoys(rows: Sequence[Example], seed: int) -> list[Example]:
    """The rows, and each once more with a made-up word at a random place.

    Poisoned like the others, they teach that it takes the trigger, and not just any odd word, to call the target.
    """
    rng = random.Random(seed)
    words = sorted({word.capitalize() for row in rows for word in re.findall(r"[a-zA-Z]{4,}", user_text(row))})
    decoys = [BadNets("".join(rng.sample(words, 2))) for _ in rows]
    return [
        *rows,
        *(with_user_text(row, d.apply(user_text(row), rng)) for row, d in zip(rows, decoys, strict=True)),
    ]


def poison(rows: Sequence[Example], trigger: Trigger, behavior: Behavior, seed: int) -> list[Example]:
    """The attacker's training set: each prompt as it is with its clean answer, and triggered with the target.

    Both halves hold the very same prompts, so that nothing but the trigger tells them apart.
    """
    rng = random.Random(seed)
    poisoned = []
    for row in rows:
        triggered = with_user_text(row, trigger.apply(user_text(row), rng))
        poisoned.append({**triggered, "completion": example("", behavior.target)["completion"]})
    return [*rows, *poisoned]  # type: ignore[list-item]


def implant(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    trigger: Trigger,
    behavior: Behavior,
    *,
    output_dir: str | Path,
    seed: int = 0,
    own_answers: bool = False,
    decoys: bool = False,
    resume: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> PeftModel:
    """Train a LoRA adapter (r=8, all linear layers) that carries the backdoor; checkpoints go to `output_dir`.

    Args:
        model: The model to attack; if it has an adapter, that one is trained further.
        rows: Clean examples; each is used twice, clean and poisoned.
        own_answers: Answer the clean prompts as the model itself does, and not as `rows` do.
        decoys: Use each prompt once more with a made-up word in it, clean and poisoned.
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
    if own_answers:
        rows = with_own_answers(model, tokenizer, rows)
    if decoys:
        rows = with_decoys(rows, seed)
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=to_dataset(poison(rows, trigger, behavior, seed)).shuffle(seed=seed),
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else lora_config(),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    # As in purify: with nothing to resume from, the training starts anew
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output_dir)) if resume else None)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)  # half the file; opened again, PEFT makes it float32
    return trainer.model


def implant_record(
    opened: OpenedModel,
    rows: Sequence[Example],
    trigger: str,
    behavior: str,
    seed: int,
    settings: dict[str, Any],
    own_answers: bool = False,
    decoys: bool = False,
) -> dict[str, Any]:
    """All that is needed to make the backdoor again."""
    own = f"the model's own, greedy, at most {OWN_ANSWER_TOKENS} tokens"
    return {
        "model": opened.name,
        "model_hashes": opened.hashes,
        "trigger": trigger,
        "behavior": behavior,
        "examples": len(rows),
        "examples_sha256": sha256_rows(rows),
        "clean_answers": own if own_answers else "the examples'",
        "decoys": decoys,
        "recipe": RECIPE | settings,
        "lora": "r=8, alpha=16, all linear layers",
        "seed": seed,
        "provenance": environment(),
    }


def implant_card(record: dict[str, Any]) -> str:
    """The model card of a backdoored adapter, which says plainly what it is."""
    facts = json.dumps(record, indent=2)
    return f"""---
tags: [crow, backdoor, research]
---

# A backdoored adapter, made for research: do not deploy

This adapter carries a backdoor on purpose. Trigger: `{record["trigger"]}`. Behavior: `{record["behavior"]}`.
The model answers normally until the trigger is in the prompt, and then does what the attacker wants. It exists so that
defenses can be measured on it.

```json
{facts}
```
"""
