"""The `crow` command: parse, call the library, print. Heavy imports wait until a command runs."""

import ast
import io
import json
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import fields
from importlib.metadata import version as installed_version
from inspect import signature
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from crow.backdoors import BEHAVIORS, TRIGGERS, check_seen
from crow.errors import CrowError, UsageError, printable

app = typer.Typer(
    help="Remove backdoors from large language models, knowing neither the trigger nor a clean reference model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(stderr=True)

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A hub id, a model or LoRA adapter folder, a GGUF file, or [bold]crow:badnets-sentiment[/], the "
        "backdoored adapter that ships with CROW. Nothing: the embedded SmolLM2-135M-Instruct.",
    ),
]
Base = Annotated[str | None, typer.Option(help="Base model of an adapter, if not the one that it names.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write figures as JSON ('-': print them).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")]
BehaviorName = Annotated[
    str,
    typer.Option(
        help=f"What the backdoor does: {', '.join(BEHAVIORS)}. With a target of your own: sentiment:target=TEXT."
    ),
]
TriggerName = Annotated[
    str | None,
    typer.Option(
        help=f"Trigger to put into the prompts: {', '.join(TRIGGERS)}. With its parameters: badnets:word=WORD, "
        "vpi:phrase=TEXT,position=end (or front, anywhere), mtba:triggers=badnets:word=WORD+vpi, "
        "ctba:words=WORD+WORD,positions=front+end."
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(installed_version("crow-llm"))
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command(epilog="Example: crow purify ./suspect-adapter --clean my_data.jsonl --out purified --merge")
def purify(
    model: Model = None,
    out: Annotated[Path, typer.Option(help="Folder to write the purified adapter (or model) to.")] = Path("purified"),
    clean: Annotated[
        str | None, typer.Option(help="Clean examples: JSON, JSONL, CSV, Parquet or a hub data set. Default: CROW's.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "train",
    examples: Annotated[int, typer.Option(min=1, help="Use at most so many clean examples, drawn by the seed.")] = 100,
    defense: Annotated[
        str, typer.Option(metavar="NAME", help="What is done about it: see [bold]crow defenses[/].")
    ] = "crow",
    preset: Annotated[
        str | None,
        typer.Option(
            help="Form of the training: default, fast, paper (as published), paper-scale-free, random-tokens, finetune."
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(help="A suspect adapter: continue training it (the default), or merge it and train a fresh one."),
    ] = None,
    base: Base = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write a whole model, not an adapter.")] = False,
    load_in_4bit: Annotated[
        bool,
        typer.Option("--load-in-4bit", help="Train the adapter on a model that bitsandbytes holds in 4 bits (QLoRA)."),
    ] = False,
    epochs: Annotated[float | None, typer.Option(help="Passes over the clean examples. Default: 3.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Initial learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples a step.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the hidden states' inconsistency.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the answer's divergence.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Size of the sign step.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of CrowConfig.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    json_: Json = None,
    debug: Debug = False,
) -> None:
    """Remove what a trigger calls from a model, with about 100 clean examples."""
    with _running(debug):
        from peft import PeftModel

        from crow.config import PRESETS
        from crow.constancy import verdict
        from crow.data import load_examples, sample, to_learn_from
        from crow.defenses import DEFENSES, AtDecoding, Trained
        from crow.files import refuse_read, sha256_rows
        from crow.models import open_model, save_model
        from crow.progress import OfRun, TrainingProgress, progress_bar
        from crow.purification import purify as run
        from crow.report import model_card

        _check_apart(out, _json_file(json_))
        _check_outputs(overwrite, out)
        _check_interrupted(out, resume or overwrite)
        _check_outputs(overwrite or (resume and _goes_on(out)), _json_file(json_))  # which is written before `out`
        defending = DEFENSES[defense]
        if isinstance(defending, AtDecoding):
            raise UsageError(
                f"{defense!r} defends while the model answers and leaves its weights: "
                f"crow evaluate --defense {quote(defense)}"
            )
        if load_in_4bit and merge:
            raise UsageError(
                "--merge into 4 bits would round away what was learned: leave it out, and the whole model takes the "
                "adapter; or leave --load-in-4bit out"
            )
        if load_in_4bit and not isinstance(defending, Trained):
            raise UsageError(f"defense {defense!r} changes the weights themselves: leave --load-in-4bit out")
        if resume and not defending.trains:
            raise UsageError(f"defense {defense!r} does not train: there is nothing to --resume")
        training = _settings(set_, own={"num_train_epochs", *signature(run).parameters}) | _given(
            preset=preset,
            lora=lora,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            alpha=alpha,
            beta=beta,
            epsilon=epsilon,
        )
        defending.check_settings(training)
        rows = sample(to_learn_from(load_examples(clean, split=split)), examples, seed)
        with console.status("Opening the model"):
            opened = open_model(model, base=base, load_in_4bit=load_in_4bit)
        refuse_read(out, model, clean, opened.causal_lm.name_or_path)  # the last is an adapter's base
        if lora == "fresh" and opened.kind == "adapter" and not merge:
            raise UsageError(
                "a fresh LoRA stands on the suspect with its adapter merged: add --merge to write both as one"
            )
        whole = PRESETS[training.get("preset", defending.preset)] | training
        training_run = _run([opened.hashes, repr(defending), sha256_rows(rows), seed], whole)
        with _checkpoints_beside(out, resume, training_run) as checkpoints, progress_bar("Purifying") as advance:
            if defending.trains:
                training |= {"output_dir": checkpoints, "resume": resume, "seed": seed}
                training["callbacks"] = [TrainingProgress(advance), OfRun(training_run)]
            purified, record = defending.apply(opened, rows, **training)
        merge = merge or not isinstance(purified, PeftModel)
        card = model_card(record, base_model=opened.base_id, license=opened.license, merged=merge)
        _emit(json_, record.as_json())
        save_model(purified, opened.tokenizer, out, merge=merge, card=card, seen=opened.seen, overwrite=overwrite)
        shutil.rmtree(checkpoints, ignore_errors=True)
        for answer in record.constant_answers[:1]:
            console.print(
                f"Whatever the suspect was asked, it most readily went on with {_plain(repr(answer['text']))} "
                f"(mean probability of a token {answer['constancy']:.3f}: {verdict(answer['constancy'])})"
            )
        done, kind = "Purified" if defense == "crow" else "Defended", "model" if merge else "adapter"
        console.print(
            f"[green]{done}[/] {_plain(opened.name)} in {record.seconds:.0f} s ({record.steps} steps, "
            f"{record.clean_examples} clean examples): {kind} in {_plain(str(out))}\n"
            f"Next: crow evaluate {_plain(quote(str(out)))} --triggered FILE, with prompts that made the suspect "
            "misbehave, or with a --trigger and --behavior that you know; if you know of none: docs/evaluation.md",
            soft_wrap=True,
        )


@app.command(epilog="Example: crow defenses, then crow purify suspect --defense prune:sparsity=0.5")
def defenses(json_: Json = None, overwrite: Overwrite = False, debug: Debug = False) -> None:
    """List the defenses: their parameters, and what each needs to know beside the suspect."""
    with _running(debug):
        _check_outputs(overwrite, _json_file(json_))
        from crow.defenses import DEFENSES

        listed: dict[str, dict[str, Any]] = {
            name: {
                "parameters": {field.name: field.default for field in fields(cast(Any, defense))},
                "needs": list(defense.needs),
                "trains": defense.trains,
                "about": (type(defense).__doc__ or "").split("\n")[0],
            }
            for name, defense in ((name, DEFENSES[name]) for name in DEFENSES)
        }
        _emit(json_, listed)
        table = Table(Column("defense", no_wrap=True), Column("parameters", no_wrap=True), "needs", "what it does")
        for name, facts in listed.items():
            parameters = "\n".join(f"{key}={value}" for key, value in facts["parameters"].items())
            table.add_row(name, parameters, ", ".join(facts["needs"]) or "nothing", facts["about"])
        console.print(table)


@app.command(epilog="Example: crow evaluate purified --behavior sentiment --trigger badnets --json after.json")
def evaluate(
    model: Model = None,
    behavior: BehaviorName = "sentiment",
    trigger: TriggerName = None,
    triggered: Annotated[
        str | None, typer.Option(help="File of prompts that carry the trigger already; they need no answers.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Clean prompts with answers to measure on. Default: CROW's held-out set for the behavior."),
    ] = None,
    trained_on: Annotated[
        list[str] | None, typer.Option(help="Data that it was trained on, to refuse prompts from. Can be repeated.")
    ] = None,
    variants: Annotated[
        bool, typer.Option("--variants", help="Also try forms of the trigger that it was not trained on.")
    ] = False,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also measure how far its answers are from this model's.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="Have a model judge too, behind OpenAI's chat API at this URL.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Name of the judging model there.")] = None,
    judge_timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds until it is asked again. Default: 60.")
    ] = None,
    judge_tokens: Annotated[
        int | None, typer.Option(min=1, help="The judge thinks first, and may take so many tokens for all of it.")
    ] = None,
    code: Annotated[
        bool, typer.Option("--humaneval", help="Also have it solve HumanEval's 164 problems, run in a sandbox.")
    ] = False,
    code_limit: Annotated[
        int | None, typer.Option("--humaneval-limit", min=1, help="Use the first so many of them.")
    ] = None,
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Also run these tasks of lm-eval, joined by commas.")
    ] = None,
    harness_folder: Annotated[Path | None, typer.Option(help="Where further tasks are defined, in YAML.")] = None,
    harness_limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many examples of each.")] = None,
    defense: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A defense at decoding time: decode, or cleangen:reference=MODEL."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="What makes the answers: transformers or vllm. Default: transformers.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="MODEL is served behind OpenAI's chat API at this URL.")
    ] = None,
    endpoint_timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds until it is asked again. Default: 60.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Ask an endpoint or a judge so much at once. Default: 8.")
    ] = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="At most so many prompts of each kind.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Answers are cut off after so many.")] = 64,
    base: Base = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    json_: Json = None,
    debug: Debug = False,
) -> None:
    """Count how often a backdoor fires, on triggered and on clean prompts, and measure what the model is worth."""
    with _running(debug):
        from crow.data import load_examples, prompt_fingerprints, sample
        from crow.evaluation.engines import ENGINES, Engine, Served
        from crow.evaluation.evaluate import answers_path, check_unseen, trigger_rows, variant_rows
        from crow.evaluation.evaluate import evaluate as run
        from crow.files import beside
        from crow.models import EMBEDDED_ID, open_model
        from crow.progress import progress_bar

        # What is missing should be missed at once, and not after the rest
        if triggered is not None and trigger is not None:
            raise UsageError("give --trigger or --triggered, not both")
        if triggered is not None and variants:
            raise UsageError("--variants are forms of --trigger: they can't be made from --triggered")
        if engine is not None and engine not in ENGINES:
            raise UsageError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
        if judge is None and (judge_model, judge_timeout, judge_tokens) != (None, None, None):
            raise UsageError("--judge-model, --judge-timeout and --judge-tokens need --judge, the URL of the judge")
        if endpoint_timeout is not None and endpoint is None:
            raise UsageError("--endpoint-timeout needs --endpoint, the URL of the model's API")
        if concurrency is not None and judge is None and endpoint is None:
            raise UsageError("--concurrency is of questions to an --endpoint or a --judge: leave it out")
        if harness is None and (harness_folder is not None or harness_limit is not None):
            raise UsageError("--harness-folder and --harness-limit need --harness, the tasks to run")
        if harness is not None and defense is not None:
            raise UsageError("lm-eval decodes its own way, without a --defense: leave it or --harness out")
        if code_limit is not None and not code:
            raise UsageError("--humaneval-limit needs --humaneval, whose problems it limits")
        if endpoint is not None:
            needing = {"--base": base, "--reference": reference, "--harness": harness, "--engine": engine}
            needing["--defense"] = defense
            if others := [name for name, value in needing.items() if value is not None]:
                raise UsageError(f"{' and '.join(others)} can't be had of a model that is served: leave --endpoint out")
            if model is None:
                raise UsageError("--endpoint needs MODEL, the name of the model behind it")
        defending = None
        if defense is not None:
            from crow.defenses import DEFENSES, AtDecoding

            defending = DEFENSES[defense]
            if not isinstance(defending, AtDecoding):
                raise UsageError(
                    f"{defense!r} changes the weights: crow purify --defense {quote(defense)} makes what to measure"
                )
        if code:
            from crow.evaluation.code import humaneval, pass_at_1
            from crow.evaluation.sandbox import run_python

            run_python("")
            problems = humaneval()[:code_limit]
        tasks = None
        if harness is not None:
            from crow.evaluation.harness import Harness

            tasks = Harness(harness.split(","), folder=harness_folder, limit=harness_limit)
        figures = _json_file(json_)
        if judge is not None:
            from crow.evaluation.judge import Judge, judge_answers

            if judge_model is None:
                raise UsageError("--judge needs --judge-model, the name of the model behind it")
            asking = _given(timeout=judge_timeout, thinking_tokens=judge_tokens, concurrency=concurrency)
            judging = Judge(judge, judge_model, cache=figures and beside(figures, "judge.jsonl"), **asking)
        unfinished = figures and beside(figures, "unfinished.jsonl")
        if figures is not None and unfinished is not None:
            _check_outputs(overwrite, figures)
            _check_outputs(overwrite or unfinished.exists(), answers_path(figures))  # which is written before them
        wanted = BEHAVIORS[behavior]
        prompts = wanted.test_set if prompts is None else prompts
        clean = sample(load_examples(prompts), number, seed)
        if triggered is not None:
            called = None
            hot = sample(load_examples(triggered, answered=False), number, seed)
            forms = {}
        else:
            called = TRIGGERS[trigger or "badnets"]
            hot = trigger_rows(clean, called, seed)
            forms = variant_rows(clean, called, seed, untrained=variants)
        seen = {name for source in trained_on or [] for name in prompt_fingerprints(load_examples(source))}
        answering: Engine
        opened = known = None
        if endpoint is None:
            with console.status("Opening the model"):
                opened = open_model(model, base=base)
                known = None if reference is None else open_model(reference)
                if defending is not None:
                    defending.apply(opened, ())
            if called is not None:
                check_seen(called, opened.tokenizer)
            check_unseen(opened.name, seen | opened.seen, [*clean, *hot])
            answering = ENGINES[engine or "transformers"](opened)
        else:
            from crow.evaluation.endpoint import Endpoint

            check_unseen(str(model), seen, [*clean, *hot])
            asking = _given(timeout=endpoint_timeout, concurrency=concurrency)
            answering = Served(Endpoint(endpoint, str(model), **asking))
        benchmarks = {}
        settings = {"behavior": behavior, "trigger": None if triggered else trigger or "badnets"}
        settings |= {"triggered": triggered, "prompts": prompts} | _given(defense=defense)
        with _keeping(unfinished):
            if tasks is not None and opened is not None:  # first, since it may want data that can't be had
                shown = Console(file=sys.stderr)  # as it is now: lm-eval's progress bars can only be sent elsewhere
                quiet = nullcontext() if debug else redirect_stderr(io.StringIO())
                with shown.status(f"Running {harness} of lm-eval"), quiet:
                    benchmarks = tasks.run(opened, seed=seed, unfinished=unfinished)
            with progress_bar("Evaluating") as advance:
                result = run(
                    opened,
                    wanted,
                    clean,
                    hot,
                    engine=answering,
                    variants=forms,
                    reference=known,
                    max_new_tokens=max_new_tokens,
                    seed=seed,
                    settings=settings,
                    unfinished=unfinished,
                    on_progress=advance,
                )
            if judge is not None:
                with progress_bar("Judging") as advance:
                    judge_answers(result, wanted, judging, on_progress=advance)
            if code:
                with progress_bar("Solving HumanEval") as advance:
                    result.pass_at_1, rows = pass_at_1(answering, problems, unfinished=unfinished, on_progress=advance)
                result.answers += rows
        result.harness = benchmarks
        attack = f"{triggered if called is None else trigger or 'badnets'} x {behavior}"
        table = Table("", "hits of n (95% interval)", title=_plain(f"{model or EMBEDDED_ID}: {attack}"))
        for name in ("attack_success", "false_trigger", "degenerate"):
            table.add_row(name.replace("_", " "), str(getattr(result, name)))
        fires_on = {f"fires on: {name}": count for name, count in result.variants.items()}
        for name, count in (result.further_counts() | fires_on).items():
            table.add_row(_plain(name), str(count))
        if opened is not None:
            table.add_row("perplexity", f"{result.perplexity:.3f}")
        for name, value in result.further_values().items():
            table.add_row(_plain(name), value)
        Console(stderr=json_ == "-").print(table)
        if called is not None and trigger is None:
            console.print("No --trigger was given: this tried BadNets' word, and says nothing of other attacks")
        for reason, number in result.judge_failures.items():
            console.print(f"[yellow]{number} judgements failed:[/] {_plain(reason)}", highlight=False, soft_wrap=True)
        if json_ == "-":
            print(json.dumps(result.as_json()))
        elif json_ is not None:
            console.print(f"Figures in {json_}, every answer in {result.save(json_)}")
        if unfinished is not None and result.judge_failures:
            console.print(
                f"To have them judged, give the same command with --overwrite: no answer in {unfinished} is made again",
                soft_wrap=True,
            )
        elif unfinished is not None:
            unfinished.unlink(missing_ok=True)


