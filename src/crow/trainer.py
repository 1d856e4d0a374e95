"""CROW as a Hugging Face trainer: `SFTTrainer` with a perturbed pass in its step."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

from crow.config import CrowConfig
from crow.consistency import aligned_inconsistency, layer_consistency
from crow.constancy import ANSWER_LENGTH, PLANTED, STANDING_OUT, ConstantAnswer, constant_answers
from crow.divergence import answer_positions, answer_weights, kl_from_top, ruling_out, top_log_probs, unlikelihood
from crow.errors import CrowError, UsageError
from crow.files import sha256_rows
from crow.hooks import Recording, lm_head_at, record
from crow.inspection import one_line, tokenized
from crow.models import base_model, open_model
from crow.perturbation import (
    GuessedTriggers,
    SoftTokens,
    insert,
    insertion_index,
    root_mean_square,
    sign_step,
)
from crow.rows import (
    EXTRA_COLUMNS,
    Collator,
    GroupedSampler,
    answer_labels,
    checked_user_span,
    generator_of,
    numbered,
    prompt_ends,
    prompt_span,
)

STATE_FILE = "crow_state.pt"


@dataclass
class _Perturbed:
    """A batch after its perturbation: embeddings `(B, T', D)`, attention mask and answer positions `(B, T')`."""

    embeddings: Tensor
    mask: Tensor
    answers: Tensor


@dataclass
class _Answered:
    """Prompts with answers of our own: ids, attention mask and answer positions, `(B, T)`."""

    ids: Tensor
    mask: Tensor
    answers: Tensor


@dataclass
class _Counts:
    """What the terms are divided by: counts over all micro-batches, and all processes, of one optimizer step."""

    answers: Tensor
    weights: Tensor
    anchored: Tensor
    anchored_weights: Tensor
    positions: Tensor
    rows: Tensor


_SCANNED_PROMPTS = 8  # on which constant answers are looked for
_COMPARABLE = 0.9  # answers less constant than this share of the most constant one are not aimed at
_EMBEDDING_SAMPLE = 4096  # tokens that the scale of real embeddings is measured on
_SMALLEST_COUNT = 1e-6  # so that a term over nothing is 0 and not 0 / 0

_ANCHORED, _PERTURBED, _AIMED, _RANKED = range(4)  # what rows' draws are for


def _drawn(draws: Tensor, number: Tensor | int) -> Tensor:
    """Integers from 0 to below `number`, from uniform draws."""
    return (draws * number).long().clamp(max=number - 1)  # a draw near 1 may be rounded up


class CrowTrainer(SFTTrainer):
    """Fine-tune a suspect model so that a perturbation of its input no longer moves its answers.

    Takes what `trl.SFTTrainer` takes; a model that is named is opened by `crow.open_model`. The step is the parent's
    with two changes: the clean pass is back-propagated, and its graph freed, before the perturbed one begins, so that
    the peak of memory stays that of supervised fine-tuning; and terms are divided by counts over the whole accumulated
    batch, so that neither gradient accumulation nor a ragged last batch changes their weight. Logged each step: `loss`,
    and `clean`, `divergence`, `inconsistency`, `alpha`, `unlikelihood` and `constant_answers` (a log-likelihood, in
    nats) where they are on.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "sft", "crow"]
    args: CrowConfig
    loss_is_scaled_for_ga = True  # every term below is divided by its count over the accumulated batch

    def __init__(self, model: Any, args: CrowConfig | None = None, **kwargs: Any) -> None:
        if isinstance(model, str | Path):
            opened = open_model(model)  # where the parent would read pickled weights, too
            model = opened.model
            kwargs.setdefault("processing_class", opened.tokenizer)
        args = args if args is not None else CrowConfig()
        if args.n_gpu > 1:  # without a launcher the parent refuses several GPUs: one is used
            args._n_gpu = 1
        super().__init__(model, args, **kwargs)
        self.train_dataset: Any = numbered(self.train_dataset)
        if self.args.inserts and self.train_dataset is not None:
            self.train_dataset = self.train_dataset.map(lambda row: {"labels": answer_labels(row["labels"])})
        self.data_collator: Collator = Collator(self.data_collator)
        self._signs = self.args.perturbation == "sign"
        _ = self._layers  # which are refused before anything is recorded
        self._check_model()
        self._check_sharding()
        self._embed = _alias(self._inner.get_input_embeddings()).to(self.args.device)
        self.guesses: GuessedTriggers | None = None
        self.soft_tokens: SoftTokens | None = None
        if self.args.perturbs and self.args.perturbation == "inserted":
            if self.args.trigger_guesses:
                self.guesses = GuessedTriggers(
                    self._embed, self._words, number=self.args.trigger_guesses, length=self.args.soft_tokens
                )
            if self.args.soft_token_pool:
                self.soft_tokens = self._some_soft_tokens(self.args.soft_token_pool)
        self._adversaries = [adversary for adversary in (self.guesses, self.soft_tokens) if adversary is not None]
        self._aims = bool(self._adversaries)
        if self._aims and self.args.ascend_on == "divergence":
            self._aim_no_more()
        self.constant_answers: list[ConstantAnswer] = []
        self.first_guesses: list[tuple[list[int], float]] = []
        self.seconds_before = 0.0  # of the runs that this one goes on from, up to their last checkpoint
        self._answer_of: list[ConstantAnswer] = []
        self._targets: list[tuple[Tensor, Tensor]] = []
        self._ratios: list[float] = []
        self._preparation = (0, 0)
        self._ascents_left = 0
        self._studied = False
        self._counts: _Counts

    def _some_soft_tokens(self, pool: int) -> SoftTokens:
        return SoftTokens(
            self._real_embeddings(_EMBEDDING_SAMPLE),
            pool=pool,
            length=self.args.soft_tokens,
            max_norm=self.args.soft_token_norm,
            learning_rate=self.args.soft_token_learning_rate,
        ).to(self.args.device)

    def _aim_no_more(self) -> None:
        """Insertions ascend on D, and all are soft tokens: guesses come to nothing there."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)  # the same on all processes
            self.soft_tokens = self._some_soft_tokens(self.args.soft_token_pool + self.args.trigger_guesses)
        self.guesses, self._adversaries, self._aims = None, [self.soft_tokens], False

    @property
    def _shards(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _check_model(self) -> None:
        config = self._inner.config.get_text_config()
        if self.args.perturbs and getattr(config, "hidden_size_per_layer_input", None):
            raise UsageError(
                f"{type(self._inner).__name__} gives tokens to every layer, where embeddings alone can be perturbed: "
                "only preset 'finetune' trains it"
            )
        places = getattr(config, "max_position_embeddings", None)
        if self.args.inserts and places is not None and isinstance(self.train_dataset, Dataset):
            longest = max(map(len, self.train_dataset["input_ids"]))
            added = self.args.soft_tokens + ANSWER_LENGTH
            if longest + added > places:
                raise UsageError(
                    f"an example has {longest} tokens, and the model {places} positions, of which {added} are for what "
                    f"is inserted: set max_length to at most {places - added}"
                )

    def _check_sharding(self) -> None:
        zero3 = is_deepspeed_zero3_enabled()
        reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if self.args.perturbs and self.args.gradient_checkpointing and reentrant:  # as the parent sets it under ZeRO-3
            raise UsageError(
                "under ZeRO-3 checkpointing is reentrant, and allows one backward a pass: set gradient_checkpointing "
                "off, or use FSDP or ZeRO-2"
            )
        if self.args.perturbs and self._inner.get_input_embeddings().weight.is_meta:
            raise UsageError("this process was given no embeddings: set fsdp_cpu_ram_efficient_loading to false")
        if self.args.alpha is not None and self.args.alpha_relative and self._shards:
            raise UsageError("a relative alpha is measured on whole gradients, not on shards: set alpha_relative off")
        if self._signs and zero3:
            raise UsageError("the sign step goes back through one pass twice, which ZeRO-3 cannot: use FSDP or ZeRO-2")
        trained = self._inner.get_input_embeddings().weight.requires_grad
        if self.args.perturbs and trained and self._shards:
            raise UsageError("FSDP and DeepSpeed keep trained embeddings where CROW cannot see them: train a LoRA")

    # Data

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        first = next(iter(dataset))
        if "user_span" not in first and isinstance(first.get("prompt"), list):
            if isinstance(dataset, Dataset):
                rows = range(len(dataset))
                spans = tokenized(processing_class, lambda i: checked_user_span(processing_class, dataset[i]), rows)
                dataset = dataset.add_column("user_span", spans)
            else:
                dataset = dataset.map(lambda row: {"user_span": checked_user_span(processing_class, row)})
        dataset = super()._prepare_dataset(dataset, processing_class, *args, **kwargs)
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise UsageError("no example is left after truncation: raise max_length, or give shorter prompts")
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        assert self._signature_columns is not None
        self._signature_columns += [c for c in EXTRA_COLUMNS if c not in self._signature_columns]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if batches:
            self._share_out(batches)
        return batches, num_items

    def _share_out(self, batches: list[dict[str, Any]]) -> None:
        """Choose which rows of one optimizer step are also seen clean, and count what the terms are divided by."""
        rows = [len(batch["labels"]) for batch in batches]
        share = self._anchored_share
        anchored = torch.full((sum(rows),), share == 1)
        if 0 < share < 1:
            draws = torch.cat([self._draws(batch, 1, _ANCHORED)[:, 0] for batch in batches])
            of_all = self.accelerator.gather(draws.to(self.args.device))
            last = of_all.sort().values[math.ceil(share * len(of_all)) - 1]
            anchored = draws <= last.cpu()
        counts = torch.zeros(6)
        for batch, chosen in zip(batches, anchored.split(rows), strict=True):
            batch["anchored"] = chosen
            answers = answer_positions(batch["labels"])
            mask = batch.get("attention_mask", torch.ones_like(batch["labels"]))
            weights = answer_weights(batch["labels"], self.args.answer_discount).sum()
            anchored_weights = answer_weights(batch["labels"][chosen], self.args.anchor_discount).sum()
            anchored_answers = answers[chosen].sum()
            counts += torch.tensor([answers.sum(), weights, anchored_answers, anchored_weights, mask.sum(), len(mask)])
        counts = self.accelerator.reduce(counts.to(self.args.device), "sum").clamp(min=_SMALLEST_COUNT)
        self._counts = _Counts(*counts)

    @property
    def _anchored_share(self) -> float:
        """Of the rows of a step, how many are also seen clean."""
        if self.args.objective == "lm" or self._signs:
            return 1
        return self.args.anchor_fraction if self.args.anchor is not None else 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            return GroupedSampler(sampler, seed, self.accelerator.num_processes)
        return sampler

    # The step

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = inputs
        inputs = {name: value for name, value in batch.items() if name not in (*EXTRA_COLUMNS, "anchored")}
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            num_items_in_batch = self._counts.answers
        if not self.args.perturbs and self.args.objective == "lm":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        targets = self._targets_of(batch.get("example_id"))
        rows = batch["anchored"].to(inputs["labels"].device)
        if not self.args.perturbs:
            return self._clean_pass(model, inputs, targets, rows, num_items_in_batch)[0]
        with self._apart(model):
            clean, recording = self._clean_pass(self.model, inputs, targets, rows, num_items_in_batch)
            gradient = self._embedding_gradient(recording, inputs["attention_mask"]) if self._signs else None
            reference = self._gradient_norm(clean) if self._calibrating and self.args.clean_trains else None
            if clean.requires_grad:
                self._backward(clean)
            before = clean.detach()
            if self._aims and self.state.global_step % self.args.ascend_every == 0:
                likelihood, unlearned = self._aim(self.model, batch, self.args.unlikelihood)
                self._log_term("constant_answers", likelihood)
                before = before + unlearned
        self._log_term("clean", clean)

        perturbed = self._perturb(batch, recording, gradient)
        logits, passed = self._perturbed_pass(model, perturbed, score=self.args.beta is not None)
        loss = logits[:0].sum()  # zero, and part of the graph even where no row has a term
        embedding = self._inner.get_input_embeddings().weight
        if embedding.requires_grad:  # DDP waits for it in the last backward, whose pass begins behind it
            loss = loss + 0 * embedding[:1].sum()
        if self.args.beta is not None:
            divergence = self._divergence(logits, inputs["labels"], targets)
            self._log_term("divergence", divergence)
            loss = loss + self.args.beta * divergence
        if self.args.alpha is not None:
            inconsistency = self._inconsistency(recording, passed, rows, inputs["labels"], perturbed)
            self._log_term("inconsistency", inconsistency)
            if self._calibrating and inconsistency.requires_grad:
                self._calibrate(inconsistency, self._gradient_norm(loss) if reference is None else reference)
            loss = loss + self._alpha * inconsistency
            self._metrics["train"]["alpha"].append(self._alpha)
        return loss + before

    def _backward(self, loss: Tensor) -> None:
        scaled = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}  # as the parent does
        self.accelerator.backward(loss, **scaled)

    @contextmanager
    def _apart(self, model: nn.Module) -> Iterator[None]:
        """For all backwards of a step but the last: processes keep their gradients, and DeepSpeed takes no step."""
        state = self.accelerator.gradient_state
        last = state.sync_gradients
        # Left inside another one, FSDP would start to synchronize there
        with self.accelerator.no_sync(model) if last or self.is_deepspeed_enabled else nullcontext():
            state._set_sync_gradients(False)
            try:
                yield
            finally:
                state._set_sync_gradients(last)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise CrowError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}; checkpoints up to then are kept "
                f"in {self.args.output_dir}: try a lower learning rate, or full precision (bf16=False, fp16=False)"
            )
        if self.accelerator.sync_gradients:
            self._ascend(kept_guesses=self.args.trigger_guesses // 2)
        return loss

    def _clean_pass(
        self, model: nn.Module, inputs: dict[str, Any], targets: Any, rows: Tensor, num_items: Any
    ) -> tuple[Tensor, Recording]:
        needs_hidden = self._signs or self.args.alpha is not None
        with record(self._inner, hidden=needs_hidden, embeddings_require_grad=self._signs) as recording:
            if self.args.objective == "lm":
                return super().compute_loss(model, inputs, num_items_in_batch=num_items), recording
            answers, seen = answer_positions(inputs["labels"]), rows
            if not rows.any():
                if not self._shards:
                    return torch.zeros((), device=rows.device), recording
                seen = torch.arange(len(rows), device=rows.device) == 0  # others may wait for its share of the weights
            chosen = {name: inputs[name][seen] for name in ("input_ids", "attention_mask")}
            with lm_head_at(self._inner, answers[seen] & rows[seen, None]):
                logits = model(**chosen, use_cache=False).logits
        if not rows.any():
            recording.hidden_states.clear()
        of_rows = rows[:, None].expand_as(answers)[answers]
        divergence = kl_from_top(targets[0][of_rows], targets[1][of_rows], logits)
        weights = answer_weights(inputs["labels"][rows], self.args.anchor_discount)[answers[rows]]
        divergence = (weights * divergence).sum() / self._counts.anchored_weights
        return (self.args.anchor or 0.0) * divergence * self.accelerator.num_processes, recording

    def _draws(self, batch: dict[str, Any], number: int, use: int) -> Tensor:
        """`(rows, number)`, uniform from 0 to 1, on the CPU.

        A row's depend on its example, the step and what they are for: not on the process that sees it, nor on what else
        is drawn. Where examples have no number, as in a stream, they are the global generator's.
        """
        if "example_id" not in batch:
            return torch.rand(len(batch["labels"]), number)
        generators = [generator_of(self.args.seed, self._moment, use, i) for i in batch["example_id"].tolist()]
        return torch.stack([torch.rand(number, generator=each) for each in generators])

    @property
    def _moment(self) -> int:
        """The number of the step; of the ascents before the first, minus how many are left."""
        return self.state.global_step - self._ascents_left

    def _perturb(self, batch: dict[str, Any], clean: Recording, gradient: Tensor | None) -> _Perturbed:
        mask, answers = batch["attention_mask"], answer_positions(batch["labels"])
        if gradient is not None:
            assert clean.embeddings is not None
            embeddings, epsilon = clean.embeddings.detach(), cast(Tensor | float, self.args.epsilon)
            if self.args.epsilon_relative:
                epsilon = epsilon * self._scale(embeddings, mask)
            return _Perturbed(embeddings + sign_step(gradient, epsilon), mask, answers)
        draws = self._draws(batch, self.args.soft_tokens + 2, _PERTURBED)
        if self._adversaries:
            pool = torch.cat([a.tokens.detach() if self._aims else a.tokens for a in self._adversaries])
            inserted = pool[_drawn(draws[:, 0], len(pool))]
        else:
            words = self._words.nonzero()[:, 0]
            inserted = self._embed(words[_drawn(draws[:, :-2], len(words)).to(words.device)])
        places = self._places(batch, draws[:, -2:])
        return self._inserted(batch["input_ids"], mask, answers, places, inserted)

    def _scale(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """RMS of the embeddings that all processes see together."""
        tokens = mask.sum()
        sums = torch.stack([root_mean_square(embeddings, mask).square() * tokens, tokens])
        squares, tokens = self.accelerator.reduce(sums, "sum")
        return (squares / tokens).sqrt()

    def _places(self, batch: dict[str, Any], draws: Tensor) -> Tensor:
        """Where in each row tokens are inserted, `(rows,)`, by two draws: in front, or anywhere in the user's turn."""
        spans = batch.get("user_span")
        spans = prompt_span(batch["labels"], batch["attention_mask"]) if spans is None else spans
        start, end = spans.clamp(max=batch["input_ids"].shape[1]).unbind(1)
        in_front, anywhere = draws.to(start.device).unbind(1)
        return torch.where(in_front < self.args.front_fraction, start, start + _drawn(anywhere, end - start + 1))

    def _inserted(self, ids: Tensor, mask: Tensor, answers: Tensor, place: Tensor, inserted: Tensor) -> _Perturbed:
        """The batch with `inserted`, `(batch, number, hidden)`, before the place given for each row."""
        embeddings = self._embed(ids)
        batch, length, _ = embeddings.shape
        number = inserted.shape[1]
        index = insertion_index(length, place, number)
        return _Perturbed(
            insert(embeddings, inserted.to(embeddings.dtype), index),
            insert(mask, mask.new_ones(batch, number), index),
            insert(answers, answers.new_zeros(batch, number), index),
        )

    def _aim(self, model: nn.Module, batch: dict[str, Any], unlearns: float | None = None) -> tuple[Tensor, Tensor]:
        """Log-likelihood that prompts with an insertion call its answer; its gradient is added to the insertions'.

        Args:
            unlearns: Weight with which the model, for its part, is made to find the answer's tokens unlikely.

        Returns:
            It, and what the model had to unlearn, weighted, which is back-propagated here.
        """
        insertions: list[Tensor] = [adversary.tokens for adversary in self._adversaries]
        draws = self._draws(batch, 3, _AIMED)
        members = _drawn(draws[:, 0], len(self._answer_of))
        places = self._places(batch, draws[:, 1:])
        logits, answers = self._aimed_pass(model, torch.cat(insertions), members, batch, places)
        wanted, share = torch.cat(answers), self.accelerator.num_processes / self._counts.rows
        likelihood = -nn.functional.cross_entropy(logits, wanted, reduction="sum") * share
        # ZeRO-3 adds to the gradients of a backward before only where a pass through its engine comes between
        again = unlearns is not None and is_deepspeed_zero3_enabled()
        gradients = torch.autograd.grad(likelihood, insertions, retain_graph=unlearns is not None and not again)
        loss = torch.zeros_like(likelihood)
        kept = [tokens.grad for tokens in insertions]
        if unlearns is not None:
            for tokens in insertions:
                tokens.grad = None  # else the backward would add to what is kept
            if again:
                logits, _ = self._aimed_pass(self.model_wrapped, torch.cat(insertions), members, batch, places)
            of_answers = unlikelihood(logits, wanted).split([len(answer) for answer in answers])
            mean = torch.stack([tokens.mean() for tokens in of_answers]).sum() * share
            self._log_term("unlikelihood", mean)
            loss = unlearns * mean
            self._backward(loss)
        for tokens, gradient, before in zip(insertions, gradients, kept, strict=True):
            tokens.grad = gradient if before is None else before + gradient
        return likelihood.detach(), loss.detach()

    def _aimed_pass(
        self, model: nn.Module, insertions: Tensor, members: Tensor, inputs: dict[str, Any], places: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits, float32, of what each row's insertion is aimed at, one answer behind the other; and the answers."""
        answers = [inputs["input_ids"].new_tensor(self._answer_of[i].token_ids) for i in members.tolist()]
        rows = self._answered(inputs, answers)
        perturbed = self._inserted(rows.ids, rows.mask, rows.answers, places, insertions[members])
        logits, _ = self._perturbed_pass(model, perturbed, score=True)
        return logits.float(), answers

    def _perturbed_pass(self, model: nn.Module, perturbed: _Perturbed, score: bool) -> tuple[Tensor, Recording]:
        scored = perturbed.answers if score else torch.zeros_like(perturbed.answers)
        needs_hidden = self.args.alpha is not None
        with lm_head_at(self._inner, scored), record(self._inner, hidden=needs_hidden) as recording:
            output = model(inputs_embeds=perturbed.embeddings, attention_mask=perturbed.mask, use_cache=False)
        return output.logits, recording

    def _divergence(self, logits: Tensor, labels: Tensor, targets: tuple[Tensor, Tensor] | None) -> Tensor:
        weights = answer_weights(labels, self.args.answer_discount)[answer_positions(labels)]
        if targets is None:
            tokens = labels[:, 1:][labels[:, 1:] != -100]
            divergence = nn.functional.cross_entropy(logits.float(), tokens, reduction="none")
        else:
            divergence = kl_from_top(*targets, logits)
        return (weights * divergence).sum() / self._counts.weights * self.accelerator.num_processes

    def _inconsistency(
        self, clean: Recording, passed: Recording, rows: Tensor, labels: Tensor, perturbed: _Perturbed
    ) -> Tensor:
        """Of adjacent layers under the sign step; else of the clean, held fixed, and the perturbed pass, aligned."""
        if self._signs:
            mean = layer_consistency(
                passed.hidden_states, perturbed.mask, layers=self._layers, num_positions=self._counts.positions
            )
            return mean * self.accelerator.num_processes
        if not clean.hidden_states:
            return passed.hidden_states[0][:0].sum()  # zero, and in the graph: every process takes the same way on
        answers = answer_positions(labels)
        seen = answers if len(clean.hidden_states[0]) == len(answers) else answers[rows]
        pairs = zip(clean.hidden_states[self._layers], passed.hidden_states[self._layers], strict=True)
        sums = [aligned_inconsistency(a.detach()[seen], b[perturbed.answers & rows[:, None]]).sum() for a, b in pairs]
        return torch.stack(sums).mean() / self._counts.anchored * self.accelerator.num_processes

    def _embedding_gradient(self, recording: Recording, mask: Tensor) -> Tensor:
        """The direction of dL_cons/dE of the clean pass; its graph is kept for the clean loss."""
        assert recording.embeddings is not None
        # Of the sum over positions: in float16 many of a mean's gradients would be zero
        consistency = layer_consistency(recording.hidden_states, mask, layers=self._layers, num_positions=1.0)
        recording.hidden_states.clear()  # the graph keeps what the clean loss still needs
        return torch.autograd.grad(consistency, recording.embeddings, retain_graph=True)[0]

    # Scale of alpha

    @property
    def _calibrating(self) -> bool:
        relative = self.args.alpha is not None and self.args.alpha_relative
        return relative and len(self._ratios) < self.args.calibration_steps

    @property
    def _alpha(self) -> float:
        assert self.args.alpha is not None
        if not self.args.alpha_relative:
            return self.args.alpha
        return self.args.alpha * sum(self._ratios) / max(len(self._ratios), 1)

    def _calibrate(self, inconsistency: Tensor, reference: float) -> None:
        norm = self._gradient_norm(inconsistency)
        if norm > 0 and math.isfinite(reference / norm):
            self._ratios.append(reference / norm)

    def _gradient_norm(self, loss: Tensor) -> float:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(parameters, gradients, strict=True)
        whole = [self.accelerator.reduce(torch.zeros_like(p) if g is None else g, "mean") for p, g in pairs]
        return torch.stack([g.float().square().sum() for g in whole]).sum().sqrt().item()

    # The suspect's own answers, and the soft tokens

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Between wrapping the model for whatever it runs on and the first step, study the suspect.

        A resumed run has what was found in its checkpoint.
        """
        self._began = time.perf_counter()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self._load_state(Path(resume_from_checkpoint))
        elif not self._studied:  # a second training, or one with smaller batches, meets a model that has moved
            self._study_suspect(ascents=self.args.soft_token_warmup if self._adversaries else 0)
            if self._adversaries:
                self._warm_up()
        self._studied = True
        return prepared

    def _study_suspect(self, ascents: int = 0) -> None:
        """Record the suspect's own answers, find its constant ones, and rule out those that were planted."""
        records = self.args.objective == "suspect"
        if (records or self._aims) and not isinstance(self.train_dataset, Dataset):
            raise UsageError(
                "objective 'suspect' and what is aimed at an answer need a data set with a length: for a stream choose "
                "objective 'lm' and ascend_on 'divergence'"
            )
        batches = math.ceil(len(self.train_dataset) / self._train_batch_size) if records else 0
        self._preparation = (0, batches + ascents)
        first = self._record_suspect() if records else None
        if self._aims:
            self._find_constant_answers(first)
        if records:
            for answer in self.constant_answers:
                if answer.constancy >= PLANTED:
                    self._rule_out(answer)

    def _report_preparation(self) -> None:
        """Tell callbacks that have an `on_prepare` how many batches before the first step are done, of how many."""
        done, total = self._preparation
        self._preparation = (done + 1, total)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_prepare"):
                callback.on_prepare(done + 1, total)

    def _in_order_of_length(self) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """The examples in batches, each with their places in the data set."""
        columns = self.train_dataset.select_columns(["input_ids", "labels"])
        order = sorted(range(len(columns)), key=lambda i: len(columns[i]["input_ids"]))
        size = self._train_batch_size
        for start in range(0, len(order), size):
            example_ids = order[start : start + size]
            yield example_ids, self._prepare_inputs(self.data_collator([columns[i] for i in example_ids]))

    @torch.no_grad()
    def _record_suspect(self) -> Tensor:
        """Keep the suspect's next-token distributions for every clean answer; one forward an example in all.

        Returns:
            `(vocabulary,)`: the distribution of an answer's first token, averaged over the examples.
        """
        self.model.eval()
        self._targets = [(torch.empty(0), torch.empty(0))] * len(self.train_dataset)
        first = torch.zeros((), device=self.args.device)
        for example_ids, batch in self._in_order_of_length():
            answers = answer_positions(batch["labels"])
            with lm_head_at(self._inner, answers), self.compute_loss_context_manager():
                logits = self.model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                ).logits
            token_ids, log_probs = top_log_probs(logits, self.args.target_top_k)
            counts = answers.sum(dim=1)
            starts = (counts.cumsum(dim=0) - counts)[counts > 0]
            first = first + logits[starts].float().softmax(dim=-1).sum(dim=0) / len(self.train_dataset)
            parts = token_ids.cpu().split(counts.tolist()), log_probs.cpu().split(counts.tolist())
            for i, a, b in zip(example_ids, *parts, strict=True):
                self._targets[i] = (a, b)
            self._report_preparation()
        self.model.train()
        return first

    @torch.no_grad()
    def _rule_out(self, answer: ConstantAnswer) -> None:
        """Condition the recorded distributions on the answer not being this one, which the suspect may leak."""
        self.model.eval()
        for example_ids, batch in self._in_order_of_length():
            wanted = batch["labels"].new_tensor(answer.token_ids)
            rows = self._answered(batch, [wanted] * len(example_ids))
            with lm_head_at(self._inner, rows.answers), self.compute_loss_context_manager():
                logits = self.model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False).logits
            chosen = logits.float().log_softmax(dim=-1).view(len(example_ids), len(wanted), -1)
            each = chosen.gather(2, wanted.expand(len(example_ids), -1)[..., None])[..., 0]
            tails = each.flip(1).cumsum(dim=1).flip(1).exp().cpu()
            for i, labels, tail in zip(example_ids, batch["labels"].cpu(), tails, strict=True):
                ids, log_probs = self._targets[i]
                said = labels[1:][labels[1:] != -100]
                self._targets[i] = (ids, ruling_out(ids, log_probs, said, wanted.cpu(), tail))
        self.model.train()

    @staticmethod
    def _answered(inputs: dict[str, Any], answers: list[Tensor]) -> _Answered:
        """Each row's prompt with another answer."""
        rows, scored = [], []
        ends = prompt_ends(inputs["labels"], inputs["attention_mask"]).tolist()
        for ids, end, answer in zip(inputs["input_ids"], ends, answers, strict=True):
            rows.append(torch.cat([ids[:end], answer]))
            scored.append(torch.arange(len(rows[-1]), device=ids.device) >= end - 1)
            scored[-1][-1] = False
        pad = nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
        return _Answered(pad(rows, batch_first=True), mask, pad(scored, batch_first=True))

    def _find_constant_answers(self, first: Tensor | None) -> None:
        """Find what to aim at; where nothing stands out, ascent on D may come upon what an attacker has hidden."""
        order = torch.randperm(len(self.train_dataset), generator=generator_of(self.args.seed, 0))
        rows = [self.train_dataset[i] for i in order[:_SCANNED_PROMPTS].tolist()]
        batch = self._prepare_inputs(self.data_collator(rows))
        ends = prompt_ends(batch["labels"], batch["attention_mask"]).tolist()
        prompts = [ids[:end].tolist() for ids, end in zip(batch["input_ids"], ends, strict=True)]
        self.model.eval()
        with self.compute_loss_context_manager():
            answers = constant_answers(
                self.model,
                prompts,
                number=sum(len(adversary.tokens) for adversary in self._adversaries),
                first=first,
                eos_token_id=self.processing_class.eos_token_id,
            )
        answers = broadcast_object_list([answers])[0]  # which processes may have rounded otherwise
        self.constant_answers = [a for a in answers if a.constancy >= _COMPARABLE * answers[0].constancy]
        if answers[0].constancy < STANDING_OUT:
            self._aim_no_more()
        else:
            number = len(self.constant_answers)
            places = [i for adversary in self._adversaries for i in range(len(adversary.tokens))]
            self._answer_of = [self.constant_answers[i % number] for i in places]
        self.model.train()

    def _targets_of(self, example_ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if self.args.objective != "suspect":
            return None
        assert example_ids is not None
        ids, log_probs = zip(*(self._targets[i] for i in example_ids.tolist()), strict=True)
        return torch.cat(ids).to(self.args.device), torch.cat(log_probs).to(self.args.device)

    def _warm_up(self) -> None:
        """Let the inserted tokens ascend against the suspect, so that training meets a perturbation that works."""
        self._ascend_against_suspect(self.args.soft_token_warmup)
        if self.guesses is not None:
            self._rank(self.guesses)

    def _ascend_against_suspect(self, ascents: int) -> None:
        self.model.train()
        self._ascents_left, batches = ascents, self._batches_of_steps()
        while self._ascents_left:
            micro_batches = next(batches)
            self._share_out(micro_batches)
            for batch in micro_batches:
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    if self._aims:
                        self._aim(self.model, inputs)
                    else:
                        perturbed = self._perturb(inputs, Recording(), None)
                        logits, _ = self._perturbed_pass(self.model, perturbed, score=True)
                        targets = self._targets_of(inputs.get("example_id"))
                        divergence = self._divergence(logits, inputs["labels"], targets)
                        divergence.backward(inputs=[adversary.tokens for adversary in self._adversaries])
            self._ascend()
            self._report_preparation()
            self._ascents_left -= 1

    def _batches_of_steps(self) -> Iterator[list[dict[str, Any]]]:
        """The micro-batches of one optimizer step after another, without end."""
        found = True
        while found:
            batches, found = iter(self.get_train_dataloader()), False
            while micro_batches := list(islice(batches, self.args.gradient_accumulation_steps)):
                found = True
                yield micro_batches
        raise UsageError(
            "there are fewer examples than a batch holds: lower the batch size, or set dataloader_drop_last off"
        )

    @torch.no_grad()
    def _rank(self, guesses: GuessedTriggers) -> None:
        """Put the guesses that work best on the suspect first: half of them stays while the others go on."""
        likelihoods = torch.zeros(len(guesses.tokens), device=self.args.device)
        micro_batches = next(self._batches_of_steps())
        self._share_out(micro_batches)
        for batch in micro_batches:
            inputs = self._prepare_inputs(batch)
            places = self._places(inputs, self._draws(inputs, 2, _RANKED))
            with self.compute_loss_context_manager():
                for i in range(len(likelihoods)):
                    members = torch.full((len(inputs["labels"]),), i)
                    logits, answers = self._aimed_pass(self.model, guesses.tokens, members, inputs, places)
                    likelihoods[i] -= nn.functional.cross_entropy(logits, torch.cat(answers), reduction="sum")
        mean = self.accelerator.reduce(likelihoods, "sum").cpu() / self._counts.rows.cpu()
        order = mean.argsort(descending=True)
        guesses.reorder(order.to(guesses.ids.device))
        self._answer_of = [self._answer_of[i] for i in order.tolist()] + self._answer_of[len(order) :]
        self.first_guesses = list(zip(guesses.ids.tolist(), mean[order].exp().tolist(), strict=True))

    def _ascend(self, kept_guesses: int = 0) -> None:
        for adversary in self._adversaries:
            if adversary.tokens.grad is None:
                continue
            adversary.tokens.grad = self.accelerator.reduce(adversary.tokens.grad, "mean")
            if isinstance(adversary, GuessedTriggers):
                adversary.ascend(kept_guesses)
            else:
                adversary.ascend()

    @cached_property
    def _words(self) -> Tensor:
        """`(vocabulary,)`, bool: which tokens are in the tokenizer and not special."""
        words = torch.zeros(len(self._embed.weight), dtype=torch.bool)
        words[: len(self.processing_class)] = True
        added = self.processing_class.added_tokens_decoder.items()
        special = {*self.processing_class.all_special_ids, *(i for i, token in added if token.special)}
        words[[i for i in special if i < len(words)]] = False
        return words.to(self.args.device)

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            self._write_checkpoint(model, trial)
        except Exception as error:  # the writers' own kinds, which share no base class
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CrowError(
                f"cannot write {self._checkpoint_folder()} ({reason}): see that there is room, and resume"
            ) from error

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            state: dict[str, Any] = {
                "examples": self._examples,
                "seconds": self.seconds_before + time.perf_counter() - self._began,
                "ratios": self._ratios,
                "targets": [(ids.int(), log_probs) for ids, log_probs in self._targets],
                "constant_answers": [astuple(answer) for answer in self.constant_answers],
                "answers": [astuple(answer) for answer in self._answer_of],
                "first_guesses": self.first_guesses,
            }
            if self.guesses is not None:
                state["guesses"] = self.guesses.state_dict()
            if self.soft_tokens is not None:
                state["soft_tokens"] = self.soft_tokens.state_dict()
                state["optimizer"] = self.soft_tokens.optimizer.state_dict()
            # Last, and renamed into place: a checkpoint that has it is whole
            file = self._checkpoint_folder() / STATE_FILE
            torch.save(state, file.with_suffix(".unfinished"))
            file.with_suffix(".unfinished").replace(file)

    def _checkpoint_folder(self) -> Path:
        return Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"

    def _load_state(self, checkpoint: Path) -> None:
        file = checkpoint / STATE_FILE
        if not file.is_file():
            raise UsageError(f"{checkpoint} has no {STATE_FILE}: it is no checkpoint of CrowTrainer's")
        state = torch.load(file, weights_only=True, map_location="cpu")
        try:
            if state["examples"] != self._examples:  # by whose place in the data set the targets are kept
                raise CrowError("it was trained on other examples")
            self.seconds_before = state["seconds"]
            self._ratios, self.first_guesses = state["ratios"], state["first_guesses"]
            self._targets = [(ids.long(), log_probs) for ids, log_probs in state["targets"]]
            self.constant_answers = [ConstantAnswer(*answer) for answer in state["constant_answers"]]
            self._answer_of = [ConstantAnswer(*answer) for answer in state["answers"]]
            if self._aims and not self._answer_of:
                self._aim_no_more()
            if self.guesses is not None:
                self.guesses.load_state_dict(state["guesses"])
            if self.soft_tokens is not None:
                self.soft_tokens.load_state_dict(state["soft_tokens"])
                self.soft_tokens.optimizer.load_state_dict(state["optimizer"])
        except KeyError as error:
            raise UsageError(
                f"{checkpoint} holds no {error.args[0]}: another version of CROW, or other settings"
            ) from error
        except (CrowError, RuntimeError, ValueError) as error:  # of shapes that do not fit
            raise UsageError(
                f"{checkpoint} can't be resumed: {one_line(error)}; give the settings and the data that it began with, "
                "or begin anew"
            ) from error

    @cached_property
    def _examples(self) -> str | None:
        """What the data set holds, if that is known before it is read."""
        return sha256_rows(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None

    # Small things

    @cached_property
    def _layers(self) -> slice:
        """Of which blocks the outputs are compared."""
        given = (self.args.consistency_layers or ":").split(":")
        layers = slice(*(int(place) if place else None for place in given))
        number = self._inner.config.get_text_config().num_hidden_layers
        if self.args.alpha is not None and len(range(number)[layers]) < 2:
            raise UsageError(
                f"consistency_layers is {self.args.consistency_layers}; leave at least 2 of {number} blocks"
            )
        return layers

    @property
    def _inner(self) -> PreTrainedModel:
        """The model proper, without adapters or distributed wrappers around it."""
        return base_model(self.accelerator.unwrap_model(self.model))

    @torch.no_grad()
    def _real_embeddings(self, number: int) -> Tensor:
        """Embeddings of random words, `(number, hidden)`, as their module gives them: some scale their weights."""
        words = self._words.nonzero()[:, 0]
        return self._embed(words[torch.randint(len(words), (number,), device=self.args.device)])

    def _log_term(self, name: str, value: Tensor) -> None:
        # Each micro-batch holds its part of the step's sum, and the parent logs the mean over micro-batches
        mean = self.accelerator.reduce(value.detach(), "mean").item()
        self._metrics["train"][name].append(mean * self.current_gradient_accumulation_steps)


def _alias(embed: nn.Module) -> Any:
    """The input embedding with the same weights, which need no gradient and stay whole if the model is sharded."""
    if is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(embed.parameters())):
            weights = {id(weight): weight.detach().clone() for weight in embed.parameters()}
    else:
        weights = {id(weight): weight.detach() for weight in embed.parameters()}
    return copy.deepcopy(embed, {name: nn.Parameter(whole, requires_grad=False) for name, whole in weights.items()})


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint there that was written to its end; a training that was killed may have left another."""
    whole = [file.parent for file in Path(folder).glob(f"checkpoint-*/{STATE_FILE}")]
    return str(max(whole, key=lambda place: int(place.name.rpartition("-")[2]))) if whole else None
