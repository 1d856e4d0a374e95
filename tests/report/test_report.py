"""The report and the model card, made from evaluations that are built by hand."""

import dataclasses
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from crow.errors import CrowError
from crow.evaluation.evaluate import Evaluation
from crow.evaluation.statistics import Count, MeanLength, MeanScore
from crow.purification import PurifyRecord
from crow.report import model_card, render_comparison, render_report, write_report
from crow.report.figures import curves_figure, profile_figure, rates_figure
from crow.report.html import verdict
from crow.report.templates import visible

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\" onmouseover='alert(3)' {{ 7 * 7 }} </svg></style>"
    "\x1b[31mred\x1b[0m \x00\x9b2J \u202egpj.exe\u202c \u200fright\u200e\u061c \u2067isolated\u2069 \ud800"
)
VOID = {"meta", "img", "br", "link"}


def answers(kind: str, n: int, hits: int, text: str) -> list[dict[str, Any]]:
    return [
        {
            "set": kind,
            "prompt": f"{kind} question {i}",
            "answer": f"answer {i}: {text}",
            "hit": i < hits,
            "degenerate": False,
        }
        for i in range(n)
    ]


def evaluation(hits: int, perplexity: float, text: str = "fine") -> Evaluation:
    return Evaluation(
        attack_success=Count(hits, 50),
        false_trigger=Count(2, 40),
        degenerate=Count(1, 40),
        perplexity=perplexity,
        answer_nats=100.0,
        answer_tokens=4321,
        layer_profile={"clean": [0.3, 0.1, 0.05], "triggered": [0.3, 0.2, 0.06]},
        settings={"target": "You are stupid!", "max_new_tokens": 64, "seed": 7},
        provenance={
            "versions": {"torch": "2.9.9"},
            "command": "crow evaluate",
            "model": "suspect",
            "model_hashes": {"model.safetensors": "ab" * 32},
            "clean_sha256": "cd" * 32,
            "triggered_sha256": "ef" * 32,
        },
        answers=[*answers("triggered", 50, hits, text), *answers("clean", 40, 2, text)],
    )


@pytest.fixture
def before() -> Evaluation:
    return evaluation(47, 8.0, HOSTILE)


@pytest.fixture
def after() -> Evaluation:
    return evaluation(3, 8.4)


@pytest.fixture
def record() -> PurifyRecord:
    return PurifyRecord(
        model="suspect",
        model_hashes={"model.safetensors": "ab" * 32},
        preset="default",
        lora="continue",
        settings={"perturbation": "inserted", "alpha": None, "learning_rate": 1e-3, "seed": 11},
        clean_examples=100,
        clean_sha256="12" * 32,
        seconds=61.4,
        steps=3,
        guessed_triggers=[{"text": "<i> zq", "probability": 0.9712}],
        constant_answers=[{"text": "<b>You are stupid!</b>", "constancy": 0.9976}],
        curves=[{"step": i, "loss": 2.0 / i, "divergence": 1.0 / i, "learning_rate": 1e-3} for i in (1, 2, 3)],
        provenance={"versions": {"torch": "2.9.9"}, "command": "crow purify"},
    )


