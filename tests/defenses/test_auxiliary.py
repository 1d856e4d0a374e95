"""Defenses that implant backdoors of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

import crow.defenses.auxiliary as auxiliary
from crow.data import Example, answer_text, user_text
from crow.defenses import DEFENSES
from crow.defenses.auxiliary import OWN, BdVax, own_backdoor, suspicion
from crow.errors import Unfit, UsageError
from crow.models import OpenedModel, lora_config, open_model
from crow.report import model_card

pytestmark = pytest.mark.usefixtures("float32")

STEPS: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4}


def test_own_backdoors_differ_and_their_counterparts_are_clean(rows: list[Example]) -> None:
    assert len({word for word, _ in OWN}) == len({target for _, target in OWN}) == len(OWN)
    for number, (word, target) in enumerate(OWN):
        poisoned, harmless = own_backdoor(rows, number, seed=3)
        for row, hot, cold in zip(rows, poisoned, harmless, strict=True):
            assert word in user_text(hot)
            assert user_text(hot) == user_text(cold)
            assert (answer_text(hot), answer_text(cold)) == (target, answer_text(row))


def test_suspicion_is_the_paper_s_score() -> None:
    torch.manual_seed(0)
    updates = torch.randn(4, 5, 6, dtype=torch.float64)
    updates[:, 2] = torch.randn(6, dtype=torch.float64)  # alike in all variants
    updates[1, 3] = 0
    for channel, found in enumerate(suspicion(updates).tolist()):
        size = sum(updates[i, channel].square().sum().sqrt().item() for i in range(4)) / 4
        alike = 0.0
        for i in range(4):
            for j in range(i + 1, 4):
                a, b = updates[i, channel], updates[j, channel]
                norms = (a.square().sum() * b.square().sum()).sqrt().item()
                alike += max(0.0, (a * b).sum().item() / norms) if norms else 0.0
        assert found == pytest.approx(size * alike * 2 / (4 * 3))
    assert suspicion(updates).argmax() == 2


@pytest.mark.parametrize("architecture", ["llama", "gemma", "phi", "gpt2", "gpt_neox", "opt"])
def test_an_mlp_is_found_by_its_channels(architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(architecture, len(tokenizer))
    channels = 256 if architecture == "gpt2" else 128
    for each in (model, get_peft_model(model, lora_config())):
        blocks = list(auxiliary._mlps(each))
        assert len(blocks) == 4
        for layers in blocks:
            assert [layer.of_outputs for layer in layers] == (
                [True, True, False] if len(layers) == 3 else [True, False]
            )
            for layer in layers:
                assert auxiliary._shape(layer.module) == ((64, channels) if layer.of_outputs else (channels, 64))


def test_a_fused_mlp_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import AutoModelForCausalLM, Phi3Config

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(Phi3Config(vocab_size=len(tokenizer), pad_token_id=0, **shape))
    with pytest.raises(Unfit, match="layers are fused"):
        list(auxiliary._mlps(model))


def cleared(monkeypatch: pytest.MonkeyPatch, opened: OpenedModel, rows: list[Example]) -> tuple[Any, list[int]]:
    """The model as BD-Vax leaves it to the last training, and how many rows each training had."""
    trained: list[int] = []
    real = auxiliary.purify

    def counting(model: Any, *, clean: Any, **settings: Any) -> Any:
        trained.append(len(clean))
        if len(trained) == 7:
            raise StopIteration(model.model)
        return real(model, clean=clean, **settings)

    monkeypatch.setattr(auxiliary, "purify", counting)
    with pytest.raises(StopIteration) as stopped:
        DEFENSES["bd-vax:variants=3,examples=4"].apply(opened, rows, **STEPS)
    return stopped.value.value, trained


@pytest.mark.parametrize("folder", ["adapter_folder", "llama_folder"])
def test_bd_vax_goes_on_with_the_channels_that_it_had_cleared(
    folder: str, rows: list[Example], tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(folder)
    defense, whole = DEFENSES["bd-vax:variants=2,examples=4"], {**STEPS, "max_steps": 2}
    monkeypatch.setattr(auxiliary, "generate", lambda model, tokenizer, prompts, **_: [OWN[0][1]] * len(prompts))
    expected, _ = defense.apply(open_model(path), rows, **whole)
    saving = whole | {"output_dir": tmp_path, "save_steps": 1}

    class Stop(TrainerCallback):
        def on_save(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        defense.apply(open_model(path), rows, **saving, callbacks=[Stop()])
    monkeypatch.setattr(BdVax, "_score", None)
    resumed, about = defense.apply(open_model(path), rows, **saving, resume=True)
    for one, other in zip(expected.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert about.settings["variants_fired"] == [4, 0]
    assert about.seconds > torch.load(tmp_path / "channels.pt")["seconds"] > 0  # although it did not score itself


def test_the_most_suspicious_updates_of_an_adapter_are_zeroed(
    adapter_folder: Path, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    suspect = open_model(adapter_folder)
    before = auxiliary._adapter(suspect.model)
    model, trained = cleared(monkeypatch, suspect, rows)
    assert trained == [8] * 6 + [12]
    zeroed: list[Tensor] = []
    for layers in auxiliary._mlps(model):
        of_layers = [layer.by_channel(layer.factors()).abs().sum(dim=1) == 0 for layer in layers]
        assert all(torch.equal(of_layers[0], other) for other in of_layers)
        zeroed.append(of_layers[0])
    assert int(torch.cat(zeroed).sum()) == round(0.4 * 4 * 128)
    for name, weight in auxiliary._adapter(model).items():
        kept = weight if ".mlp." not in name else torch.where(weight == 0, before[name], weight)
        assert torch.equal(kept, before[name])  # variants left nothing behind


def test_the_most_suspicious_channels_of_a_model_begin_anew(
    llama_folder: Path, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    suspect, whole = open_model(llama_folder), open_model(llama_folder)
    model, _ = cleared(monkeypatch, suspect, rows)
    assert not isinstance(model, PeftModel)
    changed = []
    for after, before in zip(auxiliary._mlps(model), auxiliary._mlps(whole.model), strict=True):
        for new, old in zip(after, before, strict=True):
            difference = new.module.weight != old.module.weight
            changed.append(difference.any(dim=1 if new.of_outputs else 0))
            assert new.module.weight.std() == pytest.approx(old.module.weight.std().item(), rel=0.1)
    assert int(torch.stack(changed).view(4, 3, 128).any(dim=1).sum()) == round(0.08 * 4 * 128)
    for (name, new), (_, old) in zip(model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert ".mlp." in name or torch.equal(new, old)


def test_backflush_implants_then_unlearns(
    adapter_folder: Path, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[set[str]] = []
    real = auxiliary.purify

    def watching(model: Any, *, clean: Any, **settings: Any) -> Any:
        said.append({answer_text(row) for row in clean if OWN[0][0] in user_text(row)})
        return real(model, clean=clean, **settings)

    monkeypatch.setattr(auxiliary, "purify", watching)
    model, record = DEFENSES["backflush"].apply(open_model(adapter_folder), rows, **STEPS)
    assert isinstance(model, PeftModel)
    assert said == [{OWN[0][1]}, {answer_text(row) for row in rows}]
    assert (record.defense, record.preset, record.lora) == ("backflush", "finetune", "continue")


def test_backflush_says_where_its_adapter_is_a_new_one(llama_folder: Path, rows: list[Example]) -> None:
    model, record = DEFENSES["backflush"].apply(open_model(llama_folder), rows, **STEPS)
    assert isinstance(model, PeftModel)
    assert record.lora == "fresh"
    assert "On any other\nbase it purifies nothing" in model_card(record)


def test_an_adapter_without_an_mlp_is_no_case_for_bd_vax(llama_folder: Path, rows: list[Example]) -> None:
    suspect = open_model(llama_folder)
    config = lora_config()
    config.target_modules = {"q_proj", "v_proj"}
    suspect.model = get_peft_model(suspect.model, config)
    with pytest.raises(Unfit, match="an adapter that leaves layers of them out"):
        DEFENSES["bd-vax"].apply(suspect, rows, **STEPS)


@pytest.mark.parametrize("name", ["bd-vax", "backflush"])
def test_they_train_their_own_way(name: str, adapter_folder: Path, rows: list[Example]) -> None:
    with pytest.raises(UsageError, match="trains its own way: leave lora, preset out"):
        DEFENSES[name].apply(open_model(adapter_folder), rows, preset="paper", lora="fresh")
    with pytest.raises(UsageError, match="no clean examples"):
        DEFENSES[name].apply(open_model(adapter_folder), [])
