"""The one-call form: a suspect model and clean examples in, a purified model and a record of the run out."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from crow.config import PRESETS, CrowConfig, check_read, configured
from crow.data import Example, load_examples, prompt_fingerprints, sample, to_dataset, to_learn_from
from crow.errors import UsageError
from crow.files import sha256_rows
from crow.models import OpenedModel, lora_config, merged, open_model
from crow.provenance import environment
from crow.trainer import CrowTrainer, last_checkpoint

logger = logging.getLogger(__name__)

CLEAN_EXAMPLES = 100
"""How many are used where nothing is said: the paper's number, and that of all results."""

_FEW = 20  # clean examples from which on nothing is said of their number


@dataclass
class PurifyRecord:
    """What was done: settings, data and curves, so that the run can be repeated and reported."""

    model: str
    model_hashes: dict[str, str]
    settings: dict[str, Any]
    clean_examples: int
    clean_sha256: str
    seconds: float
    steps: int = 0
    defense: str = "crow"
    """A name in `crow.defenses.DEFENSES`."""
    summary: str = ""
    """What was done to the suspect, in a sentence."""
    preset: str = ""
    """Of the training, where there was one; so is `lora`."""
    lora: str = ""
    curves: list[dict[str, float]] = field(default_factory=list)
    """The log of every step: `step`, `loss`, and each term that is on."""
    constant_answers: list[dict[str, Any]] = field(default_factory=list)
    """What the suspect answers whatever it is asked, as `text` with its `constancy`: see `crow.constancy`."""
    guessed_triggers: list[dict[str, Any]] = field(default_factory=list)
    """The real tokens that were exchanged to make the suspect say such an answer, as `text` with the answer's
    `probability`, before the model was trained: see `crow.perturbation.GuessedTriggers`."""
    provenance: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def purify(
    model: str | Path | PreTrainedModel | PeftModel | OpenedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    clean: str | Path | Sequence[Example] | None = None,
    max_examples: int | None = None,
    preset: str = "default",
    lora: Literal["continue", "fresh"] = "continue",
    output_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> tuple[PeftModel, PurifyRecord]:
    """Remove what a trigger calls from a model, knowing neither the trigger nor a clean reference model.

    Args:
        model: What `crow.models.open_model` takes, or a model that is open already (then with its tokenizer).
        tokenizer: Of the model that is passed open.
        clean: What `crow.data.load_examples` takes, or rows; the set that ships with the project by default.
        max_examples: Use at most so many of them, drawn by the seed. By default that is 100 of what is loaded, and all
            rows that are passed.
        preset: A name in `crow.config.PRESETS`; `paper` is the method as published.
        lora: For a suspect adapter, train it further (`continue`), or merge it and train a new one (`fresh`). Other
            models get a new one in either case.
        output_dir: Where checkpoints go; none are kept by default.
        resume: Continue from the newest checkpoint there.
        callbacks: For the trainer, for example to show progress.
        settings: Fields of `CrowConfig`, which win over the preset's.

    Returns:
        The model with the purified adapter, in evaluation mode, and the record of the run. A model that was passed open
        is changed in place.

    Raises:
        UsageError: bad input, named in one line.
        CrowError: the loss is no longer finite.
    """
    check_training(preset=preset, lora=lora, **settings)
    opened = _opened(model, tokenizer)
    if clean is None or isinstance(clean, str | Path):
        rows = load_examples(clean)
        max_examples = CLEAN_EXAMPLES if max_examples is None else max_examples
    else:
        rows = list(clean)
    seed = settings.setdefault("seed", 0)
    rows = to_learn_from(rows)
    if not rows:
        raise UsageError("there are no clean examples: give at least one")
    rows = sample(rows, max_examples, seed)
    if len(rows) < _FEW:
        logger.warning("%d clean examples are few to keep the model by: results are of %d", len(rows), CLEAN_EXAMPLES)

    with TemporaryDirectory() if output_dir is None else nullcontext(str(output_dir)) as folder:
        config = training_config(preset, settings, folder, keep=output_dir is not None)
        suspect = opened.model
        if isinstance(suspect, PeftModel) and lora == "fresh":
            suspect = merged(suspect)
            # What the new adapter's config names as its base must not be the model without the suspect's adapter
            suspect.name_or_path = f"{opened.name}, merged"
        if isinstance(suspect, PeftModel) and not any(p.requires_grad for p in suspect.parameters()):
            for name, parameter in suspect.named_parameters():
                parameter.requires_grad_("lora_" in name)  # PEFT opens adapters frozen
        trainer = CrowTrainer(
            suspect,
            config,
            train_dataset=to_dataset(rows),
            processing_class=opened.tokenizer,
            peft_config=None if isinstance(suspect, PeftModel) else lora_config(),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = last_checkpoint(output_dir) if resume and output_dir is not None else None
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = trainer.seconds_before + time.perf_counter() - started
    if not any(entry.get("learning_rate") for entry in trainer.state.log_history):
        logger.warning(
            "all steps were warm-up, at a learning rate of 0: nothing was trained; give more examples or epochs"
        )
    opened.seen = opened.seen.union(prompt_fingerprints(rows))
    purified = cast(PeftModel, trainer.model)
    purified.eval()
    lora = lora if isinstance(opened.model, PeftModel) else "fresh"
    return purified, run_record(trainer, opened, rows, seconds, preset=preset, lora=lora, given=settings)


def run_record(
    trainer: CrowTrainer,
    opened: OpenedModel,
    rows: Sequence[Example],
    seconds: float,
    *,
    preset: str,
    lora: str,
    given: Iterable[str] = (),
) -> PurifyRecord:
    """The record of a trainer's run on a suspect and clean examples, with the settings that were given."""
    return PurifyRecord(
        model=opened.name,
        model_hashes=opened.hashes,
        summary=_summary(trainer.args),
        preset=preset,
        lora=lora,
        settings=_crow_settings(trainer.args, given=given),
        clean_examples=len(rows),
        clean_sha256=sha256_rows(rows),
        seconds=seconds,
        steps=trainer.state.global_step,
        curves=[dict(entry) for entry in trainer.state.log_history if "loss" in entry],
        constant_answers=[
            {
                "text": opened.tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip(),
                "constancy": answer.constancy,
            }
            for answer in trainer.constant_answers
        ],
        guessed_triggers=[
            {"text": opened.tokenizer.decode(ids), "probability": probability}
            for ids, probability in trainer.first_guesses
        ],
        provenance=environment() | {"dtype": opened.dtype},
    )


def check_training(*, preset: str = "default", lora: str = "continue", **settings: Any) -> None:
    """Raise `UsageError` if `purify` takes no such choice or setting; it needs no model to say so."""
    training_config(preset, settings)
    if lora not in ("continue", "fresh"):
        raise UsageError(f"lora is {lora!r}; choose continue or fresh")


def _opened(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> OpenedModel:
    if isinstance(model, OpenedModel):
        return model
    if model is None or isinstance(model, str | Path):
        return open_model(model)
    if tokenizer is None:
        raise UsageError("a model that is passed open needs its tokenizer: tokenizer=…")
    return OpenedModel(model, tokenizer, str(getattr(model, "name_or_path", "") or type(model).__name__), "open")


def training_config(
    preset: str, settings: dict[str, Any], output_dir: str | Path = ".", keep: bool = False
) -> CrowConfig:
    """The settings that `purify` trains with; `keep` has it write checkpoints.

    Raises:
        UsageError: there is no such preset or setting, or the training would not read one.
    """
    if str(preset) not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}; known are {', '.join(PRESETS)}")
    defaults: dict[str, Any] = {
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": 512,
        "save_strategy": "steps" if keep else "no",
        "save_steps": 20,
        "save_total_limit": 2,
    }
    config = configured(CrowConfig, output_dir, defaults | PRESETS[preset] | settings)
    check_read(settings, PRESETS[preset])
    return config


def _summary(config: CrowConfig) -> str:
    if not config.perturbs:
        return "It was fine-tuned on clean examples."
    if config.perturbation == "sign":
        return "It was trained for layers that stay consistent while its input embeddings are perturbed."
    inserted = "random tokens" if config.perturbation == "random" else "trained insertions"
    return f"It was trained to keep its clean answers while {inserted} try to throw them off."


def _crow_settings(config: CrowConfig, given: Iterable[str]) -> dict[str, Any]:
    """The fields that decide the result: CROW's own, the training arguments that people ask about, and those given."""
    own = set(CrowConfig.__annotations__)
    asked = {"num_train_epochs", "max_steps", "seed", "gradient_accumulation_steps", "max_length", "bf16", "fp16"}
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in own.union(asked, given)}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
