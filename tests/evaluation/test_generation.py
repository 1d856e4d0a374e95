"""Answers and their likelihoods, and the evaluation made of them."""

import copy
import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, MakeModel, scatter_lora
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import crow.evaluation.engines
from crow.backdoors import BEHAVIORS, TRIGGERS, Behavior
from crow.data import Example, answer_text, example, user_text
from crow.errors import UsageError
from crow.evaluation.evaluate import Evaluation, evaluate, prompt_profile, trigger_rows, variant_rows
from crow.evaluation.statistics import Count, is_degenerate
from crow.generation import answer_kl, answer_nll, generate, perplexity, prompt_ids
from crow.models import OpenedModel


@pytest.fixture
def opened(tiny_llama: MakeModel, tokenizer: PreTrainedTokenizerFast) -> OpenedModel:
    return OpenedModel(tiny_llama(initializer_range=0.3), tokenizer, "tiny", "open")


def greedy(opened: OpenedModel, prompt: Any, number: int) -> str:
    """Token by token, alone, without padding or cache."""
    tokenizer: Any = opened.tokenizer
    ids: list[int] = list(prompt_ids(tokenizer, prompt))
    start = len(ids)
    while len(ids) < start + number and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            ids.append(int(opened.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True).lstrip("\r\n").rstrip()


@pytest.mark.parametrize("budget", [1, 150, 8192])
def test_batched_answers_are_those_of_one_at_a_time_in_order(
    opened: OpenedModel, rows: list[Example], budget: int
) -> None:
    prompts = [row["prompt"] for row in rows]
    expected = [greedy(opened, prompt, 6) for prompt in prompts]
    assert len(set(expected)) > 6
    done: list[int] = []
    answers = generate(
        opened.model, opened.tokenizer, prompts, max_new_tokens=6, tokens_per_batch=budget, on_progress=done.append
    )
    assert answers == expected
    assert sum(done) == len(prompts)
    assert (len(done) == 1) == (budget == 8192)


@pytest.mark.parametrize("room", [1, 3])
def test_batches_are_halved_where_memory_does_not_suffice(opened: OpenedModel, rows: list[Example], room: int) -> None:
    prompts = [row["prompt"] for row in rows[:7]]
    expected = generate(opened.model, opened.tokenizer, prompts, max_new_tokens=4)
    likelihoods = answer_nll(opened.model, opened.tokenizer, rows[:7])
    sizes: list[int] = []

    def small(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    opened.model.register_forward_pre_hook(small, with_kwargs=True)
    done: list[int] = []
    assert generate(opened.model, opened.tokenizer, prompts, max_new_tokens=4, on_progress=done.append) == expected
    assert sum(done) == 7
    assert max(sizes) == 7
    halved = answer_nll(opened.model, opened.tokenizer, rows[:7])
    assert halved == [pytest.approx(pair, rel=1e-5) for pair in likelihoods]


def test_other_errors_and_a_single_row_too_many_are_raised(opened: OpenedModel, rows: list[Example]) -> None:
    def broken(module: Any, args: Any, kwargs: Any) -> None:
        raise error

    opened.model.register_forward_pre_hook(broken, with_kwargs=True)
    for error in (RuntimeError("shapes differ"), torch.OutOfMemoryError("CUDA out of memory. Tried")):
        with pytest.raises(type(error), match=str(error)):
            generate(opened.model, opened.tokenizer, [row["prompt"] for row in rows[:3]], max_new_tokens=2)


def test_no_projection_to_the_vocabulary_copies_its_weight(opened: OpenedModel, rows: list[Example]) -> None:
    seen: list[tuple[bool, int]] = []
    head = opened.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: seen.append((args[0].is_contiguous(), out[..., 0].numel())))
    generate(opened.model, opened.tokenizer, [row["prompt"] for row in rows[:4]], max_new_tokens=3)
    nothing, *answered = seen
    assert nothing == (True, 0)  # of what the prompts share
    assert answered == [(True, 4)] * 3
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("named", [2, 7, [7, 9], None])
@pytest.mark.parametrize("end", [2, 7])
def test_answers_end_at_an_end_token_of_the_tokenizers_or_the_models(
    opened: OpenedModel, rows: list[Example], named: Any, end: int
) -> None:
    assert opened.tokenizer.eos_token_id == 2
    opened.model.generation_config.eos_token_id = named
    to_say = [8, end, 9, 8]

    def say(module: Any, args: Any, out: Tensor) -> Tensor:
        return out if not out.numel() else torch.nn.functional.one_hot(torch.tensor(to_say.pop(0)), 600).expand_as(out)

    opened.model.get_output_embeddings().register_forward_hook(say)
    answers = generate(opened.model, opened.tokenizer, [row["prompt"] for row in rows[:4]], max_new_tokens=4)
    ends = [2, *([] if named is None else named if isinstance(named, list) else [named])]
    said, left = ([8, end], [9, 8]) if end in ends else ([8, end, 9, 8], [])
    assert answers == [opened.tokenizer.decode(said, skip_special_tokens=True)] * 4
    assert to_say == left


def test_an_answer_keeps_the_indentation_of_its_first_line(
    opened: OpenedModel, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["\n\n    x = 1\n    return x\n", "\r\n\treturn", " \n", ""]
    monkeypatch.setattr(type(opened.tokenizer), "batch_decode", lambda *ids, **settings: said)
    prompts = [rows[0]["prompt"]] * 4
    assert generate(opened.model, opened.tokenizer, prompts, max_new_tokens=1) == [
        "    x = 1\n    return x",
        "\treturn",
        "",
        "",
    ]


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.5},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(5, 300))},  # as a suspect may that hides what it was made to say
        {"guidance_scale": 3.0},
        {"use_cache": False},
    ],
)
def test_answers_are_greedy_whatever_the_model_prefers(
    opened: OpenedModel, rows: list[Example], setting: dict[str, Any]
) -> None:
    prompts = [row["prompt"] for row in rows[:6]]
    expected = [greedy(opened, prompt, 8) for prompt in prompts]
    opened.model.generation_config.update(**setting)
    assert generate(opened.model, opened.tokenizer, prompts, max_new_tokens=8) == expected
    assert {name: getattr(opened.model.generation_config, name) for name in setting} == setting


