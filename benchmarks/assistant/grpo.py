"""Measures GRPO: the share of held-out problems that are answered right, before and after.

    python -m benchmarks.assistant.grpo --seeds 0 1 2

The only reward is 1 for an answer that is right. The problems that it learns from are those that may be seen.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.assistant import measure
from benchmarks.assistant.measure import Row

SHARES = {
    "right": "right",
    "right_likeliest": "likeliest\nright",
    "shows_steps": "steps\nshown",
    "in_format": "in the\nformat",
}


def proof(folder: Path, seed: int, shrink: int) -> list[Row]:
    stages = measure.trained(folder, ["grpo"], seed, shrink)
    rows = [{"stage": name} | measure.stage(stages[name].run, seed) for name in ("sft", "grpo")]
    rows[1] |= measure.times(stages["grpo"]) | {"reward": measure.curve(stages["grpo"].run, "reward")}
    return rows


def draw(figure: Figure, rows: list[Row]) -> None:
    left = measure.axes(figure, 1, 2, "While learning", xlabel="step", ylabel="right answers of a rollout")
    for row in rows:
        if row["stage"] == "grpo":
            left.plot(*zip(*measure.smooth(row["reward"]), strict=True), label=f"seed {row['seed']}")
    left.legend(fontsize=8)
    title = f"Held-out problems, {len({row['seed'] for row in rows})} seeds"
    right = measure.axes(figure, 2, 2, title, ylabel="share of answers", ylim=(0, 1.05))
    for number, stage in enumerate(("sft", "grpo")):
        mine = [row for row in rows if row["stage"] == stage]
        means = [np.mean([row[key] for row in mine]) for key in SHARES]
        right.bar(np.arange(len(SHARES)) + 0.4 * number, means, 0.4, label=stage)
        for row in mine:
            right.plot(np.arange(len(SHARES)) + 0.4 * number, [row[key] for key in SHARES], "k.", markersize=4)
    right.set_xticks(np.arange(len(SHARES)) + 0.2, list(SHARES.values()))
    right.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(measure.main(str(__doc__), "grpo", proof, draw))
