"""Peak memory of training, against supervised fine-tuning, with and without gradient checkpointing, on two shapes.

    python benchmarks/memory.py --json memory.json

Each form's peak is taken as in `benchmarks/step.py`: in a process of its own, with all that comes before training, on
the embedded model. Rows are filled to their length by their answers, where CROW pays most: it compares distributions
there, where fine-tuning scores one token.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from step import FORMS, embedded_folder, peak_memory

SHAPES = ((8, 128), (2, 512))
"""Rows a batch, and tokens a row."""


def measure() -> dict[str, Any]:
    from crow.provenance import environment

    peaks: dict[str, dict[str, int]] = {}
    with embedded_folder() as folder:
        for rows, tokens in SHAPES:
            for checkpointing in (False, True):
                settings = {"per_device_train_batch_size": rows, "max_length": tokens}
                name = f"{rows} x {tokens}" + (", gradient checkpointing" if checkpointing else "")
                peaks[name] = {
                    form: peak_memory(form, folder, gradient_checkpointing=checkpointing, **settings) for form in FORMS
                }
    ratios = {
        name: {form: peak / of_forms["finetune"] for form, peak in of_forms.items() if form != "finetune"}
        for name, of_forms in peaks.items()
    }
    return {"memory_ratio": ratios, "peak_memory_bytes": peaks, "provenance": environment()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    text = json.dumps(measure(), indent=2)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