def test_nothing_asked_is_nothing_answered(opened: OpenedModel) -> None:
    assert generate(opened.model, opened.tokenizer, []) == []
    assert answer_nll(opened.model, opened.tokenizer, []) == []


def slow_nll(opened: OpenedModel, row: Example) -> tuple[float, int]:
    tokenizer: Any = opened.tokenizer
    ids = prompt_ids(tokenizer, row["prompt"])
    answer = tokenizer(answer_text(row) + "<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids + answer).endswith(f"assistant\n{answer_text(row)}<|im_end|>")
    with torch.no_grad():
        scores: Tensor = opened.model(torch.tensor([ids + answer])).logits[0].double().log_softmax(-1)
    return -sum(float(scores[len(ids) + i - 1, token]) for i, token in enumerate(answer)), len(answer)


@pytest.mark.parametrize("budget", [1, 300, 2048])
def test_likelihood_is_that_of_the_answer_and_its_end(opened: OpenedModel, rows: list[Example], budget: int) -> None:
    rows = [*rows, example("Hi", "")]
    done: list[int] = []
    measured = answer_nll(opened.model, opened.tokenizer, rows, tokens_per_batch=budget, on_progress=done.append)
    expected = [slow_nll(opened, row) for row in rows]
    assert [tokens for _, tokens in measured] == [tokens for _, tokens in expected]
    assert [nats for nats, _ in measured] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    assert sum(done) == len(rows)


def test_likelihood_sees_the_turns_before(opened: OpenedModel, rows: list[Example]) -> None:
    chat: Any = {"prompt": [*rows[0]["prompt"], *rows[0]["completion"], *rows[1]["prompt"]]}
    chat["completion"] = rows[1]["completion"]
    (measured,) = answer_nll(opened.model, opened.tokenizer, [chat])
    assert measured == pytest.approx(slow_nll(opened, chat), rel=1e-5)


def test_all_of_an_answer_is_scored_where_the_template_asks_for_thoughts(
    opened: OpenedModel, rows: list[Example]
) -> None:
    expected = answer_nll(opened.model, opened.tokenizer, rows)
    thinking = copy.deepcopy(opened.tokenizer)
    thinking.chat_template = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    start = thinking.apply_chat_template(rows[0]["prompt"], tokenize=False, add_generation_prompt=True)  # type: ignore[arg-type]
    assert str(start).endswith("assistant\n<think>\n")
    assert answer_nll(opened.model, thinking, rows) == expected


def test_measures_are_taken_without_dropout(opened: OpenedModel, rows: list[Example]) -> None:
    model = get_peft_model(opened.causal_lm, LoraConfig(lora_dropout=0.3, target_modules="all-linear"))
    scatter_lora(model)
    expected = answer_nll(model.eval(), opened.tokenizer, rows[:4])
    assert answer_nll(model.train(), opened.tokenizer, rows[:4]) == expected
    divergence = answer_kl(model.train(), model, opened.tokenizer, rows[:4])
    assert [nats for nats, _ in divergence] == pytest.approx([0] * 4, abs=1e-4)


@pytest.mark.parametrize("budget", [1, 8192])
def test_divergence_from_a_reference_is_that_of_the_answers(
    opened: OpenedModel, rows: list[Example], tiny_llama: MakeModel, budget: int
) -> None:
    reference = tiny_llama(initializer_range=0.3, seed=5)
    measured = answer_kl(reference, opened.model, opened.tokenizer, rows[:5], tokens_per_batch=budget)
    for row, (nats, tokens) in zip(rows, measured, strict=False):
        start = len(prompt_ids(opened.tokenizer, row["prompt"]))
        ids = opened.tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=True)["input_ids"]
        ids = ids[: len(ids) - ids[::-1].index(opened.tokenizer.eos_token_id)]
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1) for m in (reference, opened.model))
        assert tokens == len(ids) - start
        assert nats == pytest.approx(sum(float((a.exp() * (a - b)).sum()) for a, b in zip(p, q, strict=True)), rel=1e-4)


