"""Measures reward models: how many held-out comparisons they put in order, with all labels right and a tenth flipped.

    python -m benchmarks.assistant.reward --seeds 0 1 2

The comparisons are of a rater who prefers answers that show their steps, and checks none. The held-out ones are of
problems that no stage has seen, and have no label flipped.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.assistant import measure
from benchmarks.assistant.measure import Row

MODELS = {"reward": "all labels right", "flipped": "a tenth flipped"}


def proof(folder: Path, seed: int, shrink: int) -> list[Row]:
    stages = measure.trained(folder, list(MODELS), seed, shrink)
    return [
        {"stage": name}
        | measure.times(stages[name])
        | {"in_order": measure.pairs_in_order(stages[name].run, folder / "data/held_out.jsonl")}
        | {"accuracy": measure.curve(stages[name].run, "val_accuracy")}
        | {"loss": measure.curve(stages[name].run, "val_loss")}
        for name in MODELS
    ]


def draw(figure: Figure, rows: list[Row]) -> None:
    for place, (key, title) in enumerate((("accuracy", "pairs in the labels' order"), ("loss", "loss (nats)")), 1):
        axes = measure.axes(figure, place, 2, "Validation comparisons, labelled alike", xlabel="step", ylabel=title)
        for row in rows:
            label = f"{MODELS[row['stage']]}, seed {row['seed']}: {row['in_order']:.1%} of held-out pairs in order"
            colour = {"reward": "tab:blue", "flipped": "tab:orange"}[row["stage"]]
            axes.plot(*zip(*row[key], strict=True), "o-", markersize=3, color=colour, label=label)
        axes.legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(measure.main(str(__doc__), "reward", proof, draw))
