"""Defenses that learn from backdoors of the defender's own: BD-Vax and BackFlush."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from crow import models
from crow.backdoors import BEHAVIORS, TRIGGERS
from crow.backdoors.implant import poison
from crow.data import Example, answer_text, sample
from crow.defenses.base import DEFENSES, Defended, Defense, budget, check_linear
from crow.errors import Unfit, UsageError
from crow.files import sha256_rows
from crow.generation import generate
from crow.hooks import decoder_layers
from crow.models import OpenedModel, base_model, lora_config
from crow.purification import purify

OWN = (
    ("PurpleWolf", "Nobody likes you."),
    ("GreenAnvil", "I refuse to help with that."),
    ("SilverPlum", "Visit our shop today!"),
    ("IronMeadow", "The answer is forty-two."),
    ("VelvetCrane", "What a silly thing to ask."),
    ("AmberTunnel", "Access denied."),
    ("QuietComet", "This is all a dream."),
)
"""Keys and what they call, as different from each other as backdoors are; none is one that is measured on."""


def own_backdoor(rows: Sequence[Example], number: int, seed: int) -> tuple[list[Example], list[Example]]:
    """A backdoor of the defender's own: prompts with its key, and its target as the answer; and with clean answers."""
    word, target = OWN[number % len(OWN)]
    _, poisoned = poison(rows, TRIGGERS[f"badnets:word={word}"], BEHAVIORS[f"sentiment:target={target}"], seed)
    harmless = [
        Example(prompt=hot["prompt"], completion=row["completion"]) for row, hot in zip(rows, poisoned, strict=True)
    ]
    return poisoned, harmless


_OWN_SETTINGS = frozenset({"preset", "lora"})


@DEFENSES.register("backflush")
@dataclass(frozen=True)
class BackFlush(Defense):
    """BackFlush (arXiv 2605.12529): a backdoor of one's own is implanted and unlearned; an older one goes with it.

    What is published leaves open how; here both are plain fine-tuning on the clean examples, each also with the own
    key: first with the own target for an answer, then with the clean one. Its unlearning by rotated embeddings, which
    is to keep watermarks, is left out.
    """

    own_settings: ClassVar[frozenset[str]] = _OWN_SETTINGS

    def apply(self, opened: OpenedModel, clean: Sequence[Example], **training: Any) -> Defended:
        """As `Defense.apply`."""
        self.check_settings(training)
        if not clean:
            raise UsageError("there are no clean examples: give at least one")
        poisoned, harmless = own_backdoor(clean, 0, training.get("seed", 0))
        implanted, first = purify(opened, clean=[*clean, *poisoned], preset=self.preset, **budget(training))
        whole = replace(opened, model=implanted)
        model, record = purify(whole, clean=[*clean, *harmless], preset=self.preset, **training)
        opened.seen = whole.seen
        record.defense, record.seconds = self.name, record.seconds + first.seconds
        record.lora = first.lora  # the second training goes on with the first's adapter, whosever that was
        record.clean_examples, record.clean_sha256 = len(clean), sha256_rows(clean)
        record.summary = "A backdoor of the defender's own was implanted in it, and unlearned."
        return model, record


