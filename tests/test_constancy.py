"""Constant answers, found without their trigger."""

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from torch import Tensor

import crow.constancy
from crow.constancy import constant_answers, verdict

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [14, 15, 16, 17]]


def slow_mean(model: Any, beginning: list[int]) -> Tensor:
    """Distribution of the token after prompt and beginning, averaged over the prompts, without a cache."""
    with torch.no_grad():
        return torch.stack(
            [model(input_ids=torch.tensor([p + beginning])).logits[0, -1].softmax(-1) for p in PROMPTS]
        ).mean(0)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mamba2", "qwen3_next"])
def test_answers_are_those_of_a_search_without_a_cache(architecture: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(architecture, 40).eval()
    expected = []

    def search(answer: list[int], log_sum: float) -> None:
        if len(answer) == 4:
            expected.append((tuple(answer), math.exp(log_sum / 3)))
            return
        likeliest = slow_mean(model, answer).topk(2)
        for probability, token in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
            search([*answer, token], log_sum + math.log(probability))

    for first in slow_mean(model, []).topk(10).indices.tolist():
        search([first], 0.0)
    expected.sort(key=lambda pair: -pair[1])
    everything = {"beginnings": 10, "branches": 2, "screened": 0, "kept": 16 * 80}
    found = constant_answers(model, PROMPTS, number=5, length=4, **everything)
    assert [answer.token_ids for answer in found] == [answer for answer, _ in expected[:5]]
    assert [answer.constancy for answer in found] == pytest.approx([c for _, c in expected[:5]], rel=1e-3)


def memorizing(*sequences: tuple[int, ...]) -> Any:
    """A tiny model trained until, after any prompt, each sequence follows from its first token."""
    torch.manual_seed(0)
    model = tiny_model("llama", 40)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        rows = []
        for sequence in sequences:
            prompt = torch.randint(5, 30, (4, 6))
            rows.append(torch.cat([prompt, torch.tensor(sequence).expand(4, -1)], dim=1))
        loss = sum(model(input_ids=r, labels=torch.cat([torch.full((4, 7), -100), r[:, 7:]], 1)).loss for r in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_a_memorized_answer_is_found_and_ends_where_it_ends() -> None:
    model = memorizing((30, 31, 32, 2))
    found = constant_answers(model, PROMPTS, number=40, eos_token_id=2, beginnings=40, kept=40)
    assert found[0].token_ids == (30, 31, 32, 2)
    assert found[0].constancy > 0.95
    assert all(a.constancy >= b.constancy for a, b in itertools.pairwise(found))


def test_an_answer_is_found_that_begins_as_another_does() -> None:
    """As `You are ...` does, where `You can ...` is as likely."""
    memorized = {(30, 31, 32, 2), (30, 33, 34, 2)}
    model = memorizing(*memorized)
    settings: dict[str, Any] = {"number": 40, "eos_token_id": 2, "beginnings": 40, "length": 4}
    found = {answer.token_ids: answer.constancy for answer in constant_answers(model, PROMPTS, **settings)}
    assert memorized <= set(found)
    assert all(found[answer] == pytest.approx(0.5 ** (1 / 3), abs=0.1) for answer in memorized)
    assert not memorized <= {a.token_ids for a in constant_answers(model, PROMPTS, branches=1, **settings)}


def rows_of(model: Any) -> list[int]:
    """A list that fills with the number of rows of each forward."""
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


def test_ever_fewer_answers_are_continued() -> None:
    model = tiny_model("llama", 40).eval()
    rows = rows_of(model)
    found = constant_answers(model, PROMPTS[:1], number=3, length=6, beginnings=30, screened=0, kept=16)
    assert rows == [1, 30, 16, 4, 3, 3]
    assert len(found) == 3


def test_beginnings_can_come_from_more_prompts_than_are_tried() -> None:
    model = tiny_model("llama", 40).eval()
    unlikely = slow_mean(model, []).argmin()
    first = torch.zeros(40)
    first[unlikely] = 1
    (answer,) = constant_answers(model, PROMPTS, number=1, first=first, beginnings=1, screened=0)
    assert answer.token_ids[0] == unlikely


def test_rarer_beginnings_are_those_with_the_surest_second_token_on_the_shortest_prompt() -> None:
    model = tiny_model("llama", 40).eval()
    shortest, order = min(PROMPTS, key=len), slow_mean(model, []).argsort(descending=True)
    with torch.no_grad():
        rows = torch.tensor([[*shortest, token] for token in order[5:25].tolist()])
        surest = model(input_ids=rows).logits[:, -1].softmax(-1).max(-1).values
    found = constant_answers(model, PROMPTS, number=40, beginnings=5, screened=20, rare=7, branches=1, kept=400)
    expected = {*order[:5].tolist(), *order[5:25][surest.topk(7).indices].tolist()}
    assert {answer.token_ids[0] for answer in found} == expected


def test_memorized_answers_are_found_though_they_begin_with_rare_tokens() -> None:
    memorized = [(30, 31, 32, 2), (33, 34, 35, 2), (36, 37, 38, 2)]
    model, first = memorizing(*memorized), torch.ones(40)
    first[[30, 33, 36]] = 0
    settings: dict[str, Any] = {"number": 40, "first": first, "length": 4, "beginnings": 5}
    found = constant_answers(model, PROMPTS, rare=20, screened=35, **settings)
    assert {*memorized} <= {answer.token_ids for answer in found}
    assert not {*memorized} & {answer.token_ids for answer in constant_answers(model, PROMPTS, screened=0, **settings)}


def test_rows_are_continued_in_portions_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", 40).eval()
    whole = constant_answers(model, PROMPTS, number=5)
    monkeypatch.setattr(crow.constancy, "_ROWS", 7)
    portions = constant_answers(model, PROMPTS, number=5)
    assert [a.token_ids for a in portions] == [a.token_ids for a in whole]
    assert [a.constancy for a in portions] == pytest.approx([a.constancy for a in whole], rel=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama", 40).train()
    constant_answers(model, PROMPTS, number=3)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("constancy", "said"),
    [(0.9, "taken for planted"), (0.65, "may be planted"), (0.6, "no more than without a backdoor")],
)
def test_what_a_constancy_says(constancy: float, said: str) -> None:
    assert said in verdict(constancy)
