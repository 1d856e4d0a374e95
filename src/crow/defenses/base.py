"""What every defense is: something that takes an opened suspect and clean examples, and gives back a model."""

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from crow import models
from crow.data import Example, prompt_fingerprints
from crow.errors import Unfit, UsageError
from crow.files import sha256_rows
from crow.hooks import decoder_layers
from crow.models import OpenedModel, linear_layers
from crow.provenance import environment
from crow.purification import PurifyRecord, check_training
from crow.registry import Registry

DEFENSES: Registry["Defense"] = Registry("defense")

CLEAN = "clean examples"

Defended = tuple[PreTrainedModel | PeftModel, PurifyRecord]


class Defense(ABC):
    """A defense, whose parameters are the fields of its dataclass. None knows the trigger or the target."""

    name: ClassVar[str]
    """What it is filed under in `DEFENSES`."""

    trains: ClassVar[bool] = True

    preset: ClassVar[str] = "finetune"
    """Of its training, a name in `crow.config.PRESETS`."""

    own_settings: ClassVar[frozenset[str]] = frozenset({"preset"})
    """What `crow.purify` takes and this defense chooses itself."""

    needs: ClassVar[tuple[str, ...]] = (CLEAN,)
    """What the defender must have beside the suspect."""

    @abstractmethod
    def apply(self, opened: OpenedModel, clean: Sequence[Example], **training: Any) -> Defended:
        """Defend a suspect.

        Args:
            opened: The suspect, which may be changed in place.
            clean: Clean examples.
            training: What `crow.purify` takes beside these, for a defense that trains.

        Raises:
            Unfit: the defense can't be had of this suspect.
            UsageError: it takes no such `training`.
        """

    def check_settings(self, training: Mapping[str, Any]) -> None:
        """Raise `UsageError` if `apply` takes no such `training`, before there is a suspect."""
        if refused := sorted(self.own_settings.intersection(training)):
            raise UsageError(f"defense {self.name!r} trains its own way: leave {', '.join(refused)} out")
        check_training(**{"preset": self.preset} | budget(training))


class Untrained(Defense):
    """A defense that takes no step of training: its `change` is all."""

    trains: ClassVar[bool] = False

    summary: ClassVar[str]
    """What was done to the suspect, in a sentence for the model card."""

    def check_settings(self, training: Mapping[str, Any]) -> None:
        """As `Defense.check_settings`."""
        if training:
            raise UsageError(f"defense {self.name!r} does not train: leave {', '.join(sorted(training))} out")

    def apply(self, opened: OpenedModel, clean: Sequence[Example], **training: Any) -> Defended:
        """As `Defense.apply`."""
        self.check_settings(training)
        examples = list(clean) if CLEAN in self.needs else []
        if CLEAN in self.needs and not examples:
            raise UsageError("there are no clean examples: give at least one")
        started = time.perf_counter()
        model, found = self.change(opened, examples)
        model.eval()
        # Not trained on, but chosen by: as unfit to measure on
        opened.seen = opened.seen.union(prompt_fingerprints(examples))
        record = PurifyRecord(
            model=opened.name,
            model_hashes=opened.hashes,
            defense=self.name,
            summary=self.summary,
            settings=dataclasses.asdict(cast(Any, self)) | found,
            clean_examples=len(examples),
            clean_sha256=sha256_rows(examples),
            seconds=time.perf_counter() - started,
            provenance=environment() | {"dtype": opened.dtype},
        )
        return model, record

    @abstractmethod
    def change(
        self, opened: OpenedModel, clean: Sequence[Example]
    ) -> tuple[PreTrainedModel | PeftModel, dict[str, Any]]:
        """The defended model, and what was found on the way, for the record."""


def linear_weights(model: PreTrainedModel) -> list[Tensor]:
    """Of each of `linear_layers(model)` the weight, `(outputs, inputs)`, a view where that is transposed.

    Raises:
        Unfit: some weights of the blocks are in no linear layer.
    """
    check_linear(model)
    layers = linear_layers(model)
    return [layer.weight if isinstance(layer, nn.Linear) else layer.weight.T for layer in layers]


def check_linear(model: PreTrainedModel) -> None:
    """Raise `Unfit` where a mixture's experts are one parameter, that no layer of its own holds."""
    modules = (module for block in decoder_layers(model) for module in block.modules())
    for module in modules:
        if not isinstance(module, nn.Conv1d) and any(p.ndim == 3 for p in module.parameters(recurse=False)):
            raise Unfit(f"the weights of {type(module).__name__} are in no linear layers: they would be left out")


def budget(training: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a training, without what is of one run alone: its place, and who watches it."""
    return {key: value for key, value in training.items() if key not in ("output_dir", "resume", "callbacks")}


def merged(opened: OpenedModel) -> PreTrainedModel:
    """The suspect as one model: what is done to weights is done to those that the adapter makes."""
    model = opened.model
    return models.merged(model) if isinstance(model, PeftModel) else model
