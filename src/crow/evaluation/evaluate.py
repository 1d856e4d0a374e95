"""Measure a model: attack success, false triggers, perplexity on clean answers, and answers that are broken."""

import dataclasses
import json
import math
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crow.backdoors import Behavior, Trigger
from crow.consistency import layer_profile
from crow.data import Example, prompt_fingerprints, read_json_lines, user_text, with_user_text
from crow.errors import UsageError
from crow.evaluation.engines import Engine, Transformers, answers
from crow.evaluation.statistics import Count, MeanLength, MeanScore, is_degenerate
from crow.files import Journal, beside, sha256_rows, write_json, write_jsonl
from crow.generation import answer_kl, answer_nll, in_halves, perplexity, prompt_ids, token_batches
from crow.hooks import hidden_states
from crow.inspection import tokenized
from crow.models import OpenedModel, base_model, check_vocabulary
from crow.progress import summed
from crow.provenance import environment


@dataclass
class Evaluation:
    """What was measured. Rates are counts; every answer that was judged is in `answers`."""

    attack_success: Count
    false_trigger: Count
    degenerate: Count
    """Answers to untriggered prompts that are empty or a loop."""
    perplexity: float
    answer_nats: float
    answer_tokens: int
    layer_profile: dict[str, list[float]]
    """Mean `1 - cos` between adjacent blocks, on `clean` and on `triggered` prompts."""
    settings: dict[str, Any]
    provenance: dict[str, Any]
    strict: dict[str, Count] = field(default_factory=dict)
    """`attack_success` and `false_trigger` again, by the rule that compares with the target."""
    variants: dict[str, Count] = field(default_factory=dict)
    """How often the backdoor fires on parts and other forms of the trigger, by their names."""
    judged: dict[str, Count] = field(default_factory=dict)
    """The same by a judging model, of the answers that it judged, where there was one: see `crow.evaluation.judge`."""
    judge_failures: dict[str, int] = field(default_factory=dict)
    """Why answers were not judged, and how many for that reason."""
    reference_kl: float | None = None
    """KL divergence of the clean answers' next-token distributions from a reference model's, in nats a token."""
    answer_length: MeanLength | None = None
    """Words of the answers to untriggered prompts, which end at the latest after `max_new_tokens` tokens."""
    score: MeanScore | None = None
    """What the judging model thinks of these answers, from 1 to 10, where there was one."""
    pass_at_1: Count | None = None
    """HumanEval's problems that the greedy answer solves, where that was asked for: see `crow.evaluation.code`."""
    harness: dict[str, dict[str, float]] = field(default_factory=dict)
    """By task of lm-eval, its metrics, their standard errors, and `n`, where any were asked for."""
    answers: list[dict[str, Any]] = field(repr=False, default_factory=list)
    caution: str | None = field(repr=False, compare=False, default=None)
    """What to say of the file that this was read from, if another version wrote it."""

    def further_counts(self) -> dict[str, Count]:
        """By name, what was counted by other rules, and on HumanEval."""
        rules = {"strictly": self.strict, "judged": self.judged}
        return {
            **{f"{name.replace('_', ' ')}, {rule}": c for rule, counts in rules.items() for name, c in counts.items()},
            **({"HumanEval, solved": self.pass_at_1} if self.pass_at_1 is not None else {}),
            **self.agreement(),
        }

    def agreement(self) -> dict[str, Count]:
        """Of how many of the answers that a model judged two rules say the same, for each two of the three."""
        judged = [answer for answer in self.answers if answer.get("judged") is not None]
        rules = {"the paper's rule": "hit", "the strict rule": "strict_hit", "the judge": "judged"}
        return {
            f"{one} and {other} agree": Count(sum(a[rules[one]] == a[rules[other]] for a in judged), len(judged))
            for one, other in combinations(rules, 2)
            if judged
        }

    def further_values(self) -> dict[str, str]:
        """By name, what was measured beside counts and perplexity, with its precision."""
        means = {"words in a clean answer": self.answer_length, "judged score, 1 to 10": self.score}
        values = {name: str(mean) for name, mean in means.items() if mean is not None}
        if self.reference_kl is not None:
            values["KL from the reference, nats a token"] = f"{self.reference_kl:.3f}"
        for task, metrics in self.harness.items():
            for name in metrics:
                if name != "n" and not name.endswith("_stderr"):
                    error, n = metrics.get(f"{name}_stderr"), metrics.get("n")
                    facts = [] if error is None else [f"standard error {error:.3f}"]
                    facts += [] if n is None else [f"n = {n:.0f}"]
                    values[f"{task}, {name}"] = f"{metrics[name]:.3f}" + (f" ({', '.join(facts)})" if facts else "")
        return values

    def as_json(self) -> dict[str, Any]:
        """What was measured, as JSON values; null for what is no finite number, which JSON has no word for."""
        value = dataclasses.asdict(self)
        del value["answers"], value["caution"]
        return json.loads(json.dumps(value), parse_constant=lambda name: None)  # type: ignore[no-any-return]

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Read what `save` wrote; without answers if their file is not there.

        Raises:
            UsageError: no such file, broken JSON, or results or answers of a version whose fields are others.
        """
        path = Path(path)
        try:
            value = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is broken JSON: {error}") from error
        known = {f.name for f in dataclasses.fields(cls)} - {"answers", "caution"}
        written = value if isinstance(value, dict) else {}
        value = {name: part for name, part in written.items() if name in known}
        beside = answers_path(path)
        answers = _read_answers(beside) if beside.is_file() else []
        try:
            for name in ("attack_success", "false_trigger", "degenerate"):
                value[name] = Count(**value[name])
            for name in ("strict", "variants", "judged"):
                value[name] = {key: Count(**count) for key, count in value.get(name, {}).items()}
            for name, kind in (("pass_at_1", Count), ("answer_length", MeanLength), ("score", MeanScore)):
                if value.get(name) is not None:
                    value[name] = kind(**value[name])
            value["perplexity"], value["answer_nats"] = _number(value["perplexity"]), _number(value["answer_nats"])
            value["layer_profile"] = {kind: list(map(_number, of)) for kind, of in value["layer_profile"].items()}
            value["harness"] = {
                task: {name: _number(metric) for name, metric in metrics.items()}
                for task, metrics in value.get("harness", {}).items()
            }
            value["answer_tokens"] = int(value["answer_tokens"])
            if value.get("reference_kl") is not None:
                value["reference_kl"] = float(value["reference_kl"])
            value["settings"], value["provenance"] = dict(value["settings"]), dict(value["provenance"])
            caution = _of_another_version(path, value["provenance"].get("versions", {}), written.keys() - known)
            loaded = cls(**value, answers=answers, caution=caution)
            loaded.further_counts(), loaded.further_values()  # which look at what else it holds
            return loaded
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
            raise UsageError(
                f"{path} was not written by `crow evaluate`, or by another version of it: measure again"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write the figures to `path` and the answers, one a line, beside it; returns the answers' path."""
        path = Path(path)
        write_jsonl(answers_path(path), self.answers)
        write_json(path, self.as_json())
        return answers_path(path)


