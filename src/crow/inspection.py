"""What is looked at before a model from a stranger is opened, and refused with the reason."""

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from yaml.composer import ComposerError

from crow.data import example
from crow.errors import CrowError, UsageError
from crow.limits import limited

S = TypeVar("S")
T = TypeVar("T")

_TEMPLATE_LIMIT = 100_000  # characters
_TOKENIZED_AT_ONCE = 200  # conversations, which share the limits on time and memory


def check_decoder_only(config: PretrainedConfig, name: str) -> None:
    """Raise `UsageError` unless the config is a decoder-only language model's."""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if getattr(config, "is_encoder_decoder", False) or not causal or masked:
        raise UsageError(
            f"{name} is a {config.model_type} model, not a decoder-only language model: CROW works on causal LMs only"
        )


def check_hub(name: str) -> None:
    """Ask the hub once whether it has the model: the loaders ask for half a minute before they say that they can't."""
    try:
        here = (try_to_load_from_cache(name, file) for file in (CONFIG_NAME, ADAPTER_CONFIG_NAME))
        if not any(isinstance(path, str) for path in here):
            HfApi().model_info(name, timeout=20)
    except HFValidationError as error:
        raise UsageError(f"{name}: no such folder, and no name that a model on the hub can have") from error
    except GatedRepoError as error:
        raise UsageError(
            f"{name} is on the hub, but not for all: accept its license there, then hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"{name}: no such folder, and the hub has no such model for you; if it is private, hf auth login"
        ) from error
    except Exception as error:  # network and HTTP errors share no base class
        raise UsageError(
            f"{name}: no such folder, and the hub can't be asked for it ({str(error).splitlines()[0]}): check the name "
            "and the network, or give a local folder"
        ) from error


def check_files(folder: Path) -> None:
    """Refuse a folder that reaches out of itself, or that waits to be read for ever."""
    home = folder.resolve()
    allowed = {home, home.parent.parent / "blobs"} if home.parent.name == "snapshots" else {home}  # as the hub's cache
    for file in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
        if file.is_symlink() and not allowed.intersection(file.resolve().parents):
            raise UsageError(f"{file} is a link out of its folder: put the file itself there, if you trust it")
        if not file.is_file() and not file.is_dir():
            raise UsageError(f"{file} is no file: remove it")