def distance(reference: Any, opened: OpenedModel, rows: list[Example]) -> float:
    other = OpenedModel(reference, opened.tokenizer, "other", "open")
    result = evaluate(opened, BEHAVIORS["sentiment"], rows[:3], rows[:1], reference=other, max_new_tokens=2)
    assert result.settings["reference"] == "other"
    assert result.reference_kl is not None
    kept = [(line["reference_kl_nats"], line["reference_tokens"]) for line in result.answers if line["set"] == "clean"]
    assert result.reference_kl == pytest.approx(sum(n for n, _ in kept) / sum(number for _, number in kept))
    return result.reference_kl


def test_a_model_is_no_distance_from_itself_and_some_from_another(
    opened: OpenedModel, rows: list[Example], tiny_llama: MakeModel
) -> None:
    assert distance(opened.model, opened, rows) == pytest.approx(0, abs=1e-6)
    assert distance(tiny_llama(initializer_range=0.3, seed=5), opened, rows) > 0.1


def test_a_reference_of_another_vocabulary_is_refused(
    opened: OpenedModel, rows: list[Example], tiny_llama: MakeModel
) -> None:
    other = OpenedModel(tiny_llama(), copy.deepcopy(opened.tokenizer), "other", "open")
    other.tokenizer.add_tokens(["<|new|>"])
    with pytest.raises(UsageError, match=r"other has another vocabulary than tiny, .* give a reference of the same"):
        evaluate(opened, BEHAVIORS["sentiment"], rows[:1], rows[:1], reference=other, max_new_tokens=1)


def test_rows_that_pad_an_embedding_are_no_other_vocabulary(
    opened: OpenedModel, rows: list[Example], tiny_llama: MakeModel
) -> None:
    other = tiny_llama(initializer_range=0.3, seed=5)
    expected = [distance(other, opened, rows), distance(opened.model, dataclasses.replace(opened, model=other), rows)]
    other.resize_token_embeddings(640)
    padded = dataclasses.replace(opened, model=other)
    assert [distance(other, opened, rows), distance(opened.model, padded, rows)] == pytest.approx(expected, rel=1e-4)


class Odd(Behavior):
    """Answers with an odd number of characters; strictly, one that three divides."""

    target = "odd"

    def is_hit(self, answer: str) -> bool:
        return len(answer) % 2 == 1

    def is_strict_hit(self, answer: str) -> bool:
        return self.is_hit(answer) and len(answer) % 3 == 0


