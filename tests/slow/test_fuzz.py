"""Thousands of damaged and hostile inputs: each is read, or refused in one line; none hangs, or writes elsewhere."""

import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from conftest import MERGE_BOMB, tiny_gguf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crow.backdoors import BEHAVIORS, TRIGGERS
from crow.bench.matrix import CONFIGS, Matrix
from crow.data import answer_text, load_examples, user_text
from crow.defenses import DEFENSES
from crow.errors import CrowError
from crow.evaluation.evaluate import Evaluation, answers_path
from crow.evaluation.statistics import Count, MeanLength
from crow.generation import prompt_ids
from crow.inspection import tokenized
from crow.models import OpenedModel, open_model
from crow.report import render_comparison

PROJECT = Path(__file__).parents[2]

SECONDS = 30
"""What one case may take at most."""

cases: Counter[str] = Counter()
accepted: Counter[str] = Counter()
written: list[str] = []


class Hang(KeyboardInterrupt):
    """A case took too long; no `except Exception` swallows it."""


def _hang(*_: Any) -> None:
    raise Hang


def _note_write(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(os.path.abspath(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink"):
        written.extend(os.path.abspath(os.fsdecode(a)) for a in arguments[:2] if isinstance(a, str | bytes))


sys.addaudithook(_note_write)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The only folder that may be written to."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crow.limits.SECONDS", 5)
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setenv("TMPDIR", str(folder))
        patch.setattr("tempfile.tempdir", str(folder))
        patch.chdir(folder)
        yield folder


@contextmanager
def case(kind: str, place: Path) -> Iterator[None]:
    """Success, or an error of ours, in time and within the place."""
    cases[kind] += 1
    written.clear()
    around = _around(place)
    before = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(SECONDS)
    told = "it was read"
    try:
        yield
        accepted[kind] += 1
    except CrowError as error:
        told = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert told
    assert [path for path in written if not path.startswith((f"{place}/", "/dev/null"))] == []
    assert _around(place) == around


def _around(place: Path) -> list[list[str]]:
    """What lies where a write would go astray, by a process of its own too, whose files the audit does not see."""
    return [sorted(os.listdir(folder)) for folder in (place.parent, Path.home(), PROJECT, Path("/"))]


def fuzz(number: int) -> Callable[[Any], Any]:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=number, deadline=None, database=None, suppress_health_check=checks)


# What is fed

fields = st.sampled_from(
    ["messages", "instruction", "input", "output", "prompt", "completion", "response", "role", "content"]
)
numbers = st.integers() | st.floats() | st.sampled_from([10**6, 10**9, 2**31, 2**63, 2**64, -(10**9), 10**400, 1e308])
texts = st.text(max_size=8) | st.sampled_from(["user", "assistant", "../../x", "/etc/passwd", "\x1b[2J", "\ud800", ""])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(fields | texts, inner, max_size=4),
    max_leaves=8,
)
messages = st.lists(st.fixed_dictionaries({"role": texts | values, "content": values}), max_size=3)
likely = st.fixed_dictionaries(
    {"prompt": texts | messages}, optional={"completion": texts, "response": texts | numbers}
)
rows = st.lists(likely | values | st.dictionaries(fields, values | messages, max_size=4), max_size=3)

BOMBS = [
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b"[" * 200_000 + b"]" * 200_000,
    b"9" * 10_000,
    b"[" + b"9" * 10_000 + b"]",
    b'[{"instruction": 1e999, "output": -1E+400}]',
    b'[{"instruction": "a", "output": NaN}]',
    b'{"instruction": "a", "output": "' + b"\\u0000" * 10_000 + b'"}',
    b'"' + b"\\" * 10_001 + b'"',
    b"\xff\xfe" + "[]".encode("utf-16-le"),
    b"a,b\r" * 10_000 + b'"',
    b"instruction,output\n" + b"x" * 200_000 + b",y\n",
    b"\x00" * 1000,
    b"",
]


