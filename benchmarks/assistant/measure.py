"""Measures stages on the held-out problems, and what the scripts of the stages share: options, results, pictures."""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import machine
from benchmarks.assistant import arithmetic, recipes
from jaxgpt.data import chat_templates
from jaxgpt.errors import RunError, UserError
from jaxgpt.evaluation import reward_model, rewards
from jaxgpt.generation import rollouts
from jaxgpt.generation.sampling import only_known_tokens
from jaxgpt.interop import detect_format
from jaxgpt.options.config import Compute, Sampling

RESULTS = Path(__file__).parents[1] / "results"
TEMPLATE = chat_templates.built_in("chatml")
MOST = 32  # tokens of an answer
ASKED = 200  # held-out problems
Row = dict[str, Any]


def ask(weights: Path, problems: Sequence[arithmetic.Problem], temperature: float) -> list[str]:
    """Returns a model's answers, each drawn with a seed of its own; at temperature 0 the likeliest tokens.

    Those of a stage are kept in its run, for the next script that asks.
    """
    kept = weights / f"answers_{temperature:g}.json"
    if kept.exists() and len(texts := json.loads(kept.read_text())) == len(problems):
        return texts
    source = detect_format.open_weights(str(weights))
    tokenizer, stops = source.tokenizer, chat_templates.stops(TEMPLATE.state())
    assert tokenizer
    prompts = [
        chat_templates.encode([arithmetic.asked(one)], TEMPLATE, tokenizer, add_generation_prompt=True).ids
        for one in problems
    ]
    answers = rollouts.draw(
        jax.device_put(source.load()),
        prompts,
        range(len(problems)),
        model=only_known_tokens(source.model, tokenizer),
        compute=Compute(),
        most=MOST,
        ends=rollouts.end_of_answer(tokenizer, stops),
        sampling=Sampling(temperature=temperature),
    )
    texts = [rollouts.text_of(answer, tokenizer, stops) for answer in answers]
    if (weights / recipes.DONE).exists():
        kept.write_text(json.dumps(texts, indent=1) + "\n")
    return texts


def stage(weights: Path, seed: int, scores: Path | None = None) -> Row:
    """Returns what a model does with the held-out problems, when it draws its answers, and with the likeliest ones."""
    problems = held_out(seed)
    likeliest = ask(weights, problems, 0.0)
    return drawn(weights, problems, scores) | {"right_likeliest": _share(map(arithmetic.is_right, likeliest, problems))}


def held_out(seed: int) -> list[arithmetic.Problem]:
    """Returns the held-out problems that are asked."""
    return arithmetic.split(seed)[1][:ASKED]


def drawn(weights: Path, problems: Sequence[arithmetic.Problem], scores: Path | None = None) -> Row:
    """Returns shares of a model's drawn answers, the mean score that a reward model gives them, and some of them."""
    texts = ask(weights, problems, 1.0)
    found: Row = {
        "in_format": _share(map(arithmetic.in_format, texts)),
        "shows_steps": _share(map(arithmetic.shows_steps, texts)),
        "right": _share(map(arithmetic.is_right, texts, problems)),
        "examples": [f"{problem.question} = ? {text}" for problem, text in list(zip(problems, texts, strict=True))[:3]],
    }
    if scores:
        talks = [
            [arithmetic.asked(problem), {"role": "assistant", "content": text}]
            for problem, text in zip(problems, texts, strict=True)
        ]
        scored = _scorer(scores).score_conversations(talks)
        found["score"] = float(np.mean(np.where(np.isneginf(scored), rewards.TOO_LONG, scored)))
    return found


def pairs_in_order(scores: Path, comparisons: Path) -> float:
    """Returns the share of a file's comparisons whose chosen answer a reward model scores higher."""
    rows = [json.loads(line) for line in comparisons.read_text().splitlines()]
    sides = [
        _scorer(scores).score_conversations([row["prompt"] + row[side] for row in rows])
        for side in ("chosen", "rejected")
    ]
    return _share(sides[0] > sides[1])


def curve(run: Path, name: str) -> list[tuple[int, float]]:
    """Returns a metric of a run by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def smooth(points: Sequence[tuple[int, float]], window: int = 10) -> list[tuple[int, float]]:
    """Returns the running means of so many values."""
    values = [value for _, value in points]
    return [(step, float(np.mean(values[max(0, i - window + 1) : i + 1]))) for i, (step, _) in enumerate(points)]


def trained(folder: Path, names: Sequence[str], seed: int, shrink: int) -> dict[str, recipes.Trained]:
    """Trains these stages and what they need, or keeps those that are there."""
    return {name: recipes.train(folder, name, seed, shrink) for name in recipes.needed(names)}


def times(found: recipes.Trained) -> Row:
    return {"seconds": round(found.seconds, 1), "processor_seconds": round(found.processor_seconds, 1)}


# Scripts


def main(
    about: str,
    name: str,
    proof: Callable[[Path, int, int], list[Row]],
    draw: Callable[[Figure, list[Row]], None],
    words: Sequence[str] | None = None,
    *,
    tells: bool = True,
) -> int:
    """Runs a script: proves with each seed, writes NAME.json and draws NAME.png.

    Args:
        about: The script's docstring.
        name: The results' name.
        proof: Trains and measures in a folder, with a seed and what divides the steps; returns rows of results.
        draw: Draws all rows onto the figure.
        words: The command line, if not the process's.
        tells: Whether to print each row of results, which else `proof` does.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/assistant"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the figures and the picture")
    parser.add_argument("--shrink", type=int, default=1, help="number that divides the steps, for a trial of the whole")
    options = parser.parse_args(words)
    rows = []
    try:
        for seed in options.seeds:
            for row in proof(options.folder / f"seed_{seed}", seed, options.shrink):
                rows.append({"seed": seed} | row)
                if tells:
                    print({key: value for key, value in rows[-1].items() if not isinstance(value, list)}, flush=True)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    options.output.mkdir(parents=True, exist_ok=True)
    machine_now = {"cpu": machine.cpu_name(), "versions": machine.versions("jax", "jaxlib", "numpy")}
    (options.output / f"{name}.json").write_text(json.dumps({"rows": rows} | machine_now, indent=1) + "\n")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    draw(figure, rows)
    figure.savefig(options.output / f"{name}.png", dpi=110)
    print(f"picture: {options.output / name}.png")
    return 0


def axes(figure: Figure, place: int, count: int, title: str, **labels: Any) -> Axes:
    """Adds one of `count` axes side by side."""
    made = figure.add_subplot(1, count, place)
    made.set(title=title, **labels)
    made.grid(alpha=0.3)
    return made


@functools.lru_cache(maxsize=4)
def _scorer(scores: Path) -> reward_model.RewardModel:
    return reward_model.load(str(scores))


def _share(marks: Iterable[Any]) -> float:
    return float(np.mean([bool(mark) for mark in marks]))
