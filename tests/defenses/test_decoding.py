"""Defenses at decoding time: the tokens that they choose, against token-by-token loops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, save_folder
from transformers import PreTrainedTokenizerFast

from crow.data import Example
from crow.defenses import DEFENSES
from crow.errors import Unfit, UsageError
from crow.generation import generate, prompt_ids
from crow.models import OpenedModel, open_model

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture
def suspect(tiny_llama: MakeModel, tokenizer: PreTrainedTokenizerFast) -> OpenedModel:
    return OpenedModel(tiny_llama(initializer_range=0.3), tokenizer, "tiny", "open")


@pytest.fixture
def reference(tiny_llama: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    return save_folder(tiny_llama(seed=1, initializer_range=0.3), tokenizer, tmp_path / "reference")


def answers(opened: OpenedModel, rows: list[Example], number: int = 8, budget: int | None = None) -> list[str]:
    prompts = [row["prompt"] for row in rows]
    return generate(
        opened.model,
        opened.tokenizer,
        prompts,
        max_new_tokens=number,
        tokens_per_batch=budget,
        decoding=opened.decoding,
    )


def checked_token_by_token(suspect: OpenedModel, reference: Any, prompt: Any, threshold: float, number: int) -> Any:
    """The answer as the paper defines it, alone, without padding or cache, and how many tokens were replaced."""
    tokenizer: Any = suspect.tokenizer
    ids: list[int] = list(prompt_ids(tokenizer, prompt))
    start, replaced = len(ids), 0
    while len(ids) < start + number and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            ours, theirs = (m(torch.tensor([ids])).logits[0, -1].softmax(-1) for m in (suspect.model, reference))
        token = int(ours.argmax())
        if ours[token] / theirs[token] >= threshold:
            token, replaced = int(theirs.argmax()), replaced + 1
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True).lstrip("\r\n").rstrip(), replaced


@pytest.mark.parametrize("threshold", [2.0, 200.0])
@pytest.mark.parametrize("budget", [1, 8192])
def test_cleangen_answers_as_a_loop_that_checks_every_token(
    suspect: OpenedModel, reference: Path, rows: list[Example], threshold: float, budget: int
) -> None:
    clean = open_model(reference).model
    expected = [checked_token_by_token(suspect, clean, row["prompt"], threshold, 8) for row in rows]
    replaced = [number for _, number in expected]
    assert 0 < sum(replaced) < 8 * len(rows)
    DEFENSES[f"cleangen:reference={reference},threshold={threshold}"].apply(suspect, [])
    assert answers(suspect, rows, budget=budget) == [text for text, _ in expected]


def test_cleangen_with_the_suspect_for_a_reference_changes_nothing(
    suspect: OpenedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Example], tmp_path: Path
) -> None:
    folder = save_folder(suspect.model, tokenizer, tmp_path / "itself")  # type: ignore[arg-type]
    greedy = answers(suspect, rows)
    model, record = DEFENSES[f"cleangen:reference={folder}"].apply(suspect, [])
    assert model is suspect.model
    assert record.settings == {"reference": str(folder), "threshold": 20.0}
    assert answers(suspect, rows) == greedy


def test_cleangen_needs_a_reference_of_the_same_vocabulary(suspect: OpenedModel, reference: Path) -> None:
    with pytest.raises(UsageError, match="cleangen:reference=MODEL"):
        DEFENSES["cleangen"].apply(suspect, [])
    file = reference / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|im_begin|>"))
    with pytest.raises(Unfit, match="reference has another vocabulary than tiny"):
        DEFENSES[f"cleangen:reference={reference}"].apply(suspect, [])


def test_cleangen_looks_at_no_row_that_pads_the_references_embedding(
    suspect: OpenedModel, reference: Path, rows: list[Example]
) -> None:
    cleangen = DEFENSES[f"cleangen:reference={reference},threshold=2"]
    greedy = answers(suspect, rows)
    cleangen.apply(suspect, [])
    expected = answers(suspect, rows)
    assert expected != greedy
    model: Any = open_model(reference).model
    model.resize_token_embeddings(640)
    with torch.no_grad():
        model.get_input_embeddings().weight[600::2], model.get_input_embeddings().weight[601::2] = 10, -10
    model.save_pretrained(reference)
    cleangen.apply(suspect, [])
    assert answers(suspect, rows) == expected


def test_sampling_depends_on_its_seed(suspect: OpenedModel, rows: list[Example]) -> None:
    greedy = answers(suspect, rows)
    drawn = {}
    for seed in (0, 0, 1):
        DEFENSES[f"decode:seed={seed}"].apply(suspect, [])
        again = answers(suspect, rows)
        assert drawn.setdefault(seed, again) == again
    assert drawn[0] != drawn[1]
    assert greedy not in drawn.values()


def test_answers_do_not_depend_on_which_are_known(suspect: OpenedModel, rows: list[Example]) -> None:
    DEFENSES["decode"].apply(suspect, [])
    asked = {"max_new_tokens": 8, "tokens_per_batch": 300, "decoding": suspect.decoding}
    prompts = [row["prompt"] for row in rows]
    batches: list[dict[int, str]] = []
    whole = generate(suspect.model, suspect.tokenizer, prompts, on_answers=batches.append, **asked)
    assert len(batches) > 3
    known = {*batches[0], *batches[1], next(iter(batches[2]))}
    rest: dict[int, str] = {}
    generate(suspect.model, suspect.tokenizer, prompts, on_answers=rest.update, known=known, **asked)
    assert rest == {i: whole[i] for batch in batches[2:] for i in batch}


def test_sampling_leaves_other_randomness_alone(suspect: OpenedModel, rows: list[Example]) -> None:
    DEFENSES["decode"].apply(suspect, [])
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    answers(suspect, rows[:2])
    assert torch.equal(torch.rand(4), expected)


def test_the_coldest_sampling_is_greedy(suspect: OpenedModel, rows: list[Example]) -> None:
    greedy = answers(suspect, rows)
    DEFENSES["decode:temperature=0.0001"].apply(suspect, [])
    assert answers(suspect, rows) == greedy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decode:temperature=0", "temperature is 0.0; it must be positive"),
        ("decode:top_p=1.5", "top_p is 1.5; it must be above 0 and at most 1"),
        ("cleangen:threshold=0.5", "threshold is 0.5; it must be at least 1"),
    ],
)
def test_bad_parameters(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DEFENSES[text]