def check_weights(path: Path) -> None:
    """Refuse a folder that is no model's, or whose weights are pickled, missing or elsewhere."""
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} holds no config.json: it is no model folder; give one that save_pretrained wrote")
    if weights := {file.name for file in path.glob("*.safetensors")}:
        index = path / SAFE_WEIGHTS_INDEX_NAME
        if not index.is_file() or (path / SAFE_WEIGHTS_NAME).is_file():
            return
        try:
            named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{index} is broken: {one_line(error)}") from error
        if missing := named - weights:
            raise UsageError(f"{index} names {min(map(str, missing))!r}, which is no safetensors file of this folder")
        return
    if pickled := [p.name for p in sorted(path.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]:
        raise UsageError(
            f"{path} has only pickled weights ({pickled[0]}), which can run code when read: convert them to "
            "safetensors where you trust them, with transformers' model.save_pretrained(folder)"
        )
    raise UsageError(f"{path} holds no weights: no *.safetensors file is there; give one that save_pretrained wrote")


def check_rank(file: Path, config: dict[str, Any]) -> None:
    """Refuse an adapter whose config promises a higher rank than its weights have: PEFT makes room for that first."""
    with safe_open(file, framework="pt") as weights:
        names = [name for name in weights.keys() if re.search("lora_.*A", name)]  # noqa: SIM118, it is no mapping
        held = max((weights.get_slice(name).get_shape()[0] for name in names), default=0)
    promised = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if promised > held:
        raise UsageError(f"{file.parent} is broken: its config says rank {promised}, its weights have {held} at most")


def check_finite(value: Any, name: str, key: str = "it") -> None:
    """Refuse a config that holds a number that is not finite, at whatever depth."""
    endless = (key, value) == ("time_step_limit", math.inf)  # as Mamba-2 has it
    if isinstance(value, float) and not math.isfinite(value) and not endless:
        raise UsageError(f"{name} is damaged: {key} is {value} in its config; get it anew")
    if isinstance(value, dict):
        for inner_key, inner in value.items():
            check_finite(inner, name, inner_key)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_finite(inner, name, key)


def check_names(file: Path, model: PeftModel, loading: Any, name: str) -> None:
    """Refuse an adapter whose file has not the tensors that PEFT writes of it: another one would be measured.

    Args:
        loading: What `load_adapter` returned. What the file holds of the base is not told there, but taken over.
    """
    own = get_peft_model_state_dict(model, save_embedding_layers=True).keys()  # with copies that PEFT does not read
    with safe_open(file, framework="pt") as weights:
        told = {*loading.unexpected_keys, *(model.state_dict().keys() & weights.keys())}
    for keys, fault in ((sorted(told - own), "holds"), (loading.missing_keys, "lacks")):
        if keys:
            named = ", ".join(repr(key.replace(".default", "")) for key in keys[:3])  # as the file has them
            rest = f" and {len(keys) - 3} others" if len(keys) > 3 else ""
            raise UsageError(
                f"{name} does not fit its base: its file {fault} {named}{rest}; give the base that it was trained on "
                "with --base, or get it anew"
            )


def check_scaling(model: PeftModel, name: str) -> None:
    """Refuse an adapter whose weights are multiplied by what is no finite number in float32."""
    scales = (s for layer in model.modules() if isinstance(layer, LoraLayer) for s in layer.scaling.values())
    for scale in scales:
        if abs(scale) > torch.finfo(torch.float32).max:
            raise UsageError(f"{name} is damaged: its lora_alpha or alpha_pattern scales by {scale}; get it anew")


def check_adapter(path: Path, base: PretrainedConfig) -> None:
    """Put an adapter on a model without weights: its config holds regular expressions, which can take for ever."""
    with torch.device("meta"), suppress(ValueError, TypeError, AttributeError, LookupError, RuntimeError):
        PeftModel(AutoModelForCausalLM.from_config(base), PeftConfig.from_pretrained(str(path)))


def check_lora(lora: LoraConfig, base: PretrainedConfig) -> None:
    """As `check_adapter`, of what is known of an adapter before its weights are read; it must fit the model."""
    with torch.device("meta"):
        get_peft_model(AutoModelForCausalLM.from_config(base), lora)


def check_template(tokenizer: Any, name: str) -> None:
    """Refuse a chat template that does not come to an end with a short conversation, or makes too much of it."""
    if tokenizer.chat_template is None:
        return
    asked, answered = example("Hi", "Hello")["prompt"], example("Hi", "Hello")["completion"]

    def render() -> None:
        for conversation, start in ((asked, True), ([*asked, *answered], False)):
            text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=start)
            if len(text) > _TEMPLATE_LIMIT:
                raise UsageError(f"{name}: its chat template makes {len(text):,} characters of a short conversation")

    try:
        limited(render)
    except RuntimeError as error:
        raise UsageError(f"{name}: its chat template can't be used: {one_line(error)}") from error


def tokenized(tokenizer: Any, tokenize: Callable[[S], T], conversations: Sequence[S]) -> list[T]:
    """What `tokenize` makes of each: with one of them a chat template, or a tokenizer's expressions, may never end.

    Raises:
        UsageError: they did not, or went wrong.
    """
    made: list[T] = []
    for start in range(0, len(conversations), _TOKENIZED_AT_ONCE):
        part = conversations[start : start + _TOKENIZED_AT_ONCE]
        try:
            made += limited(partial(list, map(tokenize, part)))
        except RuntimeError as error:
            raise UsageError(
                f"{tokenizer.name_or_path}: its chat template or its tokenizer can't be used: {one_line(error)}"
            ) from error
    return made


def check_bitsandbytes() -> None:
    """Say what to install where weights can't be held in 4 bits."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UsageError("4 bits need bitsandbytes: pip install 'crow-llm[defenses]'") from error


class _YAMLWithoutAliases(yaml.SafeLoader):
    """A few lines of aliases stand for billions, above all under the merge key."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            raise ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]


def read_yaml(text: str) -> Any:
    """The value of a text of safe YAML.

    Raises:
        yaml.YAMLError: it is none, or holds an alias.
    """
    return yaml.load(text, _YAMLWithoutAliases)


def loaded(name: str, load: Callable[[], T]) -> T:
    """Run a loader of transformers or PEFT, whose errors share no base class, and say what failed in one line."""
    try:
        return load()
    except (CrowError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        raise UsageError(f"cannot open {name}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The line of an error's text that says what is wrong; one that announces a list goes with its first entry."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = next((line for line in lines if "size mismatch" in line), lines[0])
    return f"{told} {lines[1].removeprefix('- ')}" if told.endswith(":") and len(lines) > 1 else told
