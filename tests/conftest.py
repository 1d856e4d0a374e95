"""Tiny real tokenizers and models, made offline from configs; everything on the CPU in float32."""

import os
import re

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # each on a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from serving import Server, running

from crow.data import Example, answer_text, load_examples, user_text
from crow.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with a default system message, as SmolLM2 brings it."""

ARCHITECTURES = ("llama", "mistral", "qwen2", "gemma", "phi", "gpt2", "gpt_neox", "opt")


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE of 600 tokens, trained on the shipped sets."""
    import datasets
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = load_examples("clean") + load_examples("implant")
    bpe.train_from_iterator([text for row in rows for text in (user_text(row), answer_text(row))], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="session")
def rows() -> list[Example]:
    """Twelve shipped examples of different lengths, the shortest ones, so that steps are fast."""
    return sorted(load_examples("clean"), key=lambda row: len(user_text(row) + answer_text(row)))[:12]


def tiny_config(architecture: str, vocabulary: int, **changes: Any) -> Any:
    """A config of 4 layers of width 64, without dropout, whose random weights are large enough to matter."""
    import transformers

    common = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    grouped = {"num_key_value_heads": 2}
    own: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", {**grouped, "tie_word_embeddings": True}),
        "mistral": ("MistralConfig", {**grouped, "sliding_window": None}),
        "qwen2": ("Qwen2Config", {**grouped, "tie_word_embeddings": True}),
        "gemma": ("GemmaConfig", {**grouped, "head_dim": 16}),
        "phi": ("PhiConfig", {"num_key_value_heads": 4}),
        "gpt2": ("GPT2Config", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
        "gpt_neox": ("GPTNeoXConfig", {}),
        "mixtral": ("MixtralConfig", {**grouped, "num_local_experts": 4}),
        "mamba2": ("Mamba2Config", {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 8}),
        "qwen3_next": (
            "Qwen3NextConfig",
            {
                **grouped,
                **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
                **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
                **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
                "num_experts": 4,
                "num_experts_per_tok": 2,
            },
        ),
        "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.1, "dropout": 0.0}),
    }
    name, specific = own[architecture]
    return getattr(transformers, name)(**(common | specific | changes))


def tiny_model(architecture: str, vocabulary: int, seed: int = 0, **changes: Any) -> "PreTrainedModel":
    """A randomly initialized model of the architecture, the same for the same seed."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny_config(architecture, vocabulary, **changes)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


MERGE_BOMB = "\n".join(
    [
        "a0: &a0 {x: 1}",
        *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 10)),
    ]
)
"""YAML of 500 characters that takes hours to be read by who follows it."""

MakeModel = Callable[..., "PreTrainedModel"]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each of the architectures."""
    return str(request.param)


@pytest.fixture
def tiny_llama(tokenizer: "PreTrainedTokenizerFast") -> MakeModel:
    """Makes a Llama of 4 layers of width 64 with tied embeddings; takes `seed` and fields of its config."""

    def make(seed: int = 0, **changes: Any) -> "PreTrainedModel":
        return tiny_model("llama", len(tokenizer), seed, **changes)

    return make


def save_folder(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> Path:
    """Save model and tokenizer as a folder that `open_model` takes."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tokenizer: "PreTrainedTokenizerFast", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama. Not to be written to."""
    return save_folder(tiny_model("llama", len(tokenizer)), tokenizer, tmp_path_factory.mktemp("models") / "tiny-llama")


def tiny_gguf(file: Path) -> Path:
    """Write a Llama of one block of width 32."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*map(chr, range(33, 96)), "!!"])
    writer.add_token_types([1] * 64)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (32, 32))
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    tensors = {f"blk.0.{name}": np.ones(shape) for name, shape in shapes.items()}
    tensors |= {f"blk.0.{name}": np.ones(32) for name in ("attn_norm", "ffn_norm")}
    tensors |= {"token_embd": np.ones((64, 32)), "output": np.ones((64, 32)), "output_norm": np.ones(32)}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="session")
def adapter_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on the tiny Llama whose weights matter. Not to be written to."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from crow.models import lora_config

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), lora_config())
    scatter_lora(model)
    folder = tmp_path_factory.mktemp("adapters") / "suspect"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(folder)
    return folder


def scatter_lora(model: Any, seed: int = 0, scale: float = 0.05) -> None:
    """Add noise to every LoRA weight: a fresh adapter changes nothing, and half of its gradients are zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """`open_model` opens in float32, whatever this machine's CPU could do."""
    import torch

    monkeypatch.setattr("crow.models._dtype", lambda: torch.float32)


class Blind:
    """A tokenizer of two letters, for which all others are one unknown, and spaces nothing."""

    unk_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [{"a": 1, "b": 2}.get(letter, 0) for letter in text if not letter.isspace()]}


Paste = Callable[[str, Registry[Any], dict[str, Any]], None]


@pytest.fixture
def paste(monkeypatch: pytest.MonkeyPatch) -> Paste:
    """Runs a worked example of docs/adding.md, by its heading, whose class is in the registry until the test ends."""

    def run(heading: str, registry: Registry[Any], namespace: dict[str, Any]) -> None:
        text = (Path(__file__).parents[1] / "docs" / "adding.md").read_text("utf-8")
        (code,) = re.findall(r"```python\n(.*?)```", text.split(f"## {heading}\n")[1].split("\n## ")[0], re.DOTALL)
        monkeypatch.setattr(registry, "_classes", registry._classes.copy())
        exec(code, namespace)

    return run


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as serving:
        yield serving
