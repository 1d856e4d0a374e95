"""What a purification would take, in memory and time, told from a model's config alone.

One training step is gone through on tensors that have shapes and no content, with the model's own code: so the estimate
holds for any architecture, attention and gradient checkpointing included.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from crow.config import CrowConfig
from crow.consistency import aligned_inconsistency
from crow.divergence import kl_from_top
from crow.errors import UsageError
from crow.hooks import Recording, record
from crow.models import linear_layers, open_config, weights_dtype
from crow.purification import CLEAN_EXAMPLES, training_config

_ADAM_MOMENTS = 2
_NF4_BITS = 4 + (8 + 32 / 256) / 64  # a weight's, and its share of a block's constant, which is quantized too
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
    """What the largest pass of a step holds at its peak, but for the logits; of 4 bits with a layer's opened weight."""
    logit_bytes: int
    peak_bytes: int
    step_flops: int
    steps: int
    tflops: float
    """Speed that the times are of: what matrix products of the model's width reach here, if not given."""
    preparation_flops: int
    """Before the first step: the suspect's answers are recorded, and insertions ascend against it."""
    step_seconds: float
    preparation_seconds: float
    seconds: float
    """Of all together: no less, since not all is matrix products, and the scan for constant answers is left out."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


LEGEND = (
    "training: what is trained, its gradients and AdamW's moments; target: the suspect's recorded answers; activation "
    "and logit: what the largest pass holds; preparation: before the first step, without the scan; seconds: no less "
    "than so many"
)
"""How `Plan` is read, where its fields are shown without their documentation."""


def plan(
    source: str | Path | None = None,
    *,
    base: str | Path | None = None,
    preset: str = "default",
    tokens: int = 256,
    answer_tokens: int | None = None,
    examples: int = CLEAN_EXAMPLES,
    tflops: float | None = None,
    load_in_4bit: bool = False,
    **settings: Any,
) -> Plan:
    """Estimate what `crow.purify` would take. Nothing is opened, and of a hub model only the config is downloaded.

    Args:
        source: As in `crow.models.open_model`; so is `base`.
        preset: A name in `crow.config.PRESETS`.
        tokens: Length of a row, its answer included.
        answer_tokens: Length of the answer; half of the row by default.
        examples: Number of clean examples.
        tflops: Speed of this machine in 10^12 operations a second, if it is not to be measured.
        load_in_4bit: As in `crow.models.open_model`. Such a peak was not checked against a measured one.
        settings: Fields of `CrowConfig`, as for `crow.purify`.

    Raises:
        UsageError: there is no such model, preset or setting, or 4 bits can't be had of the model.
    """
    config = training_config(preset, settings)
    if tflops is not None and not 0 < tflops < math.inf:
        raise UsageError(f"a speed of {tflops} TFLOPS is none: give a positive one, or leave it out")
    answer = math.ceil(tokens * _ANSWER_SHARE) if answer_tokens is None else answer_tokens
    if not 0 < answer < tokens:
        raise UsageError(f"answers of {answer} tokens don't leave a prompt in rows of {tokens}: give longer rows")
    model_config, lora = open_config(source, base=base, load_in_4bit=load_in_4bit)
    dtype = weights_dtype(model_config)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
        parameters = sum(p.numel() for p in model.parameters())
        weight_bytes, opened_bytes = sum(p.nbytes for p in model.parameters()), 0
        if load_in_4bit:
            packed = [layer.weight for layer in linear_layers(model)]
            weight_bytes -= sum(weight.nbytes - math.ceil(weight.numel() * _NF4_BITS / 8) for weight in packed)
            opened_bytes = max(weight.nbytes for weight in packed)  # one at a time, to be multiplied with
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as the trainer's parent does
        model = get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    if load_in_4bit:
        for parameter in trained:
            parameter.data = parameter.data.to(torch.bfloat16)  # as the trainer's parent does
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():  # a shared one once, which alone can be done
            module.to_empty(device="cpu", recurse=False)
        model.train()
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        passes = _Passes(model, config, tokens, answer)
        with _Accounts() as accounts, passes.noting(accounts):
            passes.step()
        before, spared = passes.preparation(examples), passes.spared()
    targets = examples * answer * config.target_top_k * 12 if config.objective == "suspect" else 0
    training_bytes = sum(p.nbytes for p in trained) * (2 + _ADAM_MOMENTS)
    width = model_config.get_text_config().hidden_size
    tflops = _speed(config.per_device_train_batch_size * tokens, width, dtype) if tflops is None else tflops
    steps = math.ceil(examples / config.per_device_train_batch_size / config.gradient_accumulation_steps)
    steps = math.ceil(steps * config.num_train_epochs) if config.max_steps < 0 else config.max_steps
    flops = (accounts.flops - spared) * config.gradient_accumulation_steps
    return Plan(
        parameters=parameters,
        trained_parameters=sum(p.numel() for p in trained),
        dtype="nf4" if load_in_4bit else str(dtype).removeprefix("torch."),
        weight_bytes=weight_bytes,
        training_bytes=training_bytes,
        target_bytes=targets,
        activation_bytes=accounts.before_head + opened_bytes,
        logit_bytes=accounts.peak - accounts.before_head,
        peak_bytes=weight_bytes + training_bytes + targets + accounts.peak + opened_bytes,
        step_flops=flops,
        steps=steps,
        tflops=tflops,
        preparation_flops=before,
        step_seconds=flops / tflops / 1e12,
        preparation_seconds=before / tflops / 1e12,
        seconds=(before + steps * flops) / tflops / 1e12,
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


class _Passes:
    """The passes of a training, by their shapes."""

    def __init__(self, model: PeftModel, config: CrowConfig, tokens: int, answer: int) -> None:
        self.model, self.config, self.tokens, self.answer = model, config, tokens, answer
        self.inner: Any = model.get_base_model()
        self.text = self.inner.config.get_text_config()

    @contextmanager
    def noting(self, accounts: _Accounts) -> Iterator[None]:
        """Have the accounts tell what is held when the head begins."""

        def note(module: Any, args: Any, output: Any) -> None:
            accounts.before_head = max(accounts.before_head, accounts.held)

        handle = self.inner.base_model.register_forward_hook(note)
        yield
        handle.remove()

    def step(self) -> None:
        """Those of `CrowTrainer.compute_loss`."""
        config, tokens, answer = self.config, self.tokens, self.answer
        rows = config.per_device_train_batch_size
        if not config.perturbs:
            self._forward(rows, tokens, answer)[0].backward()
        elif config.perturbation == "sign":
            with record(self.inner) as recording:
                loss, embeddings = self._forward(rows, tokens, answer, ascends=True)
            torch.autograd.grad(self._inconsistency(recording), embeddings, retain_graph=True)
            recording.hidden_states.clear()
            loss.backward()
            with record(self.inner) as recording:
                divergence, _ = self._forward(rows, tokens, answer if config.beta is not None else 0)
            (divergence + self._inconsistency(recording)).backward()
        else:
            share = config.anchor_fraction if config.anchor is not None else 0
            if clean := rows if config.objective == "lm" else math.ceil(rows * share):
                self._forward(clean, tokens, answer)[0].backward()
            if self._aims:
                self._aim_in_step()
            self._forward(rows, tokens + config.soft_tokens, answer)[0].backward()
        self.model.zero_grad()

    def preparation(self, examples: int) -> int:
        """Operations of `CrowTrainer._prepare_for_training`, without the scan, whose passes are few and short."""
        config, flops = self.config, 0
        if config.objective == "suspect":
            flops += examples * self._cost(lambda: self._forward(1, self.tokens, self.answer), grad=False)
        if config.perturbs and config.perturbation == "inserted":
            ascent = self._cost(self._aim if self._aims else self._diverge)
            ranking = self._cost(self._call, grad=False) * config.trigger_guesses if self._aims else 0
            flops += (config.soft_token_warmup * ascent + ranking) * config.gradient_accumulation_steps
        return flops

    def spared(self) -> int:
        """Operations of a step that are not taken in each: the ascents, of which there is one in `ascend_every`."""
        return round(self._cost(self._aim_in_step) * (1 - 1 / self.config.ascend_every)) if self._aims else 0

    @property
    def _aims(self) -> bool:
        """Whether insertions ascend on the likelihood of an answer, if one stands out."""
        config = self.config
        return config.perturbs and config.perturbation == "inserted" and config.ascend_on == "answer"

    def _cost(self, run: Callable[[], Any], grad: bool = True) -> int:
        with _Accounts() as accounts, torch.set_grad_enabled(grad):
            run()
        return accounts.flops

    def _call(self) -> tuple[Tensor, Tensor]:
        """With a constant answer of as many tokens as are inserted."""
        number = self.config.soft_tokens
        rows, prompt = self.config.per_device_train_batch_size, self.tokens - self.answer
        return self._forward(rows, prompt + 2 * number, number, ascends=torch.is_grad_enabled())

    def _aim(self, unlearns: bool = False) -> None:
        loss, embeddings = self._call()
        torch.autograd.grad(loss, embeddings, retain_graph=unlearns)
        if unlearns:
            loss.backward()

    def _aim_in_step(self) -> None:
        self._aim(unlearns=self.config.unlikelihood is not None)

    def _diverge(self) -> None:
        rows, tokens = self.config.per_device_train_batch_size, self.tokens + self.config.soft_tokens
        loss, embeddings = self._forward(rows, tokens, self.answer, ascends=True)
        torch.autograd.grad(loss, embeddings)

    def _forward(self, rows: int, tokens: int, answer: int, ascends: bool = False) -> tuple[Tensor, Tensor]:
        width = self.inner.get_input_embeddings().weight.shape[1]  # of OPT 350M another than the hidden states'
        embeddings = torch.zeros(rows, tokens, width, dtype=self.inner.dtype, requires_grad=ascends)
        inputs = {"inputs_embeds": embeddings, "attention_mask": torch.ones(rows, tokens, dtype=torch.long)}
        if self.config.objective == "lm" and answer:
            labels = torch.zeros(rows, tokens, dtype=torch.long)
            return self.model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(), embeddings
        head, top = self.inner.get_output_embeddings(), min(self.config.target_top_k, self.text.vocab_size)
        handle = head.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, 1)[: rows * answer],))
        logits = self.model(**inputs, use_cache=False).logits
        handle.remove()
        targets = torch.zeros(len(logits), top, dtype=torch.long), torch.zeros(len(logits), top)
        return kl_from_top(*targets, logits).sum(), embeddings

    @staticmethod
    def _inconsistency(recording: Recording) -> Tensor:
        pairs = pairwise(recording.hidden_states)  # cloned as the trainer's masks do
        return torch.stack([aligned_inconsistency(a.clone(), b.clone()).sum() for a, b in pairs]).mean()


def _speed(tokens: int, width: int, dtype: torch.dtype) -> float:
    """What a matrix product of a pass reaches on this machine, in 10^12 operations a second."""
    device = PartialState().device
    left, right = (torch.ones(size, width, dtype=dtype, device=device) for size in (tokens, 4 * width))
    timer = Timer("left @ right.T", globals={"left": left, "right": right}, num_threads=torch.get_num_threads())
    return 2 * tokens * width * 4 * width / timer.blocked_autorange(min_run_time=1).median / 1e12
