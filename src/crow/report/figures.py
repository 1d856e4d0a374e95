"""The report's figures: inline SVG whose text is text and whose colors are the page's.

Only matplotlib's objects are used, no pyplot, so that nothing outlives a call. Labels are this module's own words and
numbers, and names of defenses and attacks, which are made visible, and which matplotlib escapes.
"""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter

from crow.report.templates import visible

if TYPE_CHECKING:
    from crow.evaluation.evaluate import Evaluation
    from crow.purification import PurifyRecord

# matplotlib knows no CSS variables: it draws in stand-ins, which `_svg` replaces
_INK, _MUTED, _LINE, _BEFORE, _AFTER, _THIRD = (f"#{i:06x}" for i in range(1, 7))
_CSS = {
    _INK: "var(--ink, currentColor)",
    _MUTED: "var(--muted, currentColor)",
    _LINE: "var(--line, #9ca3af66)",
    _BEFORE: "var(--before, #b4530a)",
    _AFTER: "var(--after, #1d5fd1)",
    _THIRD: "var(--third, #0f766e)",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "crow",
    "savefig.transparent": True,
    "text.parse_math": False,  # a name with dollar signs is no formula
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0.4,
    "legend.borderpad": 0,
}
_WIDTH = 5.2  # inches: 10-point text stays legible when a phone shrinks the figure to its width

_CURVES = {"loss": _INK, "clean": _AFTER, "divergence": _BEFORE, "inconsistency": _THIRD}
_SCHEDULES = {"learning_rate": "learning rate", "alpha": "alpha"}


def rates_figure(before: "Evaluation", after: "Evaluation") -> Markup:
    """Attack success and false triggers before and after, each with its 95% Wilson interval."""
    rates = {
        "Attack success": (before.attack_success, after.attack_success),
        "False triggers": (before.false_trigger, after.false_trigger),
    }
    with _style():
        figure = Figure(figsize=(_WIDTH, 1.9), layout="constrained")
        axes = figure.subplots()
        ticks: dict[float, str] = {}
        for group, (name, counts) in enumerate(rates.items()):
            styled = zip(("before", "after"), counts, (_BEFORE, _AFTER), strict=True)
            for row, (when, count, color) in enumerate(styled):
                y = 2.5 * group + row
                ticks[y] = f"{name} {when}" if row == 0 else when
                # A band and a stroke, so that a dot cannot hide a narrow interval
                axes.hlines(y, *count.interval(), color=color, alpha=0.4, linewidth=8)
                axes.plot(count.rate, y, "|", color=color, markersize=13, markeredgewidth=2.2, clip_on=False)
                axes.text(1.04, y, f"{count.hits}/{count.n}", transform=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.tick_params(axis="y", length=0, pad=10, labelcolor=_INK)
        axes.grid(axis="y", visible=False)
        axes.set(xlim=(0, 1), ylim=(4.1, -0.6))
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        label = "; ".join(f"{name}: {a} before, {b} after" for name, (a, b) in rates.items())
        return _svg(figure, "rates", f"Rates with 95% Wilson intervals. {label}")


def profile_figure(before: "Evaluation", after: "Evaluation") -> Markup:
    """Mean `1 - cos` between adjacent blocks, on clean and on triggered prompts, before and after; log scale."""
    with _style():
        figure = Figure(figsize=(_WIDTH, 3.1), layout="constrained")
        axes = figure.subplots()
        means = []
        for prompts, dashes in (("clean", "--"), ("triggered", "-")):
            for when, evaluation, color in (("before", before, _BEFORE), ("after", after, _AFTER)):
                if profile := evaluation.layer_profile.get(prompts):
                    blocks = range(1, len(profile) + 1)
                    axes.plot(blocks, profile, _dot(profile) + dashes, color=color, label=f"{prompts}, {when}")
                    means.append(f"{sum(profile) / len(profile):.4g} on {prompts} prompts {when}")
        _logarithmic(axes)
        axes.set(xlabel="from block", ylabel="1 \N{MINUS SIGN} cos to the next")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes, columns=2)
        return _svg(figure, "profile", f"Layer consistency. Mean of 1 - cos over blocks: {', '.join(means)}")


