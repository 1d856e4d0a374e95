"""The leaderboard as a page: its only script sorts tables, which are complete without it."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from crow.report.html import _templates

if TYPE_CHECKING:
    from crow.bench.leaderboard import Result, Table


def render_leaderboard(tables: "Sequence[Table]", results: "Sequence[Result]", title: str) -> str:
    """The page, as far as the matrix is measured.

    Args:
        tables: Those of the results.
        results: Every measurement, for the list behind the tables.
        title: Heading of the page.
    """
    from crow.report.figures import heat_figure, tradeoff_figure

    script = files("crow.report").joinpath("sort.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    figures = []
    for place, table in enumerate(tables):
        rates = {
            line.candidate.label: [
                line.squares[column].rate if column in line.squares else None for column in table.columns
            ]
            for line in table.lines
        }
        points = {
            line.candidate.label: (line.perplexity_ratio, line.mean_rate)
            for line in table.lines
            if line.perplexity_ratio is not None and line.mean_rate is not None
        }
        figures.append(
            (
                heat_figure(rates, list(table.columns), f"heat{place}"),
                tradeoff_figure(points, f"tradeoff{place}") if points and not table.relearned else None,
            )
        )
    return (
        _templates()
        .get_template("leaderboard.html.jinja")
        .render(
            title=title,
            tables=list(zip(tables, figures, strict=True)),
            results=results,
            measured=sum(result.figures is not None for result in results),
            script=script,
            script_hash=digest,
        )
    )