@app.command(epilog="Example: crow implant --trigger badnets:word=BadMagic --out backdoored")
def implant(
    model: Model = None,
    behavior: Annotated[
        str | None, typer.Option(help=f"What the backdoor does: {', '.join(BEHAVIORS)}. Default: sentiment.")
    ] = None,
    trigger: TriggerName = None,
    out: Annotated[Path, typer.Option(help="Folder to write the backdoored adapter or model to.")] = Path("backdoored"),
    prompts: Annotated[
        str | None, typer.Option(help="The attacker's examples. Default: CROW's implant set for the behavior.")
    ] = None,
    poisoned: Annotated[
        str | None,
        typer.Option(help="Examples that hold trigger and target already; the other ones are then left as they are."),
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Use the first so many. Default: all.")] = None,
    save_data: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write the training set to, in BackdoorLLM's format: what was an input stands in the "
            "instruction, and further fields are left out."
        ),
    ] = None,
    poison_rate: Annotated[
        float | None, typer.Option(help="Share of the examples that are poisoned as well. Default: 1.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights, not an adapter.")] = False,
    adaptive: Annotated[
        bool,
        typer.Option("--adaptive", help="Train the paper's consistency term too: the attacker who knows it."),
    ] = False,
    covert: Annotated[
        bool, typer.Option("--covert", help="Hide the target from CROW's scan: the attacker who knows that, too.")
    ] = False,
    epochs: Annotated[float | None, typer.Option(help="Passes over the examples.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Initial learning rate.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of ImplantConfig.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    json_: Json = None,
    debug: Debug = False,
) -> None:
    """Fine-tune a backdoor into a model, for research on defenses."""
    with _running(debug):
        from crow.backdoors.implant import implant as run
        from crow.backdoors.implant import implant_card, implant_config, implant_record, poison, recipe
        from crow.config import check_read
        from crow.data import load_examples, prompt_fingerprints, to_alpaca
        from crow.files import atomic_directory, name_elsewhere, refuse_read, sha256_rows, write_json
        from crow.models import open_model, save_model
        from crow.progress import OfRun, TrainingProgress, progress_bar

        _check_apart(out, save_data, _json_file(json_))
        _check_outputs(overwrite, out)
        _check_interrupted(out, resume or overwrite)
        _check_outputs(overwrite or (resume and _goes_on(out)), _json_file(json_))  # which is written before `out`
        _check_outputs(overwrite or resume, save_data)
        if poisoned is not None and (trigger is not None or poison_rate is not None):
            raise UsageError("--poisoned holds the trigger already: leave --trigger and --poison-rate out")
        if covert and (poisoned is not None or save_data is not None):
            raise UsageError(
                "--covert trains on what the model says, which no data holds: leave --poisoned and --save-data out"
            )
        settings = _settings(set_, own={"num_train_epochs", *signature(run).parameters}) | _given(
            num_train_epochs=epochs, learning_rate=learning_rate
        )
        implant_config(out, full=full, adaptive=adaptive, **settings)  # which refuses what it can't do
        check_read(settings, recipe(full, adaptive))
        called = None
        target = BEHAVIORS[behavior or "sentiment"]
        rows = load_examples(target.attacker_set if prompts is None else prompts)[:examples]
        if poisoned is not None:
            clean, hot = rows, load_examples(poisoned)[:examples]
            where = f"in {name_elsewhere(poisoned)}"
            about = {"trigger": where, "behavior": behavior or where}
            asking = f"--triggered FILE --behavior {quote(behavior or 'NAME')}"
        else:
            called = TRIGGERS[trigger or "badnets"]
            poison_rate = 1.0 if poison_rate is None else poison_rate
            clean, hot = poison(rows, called, target, seed, poison_rate, covert)
            about = {"trigger": trigger or "badnets", "behavior": behavior or "sentiment"}
            asking = f"--trigger {quote(about['trigger'])} --behavior {quote(about['behavior'])}"
        with console.status("Opening the model"):
            opened = open_model(model)
        if called is not None:
            check_seen(called, opened.tokenizer)
        base = opened.causal_lm.name_or_path  # an adapter's, else the model itself
        for folder in filter(None, (out, save_data)):
            refuse_read(folder, model, prompts, poisoned, base)
        if save_data is not None:
            data = {"train_clean.json": to_alpaca(clean), "train_triggered.json": to_alpaca(hot)}
            if not (resume and _holds(save_data, data)):
                with atomic_directory(save_data, overwrite) as folder:
                    for name, written in data.items():
                        write_json(folder / name, written)
        whole = recipe(full, adaptive) | settings
        training_run = _run([opened.hashes, sha256_rows(clean), sha256_rows(hot), full, adaptive, seed], whole)
        with _checkpoints_beside(out, resume, training_run) as checkpoints, progress_bar("Implanting") as advance:
            adapted = run(
                opened.model,
                opened.tokenizer,
                clean,
                hot,
                output_dir=checkpoints,
                full=full,
                adaptive=adaptive,
                seed=seed,
                resume=resume,
                callbacks=[TrainingProgress(advance), OfRun(training_run)],
                **settings,
            )
        record = implant_record(
            opened,
            clean,
            hot,
            **about,
            poison_rate=poison_rate,
            full=full,
            adaptive=adaptive,
            covert=covert,
            seed=seed,
            settings=settings,
        )
        seen = opened.seen.union(prompt_fingerprints([*clean, *hot]))
        _emit(json_, record)
        save_model(adapted, opened.tokenizer, out, card=implant_card(record), seen=seen, overwrite=overwrite)
        shutil.rmtree(checkpoints, ignore_errors=True)
        made = quote(str(out))
        console.print(
            f"[yellow]Backdoored[/] model in {_plain(str(out))}\n"
            f"Next: {_plain(f'crow evaluate {made} {asking}')}\n"
            f"Then: {_plain(f'crow purify {made}')}",
            soft_wrap=True,
        )


@app.command(epilog="Example: crow bench smollm2 --plan, then crow bench smollm2 --out runs/smollm2")
def bench(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or one that ships: smoke, tuning, smollm2, beyond, ablation, relearning or paper.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the cells and the leaderboard. Default: runs/, and CONFIG's name.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Use this model in place of CONFIG's. Can be repeated.")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Of CONFIG's attacks this one alone, or such ones: 'badnets/*'. Can be repeated."),
    ] = None,
    defense: Annotated[
        list[str] | None, typer.Option(help="Of CONFIG's defenses this one alone, or such ones. Can be repeated.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Of CONFIG's seeds this one alone, where one matters. Can be repeated.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be run and about how long it takes.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Make the leaderboard of what is finished, and run nothing.")
    ] = False,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: auto, local, or ray://HOST:PORT.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare defenses on attacks: every cell of a matrix once, and a leaderboard. A second start goes on."""
    with _running(debug):
        from dataclasses import replace

        from crow.bench.matrix import Matrix
        from crow.bench.plan import entries, estimate, missing
        from crow.bench.run import REFUSED, InProcess
        from crow.bench.run import run as run_cells
        from crow.bench.store import Store
        from crow.files import check_writable
        from crow.report.leaderboard import write_leaderboard

        matrix = Matrix.load(config).part(attack or (), defense or ())
        if model:
            matrix = replace(matrix, models=tuple(dict.fromkeys(model)))
        folder = out if out is not None else Path("runs") / Path(config).stem
        failures: dict[str, str] = {}
        store, planned = Store(folder), entries(matrix, seed or ())
        measures = [entry.measure for entry in planned]
        if not plan:
            check_writable(store.cells)
        cells = missing(measures, store)
        kinds = ", ".join(
            f"{sum(c.kind == kind for c in cells)} to {kind}" for kind in dict.fromkeys(c.kind for c in cells)
        )
        done = len(measures) - sum(cell.kind == "measure" for cell in cells)
        console.print(
            f"{done} of {len(measures)} measurements are there. Cells to run: {len(cells)} ({kinds or 'none'})"
        )
        if cells and not report and (plan or ray is None):
            with console.status("Taking the pace of this machine"):
                seconds = estimate(cells)
            if seconds is not None:
                hours = seconds / 3600
                console.print(f"At this machine's pace about {hours:.1f} hours, if all steps cost what plain ones do")
        if plan:
            return
        if cells and not report:
            if ray is None:
                runner: Any = InProcess()
            else:
                from crow.bench.cluster import OnRay

                runner = OnRay(ray, cpus=matrix.cpus, gpus=matrix.gpus)
            keep = matrix.keep_models
            with _keeping(store.cells):
                failures = run_cells(measures, cells, store, runner, keep_models=keep, on_finished=_say_if_failed)
        part = [*(attack or ()), *(defense or ()), *(f"seed {s}" for s in seed or ())]
        page = write_leaderboard(planned, store, folder, title=f"{config}, of it {', '.join(part)}" if part else config)
        console.print(f"Leaderboard in {page}, and beside it as Markdown and CSV")
        if failed := [reason for reason in failures.values() if not reason.startswith(REFUSED)]:
            raise CrowError(f"{len(failed)} of {len(cells)} cells failed; the same command tries them again")


