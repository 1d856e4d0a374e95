"""Benchmarks of lm-eval, the harness that most published tables of language models come from."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crow.errors import CrowError, UsageError
from crow.models import OpenedModel


def harness(
    opened: OpenedModel,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval (Gao et al., "A framework for few-shot language model evaluation").

    Args:
        tasks: Their names, as `lm-eval ls tasks` lists them, or of tasks that the folder defines.
        folder: Where further tasks are defined, one a YAML file.
        limit: Use the first so many examples of each.

    Returns:
        By task its metrics, for each a standard error under its name with `_stderr`, and the number of examples as `n`.
        Where a task filters answers in ways of its own, the filter's name stands before the metric's.

    Raises:
        UsageError: lm-eval is not installed, or it knows no such task.
        CrowError: a task failed, as where its data can't be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError("--harness needs lm-eval: pip install 'crow-llm[harness]'") from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UsageError(f"lm-eval knows no task {', '.join(unknown)}: `lm-eval ls tasks` lists those that it does")
    opened.model.eval()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = simple_evaluate(
                HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except Exception as error:  # of the hub, of a task's own code, of its data
        raise CrowError(
            f"lm-eval failed at {', '.join(tasks)}: {type(error).__name__}: {error}".splitlines()[0]
        ) from error
    return {task: _metrics(values, found["n-samples"].get(task)) for task, values in found["results"].items()}


def _metrics(values: dict[str, Any], number: dict[str, int] | None) -> dict[str, float]:
    metrics = {}
    for key, value in values.items():
        name, _, of = key.partition(",")
        if of and isinstance(value, int | float):
            metrics[name if of == "none" else f"{of} {name}"] = float(value)
    return metrics | ({} if number is None else {"n": float(number["effective"])})
