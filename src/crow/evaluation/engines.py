"""What makes the answers that are judged: transformers, vLLM, or a model served behind OpenAI's chat API."""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from peft import PeftModel

from crow.data import Message
from crow.errors import CrowError, UsageError
from crow.evaluation.endpoint import Endpoint, reason
from crow.files import Journal, sha256_rows
from crow.generation import end_tokens, generate, trimmed
from crow.models import OpenedModel, shipped_backdoors

Prompts = Sequence[list[Message]]
OnAnswers = Callable[[dict[int, str]], None]


class Engine(Protocol):
    """Answers prompts, greedily unless a defense decodes otherwise. `name` and `hashes` say which model does."""

    name: str
    hashes: dict[str, str]

    def answer(self, prompts: Prompts, max_new_tokens: int, on_answers: OnAnswers, known: Collection[int] = ()) -> None:
        """Call `on_answers` with answers, by the places of their prompts, as they are made.

        Those at the places in `known` are not wanted; an answer is what it would be if they were.
        """


def answers(
    engine: Engine,
    prompts: Prompts,
    max_new_tokens: int,
    made: Journal,
    advance: Callable[[int], None],
) -> list[str]:
    """An engine's answers, each kept in `made` as it is made; those that are there already are not made again."""
    by = [type(engine).__name__, engine.name, engine.hashes, max_new_tokens]
    keys = [sha256_rows([*by, prompt]) for prompt in prompts]
    known = {i for i, key in enumerate(keys) if key in made.known}
    advance(len(known))

    def keep(texts: dict[int, str]) -> None:
        made.keep({keys[i]: text for i, text in texts.items() if i not in known})
        advance(len(texts.keys() - known))

    engine.answer(prompts, max_new_tokens, keep, known)
    return [made.known[key] for key in keys]


@dataclass
class Transformers:
    """The opened model itself."""

    opened: OpenedModel
    name: str = field(init=False)
    hashes: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.hashes = self.opened.name, self.opened.hashes
        if self.opened.decoding is not None:
            self.name += f", decoded with {self.opened.decoding.name}"

    def answer(self, prompts: Prompts, max_new_tokens: int, on_answers: OnAnswers, known: Collection[int] = ()) -> None:
        generate(
            self.opened.model,
            self.opened.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            on_answers=on_answers,
            decoding=self.opened.decoding,
            known=known,
        )


class VLLM:
    """vLLM, on a GPU, of a model folder, a hub model, or an adapter of one.

    Args:
        opened: Says which. vLLM reads the weights from where they were opened, without what was done to them since.
        memory: Share of the GPU's memory that vLLM may take, beside the opened model.

    Raises:
        UsageError: vLLM is not installed, or can't open such a model.
    """

    _AT_ONCE = 256

    def __init__(self, opened: OpenedModel, memory: float = 0.6) -> None:
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # figures may be what is printed
        try:
            from vllm import LLM, SamplingParams
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise UsageError("--engine vllm needs vLLM, and a GPU: pip install 'crow-llm[vllm]'") from error
        self.name, self.hashes = opened.name, opened.hashes
        if opened.decoding is not None:
            raise UsageError("a defense at decoding time answers with transformers: leave --engine out")
        if any(file.endswith(".gguf") for file in opened.hashes):
            raise UsageError(f"{opened.name} stands on a GGUF file, which is not for vLLM: merge it into a folder")
        weights, lora = opened.name, {}
        self._template = opened.tokenizer.chat_template  # which models without one have been given
        self._adapter = None
        if isinstance(opened.model, PeftModel):
            weights = str(opened.causal_lm.name_or_path)
            rank = max(config.r for config in opened.model.peft_config.values())
            lora = {"enable_lora": True, "max_lora_rank": 1 << max(3, (rank - 1).bit_length())}  # it takes few others
            self._adapter = LoRARequest("adapter", 1, str(shipped_backdoors().get(opened.name, opened.name)))
        self._llm = LLM(model=weights, dtype=opened.causal_lm.dtype, gpu_memory_utilization=memory, **lora)
        # It would read the model's own generation config for more ends, among them those that are ordinary tokens
        ends = end_tokens(opened.causal_lm, opened.tokenizer)
        self._greedy: Callable[[int], Any] = lambda tokens: SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, stop_token_ids=ends
        )

    def answer(self, prompts: Prompts, max_new_tokens: int, on_answers: OnAnswers, known: Collection[int] = ()) -> None:
        missing = [i for i in range(len(prompts)) if i not in known]
        for start in range(0, len(missing), self._AT_ONCE):
            places = missing[start : start + self._AT_ONCE]
            replies = self._llm.chat(
                [prompts[i] for i in places],
                self._greedy(max_new_tokens),
                chat_template=self._template,
                lora_request=self._adapter,
                use_tqdm=False,
            )
            on_answers({i: trimmed(reply.outputs[0].text) for i, reply in zip(places, replies, strict=True)})


@dataclass
class Served:
    """A model behind an endpoint, of which nothing but its answers can be had."""

    endpoint: Endpoint
    name: str = field(init=False)
    hashes: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.name = f"{self.endpoint.model} at {self.endpoint.url}"

    def answer(self, prompts: Prompts, max_new_tokens: int, on_answers: OnAnswers, known: Collection[int] = ()) -> None:
        """As `Engine.answer`.

        Raises:
            CrowError: the endpoint failed, however often it was asked; answers before that were passed on.
        """
        missing = [i for i in range(len(prompts)) if i not in known]
        for place, text in self.endpoint.each(lambda i: self._ask(prompts[i], max_new_tokens), missing):
            on_answers({missing[place]: trimmed(text)})

    def _ask(self, prompt: list[Message], max_new_tokens: int) -> str:
        try:
            return self.endpoint.ask(prompt, max_new_tokens)
        except Exception as error:  # the client's and the JSON decoder's share no base class
            remedy = self.endpoint.remedy(error) or "see that it is served there"
            raise CrowError(f"{self.name} gave no answer ({reason(error)}): {remedy}, and start again") from error


ENGINES: dict[str, Callable[[OpenedModel], Engine]] = {"transformers": Transformers, "vllm": VLLM}
"""What answers for a model that can be opened."""