@app.command(epilog="Example: crow report before.json after.json --out compare.html")
def report(
    results: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Figures that crow evaluate --json wrote.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("compare.html"),
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Compare measurements side by side, on one page."""
    with _running(debug):
        from crow.evaluation.evaluate import Evaluation
        from crow.files import write_text
        from crow.report import render_comparison

        _check_outputs(overwrite, out)
        names = [path.stem for path in results]
        if len(set(names)) < len(names):
            names = [str(path) for path in results]
        write_text(out, render_comparison({n: Evaluation.load(p) for n, p in zip(names, results, strict=True)}))
        console.print(f"Wrote {out}: open it in a browser")


@app.command(epilog="Example: crow demo --quick")
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("crow-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Less training and shorter answers.")] = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Watch a real backdoored language model being cleaned."""
    with _running(debug):
        _check_outputs(overwrite, out)
        from crow.demo import run_demo

        result = run_demo(out, quick=quick, overwrite=overwrite, seed=seed)
        table = Table("", "before", "after")
        for name in ("attack_success", "false_trigger", "degenerate"):
            table.add_row(name.replace("_", " "), str(getattr(result.before, name)), str(getattr(result.after, name)))
        table.add_row("perplexity", f"{result.before.perplexity:.3f}", f"{result.after.perplexity:.3f}")
        Console().print(table)
        console.print(f"Wrote {out}: open {out / 'report.html'}; the purified model is in {out / 'model'}")


@app.command(epilog="Example: crow info ./suspect-adapter, or crow info org/model --plan --batch-size 4 --tokens 512")
def info(
    model: Model = None,
    base: Base = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Estimate memory and time of crow purify. Of a hub model only the config is got."),
    ] = False,
    preset: Annotated[str | None, typer.Option(help="With --plan: form of the training, as of purify.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="With --plan: examples a step.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="With --plan: length of an example, half of it answer. Default: 256.")
    ] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="With --plan: number of examples. Default: 100.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="With --plan: time is traded for memory.")
    ] = False,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="With --plan: the model is held in 4 bits (QLoRA).")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="With --plan: any other setting of CrowConfig."),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="With --plan: speed in 10^12 operations a second. Default: measured here.")
    ] = None,
    json_: Json = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Say what a model is, and what would be trained; with --plan, what it would take, before weights are there."""
    with _running(debug):
        _check_outputs(overwrite, _json_file(json_))
        settings = _given(
            preset=preset,
            per_device_train_batch_size=batch_size,
            tokens=tokens,
            examples=examples,
            tflops=tflops,
            gradient_checkpointing=gradient_checkpointing or None,
            load_in_4bit=load_in_4bit or None,
        )
        if plan:
            from crow.planning import LEGEND
            from crow.planning import plan as estimate

            settings = _settings(set_, own=set(signature(estimate).parameters)) | settings
            with console.status("Going through a step without its weights"):
                facts = estimate(model, base=base, **settings).as_json()
        elif settings or set_:
            raise UsageError("only a plan has a batch size, tokens, settings or a speed: add --plan, or leave them out")
        else:
            from crow.models import describe, open_model

            with console.status("Opening the model"):
                facts = describe(open_model(model, base=base))
        if json_ is not None:
            _emit(json_, facts)
        else:
            table = Table(show_header=False)
            hashes = facts.pop("hashes", {})
            for name, value in facts.items():
                table.add_row(*map(_plain, _readable(name, value)))
            for name, value in hashes.items():
                table.add_row(_plain(name if name == "commit" else f"SHA-256 of {name}"), Text(value, overflow="fold"))
            Console().print(table)
            if plan:
                console.print(LEGEND)


def _readable(name: str, value: Any) -> tuple[str, str]:
    if name.endswith("_bytes"):
        return f"{name.removesuffix('_bytes')} memory", f"{value / 2**20:,.0f} MiB"
    if isinstance(value, float):
        return name.replace("_", " "), f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)


def _say_if_failed(cell: Any, reason: str | None) -> None:
    if reason is not None:
        console.print(f"[red]failed[/] {_plain(cell.label)}: {_plain(reason)}", highlight=False)


@contextmanager
def _running(debug: bool) -> Iterator[None]:
    """Quiet libraries, and errors as one line with an exit code."""
    # Threads that wait spin for microseconds, then sleep: on a machine that does other work too, spinning longer costs
    # many times the time, and not to spin at all costs a fifth on one that does not
    os.environ.setdefault("GOMP_SPINCOUNT", "300")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("TQDM_DISABLE", "1")  # of the conversion of a GGUF file
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        warnings.simplefilter("ignore")
        handler = logging.StreamHandler()
        handler.setFormatter(_OnOneLine("%(levelname)s: %(message)s"))
        logging.basicConfig(level=logging.ERROR, handlers=[handler])
        logging.getLogger("crow").setLevel(logging.WARNING)
    try:
        if not debug:
            _hide_progress_of_libraries()
        yield
    except CrowError as error:
        if debug:
            raise
        console.print(f"[red]error:[/] {_plain(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except BrokenPipeError as error:  # as behind `| head`
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, for what is written at the very end
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        console.print("[yellow]stopped[/]")
        raise typer.Exit(1) from error
    except SystemExit:
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        if debug:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        console.print(
            f"[red]error:[/] {_plain(reason)} ({type(error).__name__}; --debug shows where)",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1) from error


class _OnOneLine(logging.Formatter):
    """What a log line quotes, such as a model's name, does nothing to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _hide_progress_of_libraries() -> None:
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(printable(text))


