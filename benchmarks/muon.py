"""Muon beside AdamW on character-level Shakespeare: the validation loss at equal steps and at equal time.

    python -m benchmarks.muon [--seeds 0 1 2] [--rounds 60]

1. Times the compiled steps of `shakespeare_char_best` and `shakespeare_char_muon` in turn, in one process: the ratio of
   their medians is what holds on a machine that others share, and processor time is beside it.
2. Trains both for 2000 steps with each seed, and Muon once more for as many steps as take AdamW's time.

Writes results/muon.json and the loss curves, results/muon.png.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks import machine
from jaxgpt import environment
from jaxgpt.commands import configuration
from jaxgpt.data.loader import Batch
from jaxgpt.options import settings
from jaxgpt.training import step
from jaxgpt.training.resharding import Resharding

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
ADAMW, MUON = "shakespeare_char_best", "shakespeare_char_muon"


def step_times(rounds: int) -> dict[str, dict[str, float]]:
    """Returns the median seconds of a step of each config, by the clock and of the processor."""
    steps, states, found = {}, {}, {name: ([], []) for name in (ADAMW, MUON)}
    for name in found:
        config = configuration.without_text(settings.read(settings.find_config(name)))
        steps[name], states[name] = step.compile_step(config), Resharding(config).first_state()
        shape = (2, 1, config.training.batch_size, config.training.sequence_length)
        batch = Batch(*np.random.default_rng(0).integers(config.model.vocabulary_size, size=shape, dtype=np.int32))
    for turn in range(rounds + 5):
        for name, (wall, processor) in found.items():
            clock, used = time.perf_counter(), time.process_time()
            states[name], metrics = steps[name](states[name], None, batch)
            jax.block_until_ready((states[name].params, metrics))
            if turn >= 5:
                wall.append(time.perf_counter() - clock)
                processor.append(time.process_time() - used)
    return {
        name: {"wall": statistics.median(wall), "processor": statistics.median(processor)}
        for name, (wall, processor) in found.items()
    }


def trained(config: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Trains in a process of its own; returns its validation losses and the seconds of its steps."""
    name = f"{config}_{seed}_{steps}"
    command = [sys.executable, "run.py", "--config", config, "--run.folder", str(folder), "--run.name", name]
    command += ["--training.seed", str(seed), "--training.steps", str(steps), "--run.no-report"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    seconds = sum(line.get("step_seconds", 0) for line in lines)
    found = {"config": config, "seed": seed, "steps": steps, "seconds": seconds, "val_loss": curve[-1][1]}
    print(json.dumps(found), flush=True)
    return found | {"curve": curve}


def draw(about: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colours: dict[tuple[str, int], str] = {}
    for run in about["runs"]:
        kind = (run["config"], run["steps"])
        label = None if kind in colours else f"{run['config']}, {run['steps']} steps"
        colour = colours.setdefault(kind, f"C{len(colours)}")
        axes.plot(*zip(*run["curve"][1:], strict=True), "o-", markersize=3, color=colour, label=label)
    axes.set(xlabel="step", ylabel="validation loss (nats per character)", title="Character-level Shakespeare")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=60, help="steps of each, timed in turn")
    parser.add_argument("--only-time", action="store_true", help="train nothing, and write nothing")
    options = parser.parse_args()
    times = step_times(options.rounds)
    ratio = times[MUON]["processor"] / times[ADAMW]["processor"]
    print(json.dumps(times), f"{ratio:.3f} times the processor time", flush=True)
    if options.only_time:
        return 0
    steps = settings.read(settings.find_config(ADAMW)).training.steps
    folder = Path(tempfile.mkdtemp())
    kinds = ((ADAMW, steps), (MUON, steps), (MUON, round(steps / ratio)))
    runs = [trained(config, seed, count, folder) for seed in options.seeds for config, count in kinds]
    shutil.rmtree(folder)
    about = {"cpu": machine.cpu_name(), "versions": machine.versions("jax", "jaxlib", "numpy")}
    about |= {"step": times, "ratio": ratio, "runs": runs}
    (RESULTS / "muon.json").write_text(json.dumps(about, indent=1) + "\n")
    draw(about, RESULTS / "muon.png")
    for config, count in kinds:
        losses = [run["val_loss"] for run in runs if (run["config"], run["steps"]) == (config, count)]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(f"{config:<22} {count:>5} steps  {statistics.mean(losses):.4f} ± {spread:.4f}  {losses}")
    return 0


if __name__ == "__main__":
    environment.restart_with_allocator()
    sys.exit(main())
