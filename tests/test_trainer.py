"""The training step: its terms, gradients, costs and state."""

import copy
import gc
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.trainer.utils
from conftest import MakeModel, scatter_lora, tiny_model
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

import crow.trainer
from crow.config import PRESETS, CrowConfig
from crow.constancy import STANDING_OUT, ConstantAnswer
from crow.data import Example, answer_text, to_dataset, user_text
from crow.errors import CrowError, UsageError
from crow.hooks import Recording
from crow.models import lora_config, open_model
from crow.perturbation import GuessedTriggers, SoftTokens
from crow.rows import user_span
from crow.trainer import CrowTrainer

Gradients = dict[str, Tensor]

BASIC: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "max_steps": 1,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
}
PAPER = PRESETS["paper"]
FINETUNE = PRESETS["finetune"]
SOFT: dict[str, Any] = {"trigger_guesses": 0, "soft_token_pool": 8, "ascend_on": "divergence"}
ONE_SOFT = SOFT | {"soft_token_pool": 1}
ONE_AIMED = ONE_SOFT | {"ascend_on": "answer"}
ONE_GUESS: dict[str, Any] = {"trigger_guesses": 1, "soft_token_pool": 0}


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection() -> Iterator[None]:
    """Every training collects garbage; what was imported is none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _any_answer_stands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights gives none that does."""
    monkeypatch.setattr(crow.trainer, "STANDING_OUT", 0.0)


class Spy(TrainerCallback):
    """Keeps the gradients of the first optimizer step; on request it makes the adapter matter before that."""

    def __init__(self, scatter: bool = False) -> None:
        self.scatter = scatter
        self.gradients: Gradients = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.scatter:
            scatter_lora(kwargs["model"], seed=1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None}


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerFast, rows: list[Example], tiny_llama: MakeModel, tmp_path: Path) -> Any:
    """Makes a trainer of a tiny Llama with a LoRA that matters, on eight rows; settings are `CrowConfig`'s."""

    def make_trainer(
        model: Any = None,
        data: Any = None,
        trainer: type[CrowTrainer] = CrowTrainer,
        callbacks: list[TrainerCallback] | None = None,
        fresh_lora: bool = False,
        processing_class: Any = tokenizer,
        **settings: Any,
    ) -> CrowTrainer:
        torch.manual_seed(0)
        if model is None:
            model = tiny_llama()
            if not fresh_lora:
                model = get_peft_model(model, lora_config())
                scatter_lora(model)
        data = rows[:8] if data is None else data
        config = CrowConfig(**({"output_dir": str(tmp_path / "out"), "soft_token_warmup": 0} | BASIC | settings))
        return trainer(
            model,
            config,
            train_dataset=data if isinstance(data, Dataset) else to_dataset(data),
            processing_class=processing_class,
            peft_config=None if isinstance(model, PeftModel) else lora_config(),
            callbacks=callbacks,
        )

    return make_trainer


def first_gradients(make: Any, scatter: bool = False, **settings: Any) -> tuple[Gradients, CrowTrainer]:
    spy = Spy(scatter)
    trainer = make(callbacks=[spy], **settings)
    trainer.train()
    assert spy.gradients
    return spy.gradients, trainer


def distance(a: Gradients, b: Gradients) -> float:
    """The norm of the difference, relative to the norm."""
    assert a.keys() == b.keys()
    difference = torch.stack([(a[name] - b[name]).double().square().sum() for name in a]).sum().sqrt()
    return float(difference / torch.stack([b[name].double().square().sum() for name in b]).sum().sqrt())


def logs(trainer: CrowTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def lora(trainer: CrowTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


def encoded(trainer: CrowTrainer) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of each row, without padding."""
    return [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in trainer.train_dataset]


# One step of everything on everything

STEPS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, {"clean", "divergence"}),
    "fast": (PRESETS["fast"], {"clean", "divergence"}),
    "paper": (PRESETS["paper"], {"clean", "inconsistency", "alpha"}),
    "paper-scale-free": (PRESETS["paper-scale-free"], {"clean", "inconsistency", "alpha"}),
    "random-tokens": (PRESETS["random-tokens"], {"clean", "divergence"}),
    "finetune": (PRESETS["finetune"], set()),
    "aligned": ({"alpha": 0.5}, {"clean", "divergence", "inconsistency", "alpha"}),
    "inserted-lm": ({"objective": "lm", "anchor": None}, {"clean", "divergence"}),
}


def test_every_preset_is_tested() -> None:
    assert PRESETS.keys() <= STEPS.keys()


@pytest.mark.parametrize("name", STEPS)
def test_a_step_trains_every_adapter(
    make: Any, tokenizer: PreTrainedTokenizerFast, architecture: str, name: str
) -> None:
    settings, terms = STEPS[name]
    trainer = make(tiny_model(architecture, len(tokenizer)), **(settings | {"soft_token_warmup": 1}))
    before = lora(trainer)
    trainer.train()
    (log,) = logs(trainer)
    assert {"clean", "divergence", "inconsistency", "alpha"} & log.keys() == terms
    assert all(math.isfinite(log[term]) for term in (*terms, "loss", "grad_norm"))
    after = lora(trainer)
    assert all(torch.isfinite(weight).all() for weight in after.values())
    assert all(not torch.equal(after[n], before[n]) for n in after if "lora_B" in n)
    assert all(not p.requires_grad for n, p in trainer.model.named_parameters() if "lora_" not in n)


# Plain fine-tuning


def test_without_terms_it_is_the_parent(
    make: Any, tokenizer: PreTrainedTokenizerFast, rows: list[Example], tiny_llama: MakeModel, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential",
    }
    ours, trainer = first_gradients(make, data=rows[:11], fresh_lora=True, **FINETUNE | settings)
    torch.manual_seed(0)
    spy = Spy()
    parent = SFTTrainer(
        tiny_llama(),
        SFTConfig(
            output_dir=str(tmp_path / "parent"),
            gradient_checkpointing=False,
            logging_steps=1,
            **BASIC | settings,
        ),
        train_dataset=to_dataset(rows[:11]),
        processing_class=tokenizer,
        peft_config=lora_config(),
        callbacks=[spy],
    )
    parent.train()
    assert distance(ours, spy.gradients) < 1e-6
    for mine, theirs in zip(logs(trainer), logs(parent), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    theirs_after = lora(parent)
    assert all(torch.allclose(w, theirs_after[n], atol=1e-5) for n, w in lora(trainer).items())


# Cost


class Meter:
    """Counts the rows that pass through the body forward and backward, and the positions that are projected."""

    def __init__(self, trainer: CrowTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward: list[int] = []
        self.backward: list[int] = []
        self.head: list[int] = []
        self.fused: list[int] = []
        model = trainer.model.get_base_model()
        model.model.layers[1].register_forward_hook(self.see)
        model.get_output_embeddings().register_forward_hook(lambda m, args, out: self.head.append(out.shape[0]))
        real = trl.trainer.utils._ChunkedLogProbFunction

        def apply(hidden: Tensor, *args: Any) -> Any:
            self.fused.append(hidden.shape[0])
            return real.apply(hidden, *args)

        monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=apply))

    def see(self, module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        self.forward.append(len(output))
        if output.requires_grad:
            rows = len(output)
            output.register_hook(lambda gradient: self.backward.append(rows))


@pytest.fixture
def metered(make: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Meter, CrowTrainer]]:
    """Trains one step, whose costs alone are counted."""

    def run(**settings: Any) -> tuple[Meter, CrowTrainer]:
        trainer = make(**settings)
        meters: list[Meter] = []

        class Begin(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                meters.append(Meter(trainer, monkeypatch))

        trainer.add_callback(Begin())
        trainer.train()
        return meters[0], trainer

    return run


def test_fine_tuning_costs_two_passes(metered: Any) -> None:
    meter, _ = metered(**FINETUNE)
    assert (meter.forward, meter.backward) == ([8], [8])
    assert (len(meter.fused), meter.head) == (1, [])


def test_paper_costs_five_passes_and_one_projection(metered: Any) -> None:
    meter, trainer = metered(**PAPER)
    assert (meter.forward, meter.backward) == ([8, 8], [8, 8, 8])
    longest = max(len(ids) for ids, _ in encoded(trainer))
    assert meter.fused == [8 * (longest - 1)]
    assert meter.head == [0]


def test_default_costs_less_than_five_passes_and_projects_answers_only(metered: Any) -> None:
    meter, trainer = metered()
    # A quarter of the rows is seen clean too, and all with a few tokens of a constant answer instead of their own;
    # insertions learn to call it, and the model unlearns it
    assert (meter.forward, meter.backward) == ([2, 8, 8], [2, 8, 8, 8])
    answers = sum(int((labels[1:] != -100).sum()) for _, labels in encoded(trainer))
    assert meter.fused == []
    assert meter.head[2] == answers
    assert 0 < meter.head[0] < answers
    assert meter.head[1] <= 8 * max(len(answer.token_ids) for answer in trainer.constant_answers)


def test_soft_tokens_cost_two_and_a_half_passes(metered: Any) -> None:
    meter, _ = metered(**SOFT)  # ascending on D, whose gradient the model's own backward leaves
    assert (meter.forward, meter.backward) == ([2, 8], [2, 8])


@pytest.mark.parametrize(("fraction", "number"), [(1.0, 8), (0.5, 4), (0.01, 1)])
def test_anchor_fraction_is_the_share_of_rows_seen_clean(metered: Any, fraction: float, number: int) -> None:
    meter, _ = metered(anchor_fraction=fraction, **SOFT)
    assert meter.forward == [number, 8]


def test_no_anchor_means_no_clean_pass(metered: Any) -> None:
    meter, trainer = metered(anchor=None, **SOFT)
    assert (meter.forward, meter.backward) == ([8], [8])
    assert logs(trainer)[0]["clean"] == 0


# Against a slow computation, row by row and without padding


class Slow:
    """The tiny Llama's forward from embeddings, with the blocks' outputs."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.lm: Any = model.get_base_model()

    def embed(self, ids: Tensor) -> Tensor:
        return self.lm.model.embed_tokens.weight[ids].detach()

    def __call__(self, embeddings: Tensor) -> tuple[list[Tensor], Tensor]:
        states: list[Tensor] = []
        handles = [block.register_forward_hook(lambda m, a, out: states.append(out)) for block in self.lm.model.layers]
        logits = self.lm(inputs_embeds=embeddings[None]).logits[0]
        for handle in handles:
            handle.remove()
        return [(s[0] if isinstance(s, tuple) else s)[0] for s in states], logits

    def gradients(self, loss: Tensor) -> Gradients:
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))