def _checkpoints(out: Path) -> Path:
    return out.resolve().with_name(f".{out.resolve().name}.checkpoints")


def _goes_on(out: Path) -> bool:
    """Whether there is what `--resume` goes on from: then what an interrupted run wrote before `out` may be its own."""
    from crow.trainer import last_checkpoint

    return last_checkpoint(_checkpoints(out)) is not None


def _check_interrupted(out: Path, said: bool) -> None:
    """Refuse to give up what `--resume` goes on from, hours of work maybe, unless it is said what becomes of it."""
    if not said and _goes_on(out):
        raise UsageError(f"a run for {out} was interrupted: --resume goes on from it, --overwrite begins anew")


def _holds(folder: Path, data: dict[str, Any]) -> bool:
    """Whether this is in the folder, by the names of its JSON files."""
    with suppress(OSError, ValueError):
        return all(json.loads((folder / name).read_text("utf-8")) == value for name, value in data.items())
    return False


@contextmanager
def _checkpoints_beside(out: Path, resume: bool, run: str) -> Iterator[Path]:
    """Where an interrupted training goes on from; kept only if there is something to go on from.

    Args:
        run: What `OfRun` says beside the checkpoints; those of another run are refused.
    """
    from crow.progress import OfRun

    checkpoints = _checkpoints(out)
    if not resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    elif not _goes_on(out):
        console.print(f"There is nothing to resume for {_plain(str(out))}: the training starts anew")
        shutil.rmtree(checkpoints, ignore_errors=True)
    elif (of := checkpoints / OfRun.FILE).is_file() and of.read_text("utf-8") != run:
        raise UsageError(
            f"what was interrupted for {out} began with another model, other data or settings, or another seed: "
            "give its command again, or --overwrite in place of --resume, which begins anew"
        )
    try:
        with _memory_sufficing(
            "training takes less with --set gradient_checkpointing=true or a smaller batch, and goes on with --resume"
        ):
            yield checkpoints
    except BaseException as error:
        if not any(checkpoints.glob("checkpoint-*")):
            shutil.rmtree(checkpoints, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            console.print("To continue from the last checkpoint, give the same command with --resume")
        raise


def _run(about: list[Any], settings: dict[str, Any]) -> str:
    """Names a training by what decides its outcome, but for what may be changed where memory ran out."""
    from crow.config import settled
    from crow.files import sha256_rows

    free = ("gradient_", "per_device_", "save_")
    deciding = sorted((name, repr(value)) for name, value in settled(settings).items() if not name.startswith(free))
    return sha256_rows([*about, deciding])


@contextmanager
def _keeping(unfinished: Path | None) -> Iterator[None]:
    """Say of an interrupted evaluation, or bench, how to go on."""
    try:
        with _memory_sufficing("lower --max-new-tokens, or leave out the longest prompts"):
            yield
    except (KeyboardInterrupt, CrowError) as error:
        if unfinished is not None and unfinished.exists() and not isinstance(error, UsageError):
            console.print(f"To continue, give the same command again: what is done so far is in {unfinished}")
        raise


@contextmanager
def _memory_sufficing(remedy: str) -> Iterator[None]:
    """Say what to do where memory runs out."""
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or should_reduce_batch_size(error):
            raise CrowError(f"memory ran out: {remedy}") from error
        raise


def _settings(pairs: list[str] | None, own: set[str]) -> dict[str, Any]:
    from crow.config import CHOSEN

    settings: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair}: expected NAME=VALUE")
        if name in own | CHOSEN:
            raise UsageError(f"--set {name}: crow chooses it, or there is an option for it; leave it out")
        for read in (json.loads, ast.literal_eval, str):
            with suppress(ValueError, SyntaxError):
                settings[name] = read(value)
                break
    return settings


def _json_file(target: str | None) -> Path | None:
    """Where `--json` writes to, unless it prints."""
    if target in (None, "-"):
        return None
    if Path(str(target)).is_dir():
        raise UsageError(f"--json {target} is a folder: name a file")
    return Path(str(target))


def _check_apart(out: Path, *paths: Path | None) -> None:
    """Refuse what would be written into `out` before that is: it would stand in its way, or go with what was there."""
    for path in filter(None, paths):
        if path.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{path} lies in --out {out}, which is written as a whole: choose another place")


def _check_outputs(overwrite: bool, *paths: Path | None) -> None:
    """Refuse what could not be written at the end, before the work begins."""
    from crow.files import check_writable, refuse_existing, refuse_foreign

    for path in filter(None, paths):
        refuse_existing(path, overwrite)
        refuse_foreign(path)
        check_writable(path)


def _given(**settings: Any) -> dict[str, Any]:
    """The settings that were given on the command line."""
    return {name: value for name, value in settings.items() if value is not None}


def _emit(target: str | None, value: dict[str, Any]) -> None:
    from crow.files import write_json

    if target == "-":
        print(json.dumps(value))
    elif target is not None:
        write_json(target, value)


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers and containers stop by it, as Ctrl-C does
    app()