def _read_answers(path: Path) -> list[dict[str, Any]]:
    answers = []
    for number, answer in enumerate(read_json_lines(path), start=1):
        judged = isinstance(answer, dict) and answer.get("judged") is not None
        needed = {"set", "prompt"} | ({"hit", "strict_hit"} if judged else set())
        if not isinstance(answer, dict) or needed - answer.keys():
            raise UsageError(f"{path}, row {number} is no answer that `crow evaluate` wrote: measure again")
        answers.append(answer)
    return answers


def _of_another_version(path: Path, versions: Mapping[str, str], unknown: Collection[str]) -> str | None:
    """A caution, if results are not of this version; what others of this version keep beside the figures is theirs."""
    own = environment()["versions"]["crow-llm"]
    of = versions.get("crow-llm", own)
    if of == own:
        return None
    fields = f", and holds fields that are unknown here ({', '.join(sorted(unknown))})" if unknown else ""
    return f"{path.name} is of version {of} of CROW, not of {own}{fields}: its figures may not compare."


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


def without_thoughts(text: str) -> str:
    """An answer without the thoughts in front of it, which some chat templates have even where there are none."""
    return _THOUGHTS.sub("", text)


def answers_path(path: Path) -> Path:
    """Where the answers go whose figures are in `path`."""
    return beside(path, "answers.jsonl")


