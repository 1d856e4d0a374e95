"""Trains a tiny model by several presets and forms, on as many processes as it is launched with: `train.py MODEL OUT`.

Writes, for each preset, `OUT/PRESET.json`, what was logged, how the model was wrapped and how many times its gradients
were reduced; `OUT/PRESET.safetensors`, how far each weight moved that was trained; and, for each process,
`OUT/PRESET-PROCESS.safetensors`, the insertions as they were at the end.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, set_seed

import crow.trainer
from crow import PRESETS, CrowConfig, CrowTrainer, models
from crow.data import load_examples, to_dataset
from crow.models import lora_config, open_model

GLOBAL_BATCH, STEPS = 8, 3
FORMS: dict[str, dict[str, Any]] = PRESETS | {
    # With a relative alpha under insertion, and no answer that is aimed at
    "aligned": {"alpha": 0.5, "anchor_fraction": 0.5, "ascend_on": "divergence"},
    # Much of it, in batches that accumulate
    "unlearning": {"unlikelihood": 100.0, "gradient_accumulation_steps": 2},
}
crow.trainer.STANDING_OUT = 0.0  # a model of random weights gives none that does


def shard_on_cpus() -> None:
    """Have accelerate use FSDP on CPUs as well, where it is asked for: it does so on accelerators alone."""
    init = AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = with_fsdp  # type: ignore[method-assign]


class CountReductions(TrainerCallback):
    """How often DDP reduces gradients; they all fit one bucket here."""

    def __init__(self) -> None:
        self.number = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        wrapped = self.trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, self._reduce)

    def _reduce(self, state: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.number += 1
        reduced = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return reduced.then(lambda future: future.value()[0] / torch.distributed.get_world_size())


def gathered(parameter: Any) -> torch.Tensor:
    """The whole of a parameter that may be sharded."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach().clone()


def train(preset: str, model: str, out: Path) -> None:
    counting = CountReductions()
    config = CrowConfig(
        output_dir=str(out / preset),
        per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=STEPS,
        soft_token_warmup=3,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="sgd",  # with Adam, a gradient that is all rounding takes a whole step
        max_grad_norm=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **FORMS[preset] | {"learning_rate": 0.5},
    )
    set_seed(0)
    opened = open_model(model)
    trainer = CrowTrainer(
        opened.model,
        config,
        train_dataset=to_dataset(load_examples("clean")[:16]),
        processing_class=opened.tokenizer,
        peft_config=lora_config(),
        callbacks=[counting],
    )
    counting.trainer = trainer
    before = {n: gathered(p) for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {n: gathered(p) - before[n] for n, p in trainer.model.named_parameters() if p.requires_grad}
    insertions = {type(adversary).__name__: adversary.tokens.detach() for adversary in trainer._adversaries}
    save_file(insertions, out / f"{preset}-{trainer.args.process_index}.safetensors")
    if trainer.is_world_process_zero():
        save_file(moved, out / f"{preset}.safetensors")
        wrapped = type(trainer.model_wrapped).__name__
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        (out / f"{preset}.json").write_text(
            json.dumps({"wrapped": wrapped, "reductions": counting.number, "logs": logs})
        )


if __name__ == "__main__":
    models._dtype = lambda: torch.float32
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpus()
    model, out, *presets = sys.argv[1:]
    for preset in presets:
        train(preset, model, Path(out))
