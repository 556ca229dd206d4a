"""Faults that a run survives, and the cost of a checkpoint.

python -m benchmarks.faults [--kills 200] [--parts kills operations saving] [--output benchmarks/results/faults.json]

A run is killed with SIGKILL at random moments, again and again, and each time started anew with --resume auto; at its
end it is compared, bit for bit, with one that was left alone. Then runs are killed at each of their operations on
files, the first, the second and so on to the last: in a start, in the first save, in going on and in a later save. Each
is started once more and compared. Last, GPT-2 124M is saved while it trains. A part's figures are printed and written
when it ends; those of other parts that the file has stay.
"""

import argparse
import collections
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kill_at
from jaxgpt.commands import cli, configuration

STEPS = 1500
OPTIONS = {
    "model.layers": 1,
    "model.heads": 2,
    "model.width": 16,
    "model.context": 16,
    "data.tokenizer": "characters",
    "training.steps": STEPS,
    "training.batch-size": 4,
    "training.evaluate-every": 500,
    "sampling.tokens": 4,
    "checkpoint.every-steps": 1,
    "run.sample-every": 700,
}
PRELOADED = ["jaxgpt.commands.train", "jaxgpt.generation.batching", "matplotlib.figure", "benchmarks.kill_at"]
PARTS = ("kills", "operations", "saving")
TIMED = {"tokens_per_second", "step_seconds", "data_wait_seconds"}


class Killer:
    """Runs in `folder`, each start in a process of its own, forked from one that has imported what it needs."""

    def __init__(self, folder: Path, seed: int = 0):
        self.folder, self.random = folder, random.Random(seed)
        words = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "red", "hats"], k=3000)
        (folder / "text.txt").write_text(" ".join(words))
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._lock = threading.Lock()  # starting a process asks for the status of the others
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(PRELOADED)

    def start(self, name: str, steps: int = STEPS, kill_before: int = 0) -> Any:
        """Starts a run of so many steps, or goes on with it; with `kill_before` it dies before that file operation."""
        options = OPTIONS | {"run.name": name, "run.folder": self.folder, "data.text": self.folder / "text.txt"}
        options |= {"training.steps": steps}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        work = (kill_before, self.folder, _start, [*words, "--resume", "auto"])
        process = self._processes.Process(target=kill_at.run, args=work)
        with self._lock:
            process.start()
        return process

    def wait(self, process: Any) -> int:
        """Waits for a process's end and returns its status. Of several threads, one at a time asks for it."""
        while True:
            with self._lock:
                if not process.is_alive():
                    return process.exitcode
            time.sleep(0.01)

    def finish(self, name: str, steps: int = STEPS) -> Path:
        """Lets the run come to its end."""
        if status := self.wait(self.start(name, steps)):
            raise AssertionError(f"{name} ended with status {status}")
        return self.folder / name

    def kill(self, name: str, times: int) -> collections.Counter[str]:
        """Kills the run so many times, and returns what it was doing then. Fewer times, if it ends before."""
        doing: collections.Counter[str] = collections.Counter()
        metrics, checkpoints = self.folder / name / "metrics.jsonl", self.folder / name / "checkpoints"
        while doing.total() < times:
            process = self.start(name)
            smallest = _size(metrics)
            starting = self.random.random() < 0.15
            for _ in range(self.random.randrange(200)) if starting else itertools.count():
                time.sleep(0.005)
                smallest = min(smallest, _size(metrics))
                if not process.is_alive() or _has_grown(metrics, smallest):
                    break
            newest, further = _newest(checkpoints), not starting and self.random.random() < 0.5
            while further and process.is_alive() and _newest(checkpoints) == newest:  # so that the run gets somewhere
                time.sleep(0.005)
            time.sleep(0 if starting else self.random.uniform(0, 0.5))
            trained = _has_grown(metrics, smallest)
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            saving = trained and any(not (path / "SHA256SUMS").is_file() for path in checkpoints.glob("*"))
            doing["saving" if saving else "training" if trained else "starting"] += 1
        return doing

    def kill_at_each_operation(self) -> dict[str, Any]:
        """Kills runs before each of their file operations; returns the number of operations, and what differed.

        One begins and saves once; the other goes on from there to another step, saves that and deletes the first.
        """
        one, two = self.finish("one", 1), self.finish("two", 2)
        results: dict[str, Any] = {}
        for what, begun, whole, steps in (("beginning", None, one, 1), ("going on", one, two, 2)):

            def kill(number: int, what=what, begun=begun, whole=whole, steps=steps) -> tuple[bool, str]:
                name = f"{what.replace(' ', '-')}-{number}"
                if begun:
                    shutil.copytree(begun, self.folder / name)
                status = self.wait(self.start(name, steps, kill_before=number))
                if status == 0:
                    return False, ""
                if status != -signal.SIGKILL:
                    return True, f"{name}: status {status}"
                different = _difference_after(lambda: self.finish(name, steps), whole)
                left = [path.name for path in self.folder.glob(f".{name}.*")]
                shutil.rmtree(self.folder / name, ignore_errors=True)
                shutil.rmtree(self.folder / f"{name}.damaged-1", ignore_errors=True)
                return True, f"{name}: {different or left}" if different or left else ""

            numbers = itertools.count(1)
            outcomes: list[tuple[bool, str]] = []
            with concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
                while not outcomes or outcomes[-1][0]:
                    outcomes += pool.map(kill, itertools.islice(numbers, 16))
            killed = [different for was_killed, different in outcomes if was_killed]
            results[what] = {"kills": len(killed), "different": [different for different in killed if different]}
        return results