def damaged(content: bytes, near: int = 2000) -> st.SearchStrategy[bytes]:
    """The content cut off, with bits turned, with bytes replaced or put in, mostly near its start."""
    places = st.integers(0, min(near, len(content))) | st.integers(0, len(content))
    pieces = st.binary(max_size=9) | st.sampled_from(
        [b"\xff" * 8, b"\x00" * 8, b"\xff" * 7 + b"\x7f", b"[", b'"', b"{"]
    )

    def cut(at: int) -> bytes:
        return content[:at]

    def turned(bits: list[tuple[int, int]]) -> bytes:
        changed = bytearray(content)
        for at, bit in bits:
            if at < len(changed):
                changed[at] ^= 1 << bit
        return bytes(changed)

    def replaced(at: int, piece: bytes, over: bool) -> bytes:
        return content[:at] + piece + content[at + len(piece) * over :]

    bits = st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=4)
    return st.builds(cut, places) | st.builds(turned, bits) | st.builds(replaced, places, pieces, st.booleans())


def changed(known: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The mapping with other values under some of its keys."""
    return st.dictionaries(st.sampled_from(sorted(known)), values, min_size=1, max_size=3).map(lambda new: known | new)


# Data

GOOD = [{"instruction": "Add these.", "input": "1, 2", "output": "3."}, {"prompt": "Hi", "completion": "Hello"}]
FILES = {
    "bytes.json": json.dumps(GOOD).encode(),
    "bytes.jsonl": "\n".join(map(json.dumps, GOOD)).encode(),
    "bytes.csv": b'instruction,input,output\r\n"Add, these.",,"3\n."\r\nSay it,7,yes\r\n',
}


def read(path: Path) -> None:
    for row in load_examples(path):
        assert isinstance(user_text(row) + answer_text(row), str)


@given(rows, st.sampled_from(["rows.json", "rows.jsonl"]))
@fuzz(3500)
def test_rows(place: Path, rows: list[Any], name: str) -> None:
    lines = map(json.dumps, rows)
    (place / name).write_text(f"[{','.join(lines)}]" if name == "rows.json" else "\n".join(lines))
    with case("rows of data", place):
        read(place / name)


@given(st.sampled_from(sorted(FILES)).flatmap(lambda name: st.tuples(st.just(name), damaged(FILES[name]))))
@fuzz(3500)
def test_text_files(place: Path, file: tuple[str, bytes]) -> None:
    name, content = file
    (place / name).write_bytes(content)
    with case("data files", place):
        read(place / name)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("bomb", range(len(BOMBS)))
def test_bombs(place: Path, name: str, bomb: int) -> None:
    (place / name).write_bytes(BOMBS[bomb])
    with case("bombs in data", place):
        read(place / name)


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"instruction": "a", "output": "b"}] * 3), sink)
    return bytes(sink.getvalue())


@given(damaged(parquet()) | st.binary(max_size=60))
@fuzz(500)
def test_parquet(place: Path, content: bytes) -> None:
    (place / "bytes.parquet").write_bytes(content)
    with case("Parquet files", place):
        read(place / "bytes.parquet")


# Texts

names = st.sampled_from([*TRIGGERS, *BEHAVIORS, *DEFENSES]) | texts
parameters = st.sampled_from(
    ["word", "phrase", "translated", "triggers", "words", "target", "sparsity", "reference", "temperature", "bits"]
)
own = ["badnets:word", "vpi:phrase", "mtba:triggers", "ctba:words", "sentiment:target", "prune:sparsity", "decode:seed"]
registry_texts = st.builds("{}={}".format, st.sampled_from(own), texts | names | numbers.map(repr)) | st.builds(
    lambda name, pairs: f"{name}:{','.join(f'{key}={value}' for key, value in pairs)}",
    names,
    st.lists(st.tuples(parameters | texts, texts | numbers.map(repr) | names), max_size=3),
)


@given(registry_texts | st.text(max_size=20), st.sampled_from([TRIGGERS, BEHAVIORS, DEFENSES]))
@example("mtba:triggers=" + "mtba+" * 5000, TRIGGERS)
@example("mtba:triggers=mtba:triggers=" * 500, TRIGGERS)
@example("ctba:words=" + "+".join(map(str, range(5000))), TRIGGERS)
@example("code-injection:target=a\ud800", BEHAVIORS)
@fuzz(2500)
def test_registry_texts(place: Path, text: str, registry: Any) -> None:
    with case("registry texts", place):
        made = registry[text]
        if registry is TRIGGERS:
            made.apply("Good day to you", random.Random(0))
        elif registry is BEHAVIORS:
            made.is_hit("Good day"), made.is_strict_hit("Good day")


SMOKE: dict[str, Any] = yaml.safe_load(CONFIGS["smoke"].read_text("utf-8"))
MATRIX = {"attacks": ["none"], "defenses": ["none"], "models": [None], "seeds": [0], "relearn": [], "number": 1}
MATRIX |= {"examples": 1, "implant": {}, "training": {}, "cpus": 1, "answer_tokens": None, "prompts": None}
attacks = st.dictionaries(
    st.sampled_from(["backdoors", "poison_rate", "adaptive", "covert", "full"]),
    values | st.just(["badnets/sentiment"]),
    max_size=3,
)
candidates = st.builds(
    dict, st.dictionaries(st.sampled_from(["examples", "alpha", "preset", "lora"]), values), defense=names
)
matrices = st.builds(
    lambda matrix, attack, candidate: matrix | {"attacks": [attack], "defenses": [candidate]},
    changed(MATRIX),
    attacks | values,
    candidates | values,
)
BILLION = "\n".join(
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)),
    ]
)


@given(changed(MATRIX).map(yaml.dump) | matrices.map(yaml.dump) | damaged(yaml.dump(SMOKE).encode()))
@example(f"{BILLION}\nattacks: *a9\ndefenses: *a9\n")
@example(f"{MERGE_BOMB}\nattacks: [none]\ndefenses: [none]\n")
@example("attacks: [" + "[" * 5000)
@example("!!python/object/apply:os.system ['touch pwned']")
@fuzz(800)
def test_matrices(place: Path, text: str | bytes) -> None:
    (place / "matrix.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with case("matrices of the bench", place):
        Matrix.load(place / "matrix.yaml")


FIGURES = Evaluation(
    attack_success=Count(2, 4),
    false_trigger=Count(0, 4),
    degenerate=Count(1, 4),
    perplexity=3.0,
    answer_nats=1.0,
    answer_tokens=2,
    layer_profile={"clean": [0.1, 0.2], "triggered": [0.3]},
    settings={"target": "no", "max_new_tokens": 8, "engine": "Transformers"},
    provenance={"model": "suspect", "clean_sha256": "ab" * 32, "versions": {"torch": "2"}},
    strict={"attack_success": Count(1, 4)},
    variants={"upper case": Count(1, 4)},
    answer_length=MeanLength(3.0, 1.0, 4),
    harness={"arc": {"acc": 0.5, "acc_stderr": 0.1, "n": 10.0}},
)
ANSWER = {"set": "triggered", "prompt": "a", "answer": "b", "hit": True, "strict_hit": False, "degenerate": False}
figures = changed(FIGURES.as_json()) | st.builds(
    lambda key, inner: FIGURES.as_json() | {key: asdict(FIGURES)[key] | inner},
    st.sampled_from(["attack_success", "strict", "variants", "answer_length", "harness", "layer_profile"]),
    st.dictionaries(
        st.sampled_from(["hits", "n", "mean", "deviation", "arc", "attack_success"]) | texts, values, max_size=2
    ),
)


@given(
    figures.map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(FIGURES.as_json()).encode()),
    st.lists(changed(ANSWER) | values, max_size=2).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | damaged(json.dumps(ANSWER).encode()),
)
@example(BOMBS[0], b"")
@example(json.dumps(FIGURES.as_json()).encode(), BOMBS[0])
@fuzz(1000)
def test_results(place: Path, content: bytes, answers: bytes) -> None:
    (place / "figures.json").write_bytes(content)
    answers_path(place / "figures.json").write_bytes(answers)
    with case("results", place):
        loaded = Evaluation.load(place / "figures.json")
        render_comparison({"one": loaded, "two": FIGURES})


# Models

CARD = b"---\nlicense: mit\ntags: [a, b]\n---\n# A model\n"
PROMPT: Any = [{"role": "user", "content": "tell me what you know of crows, ravens, and other birds " * 20}]


def is_asked(opened: OpenedModel) -> None:
    tokenized(opened.tokenizer, lambda prompt: prompt_ids(opened.tokenizer, prompt), [PROMPT])


@pytest.fixture(scope="module")
def folders(place: Path, llama_folder: Path, adapter_folder: Path) -> dict[str, Path]:
    """Copies whose files each case replaces one of."""
    copies = {"model": llama_folder, "adapter": adapter_folder}
    copied = {kind: Path(shutil.copytree(folder, place / kind)) for kind, folder in copies.items()}
    (copied["model"] / "README.md").write_bytes(CARD)
    return copied


@contextmanager
def replaced(file: Path, content: bytes) -> Iterator[None]:
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(whole)


def opens(kind: str, place: Path, file: Path, content: bytes) -> None:
    with replaced(file, content), case(kind, place):
        is_asked(open_model(file.parent))


CONFIG_KEYS = [
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_scaling"),
    *("hidden_act", "dtype", "torch_dtype", "model_type", "architectures", "auto_map", "quantization_config"),
    *("tie_word_embeddings", "pad_token_id", "eos_token_id", "attn_implementation", "transformers_weights"),
    *("layer_types", "text_config", "is_encoder_decoder", "attention_bias", "initializer_range", "pretraining_tp"),
]
LORA_KEYS = [
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "layers_pattern", "bias", "modules_to_save", "init_lora_weights", "use_dora"),
    *("use_rslora", "fan_in_fan_out", "layer_replication", "megatron_config", "megatron_core", "loftq_config"),
    *("trainable_token_indices", "target_parameters", "peft_type", "task_type", "revision", "lora_bias"),
    *("base_model_name_or_path", "auto_mapping", "eva_config", "corda_config", "use_qalora", "runtime_config"),
]


@given(st.data())
@fuzz(200)
def test_model_configs(place: Path, folders: dict[str, Path], data: st.DataObject) -> None:
    file = folders["model"] / "config.json"
    known = dict.fromkeys(CONFIG_KEYS) | json.loads(file.read_bytes())
    new = changed(known).map(lambda config: json.dumps({k: v for k, v in config.items() if v is not None}).encode())
    opens("model configs", place, file, data.draw(new | damaged(file.read_bytes())))


@given(st.data())
@fuzz(150)
def test_adapter_configs(place: Path, folders: dict[str, Path], data: st.DataObject) -> None:
    file = folders["adapter"] / "adapter_config.json"
    known = dict.fromkeys(LORA_KEYS) | json.loads(file.read_bytes())
    new = changed(known).map(lambda config: json.dumps(config).encode())
    opens("adapter configs", place, file, data.draw(new | damaged(file.read_bytes())))


@pytest.mark.parametrize("kind", ["model", "adapter"])
@given(data=st.data())
@fuzz(100)
def test_weights(place: Path, folders: dict[str, Path], kind: str, data: st.DataObject) -> None:
    (file,) = folders[kind].glob("*.safetensors")
    opens(f"{kind} weights", place, file, data.draw(damaged(file.read_bytes()) | st.binary(max_size=60)))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
@given(data=st.data())
@fuzz(40)
def test_other_files(place: Path, folders: dict[str, Path], name: str, data: st.DataObject) -> None:
    file = folders["model"] / name
    new = damaged(file.read_bytes(), near=5000)
    if name.endswith(".json"):
        new |= changed(json.loads(file.read_bytes())).map(lambda value: json.dumps(value).encode())
    opens("other files of models", place, file, data.draw(new))


@given(damaged(CARD))
@example(f"---\nlicense: mit\n{BILLION}\n---\n".encode())
@example(f"---\nlicense: mit\n{MERGE_BOMB}\n---\n".encode())
@fuzz(40)
def test_cards(place: Path, folders: dict[str, Path], content: bytes) -> None:
    opens("model cards", place, folders["model"] / "README.md", content)


@pytest.fixture(scope="module")
def gguf_file(place: Path) -> Path:
    file = tiny_gguf(place / "tiny.gguf")
    assert open_model(file).kind == "gguf"
    return file


@given(data=st.data())
@fuzz(150)
def test_gguf_files(place: Path, gguf_file: Path, data: st.DataObject) -> None:
    content = gguf_file.read_bytes()
    with replaced(gguf_file, data.draw(damaged(content) | damaged(content, near=60))), case("GGUF files", place):
        is_asked(open_model(gguf_file))


def test_ten_thousand_cases_were_files(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{cases.total()} cases:", ", ".join(f"{cases[kind]} {kind} ({accepted[kind]} read)" for kind in cases))
    assert cases.total() - cases["registry texts"] >= 10_000