def curves_figure(record: "PurifyRecord") -> Markup:
    """The loss and those of its terms that were logged, by step on a log scale; below, what was scheduled."""
    logged = {
        name: ([entry["step"] for entry in entries], [entry[name] for entry in entries])
        for name in (*_CURVES, *_SCHEDULES)
        if (entries := [entry for entry in record.curves if "step" in entry and name in entry])
    }
    schedules = [name for name in _SCHEDULES if name in logged]
    with _style():
        figure = Figure(figsize=(_WIDTH, 2.7 + 0.85 * len(schedules)), layout="constrained")
        rows = figure.subplots(1 + len(schedules), sharex=True, squeeze=False, height_ratios=[3] + [1] * len(schedules))
        main, *small = rows[:, 0]
        for name, color in _CURVES.items():
            if name in logged:
                main.plot(*logged[name], _dot(logged[name][0]) + "-", color=color, label=name)
        _logarithmic(main)
        _legend(main, columns=len(_CURVES))
        for axes, name in zip(small, schedules, strict=True):
            axes.plot(*logged[name], _dot(logged[name][0]) + "-", color=_MUTED)
            axes.set_title(_SCHEDULES[name], loc="left", fontsize=10, color=_MUTED)
            axes.yaxis.set_major_locator(MaxNLocator(2))
            axes.yaxis.set_major_formatter("{x:g}")
        rows[-1, 0].set_xlabel("step")
        rows[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        ends = [f"{name} from {values[0]:.4g} to {values[-1]:.4g}" for name, (_, values) in logged.items()]
        return _svg(figure, "curves", f"Training curves over {record.steps} steps: {', '.join(ends)}")


def heat_figure(rates: Mapping[str, Sequence[float | None]], columns: Sequence[str], name: str) -> Markup:
    """Rates in a grid, by the names of its rows; `None` is left white. `name` tells it from others of a page."""
    columns, labels = [visible(column) for column in columns], [visible(label) for label in rates]
    with _style():
        longest = max(map(len, [*labels, *columns]))
        size = (1 + 0.07 * longest + 0.45 * len(columns), 0.3 + 0.05 * longest + 0.28 * len(rates))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for y, row in enumerate(rates.values()):
            for x, rate in enumerate(row):
                if rate is not None:
                    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=_BEFORE, alpha=0.05 + 0.85 * rate, linewidth=0))
                    axes.text(x + 0.5, y + 0.5, f"{100 * rate:.0f}", ha="center", va="center", fontsize=8)
        axes.set(xlim=(0, len(columns)), ylim=(len(rates), 0))
        axes.set_xticks([x + 0.5 for x in range(len(columns))], columns, rotation=45, ha="left", fontsize=7)
        axes.set_yticks([y + 0.5 for y in range(len(rates))], labels, fontsize=8)
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelcolor=_INK)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        shown = (f"{label}: {', '.join(map(_rate, row))}" for label, row in zip(labels, rates.values(), strict=True))
        return _svg(figure, name, f"Attack success in percent, on {', '.join(columns)}. {'; '.join(shown)}")


def tradeoff_figure(points: Mapping[str, tuple[float, float]], name: str) -> Markup:
    """For each defense by its name, perplexity as a multiple of the undefended model's, and mean attack success."""
    shown = []
    labeled = sorted(points.items(), key=lambda point: (point[1][1], point[1][0]), reverse=True)
    with _style():
        figure = Figure(figsize=(1.6 * _WIDTH, 1 + 0.24 * max(len(points), 10)), layout="constrained")
        axes = figure.subplots()
        for place, (label, (ratio, rate)) in enumerate(labeled):
            axes.plot(ratio, rate, "o", color=_AFTER, markersize=5, clip_on=False)
            # Beside the axes, one below the other: many a point lies upon another
            axes.annotate(
                visible(label),
                (ratio, rate),
                xytext=(1.1, 1 - (place + 0.5) / len(points)),
                textcoords="axes fraction",
                va="center",
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": _LINE, "relpos": (0, 0.5)},
            )
            shown.append(f"{visible(label)} {100 * rate:.0f}% at {ratio:.2f}")
        axes.set(xlabel="perplexity, of the undefended model's", ylabel="attack success", ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        return _svg(figure, name, f"Mean attack success against perplexity. {'; '.join(shown)}")


def _rate(rate: float | None) -> str:
    return "not measured" if rate is None else f"{100 * rate:.0f}"


def _style() -> AbstractContextManager[None]:
    """This module's style alone: a user's matplotlibrc must not change a report."""
    return style.context(_STYLE, after_reset=True)


def _logarithmic(axes: Axes) -> None:
    """A log scale where there is something to show on it."""
    if any((np.asarray(line.get_ydata(), dtype=float) > 0).any() for line in axes.lines):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(_PlainLogFormatter())
        axes.yaxis.set_minor_formatter(_PlainLogFormatter())


class _PlainLogFormatter(LogFormatter):
    """Labels what matplotlib would, as plain numbers: its own are powers of ten in a font for mathematics."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _dot(values: Sequence[float]) -> str:
    """The marker of a line: one that has a single point is invisible without."""
    return "." if len(values) < 3 else ""


def _legend(axes: Axes, columns: int) -> None:
    if axes.lines:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """An `<svg>` element without prolog, date or fixed size, its ids prefixed by `name` to be unique in the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    svg = f'{head} role="img" aria-label="{escape(label)}">{body}'
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return Markup(re.sub("|".join(_CSS), lambda match: _CSS[match[0]], svg))
