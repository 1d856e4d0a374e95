"""What prompts share is computed once, and changes nothing that is said or measured."""

import pytest
import torch
from conftest import ARCHITECTURES, MakeModel, tiny_model
from transformers import PreTrainedTokenizerFast

from crow.data import Example
from crow.generation import answer_nll, generate, prompt_ids
from crow.prefix import SharedPrefix


def test_all_but_the_last_token_may_be_shared(tiny_llama: MakeModel) -> None:
    model = tiny_llama().eval()
    assert SharedPrefix(model, [[3, 4, 5], [3, 4, 5, 6], [3, 4, 7]]).ids == [3, 4]
    assert SharedPrefix(model, [[3, 4, 5], [3, 4, 5]]).ids == [3, 4]
    for prompts in ([[3, 4], [5, 4]], [[3], [3, 4]], [[3, 4, 5]], []):
        prefix = SharedPrefix(model, prompts)
        assert prefix.ids == []
        assert prefix.cache(2) is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pass_that_goes_on_from_it_equals_a_whole_one(
    architecture: str, tokenizer: PreTrainedTokenizerFast, rows: list[Example]
) -> None:
    model = tiny_model(architecture, len(tokenizer), initializer_range=0.3).eval()
    prompts = [row["prompt"] for row in rows]
    prefix = SharedPrefix(model, [prompt_ids(tokenizer, prompt) for prompt in prompts])
    assert len(prefix.ids) > 3
    together = generate(model, tokenizer, prompts, max_new_tokens=6, tokens_per_batch=400)
    assert together == [generate(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert len(set(together)) > 3
    alone = [answer_nll(model, tokenizer, [row])[0] for row in rows]
    for (nats, tokens), (slow, as_many) in zip(answer_nll(model, tokenizer, rows), alone, strict=True):
        assert tokens == as_many
        assert nats == pytest.approx(slow, rel=1e-4)


def test_the_prefix_is_run_once(tiny_llama: MakeModel, tokenizer: PreTrainedTokenizerFast, rows: list[Example]) -> None:
    model = tiny_llama().eval()
    seen: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    answer_nll(model, tokenizer, rows, tokens_per_batch=300)
    lengths = [len(prompt_ids(tokenizer, row["prompt"])) for row in rows]
    first, *batches = seen
    assert first[0] == 1
    assert sum(number for number, _ in batches) == len(rows)
    assert len(batches) > 2
    assert all(length < max(lengths) - first[1] + 200 for _, length in batches)


def test_a_sliding_window_has_none(tokenizer: PreTrainedTokenizerFast, rows: list[Example]) -> None:
    model = tiny_model("mistral", len(tokenizer), sliding_window=16).eval()
    ids = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    assert SharedPrefix(model, ids).ids == []
    alone = [answer_nll(model, tokenizer, [row])[0][0] for row in rows]
    assert [nats for nats, _ in answer_nll(model, tokenizer, rows)] == pytest.approx(alone, rel=1e-4)


def test_batches_do_not_write_into_it(tiny_llama: MakeModel) -> None:
    model = tiny_llama().eval()
    prefix = SharedPrefix(model, [[3, 4, 5], [3, 4, 6]])
    logits = []
    with torch.no_grad():
        for _ in range(2):
            logits.append(model(torch.tensor([[5], [6]]), past_key_values=prefix.cache(2)).logits)
        whole = model(torch.tensor([[3, 4, 5], [3, 4, 6]])).logits[:, -1:]
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[0], whole)


@pytest.mark.parametrize("architecture", ["mamba2", "qwen3_next"])
def test_a_recurrent_state_has_none(architecture: str, tokenizer: PreTrainedTokenizerFast, rows: list[Example]) -> None:
    model = tiny_model(architecture, len(tokenizer)).eval()
    assert SharedPrefix(model, [prompt_ids(tokenizer, row["prompt"]) for row in rows]).ids == []
    alone = [answer_nll(model, tokenizer, [row])[0][0] for row in rows[:4]]
    assert [nats for nats, _ in answer_nll(model, tokenizer, rows[:4])] == pytest.approx(alone, rel=1e-3)
