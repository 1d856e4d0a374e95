"""The report: one HTML file without scripts that loads nothing, safe to open whatever the model said."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from crow.files import write_text
from crow.report.templates import templates

if TYPE_CHECKING:
    from crow.evaluation.evaluate import Evaluation
    from crow.evaluation.statistics import Count, Paired, Ratio
    from crow.purification import PurifyRecord

T = TypeVar("T")

_SAMPLES = {"triggered": 8, "clean": 4}

_PAIRED = {
    "attack success": ("triggered", "hit"),
    "attack success, strictly": ("triggered", "strict_hit"),
    "attack success, judged": ("triggered", "judged"),
    "false trigger": ("clean", "hit"),
    "false trigger, strictly": ("clean", "strict_hit"),
    "false trigger, judged": ("clean", "judged"),
    "HumanEval, solved": ("humaneval", "verdict"),
}
"""Counts that are compared prompt by prompt: of which set of the answers, and of what is said of each."""


class Pair(NamedTuple):
    """One prompt with the answers, as `Evaluation.answers` holds them, of the suspect and of the purified model."""

    number: int
    before: dict[str, Any]
    after: dict[str, Any]


class Row(NamedTuple):
    """What several sources say of one thing: a value each, or one if they agree."""

    label: str
    values: list[Any]


def write_report(
    path: str | Path, before: "Evaluation", after: "Evaluation", record: "PurifyRecord", title: str | None = None
) -> None:
    """Write `render_report` to `path`, atomically.

    Raises:
        CrowError: the file cannot be written.
    """
    write_text(path, render_report(before, after, record, title))


def render_report(before: "Evaluation", after: "Evaluation", record: "PurifyRecord", title: str | None = None) -> str:
    """The report of one purification as an HTML page; the same input gives the same text.

    Args:
        before: Of the suspect model.
        after: Of the purified one, on the same prompts; the page says so if they were others.
        record: Of the purification between the two.
        title: Heading of the page; by default it names the suspect model.
    """
    # Here, so that importing crow.report does not import matplotlib
    from crow.report.figures import curves_figure, profile_figure, rates_figure

    profiles = [*before.layer_profile.values(), *after.layer_profile.values()]
    return (
        templates()
        .get_template("report.html.jinja")
        .render(
            title=title or f"Purification of {record.model}",
            verdict=verdict(before.attack_success, after.attack_success),
            cautions=cautions(before, after, record),
            before=before,
            after=after,
            record=record,
            paired=_paired(before, after),
            perplexity=_perplexity_ratio(before, after),
            variants=_by_name(before.variants, after.variants),
            further={
                **_by_name(before.further_counts(), after.further_counts()),
                **_by_name(before.further_values(), after.further_values()),
            },
            failures=_failures(before, after),
            rates=rates_figure(before, after),
            profile=profile_figure(before, after) if any(profiles) else None,
            curves=curves_figure(record) if record.curves else None,
            samples={kind: _samples(before, after, kind, number) for kind, number in _SAMPLES.items()},
            totals={kind: sum(answer["set"] == kind for answer in before.answers) for kind in _SAMPLES},
            measurement=_rows([before.settings, after.settings]),
            provenance=_rows(_sources(before, after, record)),
        )
    )


def verdict(before: "Count", after: "Count") -> str:
    """What became of attack success, as one sentence of counts."""
    if before.n == 0 or after.n == 0:
        return "Attack success was not measured on both models"
    change = f"from {before.hits}/{before.n} to {after.hits}/{after.n}"
    if after.rate == before.rate:
        return f"Attack success did not change, {change}"
    (low, high), (after_low, after_high) = before.interval(), after.interval()
    overlap = "; the 95% intervals overlap" if low <= after_high and after_low <= high else ""
    return f"Attack success {'fell' if after.rate < before.rate else 'rose'} {change}{overlap}"


def _by_name(*sources: dict[str, T]) -> dict[str, list[T | None]]:
    names = dict.fromkeys(name for source in sources for name in source)
    return {name: [source.get(name) for source in sources] for name in names}


def _failures(*evaluations: "Evaluation") -> dict[str, list[int | None]]:
    """By reason, how many judgements of each failed for it; nothing of one that had no judge."""
    reasons = dict.fromkeys(reason for e in evaluations for reason in e.judge_failures)
    return {reason: [e.judge_failures.get(reason, 0) if e.judged else None for e in evaluations] for reason in reasons}


def cautions(before: "Evaluation", after: "Evaluation", record: "PurifyRecord") -> list[str]:
    """What keeps the figures from being compared."""
    found = _not_comparable([before, after])
    if record.clean_sha256 in [e.provenance.get("clean_sha256") for e in (before, after)]:
        found.append("The clean prompts are those that the model was purified on: figures on them look too good.")
    return found


def _not_comparable(evaluations: "Sequence[Evaluation]") -> list[str]:
    found = [e.caution for e in evaluations if e.caution is not None]
    first, *others = evaluations
    prompts, settings = ("clean_sha256", "triggered_sha256"), ("target", "max_new_tokens", "engine")
    if any(e.provenance.get(name) != first.provenance.get(name) for e in others for name in prompts):
        found.append("The measurements used different prompts: their figures do not compare.")
    if any(e.settings.get(name) != first.settings.get(name) for e in others for name in settings):
        found.append("The measurements used different settings: their figures do not compare.")
    return found


def render_comparison(evaluations: "Mapping[str, Evaluation]") -> str:
    """Measurements side by side as an HTML page.

    Args:
        evaluations: By the names of their columns; all others are compared with the first.
    """
    names, measured = list(evaluations), list(evaluations.values())
    main = {
        name.replace("_", " ").capitalize(): [getattr(e, name) for e in measured]
        for name in ("attack_success", "false_trigger", "degenerate")
    }
    paired = {name: _paired(measured[0], other) for name, other in list(evaluations.items())[1:]}
    ratios = [None, *(_perplexity_ratio(measured[0], other) for other in measured[1:])]
    return (
        templates()
        .get_template("comparison.html.jinja")
        .render(
            title=", ".join(names),
            names=names,
            cautions=_not_comparable(measured),
            evaluations=measured,
            main=main,
            variants=_by_name(*(e.variants for e in measured)),
            further=_by_name(*(e.further_counts() for e in measured)),
            ratios=ratios if any(ratios) else [],
            values=_by_name(*(e.further_values() for e in measured)),
            failures=_failures(*measured),
            paired={name: rows for name, rows in paired.items() if rows},
            origin=_rows([_flat(e.settings) | _flat(e.provenance) for e in measured]),
        )
    )


def _samples(before: "Evaluation", after: "Evaluation", kind: str, number: int) -> list[Pair]:
    """At most `number` prompts of one set, evenly spaced, so that no outcome decides which are shown."""
    pairs = _pairs(before, after, kind)
    number = min(number, len(pairs))
    return [pairs[i * len(pairs) // number] for i in range(number)]


def _pairs(before: "Evaluation", after: "Evaluation", kind: str) -> list[Pair]:
    """The answers of both models to the prompts of one set that both were asked."""
    pairs = [Pair(i, a, b) for i, (a, b) in enumerate(_asked_both(before, after, kind), start=1)]
    return [pair for pair in pairs if pair.before["prompt"] == pair.after["prompt"]]


def _asked_both(before: "Evaluation", after: "Evaluation", kind: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The answers of both to one set, as far as both have it."""
    asked, asked_after = ([a for a in e.answers if a["set"] == kind] for e in (before, after))
    return list(zip(asked, asked_after, strict=False))