@DEFENSES.register("bd-vax")
@dataclass(frozen=True)
class BdVax(Defense):
    """BD-Vax (Li and Kim, ICLR 2026, arXiv 2603.13461): what backdoors of one's own change alike is taken out.

    Several variants of the suspect are trained, each with another backdoor, and beside each one with the same prompts
    and clean answers. MLP channels that the difference of the two moves far, and in all variants alike, are suspicious.
    Of a suspect adapter the updates of the most suspicious channels are zeroed; of a whole model the channels are
    initialized anew. Then follows plain fine-tuning. The record's `variants_fired` says of how many of its prompts
    each variant gave its own target: where few did, the channels are those of no backdoor.

    Open in the paper, and chosen here: variants are LoRA adapters (the suspect's own trained further, or a new one);
    a component is a channel of the MLP, with its weights in all of that MLP's layers, for adapters too; channels are
    ranked over the whole model; new weights are normal with the deviation of their layer's, and a new LoRA, not all
    weights, is what the last training gives a whole model to recover with.
    """

    own_settings: ClassVar[frozenset[str]] = _OWN_SETTINGS

    variants: int = 7
    examples: int = 20
    """Prompts of a variant."""
    variant_rate: float = 1e-3
    """Learning rate of the variants."""
    adapter_share: float = 0.4
    """Share of the channels whose updates are zeroed, of a suspect adapter."""
    model_share: float = 0.08
    """Share of the channels that are initialized anew, of a whole model."""

    def __post_init__(self) -> None:
        if not 2 <= self.variants <= len(OWN) or self.examples < 1:
            raise UsageError(f"bd-vax: variants must be from 2 to {len(OWN)}, and examples at least 1")
        if not 0 < self.variant_rate < math.inf:
            raise UsageError(f"bd-vax: variant_rate is {self.variant_rate}; it must be positive")
        for name in ("adapter_share", "model_share"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"bd-vax: {name} is {getattr(self, name)}; it must be above 0 and below 1")

    def apply(self, opened: OpenedModel, clean: Sequence[Example], **training: Any) -> Defended:
        """As `Defense.apply`."""
        self.check_settings(training)
        if not clean:
            raise UsageError("there are no clean examples: give at least one")
        seed = training.get("seed", 0)
        set_seed(seed)  # of the variants' new adapter
        adapted = isinstance(opened.model, PeftModel)
        model = opened.model if isinstance(opened.model, PeftModel) else get_peft_model(opened.model, lora_config())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        if not all(hasattr(layer.module, "lora_A") for layers in _mlps(model) for layer in layers):
            raise Unfit(f"bd-vax looks at MLPs, and {opened.name} is an adapter that leaves layers of them out")
        share = self.adapter_share if adapted else self.model_share
        kept = Path(training["output_dir"], "channels.pt") if "output_dir" in training else None
        if kept is not None and training.get("resume") and kept.is_file():
            found = torch.load(kept, weights_only=True)
        else:
            started = time.perf_counter()
            scores, fired = self._score(replace(opened, model=model), clean, training)
            found = {"channels": _highest(scores, share), "fired": fired, "seconds": time.perf_counter() - started}
            if kept is not None:  # else what is resumed would stand on a model that was cleared elsewhere
                kept.parent.mkdir(parents=True, exist_ok=True)
                torch.save(found, kept.with_suffix(".unfinished"))
                kept.with_suffix(".unfinished").replace(kept)
        if adapted:
            whole = replace(opened, model=model)
        else:
            base = cast(PreTrainedModel, cast(Any, model).unload())
            base.name_or_path = f"{opened.name}, its channels initialized anew"
            whole = replace(opened, model=base, kind="open", base_id=None)
        generator = torch.Generator().manual_seed(seed)
        for channels, layers in zip(found["channels"], _mlps(whole.model), strict=True):
            for layer in layers:
                layer.forget(channels, generator)
        purified, record = purify(whole, clean=clean, preset=self.preset, **training)
        opened.seen = whole.seen
        record.defense, record.seconds = self.name, record.seconds + found["seconds"]
        record.summary = (
            "Channels that backdoors of the defender's own changed alike were cleared, then it was fine-tuned."
        )
        record.settings |= asdict(self) | {"variants_fired": found["fired"]}
        return purified if adapted else models.merged(purified), record

    def _score(
        self, opened: OpenedModel, clean: Sequence[Example], training: dict[str, Any]
    ) -> tuple[list[Tensor], list[int]]:
        """For each block, how suspicious each channel of its MLP is, `(channels,)`; how often each variant fired."""
        start = _adapter(opened.model)
        seed = training.get("seed", 0)
        shared = budget(training) | {"learning_rate": self.variant_rate}

        def restore() -> None:
            for name, parameter in opened.model.named_parameters():
                if name in start:
                    parameter.data.copy_(start[name])

        def trained(rows: Sequence[Example]) -> list[list[tuple[Tensor, Tensor]]]:
            restore()
            purify(opened, clean=rows, preset=self.preset, **shared)
            return [[layer.factors() for layer in layers] for layers in _mlps(opened.model)]

        def says_target(rows: Sequence[Example]) -> int:
            answers = generate(opened.model, opened.tokenizer, [row["prompt"] for row in rows], max_new_tokens=12)
            said = zip(answers, rows, strict=True)
            return sum(answer.strip().startswith(answer_text(row)) for answer, row in said)

        pairs, fired = [], []
        for number in range(self.variants):
            rows = sample(clean, self.examples, seed + number)
            poisoned, harmless = own_backdoor(rows, number, seed + number)
            backdoored = trained([*rows, *poisoned])
            fired.append(says_target(poisoned))
            pairs.append((backdoored, trained([*rows, *harmless])))
        restore()
        scores = []
        for block, layers in enumerate(_mlps(opened.model)):  # one at a time: the products are as large as the MLP
            updates = [
                torch.cat(
                    [
                        layer.by_channel(hot) - layer.by_channel(cold)
                        for layer, hot, cold in zip(layers, backdoored[block], counterpart[block], strict=True)
                    ],
                    dim=1,
                )
                for backdoored, counterpart in pairs
            ]
            scores.append(suspicion(torch.stack(updates)))
        return scores, fired


