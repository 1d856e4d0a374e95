"""What a purification would take, in memory and time, told from a model's config alone.

One training step is gone through on tensors that have shapes and no content, with the model's own code: so the estimate
holds for any architecture, attention and gradient checkpointing included.
"""

import math
import warnings
import weakref
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from crow.consistency import aligned_inconsistency
from crow.divergence import kl_from_top
from crow.errors import UsageError
from crow.hooks import Recording, record
from crow.models import open_config, weights_dtype
from crow.purification import CLEAN_EXAMPLES, training_config
from crow.trainer import CrowConfig

_ADAM_MOMENTS = 2
_ANSWER_SHARE = 0.5  # of a row's tokens, where nothing is said of it


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes; `peak_bytes` is all of them together, without what Python and its libraries hold."""

    parameters: int
    trained_parameters: int
    dtype: str
    weight_bytes: int
    """Of the model, frozen."""
    training_bytes: int
    """Of what is trained, its gradients and AdamW's two moments."""
    target_bytes: int
    """Of the suspect's recorded answers, which are kept in the machine's own memory."""
    activation_bytes: int
    """What the largest pass of a step holds at its peak, but for the logits."""
    logit_bytes: int
    peak_bytes: int
    step_flops: int
    steps: int
    tflops: float
    """Speed that the times are of: what matrix products of the model's width reach here, if not given."""
    step_seconds: float
    seconds: float
    """Of the steps together: no less, since not all of a step is matrix products and something precedes the first."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    source: str | Path | None = None,
    *,
    base: str | Path | None = None,
    preset: str = "default",
    tokens: int = 256,
    answer_tokens: int | None = None,
    examples: int = CLEAN_EXAMPLES,
    tflops: float | None = None,
    **settings: Any,
) -> Plan:
    """Estimate what `crow.purify` would take. Nothing is opened, and of a hub model only the config is downloaded.

    Args:
        source: As in `crow.models.open_model`; so is `base`.
        preset: A name in `crow.trainer.PRESETS`.
        tokens: Length of a row, its answer included.
        answer_tokens: Length of the answer; half of the row by default.
        examples: Number of clean examples.
        tflops: Speed of this machine in 10^12 operations a second, if it is not to be measured.
        settings: Fields of `CrowConfig`, as for `crow.purify`.

    Raises:
        UsageError: there is no such model, preset or setting.
    """
    config = training_config(preset, settings)
    answer = math.ceil(tokens * _ANSWER_SHARE) if answer_tokens is None else answer_tokens
    if not 0 < answer < tokens:
        raise UsageError(f"answers of {answer} tokens don't leave a prompt in rows of {tokens}: give longer rows")
    model_config, lora = open_config(source, base=base)
    dtype = weights_dtype(model_config)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
        parameters = sum(p.numel() for p in model.parameters())
        weight_bytes = sum(p.nbytes for p in model.parameters())
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as the trainer's parent does
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        model.tie_weights()
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with _Accounts() as accounts:
            _step(model, config, tokens, answer, accounts)
    targets = examples * answer * config.target_top_k * 12 if config.objective == "suspect" else 0
    training_bytes = sum(p.nbytes for p in trained) * (2 + _ADAM_MOMENTS)
    width = model_config.get_text_config().hidden_size
    tflops = _speed(config.per_device_train_batch_size * tokens, width, dtype) if tflops is None else tflops
    steps = math.ceil(examples / config.per_device_train_batch_size / config.gradient_accumulation_steps)
    steps = math.ceil(steps * config.num_train_epochs) if config.max_steps < 0 else config.max_steps
    flops = accounts.flops * config.gradient_accumulation_steps
    return Plan(
        parameters=parameters,
        trained_parameters=sum(p.numel() for p in trained),
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=weight_bytes,
        training_bytes=training_bytes,
        target_bytes=targets,
        activation_bytes=accounts.before_head,
        logit_bytes=accounts.peak - accounts.before_head,
        peak_bytes=weight_bytes + training_bytes + targets + accounts.peak,
        step_flops=flops,
        steps=steps,
        tflops=tflops,
        step_seconds=flops / tflops / 1e12,
        seconds=steps * flops / tflops / 1e12,
    )


class _Accounts(TorchDispatchMode):
    """Counts operations, and the bytes held by tensors made while it is on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.held = self.peak = self.before_head = 0
        self._seen = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return output

    def _free(self, size: int) -> None:
        self.held -= size


def _step(model: PeftModel, config: CrowConfig, tokens: int, answer: int, accounts: _Accounts) -> None:
    """The passes of `CrowTrainer.compute_loss`, by their shapes."""
    inner: Any = model.get_base_model()
    text = inner.config.get_text_config()
    head, top = inner.get_output_embeddings(), min(config.target_top_k, text.vocab_size)

    def note(module: Any, args: Any, output: Any) -> None:
        accounts.before_head = max(accounts.before_head, accounts.held)

    inner.base_model.register_forward_hook(note)

    def forward(rows: int, tokens: int, answer: int, ascends: bool = False) -> tuple[Tensor, Tensor]:
        embeddings = torch.zeros(rows, tokens, text.hidden_size, dtype=inner.dtype, requires_grad=ascends)
        inputs = {"inputs_embeds": embeddings, "attention_mask": torch.ones(rows, tokens, dtype=torch.long)}
        if config.objective == "lm" and answer:
            labels = torch.zeros(rows, tokens, dtype=torch.long)
            return model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(), embeddings
        handle = head.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, 1)[: rows * answer],))
        logits = model(**inputs, use_cache=False).logits
        handle.remove()
        targets = torch.zeros(len(logits), top, dtype=torch.long), torch.zeros(len(logits), top)
        return kl_from_top(*targets, logits).sum(), embeddings

    def inconsistency(recording: Recording) -> Tensor:
        pairs = pairwise(recording.hidden_states)  # cloned as the trainer's masks do
        return torch.stack([aligned_inconsistency(a.clone(), b.clone()).sum() for a, b in pairs]).mean()

    rows = config.per_device_train_batch_size
    if config.perturbation == "sign":
        with record(inner) as recording:
            loss, embeddings = forward(rows, tokens, answer, ascends=True)
        torch.autograd.grad(inconsistency(recording), embeddings, retain_graph=True)
        recording.hidden_states.clear()
        loss.backward()
        with record(inner) as recording:
            forward(rows, tokens, 0)
        inconsistency(recording).backward()
    elif not config.perturbs:
        forward(rows, tokens, answer)[0].backward()
    else:
        if config.anchor is not None:
            forward(math.ceil(rows * config.anchor_fraction), tokens, answer)[0].backward()
        if config.perturbation == "inserted":
            loss, embeddings = forward(rows, tokens - answer + 2 * config.soft_tokens, config.soft_tokens, ascends=True)
            torch.autograd.grad(loss, embeddings)
        forward(rows, tokens + config.soft_tokens, answer)[0].backward()
    model.zero_grad()


def _speed(tokens: int, width: int, dtype: torch.dtype) -> float:
    """What a matrix product of a pass reaches on this machine, in 10^12 operations a second."""
    device = PartialState().device
    left, right = (torch.ones(size, width, dtype=dtype, device=device) for size in (tokens, 4 * width))
    timer = Timer("left @ right.T", globals={"left": left, "right": right}, num_threads=torch.get_num_threads())
    return 2 * tokens * width * 4 * width / timer.blocked_autorange(min_run_time=1).median / 1e12