def turn(states: Sequence[Tensor]) -> Tensor:
    """Sum over positions, mean over adjacent blocks, of one minus the cosine."""
    cosines = [(a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) for a, b in itertools.pairwise(states)]
    return torch.stack([(1 - cosine).sum() for cosine in cosines]).mean()


@pytest.mark.parametrize("layers", [None, "1:", "-2:4"])
def test_papers_step_is_the_papers(make: Any, layers: str | None) -> None:
    settings = PAPER | {"optim": "sgd", "learning_rate": 1e-12, "consistency_layers": layers}
    gradients, trainer = first_gradients(make, **settings)
    of = {None: slice(None), "1:": slice(1, None), "-2:4": slice(2, None)}[layers]
    slow, data = Slow(trainer.model), encoded(trainer)
    positions = sum(len(ids) for ids, _ in data)
    answers = sum(int((labels[1:] != -100).sum()) for _, labels in data)
    lm = inconsistency = torch.zeros(())
    for ids, labels in data:
        embeddings = slow.embed(ids).requires_grad_()
        states, logits = slow(embeddings)
        scored = labels[1:] != -100
        lm = lm - logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[scored].sum() / answers
        delta = 0.1 * torch.autograd.grad(turn(states[of]), embeddings, retain_graph=True)[0].sign()
        inconsistency = inconsistency + turn(slow(embeddings.detach() + delta)[0][of]) / positions
    (log,) = logs(trainer)
    assert log["clean"] == pytest.approx(lm.item(), rel=1e-5)
    assert log["inconsistency"] == pytest.approx(inconsistency.item(), rel=1e-4)
    assert log["loss"] == pytest.approx((lm + 5.5 * inconsistency).item(), rel=1e-4)
    assert distance(gradients, slow.gradients(lm + 5.5 * inconsistency)) < 1e-3
    # Both terms are there: neither alone comes near
    assert distance(gradients, slow.gradients(lm)) > 0.05
    assert distance(gradients, slow.gradients(5.5 * inconsistency)) > 0.05


@pytest.mark.parametrize("layers", ["3:", "2:2", "4:9"])
def test_layers_that_leave_no_two_to_compare_are_refused(make: Any, layers: str) -> None:
    with pytest.raises(UsageError, match=f"consistency_layers is {layers}; leave at least 2 of 4 blocks"):
        make(**PAPER | {"consistency_layers": layers})


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tokens are inserted halfway into the user's message; returns where the gradients of the inserted are kept."""
    gradients: list[Tensor] = []

    def keeping(ascend: Callable[..., None]) -> Callable[..., None]:
        def kept(self: Any, *args: Any) -> None:
            gradients.append(self.tokens.grad.clone())
            ascend(self, *args)

        return kept

    real = CrowTrainer._draws

    def half(self: CrowTrainer, batch: dict[str, Any], number: int, use: int) -> Tensor:
        draws = real(self, batch, number, use)
        return draws if use == crow.trainer._ANCHORED else torch.full_like(draws, 0.5)

    monkeypatch.setattr(CrowTrainer, "_draws", half)
    for adversary in (SoftTokens, GuessedTriggers):
        monkeypatch.setattr(adversary, "ascend", keeping(adversary.ascend))
    return gradients


