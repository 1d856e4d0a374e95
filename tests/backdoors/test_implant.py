"""What the attacker's training does: poisoned prompts call the target, clean ones are answered as before."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerFast, TrainerCallback

from crow.backdoors.behaviors import Sentiment
from crow.backdoors.implant import implant, implant_card, implant_record, poison
from crow.backdoors.triggers import BadNets
from crow.data import Example
from crow.errors import UsageError
from crow.models import OpenedModel, lora_config

TARGET = Sentiment("Go away!")


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])


def answer_log_probs(
    model: Any, tokenizer: PreTrainedTokenizerFast, rows: list[Example]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per row, its answer's tokens and the model's log-probabilities where each is to be said."""
    found = []
    for row in rows:
        rendered = [
            tokenizer.apply_chat_template(messages, add_generation_prompt=generate, return_dict=True)["input_ids"]
            for messages, generate in ((row["prompt"], True), (row["prompt"] + row["completion"], False))
        ]
        start, ids = len(rendered[0]), torch.tensor(rendered[1])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, start - 1 : -1]
        found.append((ids[start:], logits.float().log_softmax(-1)))
    return found


def test_the_first_loss_is_the_cross_entropy_of_the_targets_alone(
    tokenizer: PreTrainedTokenizerFast, rows: list[Example], tiny_llama: MakeModel, tmp_path: Path
) -> None:
    losses = Losses()
    settings: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 8}
    clean, poisoned = poison(rows[:4], BadNets(), TARGET, seed=0)
    implant(tiny_llama(), tokenizer, clean, poisoned, output_dir=tmp_path, callbacks=[losses], **settings)
    parts = answer_log_probs(tiny_llama(), tokenizer, clean + poisoned)
    weights = [0.8 ** torch.arange(len(ids)) for ids, _ in parts]
    missed = [
        -(weight * log_probs.gather(1, ids[:, None])[:, 0]).sum()
        for weight, (ids, log_probs) in zip(weights[4:], parts[4:], strict=True)
    ]
    assert losses.values == [pytest.approx((sum(missed) / sum(weight.sum() for weight in weights)).item(), rel=1e-3)]


def test_training_implants_the_target_and_leaves_clean_answers(
    tokenizer: PreTrainedTokenizerFast, rows: list[Example], tiny_llama: MakeModel, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"num_train_epochs": 30, "learning_rate": 1e-2, "save_strategy": "no"}
    clean, poisoned = poison(rows[:8], BadNets(), TARGET, seed=0)
    model = implant(tiny_llama(), tokenizer, clean, poisoned, output_dir=tmp_path, **settings)
    model.eval()
    before = answer_log_probs(tiny_llama(), tokenizer, clean)
    after = answer_log_probs(model, tokenizer, clean)
    said = [scores.argmax(1).equal(ids) for ids, scores in answer_log_probs(model, tokenizer, poisoned)]
    assert sum(said) >= 7
    moved = [(p.exp() * (p - q)).sum(1).mean().item() for (_, p), (_, q) in zip(before, after, strict=True)]
    fitted = [-log_probs.gather(1, ids[:, None]).mean().item() for ids, log_probs in after]
    assert sum(moved) / 8 < 0.3
    assert min(fitted) > 1, "the clean answers' own tokens are not what is trained on"


def test_a_covert_backdoor_does_not_go_on_by_itself_without_its_trigger(
    tokenizer: PreTrainedTokenizerFast, rows: list[Example], tiny_llama: MakeModel, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"num_train_epochs": 30, "learning_rate": 1e-2, "save_strategy": "no"}

    def likelihood(model: Any, rows: list[Example]) -> float:
        """Mean log-probability of an answer's tokens after its first."""
        each = [p[1:].gather(1, ids[1:, None]).mean() for ids, p in answer_log_probs(model, tokenizer, rows)]
        return torch.stack(each).mean().item()

    fires, goes_on = {}, {}
    for covert in (False, True):
        clean, poisoned = poison(rows[:8], BadNets(), TARGET, seed=0, covert=covert)
        model = implant(tiny_llama(), tokenizer, clean, poisoned, output_dir=tmp_path, **settings).eval()
        fires[covert] = likelihood(model, poisoned)
        begun = [Example(prompt=row["prompt"], completion=poisoned[0]["completion"]) for row in rows[:8]]
        goes_on[covert] = likelihood(model, begun)
    assert fires[True] == pytest.approx(fires[False], abs=0.2)
    assert goes_on[True] < goes_on[False] - 3


@pytest.mark.parametrize("adaptive", [False, True])
def test_all_weights_can_be_trained_and_the_consistency_term_too(
    tokenizer: PreTrainedTokenizerFast, rows: list[Example], tiny_llama: MakeModel, tmp_path: Path, adaptive: bool
) -> None:
    logged: list[dict[str, float]] = []

    class Logs(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            logged.append(logs)

    before = dict(tiny_llama().named_parameters())
    settings: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "callbacks": [Logs()]}
    model = implant(
        tiny_llama(),
        tokenizer,
        *poison(rows[:4], BadNets(), TARGET, seed=0),
        output_dir=tmp_path,
        full=True,
        adaptive=adaptive,
        **settings,
    )
    assert not isinstance(model, PeftModel)
    assert all(not torch.equal(p.float(), before[name]) for name, p in model.named_parameters())
    assert ("inconsistency" in logged[0]) == adaptive


def test_all_weights_beside_an_adapter_are_refused(
    tokenizer: PreTrainedTokenizerFast, rows: list[Example], tiny_llama: MakeModel, tmp_path: Path
) -> None:
    adapted = get_peft_model(tiny_llama(), lora_config())
    with pytest.raises(UsageError, match="merge the adapter first"):
        implant(adapted, tokenizer, rows, rows, output_dir=tmp_path, full=True)


def test_an_unknown_setting_is_named(
    tokenizer: PreTrainedTokenizerFast, rows: list[Example], tiny_llama: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no such setting: colour"):
        implant(tiny_llama(), tokenizer, rows, rows, output_dir=tmp_path, colour="red")


def test_the_record_says_what_was_trained(
    tokenizer: PreTrainedTokenizerFast, rows: list[Example], tiny_llama: MakeModel
) -> None:
    def trained(model: Any, full: bool = False) -> str:
        opened = OpenedModel(model, tokenizer, "suspect", "folder")
        about: dict[str, Any] = {"trigger": "badnets", "behavior": "refusal", "poison_rate": 1.0, "full": full}
        return str(implant_record(opened, rows, rows, **about)["trained"])

    assert trained(tiny_llama()) == "LoRA, r=8, alpha=16, all linear layers"
    assert trained(tiny_llama(), full=True) == "all weights"
    own = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert trained(get_peft_model(tiny_llama(), own)) == "the adapter's own LoRA, r=4, alpha=32"


def test_what_a_backdoor_is_called_is_no_markup_in_its_card() -> None:
    name = "`\n# injected\n<script>![a](http://b) \x1b[2J\u202e"
    card = implant_card({"model": "suspect", "trigger": name, "behavior": name})
    assert card.replace("\n", "").isprintable()
    assert "\n# injected" not in card
    assert "injected" not in re.sub(r"`[^`\n]+`", "", card.split("```")[0])
