"""The stages from random weights to an assistant: what each is trained from, on and how, and the runs that come of it.

A folder has everything of one seed: `data`, a run for each stage, and `trained.json` in a run that was trained to its
end. A stage that is there is kept, one that was interrupted goes on, and one that was trained otherwise is left alone:
nothing is ever overwritten.
"""

import json
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.assistant import arithmetic
from jaxgpt.errors import RunError, UserError
from jaxgpt.terminal import say

ROOT = Path(__file__).parents[2]
DONE = "trained.json"


class Recipe(NamedTuple):
    about: str
    parent: str  # the stage that it begins with; empty for random weights
    data: str  # in the folder `data`
    steps: int
    options: str


class Trained(NamedTuple):
    run: Path
    seconds: float
    processor_seconds: float


REWARD = "--config reward_quickstart --training.sequence-length 48 --training.evaluate-every 25"
PPO = """--config ppo_quickstart --objective.reward model:{folder}/reward --training.sequence-length 56
    --training.evaluate-every 0 --training.evaluation-batches 1
    --checkpoint.every-steps 40 --checkpoint.keep-every 40"""
RECIPES = {
    "base": Recipe(
        "a Llama of half a million parameters learns from text in which sums are worked out",
        "",
        "text",
        5000,
        # Rotary positions learn to copy a digit from wherever it stands some times faster than GPT-2's learned ones.
        """--config quickstart --model.family llama --model.layers 3 --model.context 64 --training.batch-size 16
        --optimizer.learning-rate 2e-3 --training.evaluate-every 500 --training.evaluation-batches 20""",
    ),
    "sft": Recipe(
        "fine-tuning on conversations: it answers",
        "base",
        "conversations",
        450,
        "--config sft_quickstart --training.evaluate-every 50",
    ),
    "reward": Recipe(
        "a reward model learns from comparisons that steps are preferred", "sft", "comparisons.jsonl", 100, REWARD
    ),
    "flipped": Recipe(
        "another one, a tenth of whose comparisons are the wrong way round", "sft", "flipped.jsonl", 100, REWARD
    ),
    "dpo": Recipe(
        "the same comparisons, directly (DPO)",
        "sft",
        "comparisons.jsonl",
        150,
        """--config dpo_quickstart --optimizer.learning-rate 1e-4 --training.sequence-length 48
        --training.evaluate-every 25""",
    ),
    "ppo": Recipe("reinforcement by the reward model's scores (PPO)", "sft", "problems.jsonl", 200, PPO),
    "hacked": Recipe(
        "the same without a cost of divergence",
        "sft",
        "problems.jsonl",
        200,
        # So small a cost changes nothing; with it, the divergence is in the metrics.
        f"{PPO} --objective.kl-penalty 1e-9 --objective.kl-target 0",
    ),
    "grpo": Recipe(
        "reinforcement by whether the answer is right (GRPO)",
        "sft",
        "problems.jsonl",
        200,
        """--config grpo_quickstart --objective.reward exact:Answer: --training.sequence-length 56
        --training.evaluate-every 0 --training.evaluation-batches 1
        --optimizer.learning-rate 1.5e-4 --optimizer.schedule linear --rollouts.epochs 2""",
    ),
}


def needed(names: Sequence[str]) -> list[str]:
    """Returns these stages with all that they begin with, each behind what it needs."""
    found: list[str] = []
    for name in names:
        before = [RECIPES[name].parent] if RECIPES[name].parent else []
        before += ["reward"] if "model:" in RECIPES[name].options else []
        found += [other for other in [*needed(before), name] if other not in found]
    return found


def train(folder: Path, name: str, seed: int, shrink: int = 1) -> Trained:
    """Trains a stage, whose parents are trained, or keeps the one that is there; `shrink` divides its steps."""
    recipe, run = RECIPES[name], folder / name
    words = words_of(folder, name, seed, shrink)
    about = f"{name:8}{recipe.about}"
    if (run / DONE).exists():
        kept = json.loads((run / DONE).read_text())
        if kept["words"] != words:
            raise UserError(f"{run}: was trained with other options. Name another --folder, or move it away")
        say(f"{about}: was trained before, and is kept")
        return Trained(run, kept["seconds"], kept["processor_seconds"])
    say(f"{about}\n        python run.py {shlex.join(words)}", flush=True)
    prepare(folder, seed)
    started, used = time.perf_counter(), _processor_seconds()
    _run(*words, "--run.resume", "auto")
    found = Trained(run, time.perf_counter() - started, _processor_seconds() - used)
    done = {"words": words, "seconds": found.seconds, "processor_seconds": found.processor_seconds}
    (run / DONE).write_text(json.dumps(done, indent=1) + "\n")
    return found


def words_of(folder: Path, name: str, seed: int, shrink: int = 1) -> list[str]:
    """Returns the words behind `python run.py` that train a stage."""
    recipe = RECIPES[name]
    steps = max(4, recipe.steps // shrink // 4 * 4)  # a rollout of PPO has four
    words = [word.replace("{folder}", str(folder)) for word in recipe.options.split()]
    words += ["--training.init-from", str(folder / recipe.parent)] if recipe.parent else []
    words += ["--data.text", str(folder / "data" / recipe.data), "--training.steps", str(steps)]
    return [*words, "--training.seed", str(seed), "--run.folder", str(folder), "--run.name", name]


def prepare(folder: Path, seed: int) -> None:
    """Makes the data of a seed, where they are not there yet; the token files' manifests are written last."""
    data = folder / "data"
    if not (data / "problems.jsonl").exists():
        arithmetic.write(data, seed)
    tokenizer = ("--tokenizer", str(data / "tokenizer.json"))
    for source, more in (("text.txt", ()), ("conversations.jsonl", ("--chat",))):
        output = data / Path(source).stem
        if not (output / "manifest.json").exists():
            _run("prepare", *more, str(data / source), *tokenizer, "--output", str(output))


def _run(*words: str) -> None:
    """Runs a command of run.py. RunError, with its words, where it fails."""
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"python run.py {shlex.join(words)}: {done.stderr.strip() or done.stdout.strip()}")


def _processor_seconds() -> float:
    """Returns the processor time of all processes that this one has run to their ends."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