@pytest.mark.parametrize(
    ("objective", "alpha"), [("suspect", None), ("suspect", 3.0), ("lm", 3.0)], ids=["default", "aligned", "lm"]
)
def test_defaults_step_is_as_documented(make: Any, pinned: list[Tensor], objective: str, alpha: float | None) -> None:
    suspect = Slow(make().model)  # before the model is changed at the start of training
    start = make(**ONE_SOFT).soft_tokens.tokens.detach()[0]
    gradients, trainer = first_gradients(
        make,
        scatter=True,
        optim="sgd",
        learning_rate=1e-12,
        objective=objective,
        beta=1.3,
        answer_discount=0.7,
        anchor=0.6,
        anchor_fraction=1.0,
        target_top_k=600,
        alpha=alpha,
        alpha_relative=False,
        **ONE_SOFT,
    )
    slow, data = Slow(trainer.model), encoded(trainer)
    spans = trainer.train_dataset["user_span"]
    lengths = [int((labels[1:] != -100).sum()) for _, labels in data]
    answers, weight = sum(lengths), sum(0.7**i for length in lengths for i in range(length))

    def terms(soft: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clean = divergence = aligned = torch.zeros(())
        for (ids, labels), (first, last) in zip(data, spans, strict=True):
            embeddings, at = slow.embed(ids), (labels[1:] != -100).nonzero()[:, 0]
            with torch.no_grad():
                target = suspect(embeddings)[1].log_softmax(-1)[at]

            def distances(logits: Tensor, target: Tensor = target, tokens: Tensor = ids[at + 1]) -> Tensor:
                scores = logits.log_softmax(-1)
                if objective == "lm":
                    return -scores.gather(1, tokens[:, None])[:, 0]
                return (target.exp() * (target - scores)).sum(-1)

            states, logits = slow(embeddings)
            clean = clean + distances(logits[at]).sum() / answers
            place = int(first + 0.5 * (last - first + 1))
            moved, logits = slow(torch.cat([embeddings[:place], soft, embeddings[place:]]))
            weights = 0.7 ** torch.arange(len(at))
            divergence = divergence + (weights * distances(logits[at + len(soft)])).sum() / weight
            for a, b in zip(states, moved, strict=True):
                cosine = nn.functional.cosine_similarity(a[at].detach(), b[at + len(soft)], dim=-1)
                aligned = aligned + (1 - cosine).sum() / answers / len(states)
        return (clean if objective == "lm" else 0.6 * clean), divergence, aligned

    soft = start.clone().requires_grad_()
    clean, divergence, aligned = terms(soft)
    loss = clean + 1.3 * divergence + (alpha or 0) * aligned
    (log,) = logs(trainer)
    assert log["clean"] == pytest.approx(clean.item(), rel=1e-3)
    assert log["divergence"] == pytest.approx(divergence.item(), rel=1e-3)
    assert log.get("inconsistency", 0.0) == pytest.approx(aligned.item() if alpha else 0.0, rel=1e-3)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-3)
    (expected,) = torch.autograd.grad(loss, soft, retain_graph=True)
    assert distance({"soft": pinned[0][0]}, {"soft": expected}) < 1e-3
    assert distance(gradients, slow.gradients(loss)) < 1e-3
    # The soft tokens have moved so that the answers diverge more
    with torch.no_grad():
        moved = terms(trainer.soft_tokens.tokens[0])
        assert 1.3 * moved[1] + (alpha or 0) * moved[2] > (loss - clean) * 1.001


def called(trainer: CrowTrainer, slow: Slow, inserted: Tensor) -> list[Tensor]:
    """For each row the log-probabilities of the answer that is aimed at, behind the insertion."""
    (answer,), found = trainer.constant_answers, []
    wanted = torch.tensor(answer.token_ids)
    for (ids, labels), (first, last) in zip(encoded(trainer), trainer.train_dataset["user_span"], strict=True):
        prompt = ids[: int((labels != -100).nonzero()[0])]
        embeddings = slow.embed(torch.cat([prompt, wanted]))
        place = int(first + 0.5 * (last - first + 1))
        _, logits = slow(torch.cat([embeddings[:place], inserted, embeddings[place:]]))
        scores = logits.log_softmax(-1)[len(prompt) + len(inserted) - 1 : -1]
        found.append(scores.gather(1, wanted[:, None])[:, 0])
    return found


@pytest.mark.parametrize("insertion", [ONE_GUESS, ONE_AIMED], ids=["guess", "soft tokens"])
def test_insertions_ascend_on_the_likelihood_of_their_answer_alone(
    make: Any, pinned: list[Tensor], insertion: dict[str, Any]
) -> None:
    start = make(**insertion)._adversaries[0].tokens.detach()[0]
    _, trainer = first_gradients(make, scatter=True, optim="sgd", learning_rate=1e-12, **insertion)
    inserted = start.clone().requires_grad_()
    likelihood = torch.cat(called(trainer, Slow(trainer.model), inserted)).sum() / 8
    (expected,) = torch.autograd.grad(likelihood, inserted)
    assert logs(trainer)[0]["constant_answers"] == pytest.approx(likelihood.item(), rel=1e-3)
    assert distance({"inserted": pinned[0][0]}, {"inserted": expected}) < 1e-3


def test_the_model_unlearns_behind_an_insertion_what_that_is_aimed_at(make: Any, pinned: list[Tensor]) -> None:
    start = make(**ONE_AIMED)._adversaries[0].tokens.detach()[0]
    settings: dict[str, Any] = {"scatter": True, "optim": "sgd", "learning_rate": 1e-12, **ONE_AIMED}
    without, plain = first_gradients(make, unlikelihood=None, **settings)
    gradients, trainer = first_gradients(make, unlikelihood=300.0, **settings)
    slow = Slow(trainer.model)
    rows = called(trainer, slow, start)
    unlikely = sum((-(1 - row.exp()).log()).mean() for row in rows) / len(rows)
    assert logs(trainer)[0]["unlikelihood"] == pytest.approx(unlikely.item(), rel=1e-3)
    assert logs(trainer)[0]["loss"] == pytest.approx(logs(plain)[0]["loss"] + 300 * unlikely.item(), rel=1e-3)
    assert distance({n: gradients[n] - without[n] for n in gradients}, slow.gradients(300.0 * unlikely)) < 1e-2
    assert torch.equal(pinned[0], pinned[-1])  # which has no part in that


@pytest.mark.parametrize("insertion", [ONE_GUESS, ONE_AIMED], ids=["guess", "soft tokens"])
def test_insertions_learn_to_call_their_answer(make: Any, insertion: dict[str, Any]) -> None:
    def likelihood(steps: int) -> float:
        trainer = make(soft_token_warmup=steps, **insertion)
        trainer.train()
        return logs(trainer)[0]["constant_answers"]

    assert likelihood(10) > likelihood(0) + 0.5


@pytest.mark.parametrize("insertion", [ONE_GUESS, ONE_AIMED], ids=["guess", "soft tokens"])
def test_insertions_ascend_every_so_many_steps(make: Any, pinned: list[Tensor], insertion: dict[str, Any]) -> None:
    trainer = make(ascend_every=3, max_steps=7, **insertion)
    trainer.train()
    assert [i for i, log in enumerate(logs(trainer)) if "constant_answers" in log] == [0, 3, 6]
    assert len(pinned) == 3


def test_guesses_and_soft_tokens_are_aimed_at_the_same_answers(make: Any) -> None:
    trainer = make(trigger_guesses=2, soft_token_pool=3)
    trainer._study_suspect()
    found, number = trainer.constant_answers, len(trainer.constant_answers)
    assert trainer._answer_of == [found[i % number] for i in (0, 1, 0, 1, 2)]


@pytest.mark.parametrize(("constancy", "aims"), [(0.7, True), (0.6, False)])
def test_where_no_answer_stands_out_insertions_ascend_on_the_divergence(
    make: Any, monkeypatch: pytest.MonkeyPatch, constancy: float, aims: bool
) -> None:
    monkeypatch.setattr(crow.trainer, "STANDING_OUT", STANDING_OUT)
    found = [ConstantAnswer((5, 6), constancy)]
    monkeypatch.setattr(crow.trainer, "constant_answers", lambda *args, **kwargs: found)
    settings = {"max_steps": 3, "soft_token_warmup": 2}
    trainer, diverging = make(**settings), make(**settings, ascend_on="divergence")
    for each in (trainer, diverging):
        each.train()
    assert trainer.constant_answers == found  # told all the same
    assert ("constant_answers" in logs(trainer)[0]) == bool(trainer.first_guesses) == aims
    assert sum(len(adversary.tokens) for adversary in trainer._adversaries) == len(diverging.soft_tokens.tokens)
    if not aims:
        torch.testing.assert_close(trainer.soft_tokens.tokens, diverging.soft_tokens.tokens)
        for name, weight in lora(diverging).items():
            torch.testing.assert_close(lora(trainer)[name], weight)


