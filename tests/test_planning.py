"""The plan: exact where a config tells all, and moved as it should be by what costs."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from crow.errors import UsageError
from crow.models import describe, open_config, open_model
from crow.planning import Plan, plan

pytestmark = pytest.mark.usefixtures("float32")


def planned(folder: Path, **settings: Any) -> Plan:
    return plan(
        folder, **{"preset": "finetune", "tokens": 64, "per_device_train_batch_size": 4, "tflops": 1.0} | settings
    )


def test_parameters_are_those_of_the_opened_model(llama_folder: Path) -> None:
    facts, told = describe(open_model(llama_folder)), planned(llama_folder)
    assert (told.parameters, told.trained_parameters) == (facts["parameters"], facts["trained_parameters"])
    assert told.weight_bytes == 4 * told.parameters
    assert told.training_bytes == 4 * 4 * told.trained_parameters


def test_a_config_is_enough(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    assert planned(tmp_path) == planned(llama_folder)


def test_an_adapter_is_trained_as_it_is(adapter_folder: Path, llama_folder: Path) -> None:
    trained = sum(weight.numel() for weight in load_file(adapter_folder / "adapter_model.safetensors").values())
    told = planned(adapter_folder)
    assert told.trained_parameters == trained
    assert told.parameters == planned(llama_folder).parameters


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "own",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [5, 6]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"rank_pattern": {"v_proj": 4}, "use_dora": True},
        {"layers_to_transform": [1, 2], "bias": "lora_only"},
        {"init_lora_weights": "pissa"},
    ],
)
def test_all_that_an_adapter_trains_is_counted(tmp_path: Path, own: dict[str, Any], tied: bool) -> None:
    model = tiny_model("llama", 600, tie_word_embeddings=tied, attention_bias=True)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | own)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    told = planned(tmp_path / "adapter", base=tmp_path / "base", preset="default")
    assert told.trained_parameters == adapted.get_nb_trainable_parameters()[0]


def test_work_is_that_of_the_passes(llama_folder: Path) -> None:
    body = sum(p.numel() for p in open_model(llama_folder).causal_lm.model.layers.parameters() if p.dim() == 2)
    finetune, paper = (planned(llama_folder, preset=preset).step_flops for preset in ("finetune", "paper"))
    assert finetune > 2 * 2 * body * 4 * 64
    assert 5 / 2 * 0.8 < paper / finetune < 5 / 2 * 1.1  # the head is paid for but once
    assert planned(llama_folder, tokens=128).step_flops >= 2 * finetune


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_checkpointing_trades_time_for_memory(llama_folder: Path, preset: str) -> None:
    kept, again = (planned(llama_folder, preset=preset, gradient_checkpointing=on) for on in (False, True))
    assert again.activation_bytes < kept.activation_bytes
    assert again.step_seconds > kept.step_seconds
    assert again.weight_bytes == kept.weight_bytes


def test_a_sign_step_is_paid_for_where_a_term_reads_it(llama_folder: Path) -> None:
    plans = [
        planned(llama_folder, preset=preset, **settings).step_flops
        for preset, settings in (
            ("finetune", {}),
            ("paper", {"alpha": None}),
            ("paper", {}),
            ("paper", {"beta": 1.0}),
        )
    ]
    assert plans[0] == plans[1] < plans[2] < plans[3]


def test_logits_are_paid_for_where_there_are_answers(llama_folder: Path) -> None:
    short, long = (planned(llama_folder, preset="random-tokens", answer_tokens=number) for number in (8, 56))
    assert short.logit_bytes < long.logit_bytes
    assert (short.target_bytes, long.target_bytes) == (100 * 8 * 64 * 12, 100 * 56 * 64 * 12)


def test_time_is_work_by_speed(llama_folder: Path) -> None:
    told = planned(llama_folder, tflops=2.0, examples=10, num_train_epochs=2)
    assert told.steps == 6
    assert told.seconds == pytest.approx(6 * told.step_flops / 2e12)
    assert 0 < plan(llama_folder, tokens=16, per_device_train_batch_size=1).tflops < 1e4


def test_what_precedes_the_steps_is_counted(llama_folder: Path) -> None:
    def before(**settings: Any) -> int:
        return planned(llama_folder, **{"preset": "default", "answer_tokens": 32} | settings).preparation_flops

    assert before(preset="finetune") == before(preset="paper") == 0
    recorded = before(preset="random-tokens")
    assert before(preset="random-tokens", examples=200) == 2 * recorded > 0
    ranking = before(soft_token_warmup=0) - recorded
    assert 2 * (before(soft_token_warmup=0, trigger_guesses=2) - recorded) == ranking > 0
    diverging, aiming = before(ascend_on="divergence") - recorded, before() - ranking - recorded
    assert 0 < aiming < diverging  # the answer aimed at is shorter
    assert before(soft_token_warmup=40) - ranking - recorded == 2 * aiming
    # Four rows of 64 tokens and 8 inserted, forward and back; an example of 64, forward
    assert diverging / 20 / 4 == pytest.approx(2 * recorded / 100 * (64 + 8) / 64, rel=0.15)
    told = planned(llama_folder, preset="default")
    assert told.seconds == pytest.approx(told.preparation_seconds + told.steps * told.step_seconds)


def test_a_step_that_ascends_less_often_is_less_work(llama_folder: Path) -> None:
    def step(**settings: Any) -> int:
        return planned(llama_folder, preset="default", **settings).step_flops

    unaimed = step(ascend_on="divergence")
    assert unaimed < step(ascend_every=3) < step()
    assert step(ascend_every=3) - unaimed == pytest.approx((step() - unaimed) / 3)
    assert step(unlikelihood=None) < step()
    assert step(objective="lm", anchor=None) > step(anchor=None)  # sees the whole batch clean, too


def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, 600)
    model.config.save_pretrained(tmp_path)
    told = planned(tmp_path, preset="paper")
    assert told.parameters == sum(p.numel() for p in model.parameters())
    assert told.activation_bytes > told.logit_bytes / 10


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"preset": "none"}, "unknown preset"), ({"answer_tokens": 64}, "longer rows"), ({"beta": -1}, "beta is -1")]
    + [({"tflops": value}, "a speed of .* TFLOPS is none") for value in (0, -1.0, math.nan, math.inf)],
)
def test_what_cannot_be_planned(llama_folder: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        planned(llama_folder, **settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": "(([a-z._0-9]+)+)+!"}, "takes more than 2 s"),
        ({"target_modules": ["nothing"]}, "cannot open .*hostile: Target modules .* not found"),
        ({"r": "many"}, "cannot open .*hostile: "),
    ],
)
def test_a_hostile_adapter_is_refused(
    adapter_folder: Path, tmp_path: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crow.limits.SECONDS", 2)
    file = Path(shutil.copytree(adapter_folder, tmp_path / "hostile")) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UsageError, match=said):
        planned(tmp_path / "hostile")


def test_embeddings_may_have_another_width_than_hidden_states(tmp_path: Path) -> None:
    tiny_config("opt", 600, word_embed_proj_dim=32).save_pretrained(tmp_path)
    assert planned(tmp_path).step_flops > 0


def test_the_embedded_model_needs_no_parsing() -> None:
    config, _ = open_config()
    assert config.hidden_size == 576


def test_weights_of_many_gigabytes_take_no_memory(tmp_path: Path) -> None:
    tiny_config("llama", 128_000, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=2).save_pretrained(
        tmp_path
    )
    before = psutil.Process().memory_info().rss
    assert planned(tmp_path).weight_bytes > 8e9
    assert psutil.Process().memory_info().rss - before < 1e9


def test_of_an_adapter_on_the_hub_the_config_alone_is_got(
    adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[Any] = []

    def download(name: str, allow_patterns: Any) -> str:
        got.append(allow_patterns)
        return str(adapter_folder)

    monkeypatch.setattr("crow.models.check_hub", lambda name: None)
    monkeypatch.setattr("crow.models.find_adapter_config_file", lambda name: "adapter_config.json")
    monkeypatch.setattr("crow.models.snapshot_download", download)
    assert open_config("org/adapter")[0].hidden_size == 64
    assert got == ["adapter_config.json"]
