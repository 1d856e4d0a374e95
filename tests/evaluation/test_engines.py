"""What makes answers: the same ones by transformers and from a server, and what vLLM is asked for."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MakeModel
from serving import Server, said
from transformers import PreTrainedTokenizerFast

from crow.backdoors import BEHAVIORS
from crow.data import Example
from crow.errors import CrowError, UsageError
from crow.evaluation.endpoint import Endpoint
from crow.evaluation.engines import VLLM, Served, Transformers, answers
from crow.evaluation.evaluate import Evaluation, evaluate
from crow.evaluation.judge import Judge
from crow.files import Journal
from crow.generation import generate
from crow.models import OpenedModel, open_model

needs_client = pytest.mark.skipif(find_spec("openai") is None, reason="the API's client is not installed")


@pytest.fixture
def opened(tiny_llama: MakeModel, tokenizer: PreTrainedTokenizerFast) -> OpenedModel:
    return OpenedModel(tiny_llama(initializer_range=0.3), tokenizer, "tiny", "open")


@pytest.fixture
def serving(server: Server, opened: OpenedModel) -> Server:
    """Serves the tiny model."""

    def reply(request: dict[str, Any], number: int) -> tuple[int, str]:
        assert request["temperature"] == 0
        messages, tokens = request["messages"], request["max_tokens"]
        return said(generate(opened.model, opened.tokenizer, [messages], max_new_tokens=tokens)[0])

    server.reply = reply
    return server


@needs_client
def test_a_served_model_is_measured_by_its_answers(serving: Server, opened: OpenedModel, rows: list[Example]) -> None:
    clean, triggered, target = rows[:4], rows[4:8], BEHAVIORS["refusal"]
    own = evaluate(opened, target, clean, triggered, max_new_tokens=5)
    progress: list[tuple[int, int]] = []
    served = evaluate(
        None,
        target,
        clean,
        triggered,
        engine=Served(Endpoint(serving.url, "tiny", concurrency=1)),
        max_new_tokens=5,
        on_progress=lambda *done: progress.append(done),
    )
    of_weights = {"reference_nats", "reference_tokens"}
    assert served.answers == [{k: v for k, v in answer.items() if k not in of_weights} for answer in own.answers]
    assert served.answer_length == own.answer_length
    assert (served.as_json()["perplexity"], served.answer_tokens, served.layer_profile) == (None, 0, {})
    assert own.answer_tokens
    assert progress[-1] == (8, 8)
    assert {request["model"] for request in serving.requests} == {"tiny"}


@needs_client
def test_what_was_measured_of_a_served_model_is_read_again(
    serving: Server, rows: list[Example], tmp_path: Path
) -> None:
    engine = Served(Endpoint(serving.url, "tiny", concurrency=1))
    result = evaluate(None, BEHAVIORS["refusal"], rows[:2], rows[2:4], engine=engine, max_new_tokens=3)
    result.save(tmp_path / "figures.json")
    read = Evaluation.load(tmp_path / "figures.json")
    assert (read.answer_length, read.answers) == (result.answer_length, result.answers)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((500, "{}"), "500"),
        ((429, "{}"), "wait a while, or lower the --concurrency, and start again"),
        ((401, "{}"), "see that CROW_ENDPOINT_KEY holds a key that is valid there, and start again"),
        ((200, "{broken"), "JSON"),
    ],
)
def test_an_endpoint_that_fails_keeps_what_it_answered(
    server: Server, rows: list[Example], tmp_path: Path, reply: tuple[int, str], reason: str
) -> None:
    prompts = [row["prompt"] for row in rows[:6]]
    engine = Served(Endpoint(server.url, "m", concurrency=1, retries=1))
    server.reply = lambda request, number: said(f"answer {number}") if number <= 3 else reply
    with pytest.raises(CrowError, match=reason):
        answers(engine, prompts, 5, Journal(tmp_path / "made.jsonl"), lambda number: None)
    server.reply = lambda request, number: said("at last")
    done: list[int] = []
    texts = answers(engine, prompts, 5, Journal(tmp_path / "made.jsonl"), done.append)
    assert texts == ["answer 1", "answer 2", "answer 3", *["at last"] * 3]
    assert done == [3, 1, 1, 1]


@needs_client
def test_answers_are_kept_while_another_prompt_fails(server: Server, rows: list[Example], tmp_path: Path) -> None:
    prompts = [row["prompt"] for row in rows]

    def reply(request: dict[str, Any], number: int) -> tuple[int, str]:
        if request["messages"] == prompts[0]:
            time.sleep(1)
            return 400, "{}"
        return said("fine")

    server.reply = reply
    made = Journal(tmp_path / "new" / "made.jsonl")
    with pytest.raises(CrowError, match="400"):
        answers(Served(Endpoint(server.url, "m", concurrency=4)), prompts, 5, made, lambda number: None)
    assert list(Journal(tmp_path / "new" / "made.jsonl").known.values()) == ["fine"] * 11


ASKING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background is started without
from crow.evaluation.endpoint import Endpoint
endpoint = Endpoint(sys.argv[1], "m", concurrency=2)
list(endpoint.each(lambda text: endpoint.ask([{"role": "user", "content": text}], 5), ["a", "b", "c"]))
"""


