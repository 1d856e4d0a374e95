"""Benchmarks of lm-eval, the harness that most published tables of language models come from."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crow.errors import CrowError, UsageError
from crow.files import Journal, sha256_file, sha256_rows
from crow.generation import without_preferences
from crow.models import OpenedModel, base_model


class Harness:
    """Tasks of lm-eval (Gao et al., "A framework for few-shot language model evaluation").

    Args:
        tasks: Their names, as `lm-eval ls tasks` lists them, or of tasks and groups that the folder defines.
        folder: Where further tasks are defined, one a YAML file.
        limit: Use the first so many examples of each.

    Raises:
        UsageError: lm-eval is not installed, there is no such folder, or lm-eval knows no such task.
    """

    def __init__(self, tasks: Sequence[str], *, folder: Path | None = None, limit: int | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UsageError("--harness needs lm-eval: pip install 'crow-llm[harness]'") from error
        if folder is not None and not folder.is_dir():
            raise UsageError(f"{folder} is no folder with tasks")
        self.tasks, self.limit = [task.strip() for task in tasks], limit
        self._definitions = [] if folder is None else sorted(map(sha256_file, folder.rglob("*.yaml")))
        self._manager = TaskManager(include_path=None if folder is None else str(folder))
        if unknown := [task for task in self.tasks if task not in self._manager.all_tasks]:
            raise UsageError(f"lm-eval knows no task {', '.join(unknown)}: `lm-eval ls tasks` lists those that it does")

    def run(
        self, opened: OpenedModel, *, batch_size: int = 8, seed: int = 0, unfinished: Path | None = None
    ) -> dict[str, dict[str, float]]:
        """The results by task, and by group where a group sums its tasks up.

        Args:
            unfinished: As for `crow.evaluation.evaluate.evaluate`: these results are kept there too.

        Returns:
            Each one's metrics, their standard errors, where there are any, under the same names with `_stderr`, and the
            number of examples as `n`. Where a task filters answers in ways of its own, the filter's name stands before
            the metric's.

        Raises:
            CrowError: a task failed, as where its data can't be had.
        """
        made = Journal(unfinished)
        key = sha256_rows(["lm-eval", opened.name, opened.hashes, self.tasks, self._definitions, self.limit, seed])
        if key not in made.known:
            made.keep({key: self._run(opened, batch_size, seed)})
        return made.known[key]  # type: ignore[no-any-return]

    def _run(self, opened: OpenedModel, batch_size: int, seed: int) -> dict[str, dict[str, float]]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        opened.model.eval()
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                without_preferences(base_model(opened.model), opened.tokenizer),
            ):
                found = simple_evaluate(
                    HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size),
                    tasks=list(self.tasks),
                    task_manager=self._manager,
                    limit=self.limit,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
        except Exception as error:  # of the hub, of a task's own code, of its data
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CrowError(f"lm-eval failed at {', '.join(self.tasks)}: {reason}") from error
        return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    metrics = {}
    for key, value in values.items():
        name, _, of = key.partition(",")
        if of and isinstance(value, int | float):  # not so for an error that can't be told, which is "N/A"
            metrics[name if of == "none" else f"{of} {name}"] = float(value)
    return metrics | ({"n": float(values["sample_len"])} if "sample_len" in values else {})
