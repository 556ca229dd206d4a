"""Measures supervised fine-tuning: how often a small model answers in the format, before and after.

    python -m benchmarks.assistant.sft --seeds 0 1 2

A base model is trained on text in which sums are worked out, then on conversations. Both are asked the held-out
problems in the conversations' template.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.assistant import measure
from benchmarks.assistant.measure import Row


def proof(folder: Path, seed: int, shrink: int) -> list[Row]:
    stages = measure.trained(folder, ["sft"], seed, shrink)
    return [
        {"stage": name}
        | measure.times(found)
        | measure.stage(found.run, seed)
        | {"validation_loss": measure.curve(found.run, "val_loss")}
        for name, found in stages.items()
    ]


def draw(figure: Figure, rows: list[Row]) -> None:
    words = {"base": "base model, on text", "sft": "fine-tuning, on answers"}
    for place, (stage, title) in enumerate(words.items(), 1):
        axes = measure.axes(figure, place, 2, title, xlabel="step", ylabel="validation loss (nats a token)")
        axes.set_yscale("log")
        for row in rows:
            if row["stage"] == stage:
                label = f"seed {row['seed']}: {row['in_format']:.0%} in the format, {row['right']:.0%} right"
                axes.plot(*zip(*row["validation_loss"], strict=True), "o-", markersize=3, label=label)
        axes.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(measure.main(str(__doc__), "sft", proof, draw))