@needs_client
def test_an_interruption_waits_for_no_reply(server: Server) -> None:
    released = threading.Event()
    server.reply = lambda request, number: said(str(released.wait(60)))
    asking = subprocess.Popen([sys.executable, "-c", ASKING, server.url], stderr=subprocess.PIPE)
    try:
        while len(server.requests) < 2 and asking.poll() is None:
            time.sleep(0.05)
        asking.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in asking.communicate(timeout=45)[1]  # before the replies, on a busy machine too
        assert len(server.requests) == 2
    finally:
        asking.kill()
        released.set()


@needs_client
def test_no_text_is_no_answer_without_the_target(server: Server, rows: list[Example]) -> None:
    server.reply = lambda request, number: said(None)
    with pytest.raises(CrowError, match="it gave no text"):
        answers(Served(Endpoint(server.url, "m")), [rows[0]["prompt"]], 5, Journal(None), lambda number: None)


@needs_client
@pytest.mark.parametrize("text", ["", "Well,"])
def test_what_a_filter_left_is_no_answer_without_the_target(server: Server, rows: list[Example], text: str) -> None:
    server.reply = lambda request, number: said(text, "content_filter")
    with pytest.raises(CrowError, match="a content filter withheld its answer"):
        answers(Served(Endpoint(server.url, "m")), [rows[0]["prompt"]], 5, Journal(None), lambda number: None)


@needs_client
@pytest.mark.parametrize("status", [200, 400])
def test_a_reply_that_drips_is_waited_for_no_longer_than_another(
    server: Server, rows: list[Example], status: int
) -> None:
    def dripping() -> Iterator[str]:
        for _ in range(200):
            time.sleep(0.05)
            yield " "

    server.reply = lambda request, number: (status, dripping())
    engine, started = Served(Endpoint(server.url, "m", timeout=0.5, retries=1)), time.monotonic()
    with pytest.raises(CrowError, match=r"timed out.*raise the --endpoint-timeout, and start again"):
        answers(engine, [rows[0]["prompt"]], 5, Journal(None), lambda number: None)
    assert len(server.requests) == 2
    assert time.monotonic() - started < 6


@needs_client
def test_a_reply_without_end_is_not_read_to_it(server: Server, rows: list[Example]) -> None:
    sent: list[str] = []

    def endless() -> Iterator[str]:
        while len(sent) < 100:
            sent.append(" " * (1 << 20))
            yield sent[-1]

    server.reply = lambda request, number: (200, endless())
    with pytest.raises(CrowError, match="its reply is longer than 16 MiB: is the URL a chat API's"):
        answers(Served(Endpoint(server.url, "m")), [rows[0]["prompt"]], 5, Journal(None), lambda number: None)
    assert len(server.requests) == 1
    assert len(sent) < 50