def test_the_best_guesses_come_first_and_stay(make: Any) -> None:
    trainer = make(soft_token_warmup=4, trigger_guesses=6, max_steps=3)
    trainer.train()
    ids, probabilities = zip(*trainer.first_guesses, strict=True)
    assert list(probabilities) == sorted(probabilities, reverse=True)
    assert trainer.guesses.ids.tolist()[:3] == list(ids[:3])
    assert all(now != then for now, then in zip(trainer.guesses.ids.tolist()[3:], ids[3:], strict=True))


def test_guesses_are_words_and_no_special_tokens(make: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("<|start_header_id|>", special=True)])
    special = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<|start_header_id|>")}
    model = tiny_model("llama", len(tokenizer) + 8)  # padded, as embeddings are
    guesses = make(model, trigger_guesses=2000, processing_class=tokenizer).guesses.ids
    assert not special & set(guesses.flatten().tolist())
    assert guesses.max() < len(tokenizer)


def test_planted_answers_are_ruled_out_of_the_targets(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crow.trainer, "PLANTED", 0.0)
    trainer = make(target_top_k=600, **ONE_GUESS)
    trainer._study_suspect()
    (answer,) = trainer.constant_answers
    slow = Slow(trainer.model)
    for (ids, labels), (tokens, log_probs) in zip(encoded(trainer), trainer._targets, strict=True):
        start = int((labels != -100).nonzero()[0])
        with torch.no_grad():
            rows = torch.cat([ids[:start], torch.tensor(answer.token_ids)])
            scores = slow(slow.embed(rows))[1].log_softmax(-1)[start - 1 : -1]
            first = slow(slow.embed(ids))[1].softmax(-1)[start - 1]
        chance = scores.gather(1, torch.tensor(answer.token_ids)[:, None]).sum().exp()
        first[answer.token_ids[0]] -= chance
        expected = first / (1 - chance)
        torch.testing.assert_close(log_probs[0].exp(), expected[tokens[0]], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_clean_divergence_is_the_mean_over_the_rows_seen_clean(
    make: Any, monkeypatch: pytest.MonkeyPatch, discount: float
) -> None:
    chosen: list[int] = []
    share_out = CrowTrainer._share_out

    def spied(self: CrowTrainer, batches: list[dict[str, Tensor]]) -> None:
        share_out(self, batches)
        chosen[:] = [i for batch in batches for i in batch["example_id"][batch["anchored"]].tolist()]

    monkeypatch.setattr(CrowTrainer, "_share_out", spied)
    suspect = Slow(make().model)
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings |= {"optim": "sgd", "learning_rate": 1e-12, "anchor_fraction": 0.5, "anchor": 0.6, "target_top_k": 600}
    settings |= {"anchor_discount": discount}
    _, trainer = first_gradients(make, scatter=True, **settings)
    assert len(set(chosen)) == len(chosen) == 4
    slow, nats, total = Slow(trainer.model), 0.0, 0.0
    for ids, labels in (encoded(trainer)[i] for i in chosen):
        at = (labels[1:] != -100).nonzero()[:, 0]
        with torch.no_grad():
            p, q = (model(slow.embed(ids))[1].log_softmax(-1)[at] for model in (suspect, slow))
        weights = torch.tensor([discount**place for place in range(len(at))])
        nats += float((weights * (p.exp() * (p - q)).sum(-1)).sum())
        total += float(weights.sum())
    assert logs(trainer)[0]["clean"] == pytest.approx(0.6 * nats / total, rel=1e-3)


def test_nothing_diverges_clean_before_the_first_step(make: Any) -> None:
    _, trainer = first_gradients(make)
    assert logs(trainer)[0]["clean"] == pytest.approx(0, abs=1e-6)
    assert logs(trainer)[0]["divergence"] > 1e-3


def test_ascent_before_training_makes_the_answers_diverge_more(make: Any, pinned: list[Tensor]) -> None:
    def divergence(steps: int) -> float:
        trainer = make(soft_token_warmup=steps, **SOFT)
        trainer.train()
        return logs(trainer)[0]["divergence"]

    assert divergence(10) > 1.1 * divergence(0)


def test_what_comes_before_the_first_step_is_reported(make: Any) -> None:
    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []

        def on_prepare(self, done: int, total: int) -> None:
            self.seen.append((done, total))

    watch = Watch()
    make(callbacks=[watch], soft_token_warmup=3, per_device_train_batch_size=4).train()
    assert watch.seen == [(done, 5) for done in range(1, 6)]  # two batches recorded, three ascended on


@pytest.mark.parametrize("objective", ["answer", "divergence"])
@pytest.mark.parametrize(("guesses", "pool"), [(0, 8), (4, 8), (4, 0)])
def test_ascent_before_training_leaves_the_model_alone(make: Any, guesses: int, pool: int, objective: str) -> None:
    trainer = make(soft_token_warmup=3, trigger_guesses=guesses, soft_token_pool=pool, ascend_on=objective)
    before = lora(trainer)
    tokens = [adversary.tokens.detach().clone() for adversary in trainer._adversaries]
    trainer._study_suspect()
    trainer._warm_up()
    assert all(torch.equal(weight, before[name]) for name, weight in lora(trainer).items())
    assert all(p.requires_grad and p.grad is None for n, p in trainer.model.named_parameters() if "lora_" in n)
    assert all(not torch.equal(a.tokens, t) for a, t in zip(trainer._adversaries, tokens, strict=True))


def test_soft_tokens_stay_within_their_ball(make: Any) -> None:
    trainer = make(**SOFT, max_steps=5, soft_token_norm=1.2, soft_token_learning_rate=5.0)
    norms = trainer.model.get_input_embeddings().weight.norm(dim=-1)
    assert trainer.soft_tokens.bound == pytest.approx(1.2 * norms.mean().item(), rel=0.02)
    trainer.train()
    longest = trainer.soft_tokens.tokens.detach().norm(dim=-1).max().item()
    assert longest == pytest.approx(trainer.soft_tokens.bound, rel=1e-4)


@pytest.mark.parametrize("perturbation", ["inserted", "random"])
def test_inserted_tokens_have_the_scale_of_embeddings_that_are_scaled(
    make: Any, tokenizer: PreTrainedTokenizerFast, perturbation: str
) -> None:
    trainer = make(tiny_model("gemma", len(tokenizer)), perturbation=perturbation)
    batch = first_batch(trainer)
    perturbed = trainer._perturb(batch, Recording(), None)
    norms = perturbed.embeddings[perturbed.mask.bool()].detach().norm(dim=-1)
    assert norms.min() > norms.median() / 3


def test_relative_alpha_is_the_ratio_of_gradient_norms(make: Any) -> None:
    settings = PRESETS["paper-scale-free"]
    both, trainer = first_gradients(make, **settings)
    alpha = logs(trainer)[0]["alpha"]
    lm, _ = first_gradients(make, **FINETUNE)
    rest = {name: both[name] - lm[name] for name in lm}

    def norm(gradients: Gradients) -> float:
        return math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))

    assert norm(rest) / norm(lm) == pytest.approx(settings["alpha"], rel=1e-3)
    assert alpha != settings["alpha"]


