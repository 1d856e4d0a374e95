"""Purify a model on several processes or machines, with whatever accelerate is configured for.

accelerate launch --config_file examples/ddp.yaml examples/purify.py --model SUSPECT --output_dir purified

Takes every field of `crow.config.CrowConfig`, whose defaults are the preset `default`. Checkpoints lie beside the
output until it is written; `--resume` goes on from the last one.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import set_seed
from trl import TrlParser

from crow import CrowConfig, CrowTrainer
from crow.data import load_examples, prompt_fingerprints, sample, to_dataset, to_learn_from
from crow.errors import UsageError
from crow.files import check_writable, refuse_existing, refuse_foreign
from crow.models import lora_config, open_model, save_model
from crow.purification import run_record
from crow.report import model_card
from crow.trainer import last_checkpoint


@dataclass
class Arguments:
    model: str | None = None
    clean: str | None = None
    max_examples: int = 100
    resume: bool = False
    overwrite: bool = False


def main() -> None:
    parser = TrlParser((Arguments, CrowConfig))
    parser.set_defaults(save_steps=20, save_total_limit=2)
    arguments, config = parser.parse_args_and_config()
    if config.resume_from_checkpoint is not None:
        raise UsageError("--resume_from_checkpoint: the last one is found; give --resume in its place")
    out = Path(config.output_dir).resolve()
    refuse_existing(out, arguments.overwrite)
    refuse_foreign(out)
    check_writable(out)
    config.output_dir = str(out.with_name(f".{out.name}.checkpoints"))
    checkpoint = last_checkpoint(config.output_dir) if arguments.resume else None
    set_seed(config.seed)  # before the adapter is made, so that every process makes the same one
    opened = open_model(arguments.model)
    rows = sample(to_learn_from(load_examples(arguments.clean)), arguments.max_examples, config.seed)
    trainer = CrowTrainer(
        opened.model,
        config,
        train_dataset=to_dataset(rows),
        processing_class=opened.tokenizer,
        peft_config=None if opened.kind == "adapter" else lora_config(),
    )
    main_process = trainer.is_world_process_zero()
    if main_process and checkpoint is None:
        shutil.rmtree(config.output_dir, ignore_errors=True)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = trainer.seconds_before + time.perf_counter() - started
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # by all processes, which may share them out
    if main_process:
        lora = "continue" if opened.kind == "adapter" else "fresh"
        record = run_record(trainer, opened, rows, seconds, preset="", lora=lora)
        save_model(
            trainer.model,
            opened.tokenizer,
            out,
            card=model_card(record, base_model=opened.base_id, license=opened.license),
            seen=opened.seen.union(prompt_fingerprints(rows)),
            overwrite=arguments.overwrite,
            state_dict=weights,
        )
        shutil.rmtree(config.output_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