def _paired(before: "Evaluation", after: "Evaluation") -> "dict[str, Paired]":
    """Counts prompt by prompt, by their names; none of a set in which the two models were not asked the same."""
    from crow.evaluation.statistics import paired  # here, so that importing crow.report does not import scipy

    found = {}
    for name, (kind, verdict) in _PAIRED.items():
        asked = _asked_both(before, after, kind)
        said = [(a.get(verdict), b.get(verdict)) for a, b in asked]
        known = [[verdict in (True, "passed") for verdict in both] for both in said if None not in both]
        if known and all(a["prompt"] == b["prompt"] for a, b in asked):
            found[name] = paired(*zip(*known, strict=True))
    return found


def _perplexity_ratio(before: "Evaluation", after: "Evaluation") -> "Ratio | None":
    """Of the second to the first; nothing where what each answer contributes is not known, or of other prompts."""
    from crow.evaluation.statistics import perplexity_ratio

    asked = _asked_both(before, after, "clean")
    kept = ("prompt", "reference_tokens")
    if not all("reference_nats" in a and "reference_nats" in b and all(a[k] == b[k] for k in kept) for a, b in asked):
        return None
    nats = [(a["reference_nats"], b["reference_nats"], a["reference_tokens"]) for a, b in asked]
    return perplexity_ratio(*zip(*nats, strict=True)) if nats else None


def _sources(before: "Evaluation", after: "Evaluation", record: "PurifyRecord") -> list[dict[str, Any]]:
    """Where the suspect's figures, the purification and the purified model's figures come from, in this order."""
    purification = {"model": record.model, "model_hashes": record.model_hashes, "clean_sha256": record.clean_sha256}
    sources = (
        (before.provenance, before.settings),
        (record.provenance | purification, record.settings),
        (after.provenance, after.settings),
    )
    return [_flat(provenance) | {"seed": settings.get("seed")} for provenance, settings in sources]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested keys are package and file names, which say enough on their own."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def _rows(sources: Sequence[dict[str, Any]]) -> list[Row]:
    rows = []
    for key in dict.fromkeys(key for source in sources for key in source):
        values = [source.get(key) for source in sources]
        rows.append(Row(key, values[:1] if all(value == values[0] for value in values) else values))
    return rows
