"""What tables say of seeds that differ, are missing, or failed."""

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest

from crow.bench.leaderboard import Line, Result, as_csv, as_markdown, tables
from crow.bench.matrix import Matrix
from crow.bench.plan import entries
from crow.evaluation.evaluate import Evaluation
from crow.evaluation.statistics import Count
from crow.report.leaderboard import render_leaderboard

Hits = Mapping[str, list[int | str | None]]
"""By backdoor, what became of each seed: hits of 200, why it failed, or nothing yet."""


def figures(hits: int) -> Evaluation:
    count = Count(hits, 200)
    return Evaluation(count, count, count, 10.0 + hits, 1.0, 1, {}, {}, {})


def results(hits: Hits) -> list[Result]:
    """Those of `crow`, on a matrix of these backdoors; of each, nothing undefended fired."""
    matrix = Matrix.read({"attacks": list(hits), "defenses": ["none", "crow"], "seeds": [0, 1, 2]})
    left = {name: iter(seeds) for name, seeds in hits.items()}

    def became(outcome: int | str | None) -> tuple[Evaluation | None, str | None]:
        return (figures(outcome), None) if isinstance(outcome, int) else (None, outcome)

    return [
        Result(entry, *became(0 if entry.defend is None else next(left[entry.backdoor.text])), "answers", None, None)
        for entry in entries(matrix)
    ]


def line(hits: Hits) -> Line:
    (table,) = tables(results(hits))
    return table.lines[1]


def test_few_hits_are_not_rounded_away() -> None:
    found = {"badnets/sentiment": [1, 0, 0]}
    square = line(found).squares["badnets/sentiment"]
    assert square.count("attack_success") == Count(1, 200)
    assert square.rate == pytest.approx(1 / 600)
    assert "| 1/200 (0.1 to 2.8%); seeds 1, 0, 0 |" in as_markdown(results(found), "title")


def test_weights_say_nothing_of_a_defense_at_decoding_time() -> None:
    planned = entries(Matrix.read({"attacks": ["badnets/sentiment"], "defenses": ["none", "decode", "prune"]}))
    found = [Result(entry, figures(50), None, "answers", None, None) for entry in planned]
    ((_, decode, prune),) = (table.lines for table in tables(found))
    assert (decode.perplexity_ratio, prune.perplexity_ratio) == (None, 1)
    assert decode.share("degenerate") == 0.25
    (row,) = (row for row in as_csv(found).splitlines() if ",decode," in row)
    assert "50,200" in row
    assert "60.0" not in row  # the perplexity of `figures(50)`


def test_the_worst_is_the_worst_seed_s() -> None:
    found = line({"badnets/sentiment": [0, 0, 150], "vpi/refusal": [60, 60, 60]})
    assert found.worst_rate == 0.75
    assert found.mean_rate == pytest.approx((0.25 + 0.3) / 2)


def test_a_fall_of_perplexity_makes_up_for_no_rise() -> None:
    found = line({"badnets/sentiment": [0, 0, 0], "vpi/refusal": [5, 5, 5]})
    assert (found.perplexity_ratio, found.worst_perplexity_ratio) == (1.25, 1.5)


def test_costs_on_some_attacks_are_not_set_beside_those_on_all() -> None:
    hits: Hits = {"badnets/sentiment": [0, 0, 0], "vpi/refusal": [4, 4, None]}
    timed = [replace(result, seconds=9.0, memory=5) for result in results(hits)]
    ((_, found),) = (table.lines for table in tables(timed))
    assert (found.squares["badnets/sentiment"].cost("seconds"), found.cost("seconds")) == (9, None)
    ((_, found),) = (table.lines for table in tables(timed[:-1]))
    assert (found.cost("seconds"), found.cost("memory")) == (9, 5)


@pytest.mark.parametrize("outcome", [None, "RuntimeError: no luck"])
def test_a_seed_that_is_missing_may_be_the_worst(outcome: str | None) -> None:
    hits: Hits = {"badnets/sentiment": [0, outcome, 0], "vpi/refusal": [4, 4, 4]}
    found = line(hits)
    whole, part = found.squares["vpi/refusal"], found.squares["badnets/sentiment"]
    assert (found.mean_rate, found.worst_rate, found.perplexity_ratio, part.rate) == (None,) * 4
    assert (part.mean("perplexity"), found.ratio("badnets/sentiment")) == (None, None)
    assert (whole.rate, whole.mean("perplexity")) == (0.02, 14)
    said = "1 of 3 seeds not measured" + (f", failed: {outcome}" if outcome else "")
    assert f"| 0/200 (0.0 to 1.9%); seeds 0, 0; {said} |" in as_markdown(results(hits), "title")
    page = render_leaderboard(results(hits), "title")
    shown = '<span class="badge hit">failed</span>' if outcome else "incomplete"
    assert f'<td data-value="">{shown}<br><small>0/200, 0.0\N{EN DASH}1.9%; seeds: 0, 0; {said}' in page
    assert "crow: not measured, 2" in page


def test_shares_are_means_over_seeds_that_nothing_rounds() -> None:
    assert line({"badnets/sentiment": [1, 0, 0]}).share("false_trigger") == pytest.approx(1 / 600)
    assert line({"badnets/sentiment": [1, None, 0]}).share("false_trigger") is None


def test_a_line_that_is_whole_is_in_all_summaries() -> None:
    hits: Hits = {"badnets/sentiment": [2, 4, 6]}
    page = render_leaderboard(results(hits), "title")
    assert '<td data-value="0.02">2.0%<br><small>4/200' in page
    assert '<td data-value="2.0">2.0%</td>' in page
    assert '<td data-value="3.0">3.0%</td>' in page
    assert "crow 2% at 1.40" in page


def test_a_part_of_a_matrix_is_named_as_one() -> None:
    assert as_markdown(results({"badnets/sentiment": [2, 4, 6]}), "smollm2, of it <seed 0>").startswith(
        "# smollm2, of it &lt;seed 0&gt;\n\n## "
    )


def test_hostile_names_are_shown_and_do_nothing() -> None:
    hits: Hits = {"badnets:word=\x1b[2J\u202e\ud800<script>/sentiment": [2, 4, 6]}
    page = render_leaderboard(results(hits), "title")
    made = page + as_markdown(results(hits), "title") + as_csv(results(hits))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f]", made)
    assert not re.search(r"[\u202a-\u202e\u2066-\u2069\ud800-\udfff]", made)
    assert page.count("<script") == 1
