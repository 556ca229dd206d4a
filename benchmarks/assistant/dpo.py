"""Measures DPO: the held-out margin between preferred and other answers, and how the model answers afterwards.

    python -m benchmarks.assistant.dpo --seeds 0 1 2

The comparisons prefer answers that show their steps, right or wrong.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.assistant import measure
from benchmarks.assistant.measure import Row

CURVES = {"val_margin": "margin (βr, nats)", "val_accuracy": "pairs in order"}


def proof(folder: Path, seed: int, shrink: int) -> list[Row]:
    stages = measure.trained(folder, ["dpo"], seed, shrink)
    rows = [{"stage": name} | measure.stage(stages[name].run, seed) for name in ("sft", "dpo")]
    rows[1] |= measure.times(stages["dpo"]) | {name: measure.curve(stages["dpo"].run, name) for name in CURVES}
    rows[1] |= {"margin": rows[1]["val_margin"][-1][1]}
    return rows


def draw(figure: Figure, rows: list[Row]) -> None:
    before = {row["seed"]: row for row in rows if row["stage"] == "sft"}
    for place, (key, title) in enumerate(CURVES.items(), 1):
        axes = measure.axes(figure, place, 2, "DPO on validation comparisons", xlabel="step", ylabel=title)
        for row in rows:
            if row["stage"] == "dpo":
                first = before[row["seed"]]
                label = f"seed {row['seed']}: steps shown {first['shows_steps']:.0%} → {row['shows_steps']:.0%}, "
                label += f"right {first['right']:.0%} → {row['right']:.0%}"
                axes.plot(*zip(*row[key], strict=True), "o-", markersize=3, label=label)
        axes.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(measure.main(str(__doc__), "dpo", proof, draw))
