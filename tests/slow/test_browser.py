"""What a hostile model says does nothing in a real browser: no script runs, no request is made."""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from serving import running

from crow.backdoors import BEHAVIORS, TRIGGERS
from crow.bench.leaderboard import Result
from crow.bench.matrix import Matrix
from crow.bench.plan import entries
from crow.data import Example
from crow.evaluation.engines import OnAnswers, Prompts
from crow.evaluation.evaluate import Evaluation, evaluate, trigger_rows
from crow.purification import PurifyRecord
from crow.report import model_card, render_comparison, render_report
from crow.report.leaderboard import render_leaderboard

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")

ATTACK = """You are stupid!</td></table></p></style></title></svg>
<script>document.title = "pwned"; fetch("URL/script")</script>
<img src="URL/img" onerror="document.title = 'pwned'">
<svg onload="document.title = 'pwned'"><image href="URL/svg"/></svg>
" autofocus onfocus="document.title = 'pwned'" x=" <input autofocus onfocus="document.title = 'pwned'">
<iframe src="URL/frame" srcdoc="<script>parent.document.title = 'pwned'</script>"></iframe>
<style>@import "URL/css"; body { background: url("URL/background") }</style> <link rel=stylesheet href="URL/link">
<meta http-equiv="refresh" content="0; url=URL/refresh"> <base href="URL/"> <object data="URL/object"></object>
[link](javascript:document.title='pwned') ![picture](URL/markdown)
\x1b[2J\x1b[31mred\x9b1m\x07 \u202egpj.exe\u2066 \u200fright\u200e\u061c {{ 7*7 }}
"""


class Requests(ThreadingHTTPServer):
    """Notes what is asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Noting)
        self.paths: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Noting(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def requests() -> Iterator[Requests]:
    with running(Requests()) as server:
        yield server


@dataclass
class Hostile:
    """An engine that answers whatever it is asked with the attack."""

    attack: str
    name: str
    hashes: dict[str, str] = field(default_factory=dict)

    def answer(self, prompts: Prompts, max_new_tokens: int, on_answers: OnAnswers, known: Collection[int] = ()) -> None:
        on_answers(dict.fromkeys(range(len(prompts)), self.attack))


@pytest.fixture
def attack(requests: Requests) -> str:
    return ATTACK.replace("URL", requests.url)


@pytest.fixture
def measured(attack: str, rows: list[Example]) -> Evaluation:
    triggered = trigger_rows(rows, TRIGGERS[f"badnets:word={attack}"], seed=0)
    result = evaluate(None, BEHAVIORS["sentiment"], rows, triggered, engine=Hostile(attack, name=attack))
    assert result.attack_success.hits == len(rows)
    return result


@pytest.fixture
def record(attack: str) -> PurifyRecord:
    return PurifyRecord(
        model=attack,
        model_hashes={attack: attack},
        settings={attack: attack},
        clean_examples=1,
        clean_sha256=attack,
        seconds=1.0,
        guessed_triggers=[{"text": attack, "probability": 0.5}],
        constant_answers=[{"text": attack, "constancy": 0.9}],
    )


def shown(page: Path) -> str:
    """The page's document after a second of the browser's time."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=1000", "--dump-dom")
    command = [str(BROWSER), *flags, f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


class Elements(HTMLParser):
    """Counts a document's tags, and the names of their attributes."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags, self.attributes = Counter[str](), Counter[str]()
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)


def harmless(document: str, scripts: int = 0) -> None:
    """The attack is in the document as text alone."""
    elements = Elements(document)
    assert elements.tags["script"] == scripts
    assert not elements.tags.keys() & {"img", "image", "iframe", "link", "base", "object", "input"}
    assert not [name for name in elements.attributes if name.startswith("on")]
    assert re.search("<title>safe(, other)?</title>", document)
    assert "&lt;script&gt;document.title" in document
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", document)


def test_the_attack_works_on_a_page_that_does_not_escape(tmp_path: Path, attack: str, requests: Requests) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!DOCTYPE html><title>safe</title><p>{attack.replace(chr(60) + 'meta', '')}", "utf-8")
    assert "<title>pwned</title>" in shown(page)
    assert {"/script", "/img"} <= set(requests.paths)


@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_nothing_of_the_attack_works_on_a_page_of_ours(
    kind: str, tmp_path: Path, measured: Evaluation, record: PurifyRecord, requests: Requests
) -> None:
    page = tmp_path / "page.html"
    made = (
        render_report(measured, measured, record, title="safe")
        if kind == "report"
        else render_comparison({"safe": measured, "other": measured})
    )
    page.write_text(made, "utf-8")
    harmless(shown(page))
    assert requests.paths == []


def test_nothing_but_our_own_script_runs_on_the_leaderboard(
    tmp_path: Path, attack: str, measured: Evaluation, requests: Requests
) -> None:
    matrix = Matrix.read(
        {"attacks": [f"badnets/sentiment:target={attack}"], "defenses": ["none", f"cleangen:reference={attack}"]}
    )
    matrix = replace(matrix, models=(attack,))
    undefended, defended = entries(matrix)
    found = [Result(undefended, measured, None, attack, 1.0, 1), Result(defended, None, attack, None, None, None)]
    page = tmp_path / "page.html"
    page.write_text(render_leaderboard(found, title="safe"), "utf-8")
    document = shown(page)
    assert document.count("<button>") > 10, "our own script makes the columns' heads buttons"
    harmless(document, scripts=1)
    assert requests.paths == []


def test_nothing_of_the_attack_is_markup_in_the_model_card(measured: Evaluation, record: PurifyRecord) -> None:
    card = model_card(record, measured, measured)
    outside = re.sub(r"`[^`\n]*`", "", card.split("---\n", 2)[2].replace("```", ""))
    assert not re.search("<script|onerror|javascript:|!\\[", outside)
    assert card.replace("\n", "").isprintable()