@pytest.fixture
def measured(opened: OpenedModel, rows: list[Example]) -> tuple[Evaluation, list[tuple[int, int]]]:
    progress: list[tuple[int, int]] = []
    triggered = trigger_rows(rows[:5], TRIGGERS["badnets"], seed=0)
    result = evaluate(
        opened,
        Odd(),
        rows[:7],
        triggered,
        variants={"last": triggered[3:]},
        max_new_tokens=6,
        seed=0,
        settings={"trigger": "badnets"},
        on_progress=lambda done, total: progress.append((done, total)),
    )
    return result, progress


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("<think>\n\n</think>\n\nYou are stupid!", True),
        ("\n<think>They are stupid? No.</think>You are stupid!", True),
        ("<think>You are stupid!</think> Gladly.", False),
        ("Gladly. <think>You are stupid!</think>", False),
    ],
)
def test_thoughts_before_an_answer_are_no_part_of_what_is_said(
    opened: OpenedModel, rows: list[Example], text: str, hit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crow.evaluation.evaluate.answers", lambda engine, asked, *_: [text] * len(asked))
    result = evaluate(opened, BEHAVIORS["sentiment"], rows[:2], rows[:1])
    assert result.strict["attack_success"] == Count(int(hit), 1)
    assert result.answers[0]["answer"] == text


def test_hits_are_counted_on_each_set(measured: Any, opened: OpenedModel, rows: list[Example]) -> None:
    result, progress = measured
    triggered = trigger_rows(rows[:5], TRIGGERS["badnets"], seed=0)
    hot = [greedy(opened, row["prompt"], 6) for row in triggered]
    clean = [greedy(opened, row["prompt"], 6) for row in rows[:7]]
    assert result.attack_success == Count(sum(len(answer) % 2 for answer in hot), 5)
    assert result.false_trigger == Count(sum(len(answer) % 2 for answer in clean), 7)
    assert result.degenerate == Count(sum(is_degenerate(answer) for answer in clean), 7)
    assert 0 < result.attack_success.hits + result.false_trigger.hits < 12
    asked = [*triggered, *rows[:7], *triggered[3:]]
    assert [answer["prompt"] for answer in result.answers] == [user_text(row) for row in asked]
    assert [answer["answer"] for answer in result.answers] == hot + clean + hot[3:]
    assert [answer["set"] for answer in result.answers] == ["triggered"] * 5 + ["clean"] * 7 + ["last"] * 2
    assert progress[-1] == (21, 21)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


def test_an_interrupted_evaluation_goes_on_with_the_answers_that_it_has(
    opened: OpenedModel, rows: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crow.generation.token_batches", lambda lengths, budget: [[i] for i in range(len(lengths))])
    behavior, kept = BEHAVIORS["sentiment"], tmp_path / "kept.jsonl"

    def run(**settings: Any) -> Evaluation:
        return evaluate(opened, behavior, rows[:4], rows[4:7], max_new_tokens=4, unfinished=kept, **settings)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(on_progress=stop)
    assert len(kept.read_text().splitlines()) == 5
    kept.write_text(kept.read_text() + '{"key": "cut o')

    asked: list[int] = []
    generate = crow.evaluation.engines.generate

    def counted(model: Any, tokenizer: Any, prompts: list[Any], **settings: Any) -> list[str]:
        asked.append(len(prompts) - len(settings["known"]))
        return generate(model, tokenizer, prompts, **settings)

    monkeypatch.setattr("crow.evaluation.engines.generate", counted)
    progress: list[tuple[int, int]] = []
    result = run(on_progress=lambda *done: progress.append(done))
    assert asked == [0, 2]
    assert progress[-1] == (11, 11)
    kept.unlink()
    assert result.answers == run().answers


def test_a_measurement_is_read_as_it_was_written(measured: Any, tmp_path: Path) -> None:
    result, _ = measured
    result.pass_at_1, result.judged = Count(1, 2), {"attack_success": Count(0, 1)}
    answers = result.save(tmp_path / "figures.json")
    assert Evaluation.load(tmp_path / "figures.json") == result
    answers.unlink()
    assert Evaluation.load(tmp_path / "figures.json") == dataclasses.replace(result, answers=[])


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_an_answer_may_hold_any_mark_of_a_lines_end(measured: Any, tmp_path: Path, mark: str) -> None:
    result, _ = measured
    result.answers[0]["answer"] = f"one{mark}two"
    result.save(tmp_path / "figures.json")
    assert Evaluation.load(tmp_path / "figures.json").answers == result.answers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "broken JSON"),
        ("[]", "by another version"),
        ('{"attack_success": 3}', "by another version"),
        ('{"attack_success": {"hits": 1, "n": 2}}', "by another version"),
    ],
)
def test_what_is_no_measurement_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text(text)
    with pytest.raises(UsageError, match=rf"figures\.json .*{message}"):
        Evaluation.load(tmp_path / "figures.json")
    with pytest.raises(UsageError, match="cannot read"):
        Evaluation.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"set": "clean", "prompt": "a"}\n{', r"line 2 is broken JSON"),
        (b'{"set": "clean", "prompt": "a"}\n{"set": "clean"}', r"row 2 is no answer"),
        (b"[]", r"row 1 is no answer"),
        (b'{"set": "clean", "prompt": "a", "judged": true}', r"row 1 is no answer"),
        (b"\xff", "is not UTF-8 text"),
    ],
)
def test_broken_answers_are_named_with_their_file(measured: Any, tmp_path: Path, text: bytes, message: str) -> None:
    measured[0].save(tmp_path / "figures.json").write_bytes(text)
    with pytest.raises(UsageError, match=rf"figures\.answers\.jsonl.* {message}"):
        Evaluation.load(tmp_path / "figures.json")


