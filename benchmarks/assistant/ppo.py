"""Measures PPO against a reward model, at a bounded divergence from the model that it began with, and without a bound.

    python -m benchmarks.assistant.ppo --seeds 0

The reward model prefers answers that show their steps, and checks none. That is good advice up to a point: without a
cost of divergence the policy finds texts that the reward model likes as well, and that answer nothing.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.assistant import measure
from benchmarks.assistant.measure import Row

STAGES = {"ppo": "divergence bounded", "hacked": "unbounded"}


def proof(folder: Path, seed: int, shrink: int) -> list[Row]:
    stages = measure.trained(folder, list(STAGES), seed, shrink)
    scores, problems = stages["reward"].run, measure.held_out(seed)
    first = {"step": 0} | measure.drawn(stages["sft"].run, problems, scores)
    rows = [{"stage": "sft"} | measure.stage(stages["sft"].run, seed, scores)]
    for name in STAGES:
        run = stages[name].run
        saved = sorted((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
        found = [{"step": int(path.name)} | measure.drawn(path, problems, scores) for path in saved]
        divergence = measure.curve(run, "kl_of_answer")
        row = {"stage": name} | measure.times(stages[name]) | measure.stage(run, seed, scores)
        row |= {"kl": measure.smooth(divergence)[-1][1], "checkpoints": [first, *found], "divergence": divergence}
        rows.append(row)
    return rows


def draw(figure: Figure, rows: list[Row]) -> None:
    titles = {"score": "Reward model's mean score", "right": "Right answers, held out"}
    for place, (key, title) in enumerate(titles.items(), 1):
        axes = measure.axes(figure, place, 3, title, xlabel="step")
        for row in rows:
            if row["stage"] in STAGES:
                points = [(one["step"], one[key]) for one in row["checkpoints"]]
                label = f"{STAGES[row['stage']]}, seed {row['seed']}"
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
        axes.legend(fontsize=7)
    axes = measure.axes(figure, 3, 3, "Divergence of an answer (nats)", xlabel="step")
    for row in rows:
        if row["stage"] in STAGES:
            axes.plot(*zip(*measure.smooth(row["divergence"]), strict=True))


if __name__ == "__main__":
    sys.exit(measure.main(str(__doc__), "ppo", proof, draw))
