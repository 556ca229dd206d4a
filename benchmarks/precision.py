"""The loss curve in bfloat16 beside the one in float32: the same weights, batches and steps.

    python -m benchmarks.precision [--config shakespeare_char] [--steps 500]

Trains three times: all in float32; activations in bfloat16; and parameters in bfloat16 too, rounded at random. Writes
the curves to results/precision.json and what they differ by from float32's to results/precision.png, and returns 1
where the activations' precision moves a mean of 50 steps' loss by more than 1%. (A single step's loss differs by more
than that from one batch to the next.) With --draw it only draws what the last run wrote.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import machine

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
WINDOW = 50  # steps
LIMIT = 0.01
VARIANTS = {
    "float32": [],
    "bfloat16": ["--compute.dtype", "bfloat16"],
    "bfloat16 parameters": ["--compute.dtype", "bfloat16", "--compute.parameters", "bfloat16"],
}


def losses(config: str, steps: int, options: list[str], folder: Path) -> np.ndarray:
    """Returns the loss of each step, as means of WINDOW steps."""
    command = [sys.executable, "run.py", "--config", config, "--training.steps", str(steps), *options]
    command += ["--run.folder", str(folder), "--run.name", "run", "--run.overwrite"]
    command += ["--training.evaluation-batches", "1", "--sampling.tokens", "1"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    values = np.array([line["loss"] for line in lines if "loss" in line])
    return values[: len(values) // WINDOW * WINDOW].reshape(-1, WINDOW).mean(axis=1)


def draw(about: dict[str, Any]) -> None:
    """Draws each curve's difference from float32's: the curves themselves would cover each other."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    reference = np.array(about["curves"]["float32"])
    steps = about["window"] * (np.arange(len(reference)) + 1)
    axes.axhline(0, color="0.6", linewidth=1)
    for name, curve in about["curves"].items():
        if name != "float32":
            axes.plot(steps, 100 * (np.array(curve) / reference - 1), ".-", label=f"{name}: ends at {curve[-1]:.4f}")
    axes.set(
        xlabel="step",
        ylabel=f"difference from float32's loss, %, mean of {about['window']} steps",
        title=f"{about['config']}; float32 ends at {reference[-1]:.4f}",
    )
    axes.legend()
    figure.savefig(RESULTS / "precision.png", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="shakespeare_char")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    if options.draw:
        draw(json.loads((RESULTS / "precision.json").read_text()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: losses(options.config, options.steps, more, Path(folder)) for name, more in VARIANTS.items()}
    reference = curves["float32"]
    furthest = {name: float(np.max(np.abs(curve / reference - 1))) for name, curve in curves.items()}
    for name, curve in curves.items():
        print(f"{name:<20} last {WINDOW} steps {curve[-1]:.4f}, furthest from float32 {furthest[name]:.3%}")
    about = {"config": options.config, "window": WINDOW, "cpu": machine.cpu_name(), "furthest": furthest}
    about["curves"] = {name: [round(float(loss), 5) for loss in curve] for name, curve in curves.items()}
    about |= machine.versions("jax", "jaxlib")
    (RESULTS / "precision.json").write_text(json.dumps(about, indent=1) + "\n")
    draw(about)
    return 0 if furthest["bfloat16"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
