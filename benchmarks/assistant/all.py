"""The whole way from random weights to a chat that answers: each stage's training, and what it gained.

    make assistant

Prints a table, and draws runs/assistant/assistant.png. Nothing is overwritten: the same command goes on where it was
interrupted, and keeps the stages that are trained.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.assistant import measure, recipes
from benchmarks.assistant.measure import Row
from jaxgpt.terminal import command, say

STAGES = ("base", "sft", "dpo", "ppo", "grpo")
SHARES = {"in_format": "in the format", "shows_steps": "shows its steps", "right": "right"}
CHAT = "grpo"


def main(words: Sequence[str]) -> int:
    # Not among the project's own results, which are somebody else's measurements.
    return measure.main(str(__doc__), "assistant", proof, draw, ["--output", "runs/assistant", *words], tells=False)


def proof(folder: Path, seed: int, shrink: int) -> list[Row]:
    rows = []
    stages = measure.trained(folder, ["reward", *STAGES], seed, shrink)
    in_order = measure.pairs_in_order(stages["reward"].run, folder / "data/held_out.jsonl")
    for name, found in stages.items():
        say(
            f"{name:8}is asked the held-out problems" if name in STAGES else f"{name:8}{in_order:.1%} of pairs in order"
        )
        row = {"stage": name, "about": recipes.RECIPES[name].about} | measure.times(found)
        rows.append(
            row | (measure.stage(found.run, seed, stages["reward"].run) if name in STAGES else {"in_order": in_order})
        )
    _show(rows)
    minutes = sum(found.seconds for found in stages.values()) / 60
    say(f"{minutes:.1f} minutes of training. Talk to it, and ask it such as 34 + 57 = ?")
    say(command("generate", "--run", str(stages[CHAT].run), "--chat", "--tokens", str(measure.MOST)))
    return rows


def draw(figure: Figure, rows: list[Row]) -> None:
    asked = [row for row in rows if row["stage"] in STAGES]
    axes = measure.axes(figure, 1, 1, "Answers to held-out problems, after each stage", ylim=(0, 1.08))
    for number, (key, label) in enumerate(SHARES.items()):
        places = np.arange(len(asked)) + 0.27 * number
        bars = axes.bar(places, [row[key] for row in asked], 0.25, label=label)
        axes.bar_label(bars, [f"{row[key]:.0%}" for row in asked], fontsize=8)
    axes.set_xticks(np.arange(len(asked)) + 0.27, [f"{row['stage']}\n{row['seconds'] / 60:.1f} min" for row in asked])
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.9))


def _show(rows: list[Row]) -> None:
    table = Table(box=box.SIMPLE)
    for name in ("stage", "minutes", *SHARES.values(), "right, likeliest", "score"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for row in rows:
        shares = [f"{row[key]:.0%}" if key in row else "" for key in (*SHARES, "right_likeliest")]
        # A score of what is no answer would say nothing.
        score = f"{row['score']:.2f}" if row.get("in_format") else ""
        score = f"{row['in_order']:.1%} of pairs in order" if "in_order" in row else score
        table.add_row(row["stage"], f"{row['seconds'] / 60:.1f}", *shares, score)
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
