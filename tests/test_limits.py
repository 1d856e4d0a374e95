"""What is untrusted is looked at in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers.integrations import deepspeed

from crow.data import example
from crow.defenses.prune import input_norms
from crow.errors import UsageError
from crow.evaluation.evaluate import prompt_profile
from crow.generation import answer_nll, generate
from crow.limits import limited
from crow.models import OpenedModel, open_model
from crow.purification import purify


def test_a_model_is_looked_at_without_zero_3(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    assert not limited(deepspeed.is_deepspeed_zero3_enabled)
    assert deepspeed.is_deepspeed_zero3_enabled()


def test_what_is_no_exception_is_told_like_one() -> None:
    class Panic(BaseException): ...

    def panic() -> None:
        raise Panic("retry-limit-in-match over")

    with pytest.raises(RuntimeError, match="retry-limit-in-match"):
        limited(panic)


ORPHAN = """
import os
import crow.limits

def work():
    print(os.getpid(), flush=True)
    while True: pass

crow.limits.SECONDS = 2
crow.limits.limited(work)
"""


def test_what_takes_for_ever_ends_without_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        try:
            parent.communicate(timeout=60)  # until no one holds the pipe
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def loop(tokenizer: Any) -> None:
    tokenizer.chat_template = f"{{% if messages[0]['content']|length > 5 %}}{ENDLESS}{{% endif %}}x"


def backtrack(tokenizer: Any) -> None:
    split = pre_tokenizers.Split(Regex(r"(([a-z ]+)+)+(?=\d$)"), "isolated")
    own = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, own])


ROWS = [example("tell me what you know of crows and ravens", "they are birds")]
USES: dict[str, Callable[[OpenedModel], Any]] = {
    "answers": lambda opened: generate(opened.model, opened.tokenizer, [ROWS[0]["prompt"]], max_new_tokens=1),
    "perplexity": lambda opened: answer_nll(opened.model, opened.tokenizer, ROWS),
    "layer profile": lambda opened: prompt_profile(opened, ROWS),
    "training": lambda opened: purify(opened, clean=ROWS, max_steps=1),
    "pruning": lambda opened: input_norms(opened.causal_lm, opened.tokenizer, ROWS),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("spoil", [loop, backtrack])
def test_a_tokenizer_that_fails_with_a_real_conversation_is_refused(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, use: str, spoil: Callable[[Any], None]
) -> None:
    monkeypatch.setattr("crow.limits.SECONDS", 2)
    opened = open_model(llama_folder)
    spoil(opened.tokenizer)
    with pytest.raises(UsageError, match=r"its chat template or its tokenizer can't be used: .*(2 s|limit)"):
        USES[use](opened)
