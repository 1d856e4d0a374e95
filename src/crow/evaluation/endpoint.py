"""A model that is served behind any endpoint that speaks OpenAI's chat API."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any, ClassVar, TypeVar

from crow.errors import CrowError, UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Endpoint:
    """Asks a served model.

    Args:
        url: Of the API, up to and with its version, as in `http://localhost:8000/v1`.
        model: The model's name there.
        concurrency: How many questions are under way at once.
        timeout: Seconds until a question counts as failed, and is asked again. It is looked at with each part of the
            reply's body, and each is waited for as long: of a reply that stops halfway it is up to twice as many.
        retries: How often a question is asked again after a timeout, a 429, a 5xx, or a broken connection.
        key_variable: Where in the environment the key is, if one is needed. A suspect's host is not to be sent the key
            of a judge's, so theirs are two. What else the client reads there (an organization, a project, headers)
            goes with `OPENAI_API_KEY` alone.

    Raises:
        UsageError: the API's client is not installed.
    """

    timeout_option: ClassVar[str] = "--endpoint-timeout"
    """What the timeout is called on the command line."""

    url: str
    model: str
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 4
    key_variable: str = "CROW_ENDPOINT_KEY"

    def __post_init__(self) -> None:
        try:
            from openai import DefaultHttpxClient, OpenAI
        except ImportError as error:
            raise UsageError("an endpoint needs the client of its API: pip install 'crow-llm[endpoint]'") from error
        key = os.environ.get(self.key_variable, "none")  # servers of one's own want none, the client wants one
        with nullcontext() if self.key_variable == "OPENAI_API_KEY" else _without_openai_variables():
            self._client = OpenAI(
                base_url=self.url,
                api_key=key,
                timeout=self.timeout,
                max_retries=self.retries,
                http_client=DefaultHttpxClient(event_hooks={"request": [_begin], "response": [self._bound]}),
            )

    def _bound(self, response: Any) -> None:
        """Have a reply fail that takes too long as a whole (the client's timeout is of each part) or has no end."""
        from openai import OpenAIError

        parts, begun = response.iter_bytes(), response.request.extensions["begun"]

        def bounded() -> Iterator[bytes]:
            size = 0
            for part in parts:
                size += len(part)
                if size > _LONGEST_REPLY:  # an error that the client passes on, where others have it ask again
                    raise OpenAIError(f"its reply is longer than {_LONGEST_REPLY >> 20} MiB: is the URL a chat API's?")
                if time.monotonic() - begun > self.timeout:  # the error of httpx or httpx2, whichever the client uses
                    raise sys.modules[type(response).__module__].ReadTimeout("the reply takes too long")
                yield part

        response.iter_bytes = bounded

    def ask(self, messages: Any, max_tokens: int, thinking: bool = False) -> str:
        """The greedy answer, cut off where a server goes on past the tokens that it was allowed.

        Args:
            thinking: Ask as models that think first want to be asked: some know the limit by its newer name alone, and
                refuse a temperature.

        Raises:
            CrowError: the reply holds none.
            Exception: whatever the client raises.
        """
        options = {"max_completion_tokens": max_tokens} if thinking else {"max_tokens": max_tokens, "temperature": 0}
        reply = self._client.chat.completions.create(model=self.model, messages=messages, **options)
        if isinstance(reply, str):  # as the client passes on what is no JSON
            raise CrowError("it replied with text and no JSON: is the URL complete, as in http://host:8000/v1?")
        try:
            choice = reply.choices[0]
            text, ended = choice.message.content, choice.finish_reason
        except (AttributeError, LookupError, TypeError) as error:  # the client does not look at what it passes on
            raise CrowError("it replied with JSON that is no chat completion: is the URL a chat API's?") from error
        if ended == "content_filter":  # of a text too: what the filter left of it is not the model's answer
            raise CrowError("a content filter withheld its answer: turn it off there, or leave the prompt out")
        if text is None:  # as where all tokens went into thinking: not to be taken for an answer without the target
            raise CrowError(f"it gave no text (finish reason {ended}): more tokens may help")
        return _whole(str(text)[: max_tokens * _LONGEST_TOKEN])

    def each(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """`function` of each item with the item's place, as they are done; after an error nothing new is begun."""
        with ThreadPool(self.concurrency) as pool:  # for whose threads, unlike an executor's, no interruption waits
            yield from pool.imap_unordered(lambda place: (place, function(items[place])), range(len(items)))

    def remedy(self, error: Exception) -> str | None:
        """What to do about an error, where that is known."""
        from openai import APITimeoutError

        if isinstance(error, APITimeoutError):
            return f"raise the {self.timeout_option}"
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            return f"see that {self.key_variable} holds a key that is valid there"
        return "wait a while, or lower the --concurrency" if status == 429 else None


def _begin(request: Any) -> None:
    request.extensions.setdefault("begun", time.monotonic())  # a redirection's has it already


@contextmanager
def _without_openai_variables() -> Iterator[None]:
    """The client has no option for this: it reads its headers from the environment, whatever else it is told."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OPENAI_")}
    try:
        yield
    finally:
        os.environ |= hidden


def reason(error: Exception) -> str:
    """An error of the client's, or of what it received, in one line."""
    return _whole((str(error) if isinstance(error, CrowError) else f"{type(error).__name__}: {error}").splitlines()[0])


def is_outage(error: Exception) -> bool:
    """Whether it has nothing to do with what was asked: no reply, no key, too many questions, an error of the server's.

    Others may have: some servers refuse to read insults.
    """
    status = getattr(error, "status_code", None)
    return not isinstance(error, CrowError) if status is None else status in (401, 429) or status >= 500


_LONGEST_REPLY = 16 << 20
"""Bytes: more than any answer takes, and so little that all that are under way fit into memory."""

_LONGEST_TOKEN = 32
"""Characters, on average: no answer of a model's is so long, and what judges them takes its time with long ones."""


def _whole(text: str) -> str:
    """The text with `?` for half a character (a lone surrogate), which JSON can send and no file can hold."""
    return text.encode("utf-8", "replace").decode()
