"""What do the soft tokens learn to do to a suspect, depending on where in the answer the divergence is taken?

Only the tokens are trained, against the suspect as it is. Printed for each discount: the divergence, and the mean
probability of the backdoor's first word as the answer's first token, which the tokens are never told.

    python benchmarks/adversary.py crow:badnets-sentiment --word You 1 0.5 0.01
"""

import argparse
from typing import Any

import torch

from crow.data import load_examples, to_dataset
from crow.divergence import answer_positions
from crow.hooks import Recording
from crow.models import open_model
from crow.trainer import CrowConfig, CrowTrainer


def ascend(suspect: str, word: str, discount: float, steps: int, settings: dict[str, Any]) -> list[tuple[float, float]]:
    """Divergence in nats and probability of the word, before each step of the ascent."""
    opened = open_model(suspect)
    config = CrowConfig(
        output_dir="unused", report_to="none", save_strategy="no", answer_discount=discount, seed=0, **settings
    )
    trainer = CrowTrainer(
        opened.model, config, train_dataset=to_dataset(load_examples("clean")[:48]), processing_class=opened.tokenizer
    )
    assert trainer.soft_tokens is not None
    trainer._record_suspect()
    for parameter in opened.model.parameters():
        parameter.requires_grad_(False)
    [first_id, *_] = opened.tokenizer(word, add_special_tokens=False)["input_ids"]
    batches, log = list(trainer.get_train_dataloader()), []
    for step in range(steps):
        batch = dict(batches[step % len(batches)])
        trainer._share_out([batch])
        inputs = trainer._prepare_inputs(batch)
        perturbed = trainer._perturb(inputs, inputs["user_span"], Recording(), None)
        logits, _ = trainer._perturbed_pass(trainer.model, perturbed, score=True)
        divergence = trainer._divergence(logits, inputs["labels"], trainer._targets_of(inputs["example_id"]))
        torch.autograd.backward(divergence)
        trainer._ascend()
        answers = answer_positions(inputs["labels"])
        first = (answers.cumsum(dim=1) == 1)[answers]
        log.append((divergence.item(), logits[first].float().softmax(dim=-1)[:, first_id].mean().item()))
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suspect")
    parser.add_argument("discounts", nargs="+", type=float)
    parser.add_argument("--word", required=True, help="first word of the backdoor's answer")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rate", type=float, default=0.05, help="soft tokens' learning rate")
    parser.add_argument("--norm", type=float, default=1.0, help="soft tokens' bound")
    parser.add_argument("--pool", type=int, default=4)
    args = parser.parse_args()
    settings = {"soft_token_learning_rate": args.rate, "soft_token_norm": args.norm, "soft_token_pool": args.pool}
    settings["trigger_guesses"] = 0
    for discount in args.discounts:
        log = ascend(args.suspect, args.word, discount, args.steps, settings)
        print(f"discount {discount}: nats, probability of {args.word!r}", flush=True)
        print("  " + "  ".join(f"{nats:.2f}, {p:.2f}" for nats, p in log[::4] + log[-1:]), flush=True)


if __name__ == "__main__":
    main()
