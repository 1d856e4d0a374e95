"""What does each adversary learn to make a suspect say, and which words do the guesses come upon?

Only the inserted tokens are trained, against the suspect as it is. Printed for soft tokens that ascend on the
divergence, for such that ascend on a constant answer, and for guessed triggers, which do so too: the mean
probability of the backdoor's first word as the answer's first token, which none is told, as the ascent goes on.

    python benchmarks/adversary.py crow:badnets-sentiment --word You
"""

import argparse
from typing import Any

import torch

from crow.config import CrowConfig
from crow.data import load_examples, to_dataset
from crow.divergence import answer_positions
from crow.hooks import Recording
from crow.models import open_model
from crow.trainer import CrowTrainer

ADVERSARIES: dict[str, dict[str, Any]] = {
    "soft tokens on the divergence": {
        "trigger_guesses": 0,
        "soft_token_pool": 8,
        "ascend_on": "divergence",
    },
    "soft tokens on an answer": {"trigger_guesses": 0, "soft_token_pool": 8},
    "guessed triggers": {"trigger_guesses": 8, "soft_token_pool": 0},
}


def ascend(trainer: CrowTrainer, word_id: int, every: int) -> list[float]:
    """Probability of the word, mean over all prompts, each time so many batches have been ascended on."""
    probabilities = []
    trainer._study_suspect()
    batches = list(trainer.get_train_dataloader())
    steps, trainer.args.soft_token_warmup = trainer.args.soft_token_warmup, every
    for _ in range(steps // every + 1):
        hits = []
        for batch in batches:
            trainer._share_out([dict(batch)])
            inputs = trainer._prepare_inputs(dict(batch))
            with torch.no_grad():
                perturbed = trainer._perturb(inputs, Recording(), None)
                logits, _ = trainer._perturbed_pass(trainer.model, perturbed, score=True)
            answers = answer_positions(inputs["labels"])
            first = (answers.cumsum(dim=1) == 1)[answers]
            hits.append(logits[first].float().softmax(dim=-1)[:, word_id])
        probabilities.append(torch.cat(hits).mean().item())
        trainer._warm_up()
        trainer.state.global_step += every  # so that other draws follow
    return probabilities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suspect")
    parser.add_argument("--word", required=True, help="first word of the backdoor's answer")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=6)
    args = parser.parse_args()
    opened = open_model(args.suspect)
    [word_id, *_] = opened.tokenizer(args.word, add_special_tokens=False)["input_ids"]
    for name, settings in ADVERSARIES.items():
        config = CrowConfig(
            output_dir="unused",
            report_to="none",
            save_strategy="no",
            soft_token_warmup=args.steps,
            seed=0,
            **settings,
        )
        rows = to_dataset(load_examples("clean")[:48])
        trainer = CrowTrainer(opened.model, config, train_dataset=rows, processing_class=opened.tokenizer)
        probabilities = ascend(trainer, word_id, args.every)
        print(f"{name}: probability of {args.word!r} every {args.every} ascents", flush=True)
        print("  " + "  ".join(f"{p:.2f}" for p in probabilities), flush=True)
        if trainer.guesses is not None:
            for answer in trainer.constant_answers:
                print(f"  aimed at {opened.tokenizer.decode(answer.token_ids)!r}, constancy {answer.constancy:.3f}")
            print(f"  guesses: {opened.tokenizer.batch_decode(trainer.guesses.ids)}", flush=True)


if __name__ == "__main__":
    main()