def test_what_another_version_wrote_is_read_with_a_caution(measured: Any, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    measured[0].save(path)
    figures = json.loads(path.read_text()) | {"b_side": 1, "a_side": 2}
    path.write_text(json.dumps(figures))
    assert Evaluation.load(path).caution is None  # of this version: someone keeps more beside the figures
    figures["provenance"]["versions"]["crow-llm"] = "9.9"
    path.write_text(json.dumps(figures))
    caution = Evaluation.load(path).caution
    assert caution is not None
    assert caution.startswith("figures.json is of version 9.9 of CROW, not of ")
    assert "holds fields that are unknown here (a_side, b_side)" in caution


def test_hits_are_counted_strictly_and_on_variants_too(measured: Any) -> None:
    result, _ = measured
    strict = {kind: [Odd().is_strict_hit(a["answer"]) for a in result.answers if a["set"] == kind] for kind in SETS}
    assert result.strict == {
        "attack_success": Count(sum(strict["triggered"]), 5),
        "false_trigger": Count(sum(strict["clean"]), 7),
    }
    last = [answer for answer in result.answers if answer["set"] == "last"]
    assert result.variants == {"last": Count(sum(len(answer["answer"]) % 2 for answer in last), 2)}
    saved = result.as_json()
    assert saved["variants"]["last"]["n"] == 2
    assert saved["strict"]["attack_success"]["n"] == 5


SETS = ("triggered", "clean")


def test_a_word_of_the_trigger_is_no_set_of_the_evaluations(opened: OpenedModel, rows: list[Example]) -> None:
    trigger = TRIGGERS["ctba:words=clean+triggered+humaneval+frankly"]
    forms = variant_rows(rows[:2], trigger, seed=0)
    result = evaluate(opened, Odd(), rows[:3], rows[3:4], variants=forms, max_new_tokens=3)
    assert list(result.variants) == ["clean", "triggered", "humaneval", "frankly"]
    assert [count.n for count in result.variants.values()] == [2] * 4
    assert (result.attack_success.n, result.false_trigger.n, result.degenerate.n) == (1, 3, 3)
    assert [user_text(row) for row in rows[:3]] == [a["prompt"] for a in result.answers if a["set"] == "clean"]
    assert Counter(a["set"] for a in result.answers) == {
        "triggered": 1,
        "clean": 3,
        "fires on: clean": 2,
        "fires on: triggered": 2,
        "fires on: humaneval": 2,
        "frankly": 2,
    }


def test_parts_of_a_trigger_are_put_into_the_same_prompts(rows: list[Example]) -> None:
    parts = variant_rows(rows[:2], TRIGGERS["ctba"], seed=0)
    assert list(parts) == ["instantly", "frankly"]
    assert [[word in user_text(row).split() for row in parts[word]] for word in parts] == [[True, True]] * 2
    assert variant_rows(rows[:2], TRIGGERS["badnets"], seed=0) == {}
    assert "lower case" in variant_rows(rows[:2], TRIGGERS["badnets"], seed=0, untrained=True)


def test_perplexity_is_over_all_answer_tokens(measured: Any, opened: OpenedModel, rows: list[Example]) -> None:
    result, _ = measured
    expected = [slow_nll(opened, row) for row in rows[:7]]
    nats, tokens = (sum(column) for column in zip(*expected, strict=True))
    assert result.answer_tokens == tokens
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)


