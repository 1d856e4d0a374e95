"""The model card: what was done to the weights that lie beside it, by which settings, and with what result."""

import json
import re
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from crow.files import name_elsewhere
from crow.report.html import cautions, verdict
from crow.report.templates import visible

if TYPE_CHECKING:
    from crow.evaluation.evaluate import Evaluation
    from crow.purification import PurifyRecord


def model_card(
    record: "PurifyRecord",
    before: "Evaluation | None" = None,
    after: "Evaluation | None" = None,
    base_model: str | None = None,
    license: str | None = None,
    merged: bool = False,
) -> str:
    """The `README.md` of a purified model, in Markdown with Hugging Face's YAML front matter.

    Args:
        record: Of the purification.
        before: Of the suspect model; figures are given if both evaluations are.
        after: Of the purified one.
        base_model: Hub id of the model that the weights belong to. A folder here has none that a reader could look up,
            and is known by its hashes.
        license: Of that model, as its own card names it.
        merged: The weights are a whole model's, not an adapter's.
    """
    from crow import constancy  # here, since it imports torch

    environment = Environment(
        loader=PackageLoader("crow", "report"),
        finalize=_line,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code_span, "yaml": _yaml, "standing": constancy.verdict}
    return environment.get_template("model_card.md.jinja").render(
        record=record,
        suspect=name_elsewhere(record.model),
        before=before,
        after=after,
        base_model=base_model,
        license=license,
        merged=merged,
        cautions=cautions(before, after, record) if before and after else [],
        verdict=verdict(before.attack_success, after.attack_success) if before and after else None,
    )


def _line(value: object) -> str:
    """One line of visible characters."""
    return re.sub(r"\s+", " ", visible(value))


def code_span(value: object) -> str:
    """A code span, in which nothing but a backtick has a meaning, so that no name can add markup."""
    return f"`{_line(value).replace('`', '').strip() or '?'}`"


def _yaml(value: str) -> str:
    """A YAML string: JSON's are."""
    return json.dumps(_line(value), ensure_ascii=False)