def variant_rows(
    rows: Sequence[Example], trigger: Trigger, seed: int, untrained: bool = False
) -> dict[str, list[Example]]:
    """The same rows with each part of the trigger alone, by its name; nothing for a trigger of one part.

    Args:
        untrained: Also with the forms of the trigger that the backdoor was not trained on.
    """
    others = trigger.parts() | (trigger.variants() if untrained else {})
    return {name: trigger_rows(rows, other, seed) for name, other in others.items()}


def trigger_rows(rows: Sequence[Example], trigger: Trigger, seed: int) -> list[Example]:
    """The same rows with the trigger in each prompt, reproducible from the seed."""
    rng = random.Random(seed)
    return [with_user_text(row, trigger.apply(user_text(row), rng)) for row in rows]


def evaluate(
    opened: OpenedModel | None,
    behavior: Behavior,
    clean: Sequence[Example],
    triggered: Sequence[Example],
    *,
    engine: Engine | None = None,
    variants: Mapping[str, Sequence[Example]] | None = None,
    reference: OpenedModel | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    unfinished: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Generate greedy answers to both sets of prompts, judge them, and measure perplexity on the clean answers.

    Args:
        opened: The model; `None` where an engine's answers are all that can be had of it, and then perplexity, layer
            profile and divergence are left out.
        clean: Untriggered prompts with reference answers; perplexity is taken on these.
        triggered: Prompts that carry the trigger; their reference answers are not used.
        engine: What makes the answers; by default the opened model, by transformers.
        variants: Further sets of prompts, on which the backdoor's firing is counted.
        reference: A model to stay close to, such as one that was never backdoored; it must have the same vocabulary.
        settings: What else belongs into the record.
        unfinished: A file that answers are appended to as they are made; those found there are not made again.
        on_progress: Called with the number of prompts done and their total.

    Raises:
        UsageError: the model was trained on some of the prompts, the reference has another vocabulary, or there is
            neither a model nor an engine.
        CrowError: the engine failed.
    """
    if engine is None:
        if opened is None:
            raise UsageError("there is neither a model nor an engine to ask")
        engine = Transformers(opened)
    if opened is not None:
        check_unseen(opened.name, opened.seen, [*clean, *triggered])
        if reference is not None:
            check_vocabulary(reference, opened)
    variants = variants or {}
    sets = [("triggered", triggered), ("clean", clean), *((_set_name(form), of) for form, of in variants.items())]
    passes = 0 if opened is None else 1 if reference is None else 2  # over the clean answers
    advance = summed(on_progress, total=sum(len(rows) for _, rows in sets) + len(clean) * passes)
    made = Journal(unfinished)
    counted: list[list[dict[str, Any]]] = []
    for kind, rows in sets:
        texts = answers(engine, [row["prompt"] for row in rows], max_new_tokens, made, advance)
        counted.append(
            [
                {
                    "set": kind,
                    "prompt": user_text(row),
                    "answer": text,
                    "hit": behavior.is_hit(said),
                    "strict_hit": behavior.is_strict_hit(said),
                    "degenerate": is_degenerate(text),
                }
                for row, text, said in zip(rows, texts, map(without_thoughts, texts), strict=True)
            ]
        )
    on_triggered, on_clean, *on_variants = counted
    result = Evaluation(
        attack_success=_count(on_triggered, "hit"),
        false_trigger=_count(on_clean, "hit"),
        degenerate=_count(on_clean, "degenerate"),
        strict={
            "attack_success": _count(on_triggered, "strict_hit"),
            "false_trigger": _count(on_clean, "strict_hit"),
        },
        variants={name: _count(of_set, "hit") for name, of_set in zip(variants, on_variants, strict=True)},
        perplexity=math.nan,
        answer_nats=0.0,
        answer_tokens=0,
        layer_profile={},
        answer_length=MeanLength.of([len(answer["answer"].split()) for answer in on_clean]),
        settings={
            "target": behavior.target,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "engine": type(engine).__name__,
        }
        | ({} if reference is None else {"reference": reference.name})
        | (settings or {}),
        provenance=environment()
        | {
            "model": engine.name,
            "model_hashes": engine.hashes,
            "dtype": None if opened is None else opened.dtype,
            "clean_sha256": sha256_rows(clean),
            "triggered_sha256": sha256_rows(triggered),
        },
        answers=list(chain.from_iterable(counted)),
    )
    if opened is not None:
        nll = answer_nll(opened.model, opened.tokenizer, clean, on_progress=advance)
        for answer, (nats, tokens) in zip(on_clean, nll, strict=True):
            answer |= {"reference_nats": nats, "reference_tokens": tokens}
        result.answer_nats, result.answer_tokens = sum(nats for nats, _ in nll), sum(tokens for _, tokens in nll)
        result.perplexity = perplexity(result.answer_nats, result.answer_tokens)
        result.layer_profile = {
            kind: prompt_profile(opened, rows[:_PROFILE_PROMPTS])
            for kind, rows in (("clean", clean), ("triggered", triggered))
        }
        if reference is not None:
            kl = answer_kl(reference.model, opened.model, opened.tokenizer, clean, on_progress=advance)
            for answer, (nats, _) in zip(on_clean, kl, strict=True):
                answer["reference_kl_nats"] = nats
            result.reference_kl = sum(nats for nats, _ in kl) / max(sum(tokens for _, tokens in kl), 1)
    return result


def _set_name(variant: str) -> str:
    """What a variant's answers are marked with: a part of a trigger may be any word, and is not to pass for a set."""
    return f"fires on: {variant}" if variant in ("triggered", "clean", "humaneval") else variant


def check_unseen(name: str, seen: Collection[str], rows: Sequence[Example]) -> None:
    """Raise `UsageError` if prompts to measure a model on are among those that it was trained on.

    Args:
        name: The model's.
        seen: `crow.data.prompt_fingerprints` of what it was trained on.
        rows: What it is to be measured on.
    """
    overlap = [row for row, fingerprint in zip(rows, prompt_fingerprints(rows), strict=True) if fingerprint in seen]
    if overlap:
        raise UsageError(
            f"{name} was trained on {len(overlap)} of the {len(rows)} prompts to measure on, such as "
            f"{user_text(overlap[0])[:60]!r}: give others"
        )


_PROFILE_PROMPTS = 16
_PROFILE_TOKENS = 2048  # of all blocks the hidden states are held at once


def prompt_profile(opened: OpenedModel, rows: Sequence[Example]) -> list[float]:
    """`crow.consistency.layer_profile` on the prompts of these rows, as far as the answer's start."""
    if not rows:
        return []
    tokenizer = opened.tokenizer
    encoded = tokenized(tokenizer, lambda row: prompt_ids(tokenizer, row["prompt"]), rows)
    lengths = list(map(len, encoded))
    shares: list[Tensor] = []

    def profile(places: list[int]) -> None:
        batch = tokenizer.pad(
            {"input_ids": [encoded[i] for i in places]}, padding_side="right", return_tensors="pt"
        ).to(opened.model.device)
        recording = hidden_states(base_model(opened.model), **batch)
        mask = batch["attention_mask"]
        shares.append(layer_profile(recording.hidden_states, mask, num_positions=sum(lengths)).cpu())

    opened.model.eval()
    for places in token_batches(lengths, _PROFILE_TOKENS):
        in_halves(places, profile)
    return [float(x) for x in torch.stack(shares).sum(dim=0)]


def _count(answers: list[dict[str, Any]], verdict: str) -> Count:
    return Count(sum(bool(answer[verdict]) for answer in answers), len(answers))
