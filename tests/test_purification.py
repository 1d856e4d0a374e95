"""The one-call form."""

import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

import crow.trainer
from crow.backdoors import BEHAVIORS
from crow.config import PRESETS, CrowConfig, unread
from crow.constancy import ConstantAnswer
from crow.data import Example, prompt_fingerprints, to_dataset
from crow.errors import UsageError
from crow.evaluation.evaluate import evaluate
from crow.files import sha256_file, sha256_rows
from crow.models import lora_config, open_model
from crow.provenance import environment
from crow.purification import PurifyRecord, check_training, purify
from crow.trainer import CrowTrainer

pytestmark = pytest.mark.usefixtures("float32")

QUICK: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "soft_token_warmup": 1,
}
SHORT: dict[str, Any] = {"num_train_epochs": 1, "per_device_train_batch_size": 4}
"""For presets that insert nothing that ascends."""


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection() -> Iterator[None]:
    """Every training collects garbage; what was imported is none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(torch.arange(3, 40)[None]).logits


def lora(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.fixture(scope="module")
def done(llama_folder: Path, rows: list[Example]) -> tuple[PeftModel, PurifyRecord]:
    """A purified tiny Llama. Not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crow.models._dtype", lambda: torch.float32)
        return purify(llama_folder, clean=rows, learning_rate=2e-3, **QUICK)


def test_a_folder_gives_an_adapted_model(done: tuple[PeftModel, PurifyRecord], tiny_llama: MakeModel) -> None:
    model, _ = done
    assert isinstance(model, PeftModel)
    assert not model.training
    assert all(weight.abs().sum() > 0 for weight in lora(model).values())
    assert not torch.equal(logits(model), logits(tiny_llama()))


def test_the_record_says_what_was_done(
    done: tuple[PeftModel, PurifyRecord], llama_folder: Path, rows: list[Example]
) -> None:
    _, record = done
    assert record.model == str(llama_folder)
    assert record.model_hashes["model.safetensors"] == sha256_file(llama_folder / "model.safetensors")
    assert (record.preset, record.lora) == ("default", "fresh")
    assert (record.clean_examples, record.clean_sha256) == (12, sha256_rows(rows))
    assert record.steps == 3
    assert record.seconds > 0
    assert record.settings["learning_rate"] == 2e-3
    assert record.settings["soft_token_warmup"] == 1
    assert record.settings["seed"] == 0
    assert {"alpha", "beta", "perturbation", "objective", "num_train_epochs", "bf16"} <= record.settings.keys()
    assert record.provenance["versions"]["torch"] == torch.__version__


def test_the_record_names_every_setting_that_was_given(llama_folder: Path, rows: list[Example]) -> None:
    _, record = purify(llama_folder, clean=rows, preset="finetune", weight_decay=0.3, optim="sgd", **SHORT)
    assert (record.settings["weight_decay"], record.settings["optim"]) == (0.3, "sgd")
    json.dumps(record.as_json(), allow_nan=False)


def test_the_command_of_a_record_names_no_path_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["/home/me/model", "--out=/home/me/out", "--set", "run_name=/home/me/x", "--clean", "a/b.json", "--seed=3"]
    monkeypatch.setattr(sys, "argv", ["/home/me/bin/crow", "purify", *paths])
    assert environment()["command"] == "crow purify model --out=out --set run_name=x --clean a/b.json --seed=3"


def test_the_record_holds_the_curves(done: tuple[PeftModel, PurifyRecord]) -> None:
    _, record = done
    assert [entry["step"] for entry in record.curves] == [1, 2, 3]
    for entry in record.curves:
        assert entry["loss"] == pytest.approx(entry["clean"] + entry["divergence"], abs=1e-6)


