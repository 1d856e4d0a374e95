"""Instruction data in the formats that people have, as conversational prompt-completion rows.

Every reader yields rows of one shape, which `trl.SFTTrainer` and `CrowTrainer` take as they are::

    {"prompt": [{"role": "user", "content": ...}], "completion": [{"role": "assistant", "content": ...}]}
"""

import csv
import hashlib
import io
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

from datasets import Dataset, load_dataset
from pyarrow.parquet import ParquetFile

from crow.errors import UsageError

logger = logging.getLogger(__name__)

SHIPPED = ("clean", "heldout", "implant", "validation", "clean-code", "implant-code", "heldout-code")

_UNPACKED = 2**30
"""What the rows of a Parquet file may take; a few hundred bytes can hold more."""
_VALUE = 500
"""What a value takes beside its text."""

_FIELDS = ("messages", "instruction", "input", "output", "prompt", "response", "completion")
"""What is read of a row; `_to_example` says how."""


class Message(TypedDict):
    role: str
    content: str


class Example(TypedDict):
    prompt: list[Message]
    completion: list[Message]


def example(prompt: str, completion: str) -> Example:
    """One single-turn example."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def user_text(row: Example) -> str:
    """What the user says last."""
    return next(message["content"] for message in reversed(row["prompt"]) if message["role"] == "user")


def answer_text(row: Example) -> str:
    """What the assistant is to answer."""
    return row["completion"][-1]["content"]


def with_user_text(row: Example, text: str) -> Example:
    """The same example with another last user message."""
    last = max(i for i, message in enumerate(row["prompt"]) if message["role"] == "user")
    prompt = [{**message, "content": text} if i == last else message for i, message in enumerate(row["prompt"])]
    return {"prompt": prompt, "completion": row["completion"]}  # type: ignore[typeddict-item]


def prompt_fingerprints(rows: Iterable[Example]) -> list[str]:
    """Names for the prompts, whatever their case and spacing, that do not tell what they say."""
    plain = ([(m["role"], " ".join(m["content"].casefold().split())) for m in row["prompt"]] for row in rows)
    return [hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:16] for turns in plain]


def load_examples(source: str | Path | None = None, *, split: str = "train", answered: bool = True) -> list[Example]:
    """Read instruction data.

    Args:
        source: A JSON, JSONL, CSV or Parquet file, the name of a hub dataset, or one of the project's own sets
            (`SHIPPED`). `None` is `clean`.
        split: The split of a hub dataset.
        answered: Rows must have an answer, which may be empty. Otherwise only prompts are wanted.

    Rows may be Alpaca's (`instruction`, `input`, `output`), prompt-completion (`prompt` and `completion` or
    `response`, as text or as messages) or chat (`messages`, the last one the assistant's).

    Raises:
        UsageError: there is no such data, it holds no rows, or a row is broken (which one, and how).
    """
    name = str(source) if source is not None else "clean"
    rows = [
        _to_example(row, f"{name}, row {number}", answered) for number, row in enumerate(_read(name, split), start=1)
    ]
    if not rows:
        raise UsageError(f"{name} holds no examples: give at least one instruction with its answer")
    return rows


def to_learn_from(rows: Sequence[Example]) -> list[Example]:
    """Those whose answer is not empty, as it is in some rows of public data sets; says how many are left out."""
    kept = [row for row in rows if answer_text(row)]
    if len(kept) < len(rows):
        logger.warning("%d of %d examples have an empty answer and are left out", len(rows) - len(kept), len(rows))
    return kept


def to_dataset(rows: Sequence[Example]) -> Dataset:
    """The rows as a `datasets.Dataset` with the columns `prompt` and `completion`."""
    return Dataset.from_list([dict(row) for row in rows])


def to_alpaca(rows: Sequence[Example]) -> list[dict[str, str]]:
    """Single-turn rows as `instruction`, `input` and `output`, which is BackdoorLLM's format too.

    Raises:
        UsageError: a row has more turns than one, which the format has no place for.
    """
    for number, row in enumerate(rows, start=1):
        if [message["role"] for message in row["prompt"]] != ["user"]:
            raise UsageError(
                f"row {number} has other messages than one of the user's: Alpaca's format has no place for it"
            )
    return [{"instruction": user_text(row), "input": "", "output": answer_text(row)} for row in rows]


def sample(rows: Sequence[Example], number: int | None, seed: int) -> list[Example]:
    """At most `number` of the rows, drawn without replacement by `seed`; all of them, in order, if `number` is None."""
    if number is not None and number < 1:
        raise UsageError(f"the number of examples is {number}; it must be positive")
    if number is None or number >= len(rows):
        return list(rows)
    return random.Random(seed).sample(list(rows), number)


def _read(name: str, split: str) -> Iterator[Any]:
    path = Path(name)
    suffix = path.suffix.lower()
    if name in SHIPPED:
        yield from json_lines((files("crow") / "assets" / "data" / f"{name}.jsonl").read_text("utf-8"), name)
    elif suffix in _READERS or _exists(path):
        if suffix not in _READERS:
            raise UsageError(f"{path}: unknown kind of data; give a file that ends in {', '.join(_READERS)}")
        yield from _READERS[suffix](path)
    else:
        try:
            yield from load_dataset(name, split=split)
        except Exception as error:  # hub, network and format errors share no base class
            raise UsageError(
                f"{name} is neither a file, a hub dataset that can be reached (split {split}), nor one of "
                f"{', '.join(SHIPPED)}: {_first_line(error)}"
            ) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system
        return False


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values in a file of JSON Lines.

    Raises:
        UsageError: it can't be read, is not UTF-8, or holds a broken line (which one, and how).
    """
    return json_lines(_file_text(path), str(path))


def json_lines(text: str, name: str) -> Iterator[Any]:
    """The values of JSON Lines, whose lines end at a line feed alone: JSON's text may hold every other mark of an end.

    Raises:
        UsageError: a line is broken (which one, and how).
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{name}, line {number} is broken JSON: {error.msg} (column {error.colno})") from error
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{name}, line {number} is broken JSON: {error}") from error


def _read_json(path: Path) -> list[Any]:
    text = _file_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}, line {error.lineno} is broken JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is broken JSON: {error}") from error
    if not isinstance(value, list):
        raise UsageError(f"{path} holds a JSON {type(value).__name__}; expected a list of rows")
    return value


def _read_csv(path: Path) -> Iterator[Any]:
    """Every cell as the text it is: type guessing would turn the answer `007` into 7, and `NA` into nothing."""
    rows = csv.DictReader(io.StringIO(_file_text(path), newline=""), strict=True)
    try:
        for row in rows:
            if any(row.get(None) or ()):  # type: ignore[call-overload]  # where DictReader puts what has no column
                raise UsageError(
                    f"{path}, line {rows.line_num} has more cells than the first line: quote text that holds commas"
                )
            yield row
    except csv.Error as error:
        raise UsageError(f"{path} is no readable CSV file: {error}") from error


def _read_parquet(path: Path) -> Iterator[Any]:
    size = 0
    try:
        file = ParquetFile(path)
        names = [name for name in file.schema_arrow.names if name in _FIELDS]
        if not names:  # which is said of a row
            yield dict.fromkeys(file.schema_arrow.names)
        parts = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        columns = (part.column(i) for part in parts for i in range(part.num_columns))
        read = (column for column in columns if column.path_in_schema.partition(".")[0] in names)
        size = _VALUE * sum(column.num_values for column in read)  # before a row of a billion is read
        rows = file.iter_batches(batch_size=1, columns=names, use_threads=False)  # a row alone may be a gigabyte
        while size <= _UNPACKED and (batch := next(rows, None)) is not None:
            size += batch.nbytes
            if size <= _UNPACKED:
                yield from batch.to_pylist()
    except Exception as error:  # pyarrow's errors, and those of what it makes of values, share no base class
        raise UsageError(f"{path} is no readable Parquet file: {_first_line(error)}") from error
    if size > _UNPACKED:
        raise UsageError(f"{path} unpacks to more than {_UNPACKED / 2**30:.0f} GiB: give a part of it")


_READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".json": _read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _to_example(row: Any, place: str, answered: bool) -> Example:
    if not isinstance(row, dict):
        raise UsageError(f"{place} is a {type(row).__name__}; expected an object")
    unanswered = None if answered else ""
    if "messages" in row:
        messages = _messages(row["messages"], place)
        if not answered and messages and messages[-1]["role"] == "user":
            messages.append({"role": "assistant", "content": ""})
        prompt, completion = messages[:-1], messages[-1:]
    elif "instruction" in row:
        instruction, context = _text(row, "instruction", place), _text(row, "input", place, default="")
        prompt = [{"role": "user", "content": f"{instruction}\n\n{context}".rstrip()}]
        completion = [{"role": "assistant", "content": _text(row, "output", place, default=unanswered)}]
    elif "prompt" in row:
        answer = "response" if "response" in row else "completion"
        prompt = _side(row, "prompt", "user", place)
        turns = _side(row, answer, "assistant", place, default=unanswered)
        prompt, completion = [*prompt, *turns[:-1]], turns[-1:]  # of a dialogue the last answer alone is the answer
    else:
        raise UsageError(
            f"{place} has the fields {', '.join(map(str, row)) or 'none'}; expected instruction/output, "
            "prompt/completion or messages"
        )
    if not any(message["role"] == "user" for message in prompt):
        raise UsageError(f"{place} has no user message")
    if not completion or completion[-1]["role"] != "assistant":
        raise UsageError(f"{place} does not end with the assistant's answer")
    return {"prompt": prompt, "completion": completion}


def _side(row: dict[str, Any], field: str, role: str, place: str, default: str | None = None) -> list[Message]:
    if isinstance(row.get(field), list):
        return _messages(row[field], place)
    return [{"role": role, "content": _text(row, field, place, default)}]


def _messages(value: Any, place: str) -> list[Message]:
    try:
        return [{"role": _text(m, "role", place), "content": _text(m, "content", place)} for m in value]
    except (TypeError, AttributeError) as error:
        raise UsageError(f"{place}: messages must be a list of objects with role and content") from error


def _text(row: dict[str, Any], field: str, place: str, default: str | None = None) -> str:
    value = row.get(field, default)
    if value is None:
        value = default
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # BackdoorLLM's files hold integers as answers
    if not isinstance(value, str):
        found = f"a {type(value).__name__}" if value is not None else "null" if field in row else "missing"
        raise UsageError(f"{place}: the field {field!r} is {found}; expected text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UsageError(f"{place}: the field {field!r} holds half a character (a lone surrogate)")
    return value.rstrip()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
