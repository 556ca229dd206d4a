"""Measures supervised fine-tuning: how often a small model answers in the format, before and after.

    python -m benchmarks.assistant.sft

For each seed: a base model is trained on lines such as "7 + 5 = 12" (a Llama of quickstart's shape, byte by byte), then
`--config sft_quickstart` trains it on conversations that end with "Answer: 12". Both are asked 100 problems that were
in neither, greedily, in the conversations' template. Writes results/sft.json and the loss curves to results/sft.png.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import machine
from benchmarks.assistant import arithmetic
from jaxgpt.data import chat_templates
from jaxgpt.generation import batching
from jaxgpt.interop import loading
from jaxgpt.options.config import Sampling

ROOT, RESULTS = Path(__file__).parents[2], Path(__file__).parents[1] / "results"
TEMPLATE = chat_templates.built_in("chatml")
# Llama's rotary positions learn sums, which begin anywhere in a row, some times faster than GPT-2's learned ones.
BASE = ("--config", "quickstart", "--model.family", "llama", "--training.evaluate-every", "200")
TUNE = ("--config", "sft_quickstart", "--training.evaluate-every", "50")
STEPS = (1200, 300)  # of the base model, and of fine-tuning


def measure(run: Path, seed: int) -> dict[str, float]:
    """Asks the held-out problems; the share of answers in the format, and of right ones."""
    model = loading.load(str(run), devices=1)
    _, problems = arithmetic.split(seed)
    sampling = Sampling(tokens=32, temperature=0.0, stop=chat_templates.stops(TEMPLATE.state()))
    requests = []
    for problem in problems:
        messages = [arithmetic.question(problem)]
        ids = chat_templates.encode(messages, TEMPLATE, model.tokenizer, add_generation_prompt=True).ids
        requests.append(batching.Request(ids, sampling, 0))
    texts = [""] * len(requests)
    for piece in batching.generate(model.params, requests, model.config.model, model.config.compute, model.tokenizer):
        texts[piece.number] += piece.text
    right = [
        text == arithmetic.answer(problem.answer)["content"] for text, problem in zip(texts, problems, strict=True)
    ]
    return {
        "in_format": sum(map(arithmetic.in_format, texts)) / len(texts),
        "right": sum(right) / len(right),
    }


def run(*words: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "run.py"), *words], check=True, stdout=subprocess.DEVNULL)


def one(seed: int, folder: Path, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Both stages of one seed."""
    data = folder / f"data_{seed}"
    data.mkdir()
    arithmetic.write(data, seed)
    chats = ["--tokenizer", "bytes", "--output", str(data / "sft")]
    run("prepare", "--chat", str(data / "sft.jsonl"), *chats)
    found = []
    base = str(folder / f"base_{seed}")
    stages = {
        "base": (*BASE, "--data.text", str(data / "text.txt"), "--training.steps", str(steps[0])),
        "sft": (*TUNE, "--init-from", base, "--data.text", str(data / "sft"), "--training.steps", str(steps[1])),
    }
    for stage, words in stages.items():
        name, started = f"{stage}_{seed}", time.perf_counter()
        run(*words, "--run.folder", str(folder), "--run.name", name, "--training.seed", str(seed))
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        curve = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
        seconds = time.perf_counter() - started
        found.append({"stage": stage, "seed": seed, "seconds": seconds} | measure(folder / name, seed))
        print(found[-1], flush=True)
        found[-1]["validation_loss"] = curve
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for one in found:
        if one["stage"] != "base":
            label = f"{one['stage']}, seed {one['seed']}: {one['in_format']:.0%} in format"
            axes.plot(*zip(*one["validation_loss"], strict=True), "o-", markersize=3, label=label)
    title = "Supervised fine-tuning on generated sums"
    axes.set(xlabel="step", ylabel="validation loss of the assistant's bytes (nats)", yscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=2, default=STEPS, help="of the base model, and of fine-tuning")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of what is written")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    found = [stage for seed in range(options.seeds) for stage in one(seed, folder, options.steps)]
    shutil.rmtree(folder)
    about = {"cpu": machine.cpu_name(), "versions": machine.versions("jax", "jaxlib", "numpy")}
    (options.output / "sft.json").write_text(json.dumps({"stages": found} | about, indent=1) + "\n")
    draw(found, options.output / "sft.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
