"""The leaderboard as a page: its only script sorts tables, which are complete without it."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from crow.bench.leaderboard import UTILITY, Result, as_csv, as_markdown, results, tables
from crow.bench.plan import Entry
from crow.bench.store import Store
from crow.files import write_text
from crow.report.figures import heat_figure, tradeoff_figure
from crow.report.templates import templates


def write_leaderboard(planned: Sequence[Entry], store: Store, folder: Path, title: str) -> Path:
    """Write `leaderboard.html`, `.md` and `.csv` to the folder; returns the page's path."""
    found = results(planned, store, folder)
    write_text(folder / "leaderboard.csv", as_csv(found))
    write_text(folder / "leaderboard.md", as_markdown(found, title))
    page = folder / "leaderboard.html"
    write_text(page, render_leaderboard(found, title))
    return page


def render_leaderboard(found: Sequence[Result], title: str) -> str:
    """The page, as far as the matrix is measured.

    Args:
        found: Every measurement, run or not.
        title: Heading of the page.
    """
    script = files("crow.report").joinpath("sort.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = tables(found)
    figures = []
    for place, table in enumerate(shown):
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
        templates()
        .get_template("leaderboard.html.jinja")
        .render(
            title=title,
            utility=UTILITY,
            tables=list(zip(shown, figures, strict=True)),
            results=found,
            measured=sum(result.figures is not None for result in found),
            script=script,
            script_hash=digest,
        )
    )