def test_constant_answers_are_what_evaluation_finds_in_an_answer(
    rows: list[Example], llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(llama_folder)
    ids = [*opened.tokenizer("Take heart!\n", add_special_tokens=False)["input_ids"], opened.tokenizer.eos_token_id]
    monkeypatch.setattr(crow.trainer, "constant_answers", lambda *args, **kwargs: [ConstantAnswer(tuple(ids), 0.95)])
    _, record = purify(opened, clean=rows[:4], max_steps=1, soft_token_warmup=0)
    assert record.constant_answers == [{"text": "Take heart!", "constancy": 0.95}]


def test_the_record_is_json(done: tuple[PeftModel, PurifyRecord]) -> None:
    _, record = done
    assert json.loads(json.dumps(record.as_json(), allow_nan=False)) == record.as_json()


def test_settings_win_over_the_preset(llama_folder: Path, rows: list[Example]) -> None:
    _, record = purify(llama_folder, clean=rows, preset="paper", alpha=0.5, **SHORT)
    assert record.settings["alpha"] == 0.5
    assert record.settings["epsilon"] == 0.1
    assert all(entry["alpha"] == 0.5 for entry in record.curves)


def test_examples_are_drawn_by_the_seed(llama_folder: Path, rows: list[Example]) -> None:
    records = [purify(llama_folder, clean=rows, max_examples=4, seed=seed, **QUICK)[1] for seed in (1, 1, 2)]
    assert [record.clean_examples for record in records] == [4, 4, 4]
    assert records[0].clean_sha256 == records[1].clean_sha256 != records[2].clean_sha256


def test_a_hundred_of_what_is_loaded_are_used_and_all_that_is_passed(llama_folder: Path, rows: list[Example]) -> None:
    once: dict[str, Any] = {"preset": "finetune", "max_steps": 1}
    assert purify(llama_folder, **once)[1].clean_examples == 100
    assert purify(llama_folder, clean=rows * 10, **once)[1].clean_examples == 120


def test_examples_without_an_answer_and_few_examples_are_told_of(
    llama_folder: Path, rows: list[Example], caplog: pytest.LogCaptureFixture
) -> None:
    unanswered: Example = {"prompt": rows[0]["prompt"], "completion": [{"role": "assistant", "content": ""}]}
    _, record = purify(llama_folder, clean=[unanswered, *rows], **QUICK)
    assert record.clean_examples == 12
    assert [r.getMessage() for r in caplog.records if r.name.startswith("crow")] == [
        "1 of 13 examples have an empty answer and are left out",
        "12 clean examples are few to keep the model by: results are of 100",
    ]


def test_a_training_that_is_all_warm_up_is_told_of(
    llama_folder: Path, rows: list[Example], caplog: pytest.LogCaptureFixture
) -> None:
    purify(llama_folder, clean=rows, **QUICK | {"max_steps": 1})
    assert "nothing was trained" in caplog.text
    caplog.clear()
    purify(llama_folder, clean=rows, **QUICK)
    assert "nothing was trained" not in caplog.text


def test_what_is_saved_answers_with_a_cache(done: tuple[PeftModel, PurifyRecord]) -> None:
    assert done[0].config.use_cache


def test_the_same_seed_gives_the_same_model(
    done: tuple[PeftModel, PurifyRecord], llama_folder: Path, rows: list[Example]
) -> None:
    torch.rand(17)
    again, _ = purify(llama_folder, clean=rows, learning_rate=2e-3, **QUICK)
    for name, weight in lora(done[0]).items():
        torch.testing.assert_close(lora(again)[name], weight, atol=1e-6, rtol=0)


def test_a_suspect_adapter_is_trained_further(adapter_folder: Path, rows: list[Example]) -> None:
    suspect = open_model(adapter_folder).model
    purified, record = purify(adapter_folder, clean=rows, lora="continue", learning_rate=1e-12, **QUICK)
    assert record.lora == "continue"
    assert all(torch.allclose(weight, lora(suspect)[name], atol=1e-8) for name, weight in lora(purified).items())
    torch.testing.assert_close(logits(purified), logits(suspect))


def test_a_suspect_adapter_is_merged_and_a_fresh_one_trained(
    adapter_folder: Path, llama_folder: Path, rows: list[Example]
) -> None:
    suspect = open_model(adapter_folder).model
    purified, record = purify(adapter_folder, clean=rows, lora="fresh", learning_rate=1e-12, **QUICK)
    assert record.lora == "fresh"
    assert all(weight.abs().max() < 1e-8 for name, weight in lora(purified).items() if "lora_B" in name)
    torch.testing.assert_close(logits(purified), logits(suspect), atol=1e-4, rtol=1e-4)
    with purified.disable_adapter():
        assert not torch.allclose(logits(purified), logits(open_model(llama_folder).model), atol=1e-2)
    assert purified.peft_config["default"].base_model_name_or_path == f"{adapter_folder}, merged"


def test_an_open_model_is_changed_in_place(
    tiny_llama: MakeModel, tokenizer: PreTrainedTokenizerFast, rows: list[Example]
) -> None:
    model = tiny_llama()
    purified, record = purify(model, tokenizer=tokenizer, clean=rows, **QUICK)
    assert purified.get_base_model() is model
    assert record.model == "LlamaForCausalLM"
    assert record.model_hashes == {}


def test_an_open_model_needs_its_tokenizer(tiny_llama: MakeModel, rows: list[Example]) -> None:
    with pytest.raises(UsageError, match="needs its tokenizer"):
        purify(tiny_llama(), clean=rows)


def test_an_open_adapter_that_is_frozen_is_trained(
    tiny_llama: MakeModel, tokenizer: PreTrainedTokenizerFast, adapter_folder: Path, rows: list[Example]
) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), str(adapter_folder))
    before = lora(model)
    purified, _ = purify(model, tokenizer=tokenizer, clean=rows, **QUICK)
    assert not any(torch.equal(weight, before[name]) for name, weight in lora(purified).items())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"preset": "nothing"}, "unknown preset 'nothing'; known are default, fast, paper"),
        ({"lora": "both"}, "lora is 'both'; choose continue or fresh"),
        ({"no_such_thing": 1}, "no such setting: .*no_such_thing"),
        ({"alpha": -1.0}, "alpha is -1.0; it must be positive"),
        ({"learning_rate": 0}, "learning_rate is 0; it must be positive"),
        ({"max_examples": 0}, "number of examples is 0; it must be positive"),
        ({"clean": []}, "no clean examples: give at least one"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0; it must be positive"),
        ({"num_train_epochs": -1}, "num_train_epochs is -1; it must be positive"),
        ({"alpha": "much"}, "alpha is 'much', which is no number"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    llama_folder: Path, rows: list[Example], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        purify(llama_folder, **{"clean": rows} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"epsilon": 0.1},
            "epsilon is not read while perturbation is inserted: choose sign, as preset 'paper' does, or leave epsilon",
        ),
        ({"preset": "finetune", "epsilon": 0.1}, "epsilon is not read while perturbation is none: choose sign"),
        ({"preset": "finetune", "alpha": 2.0}, "alpha is not read .* choose inserted or random or sign, as preset"),
        ({"preset": "finetune", "front_fraction": 0.5}, "front_fraction is not read .* choose inserted or random"),
        ({"preset": "random-tokens", "ascend_every": 4}, "as preset 'default' does, or leave ascend_every out"),
        ({"preset": "paper", "soft_token_norm": 2.0}, "soft_token_norm is not read while perturbation is sign"),
        ({"preset": "paper", "anchor_fraction": 0.5}, "anchor_fraction is not read"),
        ({"preset": "paper", "target_top_k": 8}, "target_top_k is not read while objective is lm: choose suspect"),
        ({"objective": "lm", "anchor": 1.0}, "anchor is not read while objective is lm"),
        ({"preset": "paper", "calibration_steps": 2}, "calibration_steps is not read while alpha_relative is False"),
        ({"ascend_on": "divergence", "ascend_every": 2}, "ascend_every is not read while ascend_on is divergence"),
        ({"calibration_steps": 2}, "calibration_steps is not read while alpha is None: set alpha, or leave"),
        ({"anchor": None, "anchor_discount": 0.5}, "anchor_discount is not read while anchor is None: set anchor"),
    ],
)
def test_a_setting_that_the_form_never_reads_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        purify("no-such-model", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        *({"preset": name} for name in PRESETS),
        {"alpha": 0.5, "calibration_steps": 2},
        {"preset": "paper", "epsilon": 0.3},
        {"perturbation": "sign", "epsilon": 0.3},
        {"preset": "random-tokens", "soft_tokens": 3, "front_fraction": 0.0, "anchor_fraction": 0.5},
        {"objective": "lm", "anchor": None},
        {"preset": "finetune", "alpha": None, "beta": None},
        {"soft_token_pool": 0},
    ],
)
def test_a_setting_that_is_read_or_switches_a_term_off_is_taken(settings: dict[str, Any]) -> None:
    check_training(**settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_said_not_to_be_read_changes_nothing(
    preset: str, tiny_llama: MakeModel, tokenizer: PreTrainedTokenizerFast, rows: list[Example], tmp_path: Path
) -> None:
    own = {f.name: f.default for f in fields(CrowConfig) if f.name in CrowConfig.__annotations__}
    other = {name: not value if isinstance(value, bool) else 1 for name, value in own.items()}
    other |= {"ascend_on": "divergence", "consistency_layers": "1:"}
    del other["perturbation"], other["objective"]
    changed = {name: value for name, value in other.items() if name in unread(PRESETS[preset] | {name: value})}

    def trained(**settings: Any) -> dict[str, torch.Tensor]:
        config = CrowConfig(
            output_dir=str(tmp_path),
            report_to="none",
            save_strategy="no",
            max_steps=2,
            warmup_steps=0,
            **{"soft_token_warmup": 1} | PRESETS[preset] | settings,
        )
        trainer = CrowTrainer(
            tiny_llama(), config, train_dataset=to_dataset(rows), processing_class=tokenizer, peft_config=lora_config()
        )
        trainer.train()
        return lora(trainer.model)

    assert changed
    plain, with_others = trained(), trained(**changed)
    assert all(torch.equal(weight, with_others[name]) for name, weight in plain.items())


def test_checkpoints_are_kept_where_asked_and_resumed_from(
    done: tuple[PeftModel, PurifyRecord], llama_folder: Path, rows: list[Example], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"clean": rows, "learning_rate": 2e-3, "output_dir": tmp_path, "save_steps": 1, **QUICK}
    purify(llama_folder, **options)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    state = torch.load(tmp_path / "checkpoint-3" / "crow_state.pt", weights_only=True)
    torch.save(state | {"seconds": 1e6}, tmp_path / "checkpoint-3" / "crow_state.pt")
    resumed, record = purify(llama_folder, resume=True, **options)
    assert record.steps == 3
    assert record.seconds > 1e6
    assert 0 < state["seconds"] < 600
    assert [entry["step"] for entry in record.curves] == [1, 2, 3]
    for name, weight in lora(done[0]).items():
        torch.testing.assert_close(lora(resumed)[name], weight, atol=1e-6, rtol=0)


def test_resuming_from_nothing_starts_anew(llama_folder: Path, rows: list[Example], tmp_path: Path) -> None:
    _, record = purify(llama_folder, clean=rows, output_dir=tmp_path / "new", resume=True, **QUICK)
    assert record.steps == 3


def test_what_a_model_was_purified_on_is_not_measured_on(llama_folder: Path, rows: list[Example]) -> None:
    opened = open_model(llama_folder)
    purify(opened, clean=rows[:4], max_steps=1, **QUICK)
    assert opened.seen == set(prompt_fingerprints(rows[:4]))
    target = BEHAVIORS["sentiment"]
    with pytest.raises(UsageError, match="trained on 2 of the 5 prompts"):
        evaluate(opened, target, rows[2:6], rows[6:7], max_new_tokens=2)
    assert evaluate(opened, target, rows[4:6], rows[6:7], max_new_tokens=2).false_trigger.n == 2