def _start(words: list[str]) -> None:
    raise SystemExit(cli.main(words))


def _difference_after(finish: Callable[[], Path], whole: Path) -> str:
    """Returns what differs between a run that comes to its end and a whole one, or why it doesn't come to it."""
    try:
        return difference(finish(), whole)
    except Exception as error:  # which is a difference too
        return f"{type(error).__name__}: {error}"


def _newest(checkpoints: Path) -> int:
    return max((int(path.parent.name) for path in checkpoints.glob("*/SHA256SUMS")), default=0)


def _text(path: Path) -> str:
    """Returns a file's text; "" while there is no such file, as when the folder is about to be replaced."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _size(path: Path) -> int:
    return len(_text(path))


def _has_grown(metrics: Path, smallest: int) -> bool:
    """Returns whether this start has added a step to the metrics, which it has first cut back, or emptied."""
    text = _text(metrics)
    return len(text) > smallest and '"loss"' in text.rpartition("\n{")[2]


def difference(run: Path, expected: Path) -> str:
    """Returns what differs between two runs: the last checkpoint's arrays, the metrics or the samples; "" if
    nothing."""
    import jax

    from jaxgpt.options import settings
    from jaxgpt.runs import checkpoints
    from jaxgpt.training.state import init_state

    def state(folder: Path) -> list[np.ndarray]:
        config = settings.read(folder / "config.toml")
        found = checkpoints.find(folder / "checkpoints")
        if found.about["step"] != config.training.steps:
            raise AssertionError(f"{folder} ended after step {found.about['step']}")
        restored = checkpoints.load_state(found.path, jax.eval_shape(lambda: init_state(config)))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(restored._replace(key=jax.random.key_data(restored.key)))]

    def metrics(folder: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: line[key] for key in line.keys() - TIMED} for line in lines]

    if not all(a.tobytes() == b.tobytes() for a, b in zip(state(run), state(expected), strict=True)):
        return "the train states"
    if metrics(run) != metrics(expected):
        return "metrics.jsonl"
    return "" if (run / "samples.txt").read_text() == (expected / "samples.txt").read_text() else "samples.txt"


def cost_of_saving(config_name: str, folder: Path) -> dict[str, float]:
    """Returns the seconds of a step, the seconds for which a save holds the loop, and until the checkpoint is
    whole."""
    import jax

    from jaxgpt.data.loader import Batch
    from jaxgpt.options import settings
    from jaxgpt.options.config import Checkpoint
    from jaxgpt.runs.saving import Writer
    from jaxgpt.training.state import init_state
    from jaxgpt.training.step import make_train_step

    config = configuration.without_text(settings.read(settings.find_config(config_name)))
    step = make_train_step(config)
    state = jax.jit(lambda: init_state(config))()
    shape = (1, config.training.batch_size, config.training.sequence_length)
    batch = Batch(np.ones(shape, np.int32), np.ones(shape, np.int32))

    def timed_step() -> float:
        nonlocal state
        began = time.perf_counter()
        state, metrics = step(state, None, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began

    timed_step()
    steps = [timed_step() for _ in range(5)]
    with Writer(folder / "cost", Checkpoint()) as writer:
        began = time.perf_counter()
        writer.save(state, {})
        held = time.perf_counter() - began
        during = []
        while not writer.idle:
            during.append(timed_step())
        whole = time.perf_counter() - began
    if writer.problem:
        raise RuntimeError(writer.problem)
    size = sum(path.stat().st_size for path in (folder / "cost").rglob("*") if path.is_file())
    return {
        "step_seconds": float(np.median(steps)),
        "held_seconds": held,
        "step_seconds_while_writing": float(np.median(during)) if during else 0.0,
        "whole_after_seconds": whole,
        "bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--config", default="gpt2_124m", help="the model whose saving is timed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/faults.json"))
    options = parser.parse_args()
    result = json.loads(options.output.read_text()) if options.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        killer = Killer(Path(folder))
        for part in options.parts:
            match part:
                case "kills":
                    found = random_kills(killer, options.kills)
                case "operations":
                    found = {"at_each_operation": killer.kill_at_each_operation()}
                case "saving":
                    found = {"saving": {"config": options.config} | cost_of_saving(options.config, Path(folder))}
            print(json.dumps(found, indent=2), flush=True)
            result |= found
            options.output.write_text(json.dumps(result, indent=2) + "\n")


def random_kills(killer: Killer, kills: int) -> dict[str, Any]:
    """Kills a run at random moments; returns what it was doing then, and whether it ended like one left alone."""
    whole = killer.finish("whole")
    doing = killer.kill("killed", kills)
    different = difference(killer.finish("killed"), whole)
    return {
        "kills": doing.total(),
        "killed_while": dict(doing),
        "bit_identical": not different,
        "different": different,
    }


if __name__ == "__main__":
    main()
