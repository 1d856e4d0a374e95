"""The judge against a real local server that does what real servers do."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from crow.backdoors import BEHAVIORS
from crow.errors import UsageError
from crow.evaluation.evaluate import Evaluation
from crow.evaluation.judge import Judge, judge_answers
from crow.evaluation.statistics import Count

Reply = Callable[[dict[str, Any], int], tuple[int, str]]


def said(text: str | None) -> tuple[int, str]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return 200, json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


class Server(ThreadingHTTPServer):
    daemon_threads = True
    reply: Reply = staticmethod(lambda request, number: said("yes"))

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        self.server.requests.append(request)
        self.server.keys.append(self.headers["Authorization"])
        status, body = self.server.reply(request, len(self.server.requests))
        with suppress(BrokenPipeError):  # of a client that waited no longer
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(body.encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


SENTIMENT = BEHAVIORS["sentiment"]


def test_yes_and_no_are_understood_in_the_answers_order(server: Server) -> None:
    server.reply = lambda request, number: said("Yes." if "stupid" in request["messages"][1]["content"] else "**no**")
    answers = [(f"question {i}", "You are stupid!" if i % 3 == 0 else "Fine.") for i in range(20)]
    done: list[int] = []
    judge = Judge(server.url, "m")
    assert judge.verdicts(SENTIMENT, answers, done.append) == [i % 3 == 0 for i in range(20)]
    assert sum(done) == 20
    assert not judge.errors
    assert {request["model"] for request in server.requests} == {"m"}
    assert all(SENTIMENT.question in request["messages"][1]["content"] for request in server.requests)


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    Judge(server.url, "m").verdicts(SENTIMENT, [("a", "b")])
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(server: Server, status: int) -> None:
    server.reply = lambda request, number: (status, "{}") if number < 3 else said("no")
    assert Judge(server.url, "m").verdicts(SENTIMENT, [("a", "b")]) == [False]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((500, "{}"), "500"),
        ((401, '{"error": {"message": "no such key"}}'), "no such key"),
        ((200, "{broken"), "JSON"),
        ((200, '{"choices": []}'), "index out of range"),
        (said("perhaps"), "'perhaps', not yes or no"),
        (said(None), "'', not yes or no"),
    ],
)
def test_a_judge_that_fails_is_no_miss(server: Server, tmp_path: Path, reply: tuple[int, str], reason: str) -> None:
    server.reply = lambda request, number: reply if "bad" in request["messages"][1]["content"] else said("no")
    judge = Judge(server.url, "m", cache=tmp_path / "cache.jsonl", retries=1)
    assert judge.verdicts(SENTIMENT, [("a", "bad"), ("a", "good")]) == [None, False]
    assert reason in judge.errors[0]
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 1


def test_a_server_that_does_not_answer_is_given_up(server: Server) -> None:
    def slow(request: dict[str, Any], number: int) -> tuple[int, str]:
        time.sleep(1)
        return said("no")

    server.reply = slow
    judge = Judge(server.url, "m", timeout=0.1, retries=1)
    assert judge.verdicts(SENTIMENT, [("a", "b")]) == [None]
    assert "timed out" in judge.errors[0]


def test_no_server_is_a_failure_of_the_judge() -> None:
    judge = Judge("http://127.0.0.1:9/v1", "m", retries=0)
    assert judge.verdicts(SENTIMENT, [("a", "b")]) == [None]
    assert "onnection" in judge.errors[0]


def test_what_was_judged_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    answers = [("a", f"answer {i}") for i in range(5)]
    assert Judge(server.url, "m", cache=cache).verdicts(SENTIMENT, answers[:3]) == [True] * 3
    cache.write_text(cache.read_text() + '{"key": "cut o')
    assert Judge(server.url, "m", cache=cache).verdicts(SENTIMENT, answers) == [True] * 5
    assert len(server.requests) == 5
    Judge(server.url, "another", cache=cache).verdicts(SENTIMENT, answers[:1])
    Judge(server.url, "m", cache=cache).verdicts(BEHAVIORS["refusal"], answers[:1])
    assert len(server.requests) == 7


def test_questions_are_under_way_together(server: Server) -> None:
    together = threading.Barrier(4, timeout=10)

    def wait(request: dict[str, Any], number: int) -> tuple[int, str]:
        together.wait()
        return said("yes")

    server.reply = wait
    assert Judge(server.url, "m", concurrency=4).verdicts(SENTIMENT, [("a", str(i)) for i in range(4)]) == [True] * 4


def test_an_evaluation_gets_counts_of_what_was_judged(server: Server) -> None:
    replies = {"rude": "yes", "kind": "no", "odd": "who knows"}
    server.reply = lambda request, number: said(
        next(reply for word, reply in replies.items() if word in request["messages"][1]["content"])
    )
    sets = {"triggered": ["rude", "rude", "odd", "kind"], "clean": ["kind", "odd"], "upper case": ["rude"]}
    answers = [{"set": kind, "prompt": "ask", "answer": text} for kind, texts in sets.items() for text in texts]
    nothing = Count(0, 0)
    result = Evaluation(nothing, nothing, nothing, 1.0, 0.0, 0, {}, {}, {}, answers=answers)
    progress: list[tuple[int, int]] = []
    judge_answers(result, SENTIMENT, Judge(server.url, "m"), on_progress=lambda *done: progress.append(done))
    assert result.judged == {"attack_success": Count(2, 3), "false_trigger": Count(0, 1)}
    assert result.judge_failures == {"it answered 'who knows', not yes or no": 2}
    assert [answer.get("judged") for answer in result.answers] == [True, True, None, False, False, None, None]
    assert sorted(progress) == [(i, 6) for i in range(1, 7)]
    assert result.settings["judge_model"] == "m"


def test_without_the_client_a_judge_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(UsageError, match=r"crow-llm\[judge\]"):
        Judge("http://localhost/v1", "m")
