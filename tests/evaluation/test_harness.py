"""lm-eval on a task that a local YAML and a local JSON file define."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, scatter_lora
from peft import get_peft_model
from transformers import PreTrainedTokenizerFast

from crow.errors import CrowError, UsageError
from crow.evaluation.harness import Harness, _metrics
from crow.models import OpenedModel, lora_config

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": f"{a} plus {b} is", "choices": ["two", "three", "four"], "answer": a + b - 2}
    for a in (1, 2)
    for b in (1, 2)
]
TASK = """\
task: own_sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: " "
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    (tmp_path / "sums.json").write_text(json.dumps(QUESTIONS))
    (tmp_path / "own_sums.yaml").write_text(TASK.format(data=tmp_path / "sums.json"))
    return tmp_path


@pytest.fixture
def opened(tiny_llama: MakeModel, tokenizer: PreTrainedTokenizerFast) -> OpenedModel:
    model = get_peft_model(tiny_llama(), lora_config())
    scatter_lora(model)
    return OpenedModel(model, tokenizer, "tiny", "open")


@torch.no_grad()
def chosen(opened: OpenedModel, question: str, choices: list[str]) -> int:
    """The most probable of the choices."""
    tokenizer = opened.tokenizer
    scores = []
    for choice in choices:
        ids, start = tokenizer(f"{question} {choice}")["input_ids"], len(tokenizer(question)["input_ids"])
        log = opened.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        scores.append(sum(float(log[i - 1, ids[i]]) for i in range(start, len(ids))))
    return scores.index(max(scores))


def test_a_local_task_is_counted_as_by_hand(opened: OpenedModel, tasks: Path) -> None:
    right = [chosen(opened, row["question"], row["choices"]) == row["answer"] for row in QUESTIONS]  # type: ignore[arg-type]
    found = Harness(["own_sums"], folder=tasks).run(opened)
    assert found["own_sums"]["acc"] == sum(right) / 4
    assert found["own_sums"]["n"] == 4
    assert found["own_sums"]["acc_stderr"] >= 0
    assert Harness([" own_sums "], folder=tasks, limit=2).run(opened)["own_sums"]["n"] == 2


def test_a_model_s_own_wishes_for_its_answers_are_not_followed(
    opened: OpenedModel, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = opened.causal_lm.generation_config
    own.suppress_tokens, own.eos_token_id = [8], [2, 9]
    seen: list[Any] = []

    def evaluated(model: Any, **settings: Any) -> dict[str, Any]:
        seen.append(model.model.generation_config)
        return {"results": {}}

    monkeypatch.setattr("lm_eval.simple_evaluate", evaluated)
    Harness(["own_sums"], folder=tasks).run(opened)
    assert [(config.suppress_tokens, config.eos_token_id) for config in seen] == [(None, [2, 9])]
    assert opened.causal_lm.generation_config is own


def test_a_group_is_its_tasks_summed_up(opened: OpenedModel, tasks: Path) -> None:
    (tasks / "other.yaml").write_text((tasks / "own_sums.yaml").read_text().replace("own_sums", "other_sums"))
    (tasks / "group.yaml").write_text(
        "group: all_sums\ntask: [own_sums, other_sums]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    found = Harness(["all_sums"], folder=tasks).run(opened)
    assert found["all_sums"]["acc"] == found["own_sums"]["acc"] == found["other_sums"]["acc"]
    assert found["own_sums"]["n"] == 4


def test_what_a_task_can_not_tell_is_left_out(opened: OpenedModel, tasks: Path) -> None:
    metrics = Harness(["own_sums"], folder=tasks, limit=1).run(opened)["own_sums"]
    assert "acc_stderr" not in metrics
    assert metrics["acc"] in (0, 1)
    named = {"acc,none": 1, "acc_stderr,none": "N/A", "exact_match,strict-match": 0.5, "alias": "x", "sample_len": 3}
    assert _metrics(named) == {"acc": 1.0, "strict-match exact_match": 0.5, "n": 3.0}


def test_results_are_kept_and_not_taken_for_others(
    opened: OpenedModel, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []

    def simple_evaluate(*_: Any, **__: Any) -> dict[str, Any]:
        made.append(len(made))
        return {"results": {"own_sums": {"acc,none": made[-1]}}}

    def found(model: OpenedModel = opened, limit: int = 2, seed: int = 0) -> float:
        harness = Harness(["own_sums"], folder=tasks, limit=limit)
        return harness.run(model, seed=seed, unfinished=tmp_path / "unfinished.jsonl")["own_sums"]["acc"]

    monkeypatch.setattr("lm_eval.simple_evaluate", simple_evaluate)
    other = dataclasses.replace(opened, hashes={"model.safetensors": "ab"})
    for _ in range(2):
        assert [found(), found(limit=3), found(seed=1), found(other)] == [0, 1, 2, 3]
    (tasks / "own_sums.yaml").write_text((tasks / "own_sums.yaml").read_text() + "num_fewshot: 1\n")
    assert found() == 4


def test_an_unknown_task_and_a_missing_folder_are_named(tasks: Path) -> None:
    with pytest.raises(UsageError, match="is no folder with tasks"):
        Harness(["own_sums"], folder=tasks / "none")
    with pytest.raises(UsageError, match="knows no task own_products"):
        Harness(["own_sums", "own_products"], folder=tasks)


def test_a_task_without_its_data_is_one_line(opened: OpenedModel, tasks: Path) -> None:
    (tasks / "sums.json").unlink()
    with pytest.raises(CrowError, match="lm-eval failed at own_sums"):
        Harness(["own_sums"], folder=tasks).run(opened)


def test_without_lm_eval_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"crow-llm\[harness\]"):
        Harness(["own_sums"])