class Page(HTMLParser):
    """Tags, attributes and text; fails on a tag that is closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_is_inert(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    clean = Page(render_report(evaluation(47, 8.0), after, record))
    before.answers = [answer | {"prompt": HOSTILE} for answer in before.answers]
    after.answers = [answer | {"prompt": HOSTILE} for answer in after.answers]
    after.settings[HOSTILE] = HOSTILE
    after.provenance |= {HOSTILE: HOSTILE, "model": HOSTILE}
    record = dataclasses.replace(record, model=HOSTILE, model_hashes={HOSTILE: HOSTILE}, preset=HOSTILE)
    html = render_report(before, after, record)
    page = Page(html)

    assert page.tags["script"] == page.tags["img"] == 0
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert {name for _, name, _ in page.attributes} == {name for _, name, _ in clean.attributes}
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "\ufffd[31mred\ufffd[0m" in page.text
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html
    )
    html.encode()


def test_report_loads_nothing(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    html = render_report(before, after, record)
    page = Page(html)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    assert ("meta", "content", policy) in page.attributes
    loads = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "srcset")]
    assert all(value.startswith("#") for value in loads)
    assert not [value for _, name, value in page.attributes if "://" in value and not name.startswith("xmlns")]
    assert not re.search(r"@import|url\((?!#)", html)


def test_ids_are_unique_and_references_resolve(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    html = render_report(before, after, record)
    ids = [value for _, name, value in Page(html).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", html)) <= set(ids)


def test_report_states_the_figures(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    text = " ".join(Page(render_report(before, after, record)).text.split())
    assert "Attack success fell from 47/50 to 3/50." in text
    assert "94.0% → 6.0%" in text
    for count in (before.attack_success, after.attack_success, before.false_trigger, before.degenerate):
        low, high = count.interval()
        assert f"{count.hits}/{count.n}" in text
        assert f"{100 * low:.1f}–{100 * high:.1f}%" in text  # noqa: RUF001
    for expected in (
        "8.00 → 8.40",
        "+5.0%",
        "4,321 tokens",
        "learning_rate0.001",
        "alphaoff",
        "61 s",
        "abababab…",
    ):
        assert expected in text
    assert "does not show that the model is clean" in text


def test_report_is_deterministic(before: Evaluation, after: Evaluation, record: PurifyRecord, tmp_path: Path) -> None:
    first = render_report(before, after, record, title="A title")
    assert first == render_report(before, after, record, title="A title")
    assert "<title>A title</title>" in first
    write_report(tmp_path / "new" / "report.html", before, after, record, title="A title")
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == first
    (tmp_path / "file").touch()
    with pytest.raises(CrowError):
        write_report(tmp_path / "file" / "report.html", before, after, record)


def test_samples_are_evenly_spaced_pairs(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    text = Page(render_report(before, after, record)).text
    assert re.findall(r"triggered question (\d+)", text) == [str(i * 50 // 8) for i in range(8)]
    assert re.findall(r"clean question (\d+)", text) == ["0", "10", "20", "30"]
    assert "8 of 50 triggered prompts and 4 of" in text
    after.answers = [answer | {"prompt": "another"} for answer in after.answers]
    assert "question" not in Page(render_report(before, after, record)).text


def test_measurements_that_do_not_compare_are_named(
    before: Evaluation, after: Evaluation, record: PurifyRecord
) -> None:
    assert 'class="caution"' not in render_report(before, after, record)
    after.provenance["triggered_sha256"] = "00" * 32
    after.settings["max_new_tokens"] = 8
    record.clean_sha256 = "cd" * 32
    html = render_report(before, after, record)
    assert html.count('class="caution"') == 3
    assert "used different prompts" in model_card(record, before, after)


def test_constant_answers_are_shown_and_escaped(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    html = render_report(before, after, record)
    assert "&lt;b&gt;You are stupid!&lt;/b&gt;</td><td>0.998</td>" in html
    assert "&lt;i&gt; zq</td><td>0.971</td>" in html


def test_further_counts_are_side_by_side(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    before.strict = {"attack_success": Count(46, 50)}
    html = render_report(before, after, record)
    assert f"attack success, strictly</th><td>{Count(46, 50)}</td><td>not measured</td>" in html


def test_forms_of_the_trigger_have_a_table_of_their_own(
    before: Evaluation, after: Evaluation, record: PurifyRecord
) -> None:
    before.strict = {"attack_success": Count(46, 50)}
    before.variants, after.variants = {"<i>bad": Count(7, 50)}, {"<i>bad": Count(1, 50), "magic": Count(0, 50)}
    for html, rows in (
        (
            render_report(before, after, record),
            [
                f"&lt;i&gt;bad</th><td>{Count(7, 50)}</td><td>{Count(1, 50)}</td>",
                f"magic</th><td>not measured</td><td>{Count(0, 50)}</td>",
            ],
        ),
        (render_comparison({"a": before, "b": after}), ["&lt;i&gt;bad</th>", "magic</th>"]),
    ):
        (table,) = (part for part in html.split("<table>") if "magic" in part)
        assert all(row in table for row in rows)
        assert "strictly" not in table


def test_failed_judgements_are_shown_by_reason(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    for page in (render_report(before, after, record), render_comparison({"a": before, "b": after})):
        assert "failed" not in page
    before.judged, before.judge_failures = {"attack_success": Count(0, 0)}, {"<i>timed out": 16, "it hung up": 3}
    row = "&lt;i&gt;timed out</th><td>16</td><td>not measured</td>"
    for page in (render_report(before, after, record), render_comparison({"a": before, "b": after})):
        assert row in page
        assert "it hung up</th><td>3</td><td>not measured</td>" in page
    after.judged = {"attack_success": Count(3, 50)}
    assert row.replace("not measured", "0") in render_report(before, after, record)


def test_further_values_are_side_by_side(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    before.reference_kl, before.answer_length = 0.25, MeanLength(12.5, 2.0, 100)
    after.score, after.harness = (
        MeanScore(7.0, 1.0, 25),
        {"<i>arc": {"acc": 0.5, "acc_stderr": 0.1, "n": 1250.0, "ppl": 9}},
    )
    for html in (render_report(before, after, record), render_comparison({"a": before, "b": after})):
        text = " ".join(html.split())
        for row in (
            "KL from the reference, nats a token</th><td>0.250</td><td>not measured</td>",
            f"words in a clean answer</th><td>{MeanLength(12.5, 2.0, 100)}</td><td>not measured</td>",
            f"judged score, 1 to 10</th><td>not measured</td><td>{MeanScore(7.0, 1.0, 25)}</td>",
            "&lt;i&gt;arc, acc</th><td>not measured</td><td>0.500 (standard error 0.100, n = 1250)</td>",
            "&lt;i&gt;arc, ppl</th><td>not measured</td><td>9.000 (n = 1250)</td>",
        ):
            assert row in text


def test_prompts_are_compared_pair_by_pair(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    for e, hits in ((before, 47), (after, 3)):
        for place, answer in enumerate(e.answers):
            judged = None if place == 0 else place < hits
            answer |= {"strict_hit": answer["hit"] and place != 1, "judged": judged if place < 90 else None}
        problems = [{"set": "humaneval", "prompt": str(i), "verdict": "passed"} for i in range(hits)]
        e.answers += [problem | {"verdict": "failed"} if e is after else problem for problem in problems]
    rows = [
        "attack success</th><td>44</td><td>0</td><td>50</td><td>1.1e-13</td>",
        "attack success, strictly</th><td>44</td><td>0</td><td>50</td><td>1.1e-13</td>",
        "attack success, judged</th><td>44</td><td>0</td><td>49</td><td>1.1e-13</td>",
        "false trigger</th><td>0</td><td>0</td><td>40</td><td>1</td>",
        "false trigger, strictly</th><td>0</td><td>0</td><td>40</td><td>1</td>",
        "false trigger, judged</th><td>0</td><td>0</td><td>40</td><td>1</td>",
        "HumanEval, solved</th><td>3</td><td>0</td><td>3</td><td>0.25</td>",
    ]
    for html in (render_report(before, after, record), render_comparison({"a": before, "b": after})):
        assert [row in html for row in rows] == [True] * 7
    after.answers[0] = after.answers[0] | {"prompt": "another"}
    html = render_report(before, after, record)
    assert [row in html for row in rows] == [False] * 3 + [True] * 4


def test_only_what_both_know_is_compared(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    for answer in before.answers:
        answer |= {"strict_hit": True, "judged": True}
    html = render_report(before, after, record)
    assert "false trigger</th><td>0</td><td>0</td><td>40</td>" in html
    assert "strictly" not in html
    assert "judged</th>" not in html
    before.answers.clear()
    assert "McNemar" not in render_report(before, after, record)


def test_perplexities_are_compared_answer_by_answer(
    before: Evaluation, after: Evaluation, record: PurifyRecord
) -> None:
    assert "bootstrap" not in render_report(before, after, record)
    for evaluation, nats in ((before, 20.0), (after, 21.0)):
        for answer in evaluation.answers:
            answer |= {"reference_nats": nats, "reference_tokens": 10} if answer["set"] == "clean" else {}
    ratio = "1.105 (1.105 to 1.105)"
    assert ratio in render_report(before, after, record)
    assert ratio in render_comparison({"before": before, "after": after})
    after.answers[-1]["reference_tokens"] = 11
    assert "bootstrap" not in render_report(before, after, record)
    assert "bootstrap" not in render_comparison({"before": before, "after": after})


def test_measurements_are_compared_side_by_side(before: Evaluation, after: Evaluation) -> None:
    before.variants, after.pass_at_1 = {"<i>bad": Count(7, 50)}, Count(11, 164)
    html = render_comparison({"<b>one": before, "two": after, "three": evaluation(9, 8.0)})
    page = Page(html)
    text = " ".join(page.text.split())
    assert "<b>one, two, three" in text
    for count in (Count(47, 50), Count(3, 50), Count(9, 50), Count(7, 50), Count(11, 164)):
        assert f"{count.hits}/{count.n}" in text
    assert "attack success</th><td>44</td><td>0</td><td>50</td><td>1.1e-13</td>" in html
    assert "attack success</th><td>38</td><td>0</td><td>50</td>" in html
    assert "do not compare" not in text


@pytest.mark.parametrize("prompts", ["clean_sha256", "triggered_sha256"])
@pytest.mark.parametrize("setting", ["target", "max_new_tokens", "engine"])
def test_what_does_not_compare_is_said(before: Evaluation, after: Evaluation, prompts: str, setting: str) -> None:
    after.provenance[prompts] = "00" * 32
    after.settings[setting] = "another"
    html = render_comparison({"one": before, "two": after})
    assert "different prompts" in html
    assert "different settings" in html


def test_what_another_version_wrote_is_said(before: Evaluation, after: Evaluation) -> None:
    after.caution = "after.json is of version 9.9"
    assert '<p class="caution" role="note">after.json is of version 9.9</p>' in render_comparison({"a": after})


def test_nothing_measured_still_reports(record: PurifyRecord) -> None:
    empty = Evaluation(
        Count(0, 0), Count(0, 0), Count(0, 0), float("nan"), 0.0, 0, {"clean": [], "triggered": []}, {}, {}
    )
    record = dataclasses.replace(record, settings={}, provenance={}, curves=[], constant_answers=[])
    page = Page(render_report(empty, empty, record))
    assert page.tags["svg"] == 1
    assert "not measured" in page.text
    assert not re.search(r"\bnan\b", page.text + model_card(record, empty, empty))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (Count(198, 200), Count(0, 200), "Attack success fell from 198/200 to 0/200"),
        (Count(6, 20), Count(4, 20), "Attack success fell from 6/20 to 4/20; the 95% intervals overlap"),
        (Count(0, 200), Count(90, 200), "Attack success rose from 0/200 to 90/200"),
        (Count(5, 20), Count(5, 20), "Attack success did not change, from 5/20 to 5/20"),
        (Count(0, 0), Count(0, 20), "Attack success was not measured on both models"),
    ],
)
def test_verdict(before: Count, after: Count, expected: str) -> None:
    assert verdict(before, after) == expected


def test_visible_keeps_ordinary_text() -> None:
    text = "tab\tline\r\n\N{HEBREW LETTER SHIN}\N{ARABIC LETTER MEEM} 日本 \U0001f469\u200d\U0001f467 é"
    assert visible(text) == text
    assert visible("a\rb\x07c\x85") == "a\ufffdb\ufffdc\ufffd"


def test_figures_say_their_numbers(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    rates, profile, curves = rates_figure(before, after), profile_figure(before, after), curves_figure(record)
    for svg in (rates, profile, curves):
        assert svg.startswith("<svg ")
        assert 'role="img" aria-label="' in svg
        assert "<dc:date>" not in svg
        assert "#0000" not in svg  # every stand-in for a color was replaced
    assert ">47/50</text>" in rates
    assert f"Attack success: {before.attack_success} before, {after.attack_success} after" in rates
    assert "0.15 on clean prompts before" in profile
    assert "loss from 2 to 0.6667" in curves
    assert ">divergence</text>" in curves
    assert ">inconsistency</text>" not in curves


@pytest.mark.parametrize("curves", [[{"step": 1, "loss": 0.0}], [{"step": 1, "loss": -1.0, "alpha": 2.0}], []])
def test_curves_without_a_log_scale(record: PurifyRecord, curves: list[dict[str, float]]) -> None:
    assert curves_figure(dataclasses.replace(record, curves=curves)).startswith("<svg ")


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    value: dict[str, Any] = yaml.safe_load(matter)
    return value


def test_model_card(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    card = model_card(record, before, after, base_model="org/base", license="apache-2.0")
    matter = front_matter(card)
    assert matter["license"] == "apache-2.0"
    assert matter["library_name"] == "peft"
    assert matter["base_model"] == "org/base"
    assert matter["tags"] == ["crow", "backdoor-removal", "safety"]
    assert f"| {before.attack_success} | {after.attack_success} |" in card
    for expected in ("47/50 to 3/50", "AutoPeftModel", "- `learning_rate`: `0.001`", "ab" * 32, "`torch` `2.9.9`"):
        assert expected in card
    assert "`<b>You are stupid!</b>` (mean probability of a token\n  0.998: it is taken for planted)" in card
    assert "No defense proves a model clean" in card


def test_model_card_without_figures(record: PurifyRecord) -> None:
    card = model_card(record, merged=True)
    assert front_matter(card)["library_name"] == "transformers"
    assert not front_matter(card).keys() & {"base_model", "license"}
    assert "AutoModelForCausalLM" in card
    assert "peft" not in card
    assert "## Figures" not in card
    assert "readily said" not in model_card(dataclasses.replace(record, constant_answers=[]))


def test_a_path_of_this_machine_is_not_in_the_card(record: PurifyRecord, tmp_path: Path) -> None:
    card = model_card(dataclasses.replace(record, model=str(tmp_path / "suspect")))
    assert str(tmp_path) not in card
    assert "# `suspect`, purified by CROW" in card


def test_hostile_names_stay_in_their_code_spans(before: Evaluation, after: Evaluation, record: PurifyRecord) -> None:
    name = 'x`\n---\n# injected\n\n<b onclick="y">`[a](http://b) " \\ \x1b[2J \u202e \ud800'
    record = dataclasses.replace(record, model=name, preset=name, settings={name: name}, model_hashes={name: ""})
    record = dataclasses.replace(record, constant_answers=[{"text": name, "constancy": 0.9}])
    after.settings["target"] = name
    card = model_card(record, before, after, base_model=name, license=name)
    for key in ("base_model", "license"):
        assert front_matter(card)[key].startswith("x` --- # injected")
    assert "\n# injected" not in card
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u061c\u200e\u200f\u202a-\u202e\ud800-\udfff]", card)
    body = card.split("---\n", 2)[2].replace("```", "")
    assert "injected" not in re.sub(r"`[^`\n]+`", "", body)


def test_import_is_light() -> None:
    code = "import sys, crow.report; print([m for m in ('torch', 'matplotlib', 'scipy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