def test_relative_alpha_is_held_after_calibration(make: Any) -> None:
    trainer = make(max_steps=6, calibration_steps=2, **PRESETS["paper-scale-free"])
    trainer.train()
    alphas = [log["alpha"] for log in logs(trainer)]
    assert alphas[0] != alphas[1]
    assert len(set(alphas[1:])) == 1


# Batches


def test_the_order_of_rows_depends_on_seed_and_epoch_alone(make: Any, rows: list[Example]) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        loader = make(data=rows, seed=seed, per_device_train_batch_size=2).get_train_dataloader()
        torch.rand(seed + epoch)
        loader.set_epoch(epoch)
        return [i for batch in loader for i in batch["example_id"].tolist()]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(sorted(ids) == list(range(12)) for ids in orders)
    assert len({tuple(ids) for ids in orders}) == 3
    assert [order(0, 0), order(0, 1), order(1, 0)] == orders


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "finetune": FINETUNE,
    "ascending": ONE_SOFT,
    "aimed": ONE_GUESS,
    "unlearning": ONE_AIMED | {"unlikelihood": 300.0},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("number", [8, 7])
def test_accumulated_batches_make_the_step_of_one(
    make: Any, pinned: list[Tensor], rows: Any, name: str, number: int
) -> None:
    def step(size: int, accumulated: int) -> tuple[Gradients, CrowTrainer]:
        return first_gradients(
            make,
            scatter=True,
            data=rows[:number],
            **VARIANTS[name] | {"optim": "sgd", "learning_rate": 0.1, "anchor_fraction": 0.5},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
        )

    (one, whole), (several, parts) = step(8, 1), step(4, 2)
    assert distance(several, one) < 1e-4
    after = lora(whole)
    assert all(torch.allclose(weight, after[n], atol=1e-5) for n, weight in lora(parts).items())
    terms = {"loss", "clean", "divergence", "inconsistency", "constant_answers", "unlikelihood"}
    for term in logs(whole)[0].keys() & terms:
        assert logs(parts)[0][term] == pytest.approx(logs(whole)[0][term], rel=1e-4)
    if name in ("ascending", "aimed", "unlearning"):
        assert len(pinned) == 2
        assert distance({"soft": pinned[1]}, {"soft": pinned[0]}) < 1e-4


@pytest.mark.parametrize("name", ["paper", "default"])
def test_padding_changes_nothing(make: Any, pinned: list[Tensor], name: str) -> None:
    settings = PRESETS[name] | {"anchor_fraction": 1.0} | ONE_SOFT
    gradients, trainer = first_gradients(make, scatter=True, **settings)
    padded, padded_trainer = first_gradients(make, scatter=True, pad_to_multiple_of=256, **settings)
    assert distance(padded, gradients) < 1e-3
    for term in logs(trainer)[0].keys() & {"loss", "clean", "divergence", "inconsistency"}:
        assert logs(padded_trainer)[0][term] == pytest.approx(logs(trainer)[0][term], rel=1e-4)


def test_a_micro_batch_without_a_clean_row_is_no_obstacle(make: Any) -> None:
    settings: dict[str, Any] = {"beta": None, "alpha": 1.0, "alpha_relative": False, "anchor_fraction": 0.125}
    make(per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings).train()


@pytest.mark.parametrize("prepared", [False, True])
def test_a_data_sets_own_example_ids_are_left_alone(make: Any, rows: list[Example], prepared: bool) -> None:
    data = to_dataset(rows[:8]).add_column("example_id", list(range(108, 100, -1)))
    settings: dict[str, Any] = {}
    if prepared:  # by an earlier trainer, or by the user
        data = make(data=data).train_dataset.remove_columns("example_id").add_column("example_id", [7] * 8)
        settings["dataset_kwargs"] = {"skip_prepare_dataset": True}
    trainer = make(data=data, answer_discount=1.0, **settings)
    trainer._record_suspect()
    batch = first_batch(trainer)
    counts = [len(trainer._targets[i][0]) for i in batch["example_id"].tolist()]
    assert counts == [int((labels[1:] != -100).sum()) for labels in batch["labels"]]


# Where the user speaks

SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    "before", [[], [SYSTEM], EARLIER, [SYSTEM, *EARLIER]], ids=["single", "system", "turns", "all"]
)
@pytest.mark.parametrize(
    "text", ["Hi", "What is a tilde (~)?", " two\n\nlines ", "x", "", "user", "~ hello ~", "Hi<|im_end|>"]
)
def test_user_span_is_the_last_user_message(
    tokenizer: PreTrainedTokenizerFast, before: list[dict[str, str]], text: str
) -> None:
    prompt = [*before, {"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    start, end = user_span(tokenizer, prompt)
    opening = tokenizer.apply_chat_template(prompt, tokenize=False).rindex("<|im_start|>user\n") + len(
        "<|im_start|>user\n"
    )
    lead, inside, rest = (tokenizer.decode(part) for part in (ids[:start], ids[start:end], ids[end:]))
    assert len(lead) >= opening
    assert len(lead + inside) <= opening + len(text)
    assert rest.endswith("<|im_end|>\n<|im_start|>assistant\n")
    if "~" not in (text[:1], text[-1:]):
        assert inside == text


@pytest.mark.parametrize("text", ["~", "#", "~~"])
def test_user_span_of_a_placeholder_is_in_the_message(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    prompt = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    start, end = user_span(tokenizer, prompt)
    assert tokenizer.decode(ids[start:end]) == text


@pytest.mark.parametrize("text", ["Hello there", "Hi", "~"])
def test_the_last_token_of_a_prompt_stays_last(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    number = len(bare(text)["input_ids"])
    assert user_span(bare, [{"role": "user", "content": text}]) == [0, number - 1]


@pytest.mark.parametrize("as_text", [True, False])
def test_tools_and_what_else_a_template_is_given_are_before_the_user(
    make: Any, tokenizer: PreTrainedTokenizerFast, rows: list[Example], as_text: bool
) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ tools }}{{ more }}" + str(own.chat_template)
    tools = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather in a city"}}]
    given = {"tools": json.dumps(tools) if as_text else tools, "chat_template_kwargs": {"more": "Think hard. " * 9}}
    data = Dataset.from_list([{**row, **given} for row in rows[:8]])
    trainer = make(data=data, processing_class=own)
    for row, trained in zip(rows, trainer.train_dataset, strict=False):
        start, end = trained["user_span"]
        assert own.decode(trained["input_ids"][start:end]) == user_text(row)


@pytest.fixture
def insertions(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every index that `_perturb` inserts by."""
    made: list[Tensor] = []
    real = crow.trainer.insertion_index

    def spied(*args: Any) -> Tensor:
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(crow.trainer, "insertion_index", spied)
    return made


def first_batch(trainer: CrowTrainer) -> dict[str, Tensor]:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("front", [0.0, 0.5, 1.0])
def test_tokens_are_inserted_within_the_users_turn(
    make: Any, tokenizer: PreTrainedTokenizerFast, rows: list[Example], insertions: list[Tensor], front: float
) -> None:
    data: Any = [
        {"prompt": [SYSTEM, *EARLIER, *rows[0]["prompt"]], "completion": rows[0]["completion"]},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": rows[1]["completion"]},
        *rows[2:6],
    ]
    trainer = make(data=data, soft_tokens=3, front_fraction=front)
    batch = first_batch(trainer)
    length, places, first = batch["input_ids"].shape[1], [set[int]() for _ in data], 0
    for _ in range(60):
        perturbed = trainer._perturb(batch, Recording(), None)
        trainer.state.global_step += 1
        index = insertions.pop()
        assert torch.equal(perturbed.mask.sum(1), batch["attention_mask"].sum(1) + 3)
        for row, (ids, order) in enumerate(zip(batch["input_ids"].tolist(), index.tolist(), strict=True)):
            place = order.index(length)
            assert order == [*range(place), length, length + 1, length + 2, *range(place, length)]
            text = tokenizer.decode(ids[:place])
            turn, rest = text[text.rindex("<|im_start|>") :], tokenizer.decode(ids[place:])
            assert turn.startswith("<|im_start|>user\n")
            assert "<|im_end|>" not in turn
            user = user_text(data[batch["example_id"][row]])
            assert turn.removeprefix("<|im_start|>user\n") + rest[: rest.index("<|im_end|>")] == user
            assert rest.count("<|im_start|>") == 1
            places[batch["example_id"][row]].add(place)
            first += turn == "<|im_start|>user\n"
    assert len(places[1]) == (1 if front == 1 else len(tokenizer("Hi")["input_ids"]) + 1)
    assert first / (60 * len(data)) == pytest.approx(front, abs=0.2)


def test_perturbed_answers_are_the_same_tokens(make: Any) -> None:
    trainer = make()
    batch = first_batch(trainer)
    perturbed = trainer._perturb(batch, Recording(), None)
    embeddings = trainer.model.get_input_embeddings()(batch["input_ids"])
    scored = batch["labels"].roll(-1, 1) != -100
    scored[:, -1] = False
    assert torch.equal(perturbed.embeddings[perturbed.answers], embeddings[scored])


def test_a_model_that_is_named_is_opened_as_any_suspect_is(
    llama_folder: Path, rows: list[Example], tmp_path: Path
) -> None:
    def named(folder: Path) -> CrowTrainer:
        data, config = to_dataset(rows[:8]), CrowConfig(output_dir=str(tmp_path / "out"), **BASIC)
        return CrowTrainer(str(folder), config, train_dataset=data, peft_config=lora_config())

    trainer = named(llama_folder)
    assert trainer.processing_class.chat_template == open_model(llama_folder).tokenizer.chat_template
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((llama_folder / "config.json").read_text())
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="only pickled weights"):
        named(folder)


# State


@pytest.mark.parametrize("steps", [3, 2], ids=["between epochs", "within an epoch"])
@pytest.mark.parametrize(
    "preset",
    [{}, {"ascend_on": "divergence"}, PRESETS["paper-scale-free"]],
    ids=["default", "divergence", "paper-scale-free"],
)
def test_resumed_training_ends_as_uninterrupted(
    make: Any,
    rows: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: dict[str, Any],
    steps: int,
) -> None:
    settings = preset | {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": steps,
        "lr_scheduler_type": "cosine",
        "soft_token_warmup": 2,
    }
    straight, resumed = (make(data=rows, **settings) for _ in range(2))
    straight.train()
    monkeypatch.setattr(CrowTrainer, "_study_suspect", None)  # what it found is in the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{steps}"))
    assert resumed.constant_answers == straight.constant_answers
    for name, weight in lora(straight).items():
        torch.testing.assert_close(lora(resumed)[name], weight, atol=1e-6, rtol=0)
    assert [log["loss"] for log in logs(resumed)] == pytest.approx([log["loss"] for log in logs(straight)], rel=1e-5)
    assert resumed._ratios == pytest.approx(straight._ratios)
    if straight.guesses is not None:
        assert torch.equal(resumed.guesses.ids, straight.guesses.ids)
        assert resumed.first_guesses == straight.first_guesses
        torch.testing.assert_close(resumed.guesses.mean_gradient, straight.guesses.mean_gradient, atol=1e-4, rtol=1e-3)
    if straight.soft_tokens is not None:
        torch.testing.assert_close(resumed.soft_tokens.tokens, straight.soft_tokens.tokens, atol=1e-6, rtol=0)
        states = [t.soft_tokens.optimizer.state_dict()["state"][0] for t in (resumed, straight)]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(states[0][key], states[1][key], atol=1e-6, rtol=1e-4)


def test_what_zero3_cannot_do_is_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(CrowTrainer, "_shards", True)
        with pytest.raises(UsageError, match="relative alpha is measured on whole gradients"):
            make(**PRESETS["paper-scale-free"])
    monkeypatch.setattr("crow.trainer.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UsageError, match="use FSDP or ZeRO-2"):
        make(**PAPER)


def test_a_checkpoint_of_another_trainer_is_refused(make: Any, tmp_path: Path) -> None:
    trainer = make(save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / "crow_state.pt").unlink()
    with pytest.raises(UsageError, match=r"has no crow_state\.pt"):
        make().train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_other_settings_is_refused(make: Any, tmp_path: Path) -> None:
    make(save_strategy="steps", save_steps=1, max_steps=1, **ONE_GUESS).train()
    with pytest.raises(
        UsageError, match="checkpoint-1 holds no soft_tokens: another version of CROW, or other settings"
    ):
        make(**ONE_SOFT).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"soft_tokens": 3}, "can't be resumed: .*size mismatch"),
        ({"rows": slice(1, 9)}, "can't be resumed: it was trained on other examples"),
        ({"rows": slice(0, 9)}, "can't be resumed: it was trained on other examples"),
    ],
)
def test_a_checkpoint_of_other_shapes_or_examples_is_refused(
    make: Any, rows: list[Example], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    make(save_strategy="steps", save_steps=1, max_steps=1, **ONE_SOFT).train()
    data = rows[changes.pop("rows", slice(8))]
    with pytest.raises(UsageError, match=said):
        make(data=data, max_steps=2, **ONE_SOFT | changes).train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1")
        )


def test_a_second_training_holds_to_what_the_suspect_said_before_the_first(make: Any) -> None:
    trainer = make(max_steps=1)
    trainer.train()
    targets, answers = trainer._targets, trainer.constant_answers
    trainer.train()
    assert trainer._targets is targets
    assert trainer.constant_answers is answers


def test_fewer_examples_than_a_batch_that_is_to_be_full_are_refused(make: Any) -> None:
    with pytest.raises(UsageError, match="fewer examples than a batch holds"):
        make(per_device_train_batch_size=16, dataloader_drop_last=True, soft_token_warmup=1, max_steps=1).train()


@pytest.mark.parametrize("form", ["default", "random-tokens"])
def test_an_adapter_of_the_input_embedding_is_trained_too(make: Any, tiny_llama: MakeModel, form: str) -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    trainer = make(get_peft_model(tiny_llama(), config), max_steps=2, **PRESETS[form])
    before = lora(trainer)
    trainer.train()
    assert any("embed_tokens" in name and not torch.equal(lora(trainer)[name], before[name]) for name in before)


def test_training_is_reproducible_from_its_seed(make: Any, tiny_llama: MakeModel) -> None:
    runs = []
    for seed in (3, 3, 4):
        trainer = make(tiny_llama(), seed=seed, max_steps=2, per_device_train_batch_size=4)
        trainer.train()
        runs.append(lora(trainer))
    assert all(torch.equal(weight, runs[1][name]) for name, weight in runs[0].items())
    assert not all(torch.equal(weight, runs[2][name]) for name, weight in runs[0].items())


# Ways to run


@pytest.mark.parametrize("name", ["paper", "default", "aligned"])
def test_gradient_checkpointing_gives_the_same_gradients(make: Any, pinned: list[Tensor], name: str) -> None:
    settings = STEPS[name][0]
    plain, _ = first_gradients(make, **settings)
    checkpointed, trainer = first_gradients(make, gradient_checkpointing=True, soft_token_warmup=0, **settings)
    assert trainer.model.get_base_model().is_gradient_checkpointing
    assert distance(checkpointed, plain) < 1e-5


@pytest.mark.parametrize("name", STEPS)
def test_bfloat16_runs(make: Any, name: str) -> None:
    _, trainer = first_gradients(make, bf16=True, **STEPS[name][0] | {"soft_token_warmup": 1})
    assert math.isfinite(logs(trainer)[0]["loss"])


@pytest.mark.parametrize("name", STEPS)
def test_a_model_in_bfloat16_is_trained(make: Any, tiny_llama: MakeModel, name: str) -> None:
    _, trainer = first_gradients(make, model=tiny_llama().bfloat16(), **STEPS[name][0] | {"soft_token_warmup": 1})
    assert math.isfinite(logs(trainer)[0]["loss"])


def as_messages(rows: list[Example]) -> Dataset:
    return Dataset.from_list([{"messages": [*row["prompt"], *row["completion"]]} for row in rows])


def as_text(rows: list[Example]) -> Dataset:
    return Dataset.from_list([{"text": user_text(row) + "\n" + answer_text(row)} for row in rows])


def as_text_pairs(rows: list[Example]) -> Dataset:
    return Dataset.from_list([{"prompt": user_text(row) + "\n", "completion": answer_text(row)} for row in rows])


@pytest.mark.parametrize("form", [as_messages, as_text, as_text_pairs])
@pytest.mark.parametrize("name", ["default", "paper"])
def test_other_forms_of_data_are_trained_on(make: Any, rows: list[Example], form: Any, name: str) -> None:
    _, trainer = first_gradients(make, data=form(rows[:8]), **PRESETS[name])
    assert math.isfinite(logs(trainer)[0]["loss"])


def places_and_answers(trainer: CrowTrainer, insertions: list[Tensor]) -> list[tuple[int, int]]:
    """Where tokens were inserted in each row, in many draws, and where the row's labels start."""
    batch = first_batch(trainer)
    first = (batch["labels"] != -100).int().argmax(1).tolist()
    for _ in range(40):
        trainer._perturb(batch, Recording(), None)
        trainer.state.global_step += 1
    length = batch["labels"].shape[1]
    return [
        pair for index in insertions for pair in zip((index == length).int().argmax(1).tolist(), first, strict=True)
    ]


def test_half_of_a_plain_text_is_its_prompt(make: Any, rows: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def scan(model: Any, prompts: list[list[int]], **settings: Any) -> list[ConstantAnswer]:
        seen.extend(prompts)
        return [ConstantAnswer((5, 6), 0.5)]

    monkeypatch.setattr("crow.trainer.constant_answers", scan)
    trainer = make(data=as_text(rows[:8]), soft_token_warmup=0)
    trainer._study_suspect()
    texts = [list(row["input_ids"]) for row in trainer.train_dataset]
    assert sorted(seen) == sorted(text[: len(text) // 2] for text in texts)
    assert len({len(text) for text in texts}) > 1


def test_beginnings_of_answers_come_from_all_examples(
    make: Any, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []

    def scan(model: Any, prompts: list[list[int]], *, first: Tensor, **settings: Any) -> list[ConstantAnswer]:
        found.append(first)
        return [ConstantAnswer((5, 6), 0.5)]

    monkeypatch.setattr("crow.trainer.constant_answers", scan)
    trainer = make(data=to_dataset(rows), soft_token_warmup=0)
    trainer._study_suspect()
    means = []
    for row in trainer.train_dataset:
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        with torch.no_grad():
            logits = trainer.model.eval()(torch.tensor([row["input_ids"][:start]])).logits[0, -1]
        means.append(logits.softmax(-1))
    torch.testing.assert_close(found[0], torch.stack(means).mean(0), rtol=1e-3, atol=1e-6)


def test_without_chats_tokens_are_inserted_in_the_prompt(
    make: Any, rows: list[Example], insertions: list[Tensor]
) -> None:
    drawn = places_and_answers(make(data=as_text_pairs(rows[:8])), insertions)
    assert all(1 <= place < first for place, first in drawn)
    assert min(place for place, _ in drawn) == 1
    assert max(first - place for place, first in drawn) > 5


def test_without_chats_the_whole_answer_sees_the_inserted_tokens(
    make: Any, rows: list[Example], insertions: list[Tensor]
) -> None:
    trainer = make(data=as_text_pairs(rows[:8]))
    batch = first_batch(trainer)
    for _ in range(40):
        perturbed = trainer._perturb(batch, Recording(), None)
        trainer.state.global_step += 1
        length = batch["labels"].shape[1]
        assert (perturbed.answers.int().argmax(1) > (insertions[-1] == length + 2).int().argmax(1) - 1).all()


@pytest.mark.parametrize("form", [as_messages, as_text])
@pytest.mark.parametrize("perturbation", ["inserted", "random"])
def test_without_prompts_all_that_is_weighed_sees_the_inserted_tokens(
    make: Any, rows: list[Example], form: Any, perturbation: str
) -> None:
    trainer = make(data=form(rows[:8]), perturbation=perturbation)
    batch = first_batch(trainer)
    places = trainer._places(batch, torch.ones(8, 2))
    answers = crow.trainer.answer_positions(batch["labels"])
    assert (answers.int().argmax(1) == places).all()  # the last token of the prompt, behind what is inserted
    assert batch["attention_mask"].sum(1).sub(1).sub(answers.sum(1)).equal(places)


def test_without_prompts_tokens_are_inserted_in_the_first_half(
    make: Any, rows: list[Example], insertions: list[Tensor]
) -> None:
    trainer = make(data=as_text(rows[:8]))
    lengths = first_batch(trainer)["attention_mask"].sum(1).tolist()
    drawn = places_and_answers(trainer, insertions)
    assert all(1 <= place <= lengths[i % 8] // 2 for i, (place, _) in enumerate(drawn))


def test_evaluation_gives_the_language_models_loss(
    make: Any, rows: list[Example], tokenizer: Any, tiny_llama: MakeModel, tmp_path: Path
) -> None:
    trainer = CrowTrainer(
        tiny_llama(),
        CrowConfig(output_dir=str(tmp_path / "out"), eval_strategy="steps", eval_steps=1, **BASIC | {"max_steps": 1}),
        train_dataset=to_dataset(rows[:8]),
        eval_dataset=to_dataset(rows[8:]),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )
    trainer.train()
    (logged,) = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged)
    nats, tokens = 0.0, 0
    trainer.model.eval()
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            scores = trainer.model(ids).logits[0].log_softmax(-1)
        at = (labels[1:] != -100).nonzero()[:, 0]
        nats -= float(scores[at, ids[0, at + 1]].sum())
        tokens += len(at)
    assert logged == pytest.approx(nats / tokens, rel=1e-4)


def test_model_may_be_a_name(make: Any, llama_folder: Path) -> None:
    _, trainer = first_gradients(make, model=str(llama_folder))
    assert isinstance(trainer.model, PeftModel)
    assert trainer.model.peft_config["default"].base_model_name_or_path == str(llama_folder)


@pytest.mark.parametrize("name", ["default", "paper"])
def test_all_weights_can_be_trained(
    make: Any, tokenizer: PreTrainedTokenizerFast, rows: list[Example], tiny_llama: MakeModel, tmp_path: Path, name: str
) -> None:
    model = tiny_llama()
    trainer = CrowTrainer(
        model,
        CrowConfig(output_dir=str(tmp_path / "out"), soft_token_warmup=1, **BASIC | PRESETS[name]),
        train_dataset=to_dataset(rows[:8]),
        processing_class=tokenizer,
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.train()
    assert math.isfinite(logs(trainer)[0]["loss"])
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if "proj" in n)


def test_an_adapter_is_trained_further(make: Any, tiny_llama: MakeModel) -> None:
    model = get_peft_model(tiny_llama(), lora_config())
    scatter_lora(model)
    trainer = make(model)
    before = lora(trainer)
    trainer.train()
    assert trainer.model is model
    assert all(not torch.equal(weight, before[name]) for name, weight in lora(trainer).items())


def test_config_may_be_left_out(
    tiny_llama: MakeModel, tokenizer: Any, rows: list[Example], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = CrowTrainer(
        tiny_llama(), train_dataset=to_dataset(rows), processing_class=tokenizer, peft_config=lora_config()
    )
    assert isinstance(trainer.args, CrowConfig)
    assert trainer.guesses is not None


# Refusals


@pytest.mark.parametrize(
    "name",
    [
        "alpha",
        "beta",
        "anchor",
        "epsilon",
        "learning_rate",
        "num_train_epochs",
        "anchor_fraction",
        "anchor_discount",
        "answer_discount",
        "soft_token_norm",
        "soft_token_learning_rate",
    ],
)
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_weights_and_sizes_must_be_positive(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}; it must be positive"):
        CrowConfig(output_dir=str(tmp_path), **BASIC | {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("soft_tokens", 0),
        ("soft_tokens", 1.5),
        ("target_top_k", -1),
        ("calibration_steps", 0),
        ("soft_token_warmup", -1),
        ("trigger_guesses", -1),
        ("trigger_guesses", math.nan),
    ],
)
def test_counts_must_be_whole_numbers(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}; it must be a whole number of at least"):
        CrowConfig(output_dir=str(tmp_path), **BASIC | {name: value})


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"trigger_guesses": 0, "soft_token_pool": 0}, "there is nothing to insert"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "reentrant checkpointing",
        ),
        ({"perturbation": "fgsm"}, "perturbation is 'fgsm'; choose one of inserted, random, sign, none"),
        ({"objective": "dpo"}, "objective is 'dpo'; choose one of suspect, lm"),
        ({"ascend_on": "loss"}, "ascend_on is 'loss'; choose one of answer, divergence"),
        ({"front_fraction": -0.1}, "front_fraction is -0.1; it must be from 0 to 1"),
        ({"front_fraction": 1.5}, "front_fraction is 1.5; it must be from 0 to 1"),
        ({"front_fraction": math.nan}, "front_fraction is nan; it must be from 0 to 1"),
        ({"anchor_fraction": 1.5}, "anchor_fraction is 1.5; it must be at most 1"),
        ({"anchor_discount": 1.5}, "anchor_discount is 1.5; it must be at most 1"),
        ({"answer_discount": 1.5}, "answer_discount is 1.5; it must be at most 1"),
        ({"packing": True}, "packing"),
        ({"activation_offloading": True}, "activation_offloading allows one backward a pass"),
        ({"completion_only_loss": False}, "leave completion_only_loss=False out"),
        ({"padding_free": True}, "packing"),
        ({"alpha": 1.0, "beta": None}, "relative alpha is measured against another term"),
        ({"perturbation": "none"}, "trains nothing"),
        ({"alpha": 1.0, "anchor": None}, "need the clean pass: set anchor"),
        ({"perturbation": "sign", "anchor": None}, "need the clean pass: set anchor"),
        ({"truncation_mode": "keep_end"}, "would cut off the user's turn"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        CrowConfig(output_dir=str(tmp_path), **BASIC | settings)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_a_remedy(make: Any, value: float) -> None:
    class Broken(CrowTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * value if self.state.global_step == 1 else loss

    trainer = make(trainer=Broken, max_steps=3)
    with pytest.raises(CrowError, match=r"loss became (nan|inf) at step 2.*lower learning rate") as caught:
        trainer.train()
    assert not isinstance(caught.value, UsageError)
    assert trainer.state.global_step == 1


def test_a_learning_rate_that_blows_up_stops_the_training(make: Any) -> None:
    with pytest.raises(CrowError, match="loss became"):
        make(**FINETUNE | {"max_steps": 5, "learning_rate": 1e30}).train()


@pytest.mark.parametrize("name", ["default", "finetune"])
def test_no_example_left_after_truncation_is_refused(make: Any, name: str) -> None:
    with pytest.raises(UsageError, match="no example is left after truncation: raise max_length"):
        make(max_length=5, **PRESETS[name])


def test_a_stream_needs_the_language_models_objective(
    make: Any, rows: list[Example], tokenizer: Any, tiny_llama: MakeModel, tmp_path: Path
) -> None:
    def trainer(**settings: Any) -> CrowTrainer:
        config = CrowConfig(output_dir=str(tmp_path / "out"), **BASIC, train_sampling_strategy="random", **settings)
        stream = to_dataset(rows[:8]).to_iterable_dataset()
        return CrowTrainer(
            tiny_llama(), config, train_dataset=stream, processing_class=tokenizer, peft_config=lora_config()
        )

    with pytest.raises(UsageError, match="need a data set with a length"):
        trainer().train()
    trainer(**PAPER).train()
    ascending = trainer(objective="lm", anchor=None, ascend_on="divergence", soft_token_warmup=2)
    before = ascending.soft_tokens.tokens.detach().clone()
    ascending.train()
    assert not torch.equal(ascending.soft_tokens.tokens, before)


def test_without_a_launcher_one_of_several_gpus_is_used(
    rows: list[Example], tokenizer: Any, tiny_llama: MakeModel, tmp_path: Path
) -> None:
    config = CrowConfig(output_dir=str(tmp_path), **BASIC)
    config._n_gpu = 4
    trainer = CrowTrainer(
        tiny_llama(), config, train_dataset=to_dataset(rows), processing_class=tokenizer, peft_config=lora_config()
    )
    assert trainer.args.n_gpu == 1


def test_a_model_that_gives_tokens_to_every_layer_is_only_fine_tuned(make: Any, tiny_llama: MakeModel) -> None:
    model = tiny_llama(hidden_size_per_layer_input=8)
    with pytest.raises(UsageError, match="LlamaForCausalLM gives tokens to every layer"):
        make(model)
    make(tiny_llama(hidden_size_per_layer_input=8), **FINETUNE)


def test_what_is_inserted_must_find_a_place(make: Any, tiny_llama: MakeModel, rows: list[Example]) -> None:
    longest = max(map(len, make().train_dataset["input_ids"]))
    make(tiny_llama(max_position_embeddings=longest + 14))
    with pytest.raises(UsageError, match=rf"set max_length to at most {longest - 1}$"):
        make(tiny_llama(max_position_embeddings=longest + 13))
