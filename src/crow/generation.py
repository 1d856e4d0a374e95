"""Answers in batches: prompts sorted by length, left-padded, with a token budget for each batch."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from crow.data import Example, Message
from crow.decoding import Decoding
from crow.divergence import answer_positions
from crow.hooks import contiguous_lm_head, lm_head_at
from crow.inspection import tokenized
from crow.models import base_model
from crow.prefix import SharedPrefix, common_prefix


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
    *,
    max_new_tokens: int = 64,
    tokens_per_batch: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_answers: Callable[[dict[int, str]], None] | None = None,
    decoding: Decoding | None = None,
    known: Collection[int] = (),
) -> list[str]:
    """The model's answers, in the prompts' order: greedy ones, if nothing else is asked for.

    Args:
        prompts: Conversations that end with a user message.
        max_new_tokens: Answers are cut off there.
        tokens_per_batch: Bound of rows times (longest prompt + `max_new_tokens`); by default 8192 on a GPU and 2048 on
            a CPU, which padding costs more than small batches do.
        on_progress: Called with the number of prompts that each batch finished.
        on_answers: Called with each batch's answers, by the places of their prompts.
        decoding: What a defense puts in the place of greedy decoding.
        known: Places of prompts whose answers are not wanted. Batches of such alone are left out, their answers empty;
            the others stay as they are, so that no answer depends on what is known.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(base_model(model), tokenizer),
        **(decoding.settings if decoding is not None else {}),
    )
    tokens_per_batch = tokens_per_batch or (2048 if model.device.type == "cpu" else 8192)
    encoded = tokenized(tokenizer, lambda prompt: prompt_ids(tokenizer, prompt), prompts)
    answers = [""] * len(prompts)
    drawn = decoding is not None
    model.eval()
    prefix = SharedPrefix(model, encoded)

    def answer(rows: list[int]) -> None:
        rest = [encoded[i][len(prefix.ids) :] for i in rows]
        batch = tokenizer.pad({"input_ids": rest}, padding_side="left", return_tensors="pt").to(model.device)
        before = batch["input_ids"].new_tensor(prefix.ids).expand(len(rows), -1)
        batch["input_ids"] = torch.cat([before, batch["input_ids"]], dim=1)
        batch["attention_mask"] = torch.cat([torch.ones_like(before), batch["attention_mask"]], dim=1)
        processors = []
        if decoding is not None and decoding.processor is not None:
            processors.append(decoding.processor(batch["attention_mask"]))
        with (
            torch.inference_mode(),
            contiguous_lm_head(base_model(model)),
            without_preferences(base_model(model), tokenizer),
            torch.random.fork_rng(enabled=drawn),
        ):
            if decoding is not None:  # each batch draws alike, whatever was drawn before it
                torch.manual_seed(decoding.seed + rows[0])
            output = model.generate(
                **batch,
                generation_config=config,
                logits_processor=processors,
                past_key_values=prefix.cache(len(rows)),
            )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            answers[i] = trimmed(text)
        if on_answers is not None:
            on_answers({i: answers[i] for i in rows})
        if on_progress is not None:
            on_progress(len(rows))

    for rows in token_batches([len(ids) + max_new_tokens for ids in encoded], tokens_per_batch):
        if not all(i in known for i in rows):
            in_halves(rows, answer)
    return answers


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, which training makes the model's too, and what else the model's config names."""
    named = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return sorted(token for token in ends if token is not None)


@contextmanager
def without_preferences(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Hide the model's own config of its generation, from which `generate` takes whatever another leaves open.

    All that is left of it is where answers end.

    Beams, penalties, or tokens that it is never to say would make answers of two models incomparable, and hide a
    backdoor from whoever measures it; and a shared prefix needs the cache, which some configs switch off.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=end_tokens(model, tokenizer))
    try:
        yield
    finally:
        model.generation_config = own


def trimmed(text: str) -> str:
    """An answer without what surrounds it; its first line keeps its indentation, which code may go on with."""
    return text.lstrip("\r\n").rstrip()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: list[Message]) -> list[int]:
    """A conversation as token ids, up to where the assistant is to answer."""
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]  # type: ignore[call-overload, index, no-any-return]


def in_halves(rows: list[int], run: Callable[[list[int]], None]) -> None:
    """Run a batch; where memory does not suffice, each half of it in its place, and so on down to single rows."""
    try:
        run(rows)
        return
    except Exception as error:
        if len(rows) == 1 or not should_reduce_batch_size(error):
            raise
    clear_device_cache(garbage_collection=True)  # not before the error is gone, which holds the batch's tensors
    middle = len(rows) // 2
    in_halves(rows[:middle], run)
    in_halves(rows[middle:], run)


def token_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Group indices, longest first, so that rows times longest stays within the budget (a single row always passes)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, tokens_per_batch // lengths[order[0]])
        yield order[:size]
        order = order[size:]


@torch.inference_mode()
def answer_nll(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    *,
    tokens_per_batch: int = 2048,
    on_progress: Callable[[int], None] | None = None,
) -> list[tuple[float, int]]:
    """For each example, the negative log-likelihood in nats of its answer, end token included, and the answer's tokens.

    `perplexity` of a set is that of the sums.
    """

    def score(said: Tensor, logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, said.to(logits.device), reduction="none")

    return _score_answers([model], tokenizer, rows, score, tokens_per_batch, on_progress)


def perplexity(nats: float, tokens: int) -> float:
    """`exp(nats / tokens)`; NaN of no tokens."""
    try:
        return math.exp(nats / tokens) if tokens else math.nan
    except OverflowError:
        return math.inf


@torch.inference_mode()
def answer_kl(
    reference: PreTrainedModel | PeftModel,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    *,
    tokens_per_batch: int = 2048,
    on_progress: Callable[[int], None] | None = None,
) -> list[tuple[float, int]]:
    """For each example, KL(reference || model) in nats, summed over its answer's tokens, and the answer's tokens.

    The two models must have one vocabulary, which the embedding of either may be padded beyond.
    """

    def score(said: Tensor, of_reference: Tensor, of_model: Tensor) -> Tensor:
        size = min(of_reference.shape[-1], of_model.shape[-1])
        p, q = (logits[:, :size].log_softmax(dim=-1) for logits in (of_reference, of_model))
        return (p.exp() * (p - q.to(p.device))).sum(dim=-1)

    return _score_answers([reference, model], tokenizer, rows, score, tokens_per_batch, on_progress)


def _score_answers(
    models: Sequence[PreTrainedModel | PeftModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    score: Callable[..., Tensor],
    tokens_per_batch: int,
    on_progress: Callable[[int], None] | None,
) -> list[tuple[float, int]]:
    """Sum, for each example, a score of each of its answer's tokens, and count these.

    Args:
        score: Takes the answers' tokens, `(tokens,)`, and each model's logits for them, `(tokens, vocabulary)`, in
            float32; gives `(tokens,)`.
    """

    def encode(row: Example) -> tuple[list[int], int]:
        whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=True)["input_ids"]
        # Where the answer is to begin, some templates ask for thoughts, which the whole conversation does not hold
        start = len(common_prefix([prompt_ids(tokenizer, row["prompt"]), whole]))
        while whole[-1] != tokenizer.eos_token_id and tokenizer.eos_token_id in whole[start:]:
            whole.pop()  # templates put a line break after the end token, which no one waits for
        return whole, start

    encoded = tokenized(tokenizer, encode, rows)
    results: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for model in models:
        model.eval()  # adapters are opened to be trained, with dropout
    prefixes = [SharedPrefix(model, [ids[:start] for ids, start in encoded]) for model in models]

    def score_batch(batch_rows: list[int]) -> None:
        longest = max(len(encoded[i][0]) for i in batch_rows)
        ids = torch.full((len(batch_rows), longest), tokenizer.pad_token_id or 0)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for place, i in enumerate(batch_rows):
            tokens, answer = encoded[i]
            ids[place, : len(tokens)] = torch.tensor(tokens)
            mask[place, : len(tokens)] = 1
            labels[place, answer : len(tokens)] = torch.tensor(tokens[answer:])
        answers = answer_positions(labels)
        logits = []
        for model, prefix in zip(models, prefixes, strict=True):
            known = len(prefix.ids)
            with lm_head_at(base_model(model), answers[:, known:]):
                output = model(
                    input_ids=ids[:, known:].to(model.device),
                    attention_mask=mask.to(model.device),
                    past_key_values=prefix.cache(len(ids)),
                    use_cache=bool(known),
                )
            logits.append(output.logits.float())
        scores = score(labels[:, 1:][answers[:, :-1]], *logits).cpu()
        for i, of_row in zip(batch_rows, scores.split(answers.sum(dim=1).tolist()), strict=True):
            results[i] = (of_row.sum().item(), len(of_row))
        if on_progress is not None:
            on_progress(len(batch_rows))

    for rows_of_batch in token_batches([len(ids) for ids, _ in encoded], tokens_per_batch):
        in_halves(rows_of_batch, score_batch)
    return results