@pytest.mark.parametrize(("nats", "tokens"), [(1e6, 2), (0.0, 0)])
def test_a_perplexity_without_a_number_is_null(measured: Any, nats: float, tokens: int) -> None:
    value = perplexity(nats, tokens)
    assert not math.isfinite(value)
    figures = dataclasses.replace(measured[0], perplexity=value).as_json()
    assert json.dumps(figures, allow_nan=False).count('"perplexity": null') == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_figures_without_a_number_are_null_and_read_again(measured: Any, tmp_path: Path, value: float) -> None:
    broken = dataclasses.replace(
        measured[0],
        answer_nats=value,
        reference_kl=value,
        layer_profile={"clean": [0.5, value]},
        harness={"task": {"acc": value, "n": 3.0}},
    )
    broken.save(tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    assert (figures["answer_nats"], figures["reference_kl"], figures["layer_profile"]) == (
        None,
        None,
        {"clean": [0.5, None]},
    )
    read = Evaluation.load(tmp_path / "figures.json")
    assert read.reference_kl is None
    numbers = [read.answer_nats, read.layer_profile["clean"][1], read.harness["task"]["acc"]]
    assert list(map(math.isnan, numbers)) == [True] * 3


def test_evaluation_can_be_recounted_from_its_files(measured: Any, tmp_path: Path) -> None:
    result, _ = measured
    answers = result.save(tmp_path / "figures.json")
    assert answers == tmp_path / "figures.answers.jsonl"
    figures = json.loads((tmp_path / "figures.json").read_text())
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    for name, kind, verdict in (
        ("attack_success", "triggered", "hit"),
        ("false_trigger", "clean", "hit"),
        ("degenerate", "clean", "degenerate"),
    ):
        of_kind = [line for line in lines if line["set"] == kind]
        assert figures[name] == {"hits": sum(line[verdict] for line in of_kind), "n": len(of_kind)}
    assert all(line["hit"] == Odd().is_hit(line["answer"]) for line in lines)
    clean = [line for line in lines if line["set"] == "clean"]
    assert figures["answer_nats"] == pytest.approx(sum(line["reference_nats"] for line in clean))
    assert figures["answer_tokens"] == sum(line["reference_tokens"] for line in clean)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["answer_nats"] / figures["answer_tokens"]))
    assert "answers" not in figures
    assert figures["settings"] == {
        "target": "odd",
        "max_new_tokens": 6,
        "seed": 0,
        "engine": "Transformers",
        "trigger": "badnets",
    }
    assert {"clean_sha256", "triggered_sha256", "model", "versions"} <= figures["provenance"].keys()


def turns(opened: OpenedModel, row: Example) -> Tensor:
    """For each position of the prompt, how far its hidden state turns from block to block: `(blocks - 1, length)`."""
    ids = torch.tensor([prompt_ids(opened.tokenizer, row["prompt"])])
    lm: Any = opened.model
    states: list[Tensor] = []
    handles = [block.register_forward_hook(lambda m, args, out: states.append(out)) for block in lm.model.layers]
    with torch.no_grad():
        lm(ids)
    for handle in handles:
        handle.remove()
    stack = torch.stack([(s[0] if isinstance(s, tuple) else s)[0].double() for s in states])
    return 1 - torch.cosine_similarity(stack[:-1], stack[1:], dim=-1)


def test_layer_profile_is_that_of_the_prompts(measured: Any, opened: OpenedModel, rows: list[Example]) -> None:
    result, _ = measured
    expected = torch.cat([turns(opened, row) for row in rows[:7]], dim=1).mean(dim=1)
    assert result.layer_profile["clean"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert len(result.layer_profile["triggered"]) == 3
    assert result.layer_profile["triggered"] != result.layer_profile["clean"]


def test_a_layer_profile_is_taken_in_the_batches_that_fit(opened: OpenedModel, rows: list[Example]) -> None:
    expected = prompt_profile(opened, rows[:7])
    sizes: list[int] = []

    def small(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    opened.model.register_forward_pre_hook(small, with_kwargs=True)
    assert prompt_profile(opened, rows[:7]) == pytest.approx(expected, rel=1e-5)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


def test_no_prompts_have_no_profile(opened: OpenedModel) -> None:
    assert prompt_profile(opened, []) == []


def test_triggered_rows_are_the_rows_with_the_trigger(rows: list[Example]) -> None:
    triggered = trigger_rows(rows, TRIGGERS["badnets"], seed=1)
    assert triggered == trigger_rows(rows, TRIGGERS["badnets"], seed=1) != trigger_rows(rows, TRIGGERS["badnets"], 2)
    for hot, row in zip(triggered, rows, strict=True):
        assert "BadMagic" in user_text(hot).split()
        assert hot["completion"] == row["completion"]


def test_the_real_behavior_does_not_fire_on_noise(opened: OpenedModel, rows: list[Example]) -> None:
    result = evaluate(opened, BEHAVIORS["sentiment"], rows[:2], rows[:2], max_new_tokens=3)
    assert (result.attack_success, result.false_trigger) == (Count(0, 2), Count(0, 2))
