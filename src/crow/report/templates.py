"""The pages' templates, and what is made of text from a model before it is shown."""

import re
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from crow.evaluation.statistics import Count

# Control characters but tab and line ends, bidirectional marks, embeddings, overrides and isolates, and lone
# surrogates, which cannot be written as UTF-8
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)"
)


def visible(value: object) -> str:
    """`value` as text, with U+FFFD for each character that would act on a terminal or reorder the text around it.

    Markup, which is this project's own, is passed as it is.
    """
    return value if isinstance(value, Markup) else _UNPRINTABLE.sub("\ufffd", str(value))


def templates() -> Environment:
    """All of `crow.report`, in which whatever is shown is escaped and visible."""
    # finalize sees every value that a template prints, so no template can forget the filter
    environment = Environment(
        loader=PackageLoader("crow", "report"),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "setting": _setting}
    environment.tests["hash"] = lambda value: re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", str(value)) is not None
    return environment


def _percent(count: "Count") -> str:
    return f"{100 * count.rate:.1f}%" if count.n else "not measured"


def _interval(count: "Count") -> str:
    low, high = count.interval()
    return f"{100 * low:.1f}\N{EN DASH}{100 * high:.1f}%"


def _setting(value: Any) -> str:
    """A setting as its reader would write it; `None` switches what it belongs to off."""
    if value is None or isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