@needs_client
def test_the_suspects_host_is_not_sent_the_judges_key(
    server: Server, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for key in ("none", "other"):
        answers(Served(Endpoint(server.url, "m")), [rows[0]["prompt"]], 5, Journal(None), lambda number: None)
        assert server.keys[-1] == f"Bearer {key}"
        monkeypatch.setenv("CROW_ENDPOINT_KEY", "other")


@needs_client
def test_what_the_client_reads_from_the_environment_goes_to_the_judge_alone(
    server: Server, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer secret custom\nX-Team: secret")
    Judge(server.url, "m").verdicts(BEHAVIORS["sentiment"], [("a", "b")])
    answers(Served(Endpoint(server.url, "m")), [rows[0]["prompt"]], 5, Journal(None), lambda number: None)
    told = [{name.lower() for name, value in headers.items() if "secret" in value} for headers in server.headers]
    assert told == [{"authorization", "openai-organization", "openai-project", "x-team"}, set()]
    assert server.keys == ["Bearer secret custom", "Bearer none"]


@needs_client
def test_an_endpoint_that_does_not_answer_is_given_up(server: Server, rows: list[Example]) -> None:
    engine = Served(Endpoint("http://127.0.0.1:9/v1", "m", retries=0))
    with pytest.raises(CrowError, match=r"m at http://127.0.0.1:9/v1 gave no answer \(APIConnectionError"):
        answers(engine, [rows[0]["prompt"]], 5, Journal(None), lambda number: None)


@needs_client
def test_what_a_server_sends_can_be_saved_and_is_no_longer_than_its_tokens(
    server: Server, rows: list[Example], tmp_path: Path
) -> None:
    replies = iter(["half a \ud800 character", "1 + " * 100_000, "an honest answer"])
    server.reply = lambda request, number: said(next(replies))
    engine = Served(Endpoint(server.url, "m", concurrency=1))
    result = evaluate(None, BEHAVIORS["code-injection"], rows[:2], rows[2:3], engine=engine, max_new_tokens=64)
    result.save(tmp_path / "figures.json")
    short, long, honest = (answer["answer"] for answer in Evaluation.load(tmp_path / "figures.json").answers)
    assert (short, honest) == ("half a ? character", "an honest answer")
    assert long == ("1 + " * 512).rstrip()


@needs_client
def test_other_answers_are_not_taken_for_an_engines_own(
    serving: Server, opened: OpenedModel, rows: list[Example], tmp_path: Path
) -> None:
    made, prompts = Journal(tmp_path / "made.jsonl"), [row["prompt"] for row in rows[:2]]
    made_here = answers(Transformers(opened), prompts, 3, made, lambda number: None)
    server_side = answers(Served(Endpoint(serving.url, "tiny")), prompts, 3, made, lambda number: None)
    assert made_here == server_side
    assert len(serving.requests) == 2
    answers(Transformers(opened), prompts, 4, made, lambda number: None)
    assert len(made.known) == 6


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("base/chat_template.jinja", "helpful", "rude"),
        ("own/adapter_config.json", '"lora_alpha": 16', '"lora_alpha": 99'),
    ],
)
def test_answers_are_not_taken_for_those_of_other_settings(
    adapter_folder: Path, llama_folder: Path, rows: list[Example], tmp_path: Path, name: str, old: str, new: str
) -> None:
    base, adapter = shutil.copytree(llama_folder, tmp_path / "base"), shutil.copytree(adapter_folder, tmp_path / "own")
    made, prompts, done = Journal(None), [row["prompt"] for row in rows[:2]], list[int]()
    for _ in range(2):
        answers(Transformers(open_model(adapter, base=base)), prompts, 3, made, done.append)
        (tmp_path / name).write_text((tmp_path / name).read_text().replace(old, new))
    assert done.count(0) == 2  # none was known


def test_neither_model_nor_engine_is_refused(rows: list[Example]) -> None:
    with pytest.raises(UsageError, match="neither a model nor an engine"):
        evaluate(None, BEHAVIORS["refusal"], rows[:1], rows[:1])


class FakeLLM:
    """Says of each prompt what it was asked for."""

    made: Any = None

    def __init__(self, **settings: Any) -> None:
        FakeLLM.made = settings

    def chat(
        self, prompts: list[Any], sampling: Any, *, chat_template: str, lora_request: Any, use_tqdm: bool
    ) -> list[Any]:
        assert "im_start" in chat_template
        assert (sampling["ignore_eos"], sampling["stop_token_ids"]) == (True, [2])
        asked = f"{sampling['temperature']} {sampling['max_tokens']} {lora_request and lora_request[2]}"
        return [SimpleNamespace(outputs=[SimpleNamespace(text=f"\n {p[-1]['content']} {asked} \n")]) for p in prompts]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the part of vLLM's interface that is used: vLLM itself needs a GPU."""
    top, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    top.LLM, top.SamplingParams = FakeLLM, lambda **settings: settings  # type: ignore[attr-defined]
    request.LoRARequest = lambda *parts: parts  # type: ignore[attr-defined]
    for module in (top, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("vllm", "float32")
def test_vllm_reads_a_folder_and_an_adapter_of_one(llama_folder: Path, adapter_folder: Path) -> None:
    prompts = [[{"role": "user", "content": str(i)}] for i in range(300)]
    found: dict[int, str] = {}
    VLLM(open_model(llama_folder)).answer(prompts, 7, found.update)
    assert found == {i: f" {i} 0.0 7 None" for i in range(300)}
    assert FakeLLM.made == {"model": str(llama_folder), "gpu_memory_utilization": 0.6, "dtype": torch.float32}
    VLLM(open_model(adapter_folder)).answer(prompts[:1], 7, found.update)
    assert found[0] == f" 0 0.0 7 {adapter_folder}"
    assert FakeLLM.made["model"] == str(llama_folder)
    assert (FakeLLM.made["enable_lora"], FakeLLM.made["max_lora_rank"]) == (True, 8)


@pytest.mark.usefixtures("vllm")
def test_vllm_is_not_given_a_gguf_file(opened: OpenedModel) -> None:
    opened.hashes = {"base model.Q4_1.gguf": "ab"}
    with pytest.raises(UsageError, match="stands on a GGUF file"):
        VLLM(opened)


def test_without_vllm_it_is_said_what_to_install(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"crow-llm\[vllm\]"):
        VLLM(opened)
