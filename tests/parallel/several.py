"""Real processes that train together on this machine, for the tests."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SECONDS = 240  # for anything; on an idle machine it takes a tenth
OPTIONS = {
    "model.family": "gpt2",
    "model.layers": 1,
    "model.heads": 1,
    "model.width": 9,
    "model.context": 8,
    "compute.recompute": "none",
    "data.text": "text.txt",
    "data.tokenizer": "bytes",
    "training.steps": 8,
    "training.batch-size": 8,
    "training.micro-batches": 2,
    "training.evaluate-every": 3,
    "optimizer.learning-rate": 0.01,
    "sampling.tokens": 4,
    "checkpoint.every-steps": 4,
}


def words(**changes: object) -> list[str]:
    """The command line, of options whose names have __ for a dot and _ for a dash."""
    options = OPTIONS | {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(devices: int = 1) -> dict[str, str]:
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    return os.environ | own | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}


class Several:
    """Several started processes; each one's output goes to NAME.PROCESS.log in the current folder."""

    def __init__(self, count: int, name: str, *more: str, devices: int = 1, script: str = "run.py", own=(), **changes):
        coordinator = f"127.0.0.1:{free_port()}"
        self.logs = [Path(f"{name}.{process}.log") for process in range(count)]
        self.processes = []
        for process, log in enumerate(self.logs):
            command = [sys.executable, str(ROOT / script), *words(**changes | {"run__name": name}), *more]
            if count > 1:
                command += [f"--parallel.processes={count}", f"--parallel.process={process}"]
                command.append(f"--parallel.coordinator={coordinator}")
            command += own[process] if own else ()
            with log.open("w") as output:
                self.processes.append(
                    subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment(devices))
                )

    def __enter__(self) -> "Several":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, seconds: float = SECONDS) -> list[int]:
        """The statuses, and how they ended."""
        until = time.monotonic() + seconds
        return [process.wait(max(until - time.monotonic(), 0.1)) for process in self.processes]

    def until_step(self, step: int) -> None:
        """Waits for the checkpoint of this step or a later one."""
        folder = Path("runs", self.logs[0].name.split(".")[0], "checkpoints")
        until = time.monotonic() + SECONDS
        while not any(int(path.parent.name) >= step for path in folder.glob("*/SHA256SUMS")):
            assert time.monotonic() < until, self.output()
            assert all(process.poll() is None for process in self.processes), self.output()
            time.sleep(0.05)

    def output(self, process: int | None = None) -> str:
        logs = self.logs if process is None else [self.logs[process]]
        text = "\n".join(log.read_text() for log in logs)
        return "\n".join(line for line in text.splitlines() if not re.match(r"\[Gloo\]", line))


def metrics(name: str) -> list[dict]:
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]


def losses(name: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"] if "loss" in line else line["val_loss"]) for line in metrics(name)]
