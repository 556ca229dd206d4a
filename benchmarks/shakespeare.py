"""nanoGPT's character-level Shakespeare beside PyTorch, in turn on one machine.

    python -m benchmarks.shakespeare

Trains `configs/shakespeare_char.toml` with three seeds, PyTorch with the same settings between them, and
`configs/shakespeare_char_best.toml`; writes the validation losses (over the whole split) and the training seconds to
results/shakespeare.json and the loss curves to results/shakespeare.png. Seconds are those of all steps, for jaxgpt with
the compilation of its step; evaluations are in neither.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import machine

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)


def ours(config: str, seed: int, folder: Path) -> dict[str, Any]:
    name = f"{config}_{seed}"
    command = [sys.executable, "run.py", "--config", config, "--run.folder", str(folder), "--run.name", name]
    subprocess.run([*command, "--training.seed", str(seed)], cwd=ROOT, check=True)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    validation = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    return {
        "who": "ours",
        "config": config,
        "seed": seed,
        "seconds": sum(line.get("step_seconds", 0) for line in lines),
        "val_loss": validation[-1][1],
        "curve": validation,
    }


def torch(seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.torch_shakespeare", "--seed", str(seed)]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    return {key: result[key] for key in ("who", "seed", "seconds", "val_loss")} | {"config": "PyTorch"}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for run in runs:
        if "curve" in run:
            label = f"{run['config']}, seed {run['seed']}: {run['val_loss']:.3f}"
            axes.plot(*zip(*run["curve"][1:], strict=True), "o-", markersize=3, label=label)
        else:
            axes.axhline(run["val_loss"], color="grey", linewidth=0.8, label=f"PyTorch, its end: {run['val_loss']:.3f}")
    axes.set(xlabel="step", ylabel="validation loss (nats per character)", title="Character-level Shakespeare")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    folder = Path(tempfile.mkdtemp())
    runs = []
    for seed in SEEDS:
        runs += [ours("shakespeare_char", seed, folder), torch(seed)]
    runs.append(ours("shakespeare_char_best", 0, folder))
    shutil.rmtree(folder)
    about = {"cpu": machine.cpu_name(), "versions": machine.versions("jax", "jaxlib", "numpy", "torch")}
    (RESULTS / "shakespeare.json").write_text(json.dumps({"runs": runs} | about, indent=1) + "\n")
    draw(runs, RESULTS / "shakespeare.png")
    for run in runs:
        print(f"{run['config']:<22} seed {run['seed']}  {run['seconds']:6.1f} s  validation loss {run['val_loss']:.4f}")
    plain = [run for run in runs if run["config"] == "shakespeare_char"]
    mean = sum(run["val_loss"] for run in plain) / len(plain)
    print(f"shakespeare_char, mean of {len(plain)} seeds: {mean:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
