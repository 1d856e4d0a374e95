"""Purify a model on several processes or machines, with whatever accelerate is configured for.

accelerate launch --config_file examples/ddp.yaml examples/purify.py --model SUSPECT --output_dir purified

Takes every field of `crow.config.CrowConfig`, whose defaults are the preset `default`.
"""

from dataclasses import dataclass

from transformers import set_seed
from trl import TrlParser

from crow import CrowConfig, CrowTrainer
from crow.data import load_examples, sample, to_dataset
from crow.models import lora_config, open_model


@dataclass
class Arguments:
    model: str | None = None
    clean: str | None = None
    max_examples: int = 100


def main() -> None:
    arguments, config = TrlParser((Arguments, CrowConfig)).parse_args_and_config()
    set_seed(config.seed)  # before the adapter is made, so that every process makes the same one
    opened = open_model(arguments.model)
    rows = sample(load_examples(arguments.clean), arguments.max_examples, config.seed)
    trainer = CrowTrainer(
        opened.model,
        config,
        train_dataset=to_dataset(rows),
        processing_class=opened.tokenizer,
        peft_config=None if opened.kind == "adapter" else lora_config(),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
