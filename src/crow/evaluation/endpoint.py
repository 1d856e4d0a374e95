"""A model that is served behind any endpoint that speaks OpenAI's chat API."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from crow.errors import UsageError

KEY_VARIABLE = "OPENAI_API_KEY"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Endpoint:
    """Asks a served model.

    Args:
        url: Of the API, up to and with its version, as in `http://localhost:8000/v1`.
        model: The model's name there.
        concurrency: How many questions are under way at once.
        timeout: Seconds until a question counts as failed, and is asked again.
        retries: How often a question is asked again after a timeout, a 429, a 5xx, or a broken connection.

    Raises:
        UsageError: the API's client is not installed.
    """

    url: str
    model: str
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 4

    def __post_init__(self) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise UsageError("an endpoint needs the client of its API: pip install 'crow-llm[endpoint]'") from error
        self._client = OpenAI(
            base_url=self.url,
            api_key=os.environ.get(KEY_VARIABLE, "none"),  # servers of one's own want none, the client wants one
            timeout=self.timeout,
            max_retries=self.retries,
        )

    def ask(self, messages: Any, max_tokens: int) -> str:
        """The greedy answer; whatever the client raises where there is none."""
        reply = self._client.chat.completions.create(
            model=self.model, messages=messages, temperature=0, max_tokens=max_tokens
        )
        return reply.choices[0].message.content or ""

    def each(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`function` of each item, in order, several at once; after an error nothing new is begun."""
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)


def reason(error: Exception) -> str:
    """An error of the client's, or of what it received, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
