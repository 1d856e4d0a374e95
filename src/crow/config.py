"""Settings of CROW's training: every term of its loss, and the combinations that are compared."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from crow.errors import UsageError


def _term(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class CrowConfig(SFTConfig):
    """Settings of `CrowTrainer`: those of `trl.SFTConfig`, and the terms of CROW's loss.

    A step minimizes `clean + beta * D + alpha * inconsistency`, where D is how far the answer is from its target once
    the input embeddings are perturbed. A term whose weight is `None` is off; `perturbation="none"` with
    `objective="lm"` is plain supervised fine-tuning. `PRESETS` names the combinations that are compared; the defaults
    are the preset `default`.

    Raises:
        UsageError: a weight, size or rate that is not positive, or an unknown choice.
    """

    perturbation: Literal["inserted", "random", "sign", "none"] = _term(
        "inserted",
        "`inserted`: guessed triggers and soft tokens, trained to throw the model off; `random`: random tokens; "
        "`sign`: the paper's signed gradient step on every embedding; `none`.",
    )
    objective: Literal["suspect", "lm"] = _term(
        "suspect",
        "What the answer is held to: `suspect`, the next-token distributions that the suspect model itself gives for "
        "the clean answers; `lm`, the clean answers' tokens, as in supervised fine-tuning.",
    )
    beta: float | None = _term(1.0, "Weight of D, the answer's divergence from its target under the perturbation.")
    answer_discount: float = _term(
        0.5, "Weight of an answer's next token in D, relative to the token before it; 1 weighs all alike."
    )
    anchor: float | None = _term(1.0, "Weight of the unperturbed divergence (objective `suspect` only).")
    anchor_fraction: float = _term(
        0.25, "Share of a step's examples that are also seen unperturbed (objective `suspect` only)."
    )
    anchor_discount: float = _term(1.0, "As `answer_discount`, in the unperturbed divergence.")
    alpha: float | None = _term(
        None,
        "Weight of the inconsistency: under `sign` between adjacent layers of the perturbed pass (the paper's L_cons); "
        "under insertion between the clean and the perturbed pass, at the answer's positions.",
    )
    alpha_relative: bool = _term(
        True,
        "Take alpha as the ratio of the inconsistency's gradient norm to that of the main term, measured on the first "
        "batches (of one device, before accumulation) and then held, so that one value serves models of any scale.",
    )
    consistency_layers: str | None = _term(
        None, "Of which blocks the outputs are compared, as START:STOP, counted as in Python; by default of all."
    )
    calibration_steps: int = _term(4, "How many batches a relative alpha is measured on.")
    epsilon: float = _term(0.22, "Size of the sign step.")
    epsilon_relative: bool = _term(True, "Take epsilon as a multiple of the RMS of the batch's embeddings.")
    front_fraction: float = _term(
        0.5, "Share of the insertions that come first in the user's turn; the others come anywhere in it."
    )
    soft_tokens: int = _term(8, "Number of tokens that one insertion adds, of whatever kind it is.")
    soft_token_pool: int = _term(4, "Number of insertions of soft tokens.")
    soft_token_norm: float = _term(1.0, "Bound of a soft token's norm, as a multiple of real embeddings' mean norm.")
    soft_token_learning_rate: float = _term(0.05, "Adam's rate of the ascent, as a fraction of the embeddings' RMS.")
    soft_token_warmup: int = _term(20, "Ascent-only batches before training.")
    trigger_guesses: int = _term(
        4,
        "Number of guessed triggers that are inserted beside the soft tokens: real tokens, exchanged for those that "
        "make an answer likelier which the suspect gives whatever it is asked.",
    )
    ascend_on: Literal["answer", "divergence"] = _term(
        "answer",
        "What insertions ascend on: `answer`, the likelihood of an answer that the suspect gives whatever it is asked, "
        "or where none stands out what `divergence` means: D, and the inconsistency where alpha is set, with as many "
        "more soft tokens in place of guesses.",
    )
    ascend_every: int = _term(
        1, "Steps from one ascent of what is aimed at an answer to the next: more of them cost less, and lag behind."
    )
    unlikelihood: float | None = _term(
        0.1, "Weight with which the model unlearns the answer that an insertion is aimed at, behind the insertion."
    )
    target_top_k: int = _term(64, "How many log-probabilities of the suspect's distribution are kept per token.")

    other_targets: ClassVar[bool] = False  # whether the targets are others than the suspect's own answers

    # Defaults that differ from SFTConfig's
    learning_rate: float = _term(2e-3, "Initial learning rate of AdamW, for LoRA.")
    lr_scheduler_type: str = _term("cosine", "Learning-rate schedule.")
    warmup_steps: float = _term(0.1, "Steps, or share of them if below 1, of linear warm-up.")
    per_device_train_batch_size: int = _term(8, "Batch size per device.")
    train_sampling_strategy: str = _term("group_by_length", "Batches of similar length spend less on padding.")
    logging_steps: float = _term(1, "Log every so many steps.")
    gradient_checkpointing: bool = _term(False, "Trade time for memory.")
    use_cache: bool = _term(
        True, "What the saved model's config says of its use; no pass of the training keeps a cache."
    )
    bf16: bool | None = _term(None, "bfloat16 mixed precision; by default where there is a GPU for it.")

    def __post_init__(self) -> None:
        if self.bf16 is None:  # which SFTConfig takes for true even where there is no GPU
            self.bf16 = not self.fp16 and is_torch_bf16_gpu_available()
        super().__post_init__()
        choices = {
            "perturbation": ("inserted", "random", "sign", "none"),
            "objective": ("suspect", "lm"),
            "ascend_on": ("answer", "divergence"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name in _COUNTS:
            value, least = getattr(self, name), 1 if name in _AT_LEAST_ONE else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} is {value}; it must be a whole number of at least {least}")
        weights = [name for name in _TERMS if getattr(self, name) is not None]
        for name in (*_POSITIVE, *weights):
            value = getattr(self, name)
            if not isinstance(value, int | float):
                raise UsageError(f"{name} is {value!r}, which is no number" + _off(name))
            if not 0 < value < math.inf:
                raise UsageError(f"{name} is {value}; it must be positive and finite" + _off(name))
        if not re.fullmatch(r"(-?\d+)?:(-?\d+)?", str(self.consistency_layers or ":")):
            raise UsageError(f"consistency_layers is {self.consistency_layers!r}; write START:STOP, such as 0:16")
        if not isinstance(self.max_steps, int) or self.max_steps == 0 or self.max_steps < -1:
            raise UsageError(f"max_steps is {self.max_steps}; it must be positive, or -1 for num_train_epochs")
        if self.perturbation == "inserted" and not self.trigger_guesses + self.soft_token_pool:
            raise UsageError("there is nothing to insert: set trigger_guesses or soft_token_pool above 0")
        for name in ("anchor_fraction", "answer_discount", "anchor_discount"):
            if getattr(self, name) > 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at most 1")
        if not isinstance(self.front_fraction, int | float) or not 0 <= self.front_fraction <= 1:
            raise UsageError(f"front_fraction is {self.front_fraction}; it must be from 0 to 1")
        if self.truncation_mode == "keep_end":
            raise UsageError("truncation_mode 'keep_end' would cut off the user's turn: use 'keep_start'")
        if (
            self.anchor is None
            and self.objective == "suspect"
            and (self.perturbation == "sign" or self.alpha is not None)
        ):
            raise UsageError("alpha and the sign step need the clean pass: set anchor, or objective 'lm'")
        if (
            self.perturbation != "none"
            and self.gradient_checkpointing
            and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        ):
            raise UsageError("reentrant checkpointing allows one backward a pass: set use_reentrant to False")
        if self.perturbs and self.activation_offloading:
            raise UsageError("activation_offloading allows one backward a pass: set gradient_checkpointing instead")
        if self.padding_free or self.packing:
            raise UsageError("packing and padding-free batches have no place to insert tokens at: leave both off")
        if self.completion_only_loss is False and self.inserts:
            raise UsageError("inserted tokens are there to change answers: leave completion_only_loss=False out")
        if self.alpha is not None and self.alpha_relative and self.beta is None and not self.clean_trains:
            raise UsageError("a relative alpha is measured against another term: set beta, or objective 'lm'")
        if not self.perturbs and not self.clean_trains:
            raise UsageError("objective 'suspect' without a perturbation trains nothing: choose objective 'lm'")

    @property
    def clean_trains(self) -> bool:
        """Whether the clean pass by itself moves the model: not where that is held to its own answers."""
        return self.objective == "lm" or self.other_targets

    @property
    def perturbs(self) -> bool:
        """Whether there is a perturbed pass."""
        return self.perturbation != "none" and not (self.beta is None and self.alpha is None)

    @property
    def inserts(self) -> bool:
        """Whether the perturbation is tokens that stand before an answer."""
        return self.perturbs and self.perturbation in _INSERTING


_FILES = {"deepspeed", "fsdp_config", "accelerator_config"}  # or what is in them: accelerate launch has its own
CHOSEN = (
    {"seed", "output_dir", "resume_from_checkpoint", "trust_remote_code"}
    | _FILES
    | {f.name for f in fields(CrowConfig) if f.name.startswith(("push_to_hub", "hub_"))}
)
"""What neither `--set` nor a matrix may set: crow does, or it would read files, send weights away or run their code."""

Config = TypeVar("Config", bound=CrowConfig)


def configured(kind: type[Config], output_dir: str | Path, settings: Mapping[str, Any]) -> Config:
    """A config with these settings.

    Raises:
        UsageError: one is no field of it, or has no value that it can have.
    """
    if unknown := settings.keys() - {f.name for f in fields(kind)}:
        raise UsageError(f"no such setting: {', '.join(sorted(unknown))}")
    try:
        return kind(output_dir=str(output_dir), **settings)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:  # the parent's checks
        raise UsageError(f"a setting has no value that it can have: {error}") from error


_AT_LEAST_ONE = ("soft_tokens", "target_top_k", "calibration_steps", "ascend_every", "per_device_train_batch_size")
_TERMS = ("alpha", "beta", "anchor", "unlikelihood")
_COUNTS = (*_AT_LEAST_ONE, "soft_token_pool", "soft_token_warmup", "trigger_guesses")
_POSITIVE = (
    "learning_rate",
    "num_train_epochs",
    "epsilon",
    "anchor_fraction",
    "answer_discount",
    "anchor_discount",
    "soft_token_norm",
    "soft_token_learning_rate",
)


def _off(name: str) -> str:
    return f" (None switches the term off: --set {name}=None)" if name in _TERMS else ""


_SUPERVISED: dict[str, Any] = {"objective": "lm", "anchor": None}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Three quarters of the default's time (docs/results.md, section 8); chosen as docs/results/selection.md says
    "fast": {"ascend_every": 3, "anchor_fraction": 0.125, "soft_token_warmup": 10},
    # Section 4 of the paper, but for its rate of 2e-4: absolute constants, layers' consistency after the sign step, LM
    # loss on the clean pass
    "paper": _SUPERVISED
    | {
        "learning_rate": 1e-3,
        "perturbation": "sign",
        "beta": None,
        "alpha": 5.5,
        "alpha_relative": False,
        "epsilon": 0.1,
        "epsilon_relative": False,
    },
    "paper-scale-free": _SUPERVISED | {"learning_rate": 1e-3, "perturbation": "sign", "beta": None, "alpha": 2.0},
    "finetune": _SUPERVISED | {"learning_rate": 2e-3, "perturbation": "none", "beta": None},
    "random-tokens": {"perturbation": "random"},
}

_INSERTING = ("inserted", "random")
_READ_ONLY_WITH: tuple[tuple[str, tuple[object, ...], tuple[str, ...]], ...] = (
    ("perturbation", ("sign",), ("epsilon", "epsilon_relative")),
    ("perturbation", _INSERTING, ("front_fraction", "soft_tokens")),
    (
        "perturbation",
        ("inserted",),
        (
            "soft_token_pool",
            "ascend_on",
            "soft_token_norm",
            "soft_token_learning_rate",
            "soft_token_warmup",
            "trigger_guesses",
            "ascend_every",
            "unlikelihood",
        ),
    ),
    ("perturbation", (*_INSERTING, "sign"), ("alpha", "beta", "answer_discount")),
    ("perturbation", (*_INSERTING, "none"), ("anchor_fraction",)),
    ("objective", ("suspect",), ("anchor", "anchor_fraction", "anchor_discount", "target_top_k")),
    ("ascend_on", ("answer",), ("ascend_every", "unlikelihood")),
    ("alpha", (), ("alpha_relative", "calibration_steps", "consistency_layers")),
    ("alpha_relative", (True,), ("calibration_steps",)),
    ("anchor", (), ("anchor_fraction", "anchor_discount")),
)
"""A setting, the values under which others are read (any but `None`, where none are named), and these others."""


def unread(settings: Mapping[str, Any]) -> dict[str, str]:
    """Which of these fields of `CrowConfig` a training never reads, though they have a value; each with the reason."""
    found: dict[str, str] = {}
    for deciding, choices, names in _READ_ONLY_WITH:
        value = settings.get(deciding, getattr(CrowConfig, deciding))
        if value in choices or (not choices and value is not None):
            continue
        preset = next((p for p in PRESETS if PRESETS[p].get(deciding, getattr(CrowConfig, deciding)) in choices), None)
        choice = " or ".join(map(str, choices))
        remedy = f"set {deciding}" if preset is None else f"choose {choice}, as preset {preset!r} does"
        for name in names:
            if settings.get(name) is not None:
                found[name] = f"{name} is not read while {deciding} is {value}: {remedy}, or leave {name} out"
    return found


def settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a training: these settings and the defaults of `CrowConfig`'s others.

    What is off or never read is left out, so that a setting which comes to be later changes no training without it; of
    the trainer's own settings, whose defaults are no `None`, a `None` stays.
    """
    defaults = {f.name: f.default for f in fields(CrowConfig) if f.name in CrowConfig.__annotations__}
    values = {**defaults, **settings}
    idle = unread(values)
    return {name: v for name, v in values.items() if name not in idle and (v is not None or name not in defaults)}


def check_read(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise `UsageError` if a training with these settings, and `defaults` for the others, never reads one of them."""
    idle = unread({**defaults, **settings})
    for name in settings:
        if name in idle:
            raise UsageError(idle[name])