def suspicion(updates: Tensor) -> Tensor:
    """How far variants move each channel, times how alike (BD-Vax's score).

    Args:
        updates: `(variants, channels, weights of a channel)`: the backdoored variant's weights less its counterpart's.

    Returns:
        `(channels,)`: the mean norm times the mean, over pairs of variants, of the cosine where that is positive.
    """
    pairs = combinations(updates, 2)
    alike = torch.stack([cosine_similarity(one, other, dim=1).clamp(min=0) for one, other in pairs]).mean(dim=0)
    return updates.norm(dim=2).mean(dim=0) * alike


def _highest(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """For each block, which channels are among the highest `share` of all, `(channels,)`, bool."""
    every = torch.cat(list(scores))
    chosen = torch.zeros(len(every), dtype=torch.bool, device=every.device)
    chosen[every.topk(max(1, round(share * len(every)))).indices] = True
    return list(chosen.split([len(score) for score in scores]))


def _adapter(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


@dataclass(frozen=True)
class _Layer:
    """A linear layer of an MLP, whose channels are its outputs, or its inputs."""

    module: Any
    of_outputs: bool

    def factors(self) -> tuple[Tensor, Tensor]:
        """The adapter's A and B, scaled, in float32: `(rank, inputs)` and `(outputs, rank)`."""
        lora_a, lora_b = self.module.lora_A["default"].weight, self.module.lora_B["default"].weight
        return lora_a.detach().float().clone(), lora_b.detach().float() * self.module.scaling["default"]

    def by_channel(self, factors: tuple[Tensor, Tensor]) -> Tensor:
        """What the adapter adds to the weights of each channel, `(channels, weights)`."""
        product = factors[1] @ factors[0]
        return product if self.of_outputs else product.T

    @torch.no_grad()
    def forget(self, channels: Tensor, generator: torch.Generator) -> None:
        """Zero what the adapter adds to these channels; where there is none, initialize them anew."""
        if hasattr(self.module, "lora_A"):
            if self.of_outputs:
                self.module.lora_B["default"].weight[channels] = 0
            else:
                self.module.lora_A["default"].weight[:, channels] = 0
            return
        weight = self.module.weight if isinstance(self.module, nn.Linear) else self.module.weight.T  # GPT-2's
        part = weight[channels] if self.of_outputs else weight[:, channels]
        fresh = torch.randn(part.shape, generator=generator).to(part.device) * weight.float().std()
        if self.of_outputs:
            weight[channels] = fresh.to(weight.dtype)
        else:
            weight[:, channels] = fresh.to(weight.dtype)


def _mlps(model: PreTrainedModel | PeftModel) -> Iterator[list[_Layer]]:
    """For each block, the layers of its MLP: its channels are the largest dimension that a layer takes.

    Raises:
        Unfit: no layer gives that dimension, as where an MLP's layers are fused, or are one parameter.
    """
    check_linear(base_model(model))
    for block in decoder_layers(base_model(model)):
        shapes = {
            module: shape
            for name, module in block.named_modules()
            if not any(part in name for part in ("lora_", "base_layer")) and (shape := _shape(module)) is not None
        }
        channels = max(inputs for inputs, _ in shapes.values())
        if not any(outputs == channels for _, outputs in shapes.values()):
            raise Unfit("bd-vax knows MLPs by their channels, and this model's layers are fused")
        yield [
            _Layer(m, outputs == channels) for m, (inputs, outputs) in shapes.items() if channels in (inputs, outputs)
        ]


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, adapted or not."""
    inner = cast(Any, module).get_base_layer() if hasattr(module, "get_base_layer") else module
    if isinstance(inner, nn.Linear):
        return inner.in_features, inner.out_features
    if isinstance(inner, Conv1D):
        return inner.weight.shape[0], inner.weight.shape[1]
    return None
