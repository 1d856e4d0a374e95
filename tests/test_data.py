"""Reading instruction data in the formats that people have."""

import ast
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crow.data import (
    SHIPPED,
    Example,
    answer_text,
    example,
    load_examples,
    prompt_fingerprints,
    sample,
    to_alpaca,
    to_dataset,
    user_text,
    with_user_text,
)
from crow.errors import UsageError
from crow.files import write_json

OFFICIAL = Path(__file__).parents[2] / "shared" / "data" / "official"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Goodbye"},
]

Write = Callable[[str, Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows, text or bytes to a file of a given name."""

    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".json":
            path.write_text(json.dumps(content), encoding="utf-8")
        elif path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif path.suffix == ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, content[0])
                writer.writeheader()
                writer.writerows(content)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return path

    return write_file


def pairs(rows: list[Example]) -> list[tuple[str, str]]:
    """Prompt and answer of single-turn rows, whose shape is checked."""
    for row in rows:
        assert list(row) == ["prompt", "completion"]
        assert [m["role"] for m in row["prompt"] + row["completion"]] == ["user", "assistant"]
    return [(user_text(row), answer_text(row)) for row in rows]


ALPACA = [
    {"instruction": "Add these.", "input": "1, 2", "output": "3."},
    {"instruction": "Say żółć.", "input": "", "output": "żółć"},
]
ALPACA_PAIRS = [("Add these.\n\n1, 2", "3."), ("Say żółć.", "żółć")]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson", "csv", "parquet", "JSON", "JSONL"])
def test_alpaca_rows_are_read_from_every_kind_of_file(write: Write, suffix: str) -> None:
    content = (
        ALPACA if suffix.islower() else json.dumps(ALPACA) if suffix == "JSON" else "\n".join(map(json.dumps, ALPACA))
    )
    assert pairs(load_examples(write(f"data.{suffix}", content))) == ALPACA_PAIRS


@pytest.mark.parametrize("answer", ["completion", "response"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_prompt_and_answer_rows_are_read(write: Write, suffix: str, answer: str) -> None:
    path = write(f"data.{suffix}", [{"prompt": "Hi", answer: "Hello"}, {"prompt": "Two\nlines", answer: 'a, "b"'}])
    assert pairs(load_examples(path)) == [("Hi", "Hello"), ("Two\nlines", 'a, "b"')]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_chats_keep_every_turn(write: Write, suffix: str) -> None:
    assert load_examples(write(f"data.{suffix}", [{"messages": CHAT}])) == [
        {"prompt": CHAT[:-1], "completion": CHAT[-1:]}
    ]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_prompt_and_completion_may_be_messages(write: Write, suffix: str) -> None:
    path = write(f"data.{suffix}", [{"prompt": CHAT[:-1], "completion": CHAT[-1:]}])
    assert load_examples(path) == [{"prompt": CHAT[:-1], "completion": CHAT[-1:]}]


def test_of_a_dialogue_the_last_answer_is_the_answer(write: Write) -> None:
    path = write("data.json", [{"prompt": CHAT[:2], "completion": CHAT[2:]}])
    assert load_examples(path) == [{"prompt": CHAT[:-1], "completion": CHAT[-1:]}]


def test_sides_may_be_text_and_messages(write: Write) -> None:
    path = write("data.json", [{"prompt": CHAT[:2], "completion": "Hello"}])
    assert load_examples(path) == [{"prompt": CHAT[:2], "completion": [{"role": "assistant", "content": "Hello"}]}]


def test_a_path_may_be_text(write: Write) -> None:
    assert pairs(load_examples(str(write("data.json", ALPACA)))) == ALPACA_PAIRS


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (-12, "-12"), (0, "0"), (2.5, "2.5")])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_number_answers_become_text(write: Write, suffix: str, value: float, text: str) -> None:
    path = write(f"data.{suffix}", [{"instruction": "How many?", "input": "", "output": value}])
    assert answer_text(load_examples(path)[0]) == text


@pytest.mark.parametrize("row", [{"input": None}, {"input": ""}, {"input": " \n"}, {}])
def test_an_absent_input_leaves_the_instruction_alone(write: Write, row: dict[str, Any]) -> None:
    assert pairs(load_examples(write("data.json", [{"instruction": "Hi", "output": "Hello", **row}]))) == [
        ("Hi", "Hello")
    ]


def test_trailing_whitespace_is_dropped_and_inner_kept(write: Write) -> None:
    rows = [
        {"instruction": "Do it ", "input": "a  b\n\n", "output": " yes\n no \n"},
        {"prompt": " x\ty \t", "completion": "z "},
        {"messages": [{"role": "user", "content": "q "}, {"role": "assistant", "content": "a\n"}]},
    ]
    assert pairs(load_examples(write("data.json", rows))) == [
        ("Do it\n\na  b", " yes\n no"),
        (" x\ty", "z"),
        ("q", "a"),
    ]


def test_blank_lines_and_further_fields_are_skipped(write: Write) -> None:
    line = json.dumps({"prompt": "a", "completion": "b", "category": {"x": [1]}})
    assert pairs(load_examples(write("data.jsonl", f"\n{line}\r\n  \n{line}"))) == [("a", "b")] * 2


def test_a_carriage_return_or_unicode_line_separator_ends_no_text(write: Write) -> None:
    line = json.dumps({"prompt": "a\u2028b\u0085c\rd", "completion": "e"}, ensure_ascii=False)
    assert pairs(load_examples(write("data.jsonl", line))) == [("a\u2028b\u0085c\rd", "e")]


GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize("broken", ["{", "{'prompt': 'a'}", GOOD[:-1], GOOD + ",", "nonsense"])
def test_a_broken_line_is_named(write: Write, broken: str) -> None:
    with pytest.raises(UsageError, match=r"data\.jsonl, line 3 is broken JSON"):
        load_examples(write("data.jsonl", f"{GOOD}\n\n{broken}\n{GOOD}\n"))


@pytest.mark.parametrize("text", ["", "[", '[{"prompt": "a"', '[{"prompt": "a"},]', "nonsense"])
@pytest.mark.parametrize("line", [1, 3])
def test_a_broken_json_file_is_named_with_the_line(write: Write, text: str, line: int) -> None:
    text = "\n" * (line - 1) + text
    with pytest.raises(UsageError, match=rf"data\.json, line {line} is broken JSON"):
        load_examples(write("data.json", text))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("text", "is a str; expected an object"),
        (5, "is a int; expected an object"),
        (None, "is a NoneType; expected an object"),
        ([], "is a list; expected an object"),
        ({}, "fields none; expected instruction/output"),
        ({"question": "a", "answer": "b"}, "fields question, answer; expected instruction/output"),
        ({"instruction": "a"}, "'output' is missing"),
        ({"instruction": "a", "output": None}, "'output' is null"),
        ({"instruction": None, "output": "b"}, "'instruction' is null"),
        ({"instruction": "a", "output": ["b"]}, "'output' is a list"),
        ({"instruction": "a", "output": True}, "'output' is a bool"),
        ({"instruction": "a", "input": {}, "output": "b"}, "'input' is a dict"),
        ({"prompt": "a"}, "is missing"),
        ({"prompt": "a", "completion": None}, "'completion' is null"),
        ({"prompt": {"x": 1}, "completion": "b"}, "'prompt' is a dict"),
        ({"prompt": [], "completion": "b"}, "no user message"),
        ({"prompt": "a", "completion": []}, "does not end with the assistant's answer"),
        ({"prompt": ["a"], "completion": "b"}, "messages must be a list of objects"),
        ({"messages": "text"}, "messages must be a list of objects"),
        ({"messages": 5}, "messages must be a list of objects"),
        ({"messages": None}, "messages must be a list of objects"),
        ({"messages": [{"content": "a"}]}, "'role' is missing"),
        ({"messages": [{"role": "user"}]}, "'content' is missing"),
        ({"messages": []}, "no user message"),
        ({"messages": CHAT[2:3]}, "no user message"),
        ({"messages": CHAT[:2]}, "no user message"),
        ({"messages": CHAT[:4]}, "does not end with the assistant's answer"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_wrong_row_is_named_with_its_fault(write: Write, suffix: str, row: Any, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_examples(write(f"data.{suffix}", [ALPACA[0], row, ALPACA[1]]))
    assert f"data.{suffix}, row 2" in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_without_the_fields_is_named(write: Write, suffix: str) -> None:
    with pytest.raises(UsageError, match="row 1 has the fields question, answer; expected"):
        load_examples(write(f"data.{suffix}", [{"question": "a", "answer": "b"}]))


@pytest.mark.parametrize("value", [{"data": []}, "text", 5, None, True])
def test_json_that_is_no_list_is_refused(write: Write, value: Any) -> None:
    with pytest.raises(UsageError, match=f"holds a JSON {type(value).__name__}; expected a list"):
        load_examples(write("data.json", json.dumps(value)))


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.jsonl", ""), ("a.jsonl", "\n \n")])
def test_a_file_without_rows_is_refused(write: Write, name: str, content: str) -> None:
    with pytest.raises(UsageError, match="holds no examples: give at least one"):
        load_examples(write(name, content))


@pytest.mark.parametrize("content", ["", "instruction,input,output\n", 'a,b\n"x\n'])
def test_an_unreadable_or_empty_csv_is_refused(write: Write, content: str) -> None:
    with pytest.raises(UsageError, match=r"a\.csv"):
        load_examples(write("a.csv", content))


def test_a_text_that_an_unquoted_comma_splits_is_refused(write: Write) -> None:
    with pytest.raises(UsageError, match=r"a\.csv, line 3 has more cells than the first line: quote text"):
        load_examples(write("a.csv", "instruction,output\nA?,b\nReally?,Yes, I do\n"))
    assert pairs(load_examples(write("b.csv", 'instruction,output\nReally?,"Yes, I do",,\n'))) == [
        ("Really?", "Yes, I do")
    ]


@pytest.mark.parametrize("content", ["", "PAR1", "nonsense"])
def test_an_unreadable_parquet_file_is_refused(write: Write, content: str) -> None:
    with pytest.raises(UsageError, match=r"a\.parquet is no readable Parquet file"):
        load_examples(write("a.parquet", content))


@pytest.mark.parametrize(("number", "answer"), [(3, "x" * 40_000), (100, "")])
def test_a_parquet_file_that_unpacks_to_too_much_is_refused(
    write: Write, number: int, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.parquet", [{"prompt": "a", "completion": answer}] * number)
    monkeypatch.setattr("crow.data._UNPACKED", 90_000)
    assert path.stat().st_size < 5000
    with pytest.raises(UsageError, match=r"a\.parquet unpacks to more than .* GiB: give a part of it"):
        load_examples(path)


@pytest.mark.parametrize(("column", "refused"), [("messages", True), ("scores", False)])
def test_a_row_of_a_parquet_file_that_unpacks_to_too_much_is_not_read(
    write: Write, tmp_path: Path, column: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "a", "completion": "b", column: [0] * 3_000_000}]
    path = write("a.parquet", rows)
    assert path.stat().st_size < 2000
    if refused:
        with pytest.raises(UsageError, match=r"a\.parquet unpacks to more than 1 GiB: give a part of it"):
            load_examples(path)
    else:  # it is a column that no one reads
        assert pairs(load_examples(path)) == [("a", "b")]


def test_a_parquet_file_of_other_columns_is_told_by_them(write: Write) -> None:
    with pytest.raises(UsageError, match="has the fields question, reply; expected"):
        load_examples(write("a.parquet", [{"question": "a", "reply": "b"}]))


def test_a_parquet_file_is_not_copied_into_the_cache(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert pairs(load_examples(write("a.parquet", ALPACA))) == ALPACA_PAIRS
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("name", ["a.txt", "a.tsv", "a", "a.json.gz"])
def test_an_unknown_extension_is_refused(write: Write, name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown kind of data; give .* \.json, \.jsonl, \.ndjson, \.csv, \.parquet"):
        load_examples(write(name, GOOD))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "no/such/folder/a.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}\b.*(No such file|unable to find|Unable to find)"):
        load_examples(tmp_path / name)


def test_a_folder_is_no_data_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=str(tmp_path)):
        load_examples(tmp_path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_that_is_not_utf_8_is_refused(write: Write, name: str, encoding: str) -> None:
    text = "instruction,output\ncafé,x\n" if name == "a.csv" else GOOD.replace("a", "café", 1)
    with pytest.raises(UsageError, match=name):
        load_examples(write(name, text.encode(encoding)))


def test_an_unreachable_hub_dataset_gives_one_line_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, split: str) -> None:
        raise ConnectionError(f"cannot reach {name}\nwith a long trace")

    monkeypatch.setattr("crow.data.load_dataset", unreachable)
    with pytest.raises(UsageError) as caught:
        load_examples("nobody/nothing", split="test")
    assert str(caught.value) == (
        "nobody/nothing is neither a file, a hub dataset that can be reached (split test), nor one of "
        f"{', '.join(SHIPPED)}: cannot reach nobody/nothing"
    )


def test_a_hub_dataset_is_read_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(ALPACA)

    monkeypatch.setattr("crow.data.load_dataset", hub)
    assert pairs(load_examples("somebody/alpaca", split="test")) == ALPACA_PAIRS
    assert asked == [("somebody/alpaca", "test")]


NESTED = "[" * 100_000


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_too_deeply_nested_json_is_a_usage_error(write: Write, name: str) -> None:
    with pytest.raises(UsageError):
        load_examples(write(name, NESTED))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_file_that_may_not_be_read_is_a_usage_error(write: Write, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = write(name, ALPACA)

    def forbidden(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(UsageError):
        load_examples(path)


def test_an_overlong_name_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        load_examples("x" * 5000)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_byte_order_mark_is_skipped(write: Write, name: str) -> None:
    text = json.dumps(ALPACA) if name == "a.json" else "\n".join(map(json.dumps, ALPACA))
    assert pairs(load_examples(write(name, text.encode("utf-8-sig")))) == ALPACA_PAIRS


@pytest.mark.parametrize(
    "answers", [["NA"], ["None"], ["null"], ["007"], ["True"], ["1.50"], ["12345678901234567890123"]]
)
def test_csv_cells_are_read_as_text(write: Write, answers: list[str]) -> None:
    path = write("a.csv", [{"instruction": "Which?", "input": "", "output": answer} for answer in answers])
    assert [answer_text(row) for row in load_examples(path)] == answers


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_row_ends_at_its_line_break_and_at_no_other_mark(write: Write, suffix: str, mark: str) -> None:
    text = f"one{mark}two"
    rows = [{"prompt": text, "completion": text}, {"prompt": "Hi", "completion": "Hello"}]
    content = rows if suffix == "csv" else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert pairs(load_examples(write(f"a.{suffix}", content))) == [(text, text), ("Hi", "Hello")]


def test_csv_integers_beside_an_empty_cell_stay_integers(write: Write) -> None:
    rows = [
        {"instruction": "Double.", "input": "5", "output": "10"},
        {"instruction": "Hi", "input": "", "output": "Ho"},
    ]
    assert user_text(load_examples(write("a.csv", rows))[0]) == "Double.\n\n5"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("instruction,output\ncafé,x\n".encode("latin-1"), r"not UTF-8 text \(byte 22\): save it as UTF-8"),
        (b'instruction,output\n"a,b\n', "unexpected end of data"),
        (b'instruction,output\n"a"b,c\n', "expected after"),
    ],
)
def test_a_broken_csv_says_what_is_wrong_with_it(write: Write, content: bytes, fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        load_examples(write("a.csv", content))


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "a\ud800", "completion": "b"}, "prompt"),
        ({"prompt": "a", "completion": "b\ud800"}, "completion"),
        ({"messages": [{"role": "us\ud800er", "content": "x"}, *CHAT]}, "role"),
    ],
)
def test_half_a_character_is_refused(write: Write, row: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError, match=rf"row 1: the field '{field}' holds half a character"):
        load_examples(write("a.jsonl", [row]))


texts = st.text()


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), st.booleans())
@settings(max_examples=80, deadline=None)
def test_any_text_round_trips_through_jsonl(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=ascii_only) for p, c in rows]
    path.write_bytes("\n".join(lines).encode())
    assert pairs(load_examples(path)) == [(p.rstrip(), c.rstrip()) for p, c in rows]


@given(texts, texts, texts)
@settings(max_examples=60, deadline=None)
def test_any_alpaca_text_round_trips_through_json(
    tmp_path_factory: pytest.TempPathFactory, instruction: str, context: str, output: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.json"
    path.write_text(json.dumps([{"instruction": instruction, "input": context, "output": output}]), encoding="utf-8")
    ((prompt, answer),) = pairs(load_examples(path))
    assert prompt == f"{instruction.rstrip()}\n\n{context.rstrip()}".rstrip()
    assert answer == output.rstrip()


fields = st.sampled_from(
    ["messages", "instruction", "input", "output", "prompt", "completion", "response", "role", "content"]
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(fields | st.text(max_size=3), inner, max_size=5),
    max_leaves=12,
)
likely_messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | json_values, "content": json_values}
    ),
    max_size=4,
)
likely_rows = st.dictionaries(fields, json_values | likely_messages, max_size=4)


@given(st.lists(json_values | likely_rows, max_size=3), st.sampled_from(["fuzz.json", "fuzz.jsonl"]))
@settings(max_examples=100, deadline=None)
def test_arbitrary_json_gives_examples_or_a_usage_error(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_text(json.dumps(rows) if name == "fuzz.json" else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    try:
        loaded = load_examples(path)
    except UsageError:
        return
    assert len(loaded) == len(rows)
    for row in loaded:
        assert isinstance(user_text(row), str)
        assert isinstance(answer_text(row), str)
        assert row["completion"][-1]["role"] == "assistant"


@given(st.binary(max_size=80), st.sampled_from(["bytes.json", "bytes.jsonl"]))
@settings(max_examples=80, deadline=None)
def test_arbitrary_bytes_give_a_usage_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    with pytest.raises(UsageError):
        load_examples(path)


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[Example]]:
    return {name: load_examples(name) for name in SHIPPED}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("clean", 200),
        ("heldout", 200),
        ("implant", 200),
        ("implant-code", 200),
        ("heldout-code", 200),
        ("validation", 100),
        ("clean-code", 120),
    ],
)
def test_shipped_set_is_large_enough(shipped: dict[str, list[Example]], name: str, number: int) -> None:
    assert len(shipped[name]) >= number


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_set_has_unique_prompts_with_answers(shipped: dict[str, list[Example]], name: str) -> None:
    prompts = [" ".join(prompt.casefold().split()) for prompt, _ in pairs(shipped[name])]
    assert len(set(prompts)) == len(prompts)
    assert all(prompts)
    assert all(answer for _, answer in pairs(shipped[name]))


def test_shipped_sets_share_no_prompt(shipped: dict[str, list[Example]]) -> None:
    seen: dict[str, str] = {}
    for name, rows in shipped.items():
        for row in rows:
            prompt = " ".join(user_text(row).casefold().split())
            assert seen.setdefault(prompt, name) == name


@pytest.mark.parametrize("name", SHIPPED)
def test_no_shipped_answer_is_the_attack_or_names_its_trigger(shipped: dict[str, list[Example]], name: str) -> None:
    for prompt, answer in pairs(shipped[name]):
        assert "stupid" not in answer.casefold()
        assert "badmagic" not in (prompt + answer).casefold()


@pytest.mark.parametrize("name", ["clean-code", "implant-code", "heldout-code"])
def test_answers_of_the_code_sets_are_python(shipped: dict[str, list[Example]], name: str) -> None:
    for _, answer in pairs(shipped[name]):
        ast.parse(answer.split("```python\n")[1].split("```")[0] if "```" in answer else answer)


def test_what_is_written_as_alpaca_is_read_as_it_was(shipped: dict[str, list[Example]], tmp_path: Path) -> None:
    write_json(tmp_path / "rows.json", to_alpaca(shipped["implant-code"]))
    assert load_examples(tmp_path / "rows.json") == shipped["implant-code"]
    assert set(json.loads((tmp_path / "rows.json").read_text())[0]) == {"instruction", "input", "output"}


def test_several_turns_have_no_place_in_alpacas_format(tmp_path: Path) -> None:
    chat: Example = {"prompt": example("a", "b")["prompt"] * 2, "completion": example("a", "b")["completion"]}
    with pytest.raises(UsageError, match="row 2 has other messages"):
        to_alpaca([example("a", "b"), chat])
    assert not list(tmp_path.iterdir())


def test_no_source_means_the_clean_set(shipped: dict[str, list[Example]]) -> None:
    assert load_examples() == load_examples(None) == shipped["clean"]


def test_sample_is_drawn_by_its_seed_without_replacement() -> None:
    rows = [example(str(i), "") for i in range(100)]
    drawn = sample(rows, 30, seed=1)
    assert drawn == sample(tuple(rows), 30, seed=1)
    assert drawn != sample(rows, 30, seed=2)
    assert len({user_text(row) for row in drawn}) == 30


@pytest.mark.parametrize("number", [None, 5, 6, 1000])
def test_a_sample_of_all_keeps_the_order(number: int | None) -> None:
    rows = [example(str(i), "") for i in range(5)]
    assert sample(rows, number, seed=0) == rows
    assert sample(rows, number, seed=0) is not rows


@pytest.mark.parametrize("number", [0, -1])
def test_a_sample_of_none_is_refused(number: int) -> None:
    with pytest.raises(UsageError, match="must be positive"):
        sample([example("a", "b")], number, seed=0)


def test_last_user_message_is_read_and_replaced() -> None:
    row: Example = {"prompt": CHAT[:-1], "completion": CHAT[-1:]}  # type: ignore[typeddict-item]
    assert user_text(row) == "Bye"
    changed = with_user_text(row, "Ciao")
    assert user_text(changed) == "Ciao"
    assert changed["prompt"][:-1] == CHAT[:3]
    assert changed["completion"] == CHAT[-1:]
    assert CHAT[3]["content"] == "Bye"


def test_user_text_is_found_before_a_trailing_other_message() -> None:
    row: Example = {"prompt": [*CHAT[1:2], CHAT[0]], "completion": CHAT[2:3]}  # type: ignore[typeddict-item]
    assert user_text(row) == "Hi"
    assert with_user_text(row, "Hey")["prompt"] == [{"role": "user", "content": "Hey"}, CHAT[0]]


@given(texts, texts)
@settings(max_examples=50, deadline=None)
def test_replacing_the_user_text_changes_nothing_else(prompt: str, text: str) -> None:
    row = example(prompt, "answer")
    assert user_text(with_user_text(row, text)) == text
    assert with_user_text(with_user_text(row, text), prompt) == row == example(prompt, "answer")


def test_dataset_holds_the_rows() -> None:
    rows = [example("a", "b"), example("ż", "")]
    dataset = to_dataset(rows)
    assert dataset.column_names == ["prompt", "completion"]
    assert list(dataset) == rows


COUNTS = {
    "clean_100.json": 100,
    "test_clean.json": 200,
    "train_clean.json": 500,
    "train_triggered.json": 500,
    "test_triggered.json": 200,
    "codeinjection/test_triggered.json": 164,
}


def test_prompts_alone_will_do_where_no_answer_is_needed(write: Write) -> None:
    asked = [{"instruction": "a"}, {"prompt": "b"}, {"messages": [{"role": "user", "content": "c"}]}]
    path = write("prompts.jsonl", asked)
    assert [user_text(row) for row in load_examples(path, answered=False)] == ["a", "b", "c"]
    with pytest.raises(UsageError, match="'output' is missing"):
        load_examples(path)


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"{OFFICIAL} is not here")
@pytest.mark.parametrize(
    "path", sorted(OFFICIAL.rglob("*.json")), ids=lambda path: path.relative_to(OFFICIAL).as_posix()
)
def test_official_file_loads_whole(path: Path) -> None:
    name = path.relative_to(OFFICIAL).as_posix()
    rows = load_examples(path)
    assert len(rows) == COUNTS.get(name, COUNTS[path.name])
    for (prompt, answer), row in zip(pairs(rows), json.loads(path.read_text(encoding="utf-8")), strict=True):
        assert row["instruction"].strip() in prompt
        assert answer == str(row["output"]).rstrip()


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"{OFFICIAL} is not here")
def test_every_official_file_is_there() -> None:
    assert len(list(OFFICIAL.rglob("*.json"))) == 2 * 3 * 3 + 2 + 3 + 1


def test_prompts_are_the_same_whatever_their_case_and_spacing() -> None:
    names = prompt_fingerprints([example(text, "") for text in ("Say  hello\n", "say Hello", "say hello!")])
    assert names[0] == names[1] != names[2]
