"""Cost and saving of each level of recomputing: the train step with each, in turn, on one machine.

python -m benchmarks.recompute [--config NAME] [--batch-size 2] [--length 512] [--dtype float32] [--rounds 3]
    [--output F]

One process a level and round, since what a program left in the allocator would help the next one.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import psutil

from benchmarks import machine
from jaxgpt import environment
from jaxgpt.commands import configuration
from jaxgpt.data.loader import Batch
from jaxgpt.kernels.choose import choose_attention
from jaxgpt.models.blocks import RECOMPUTE_LEVELS as LEVELS
from jaxgpt.options import settings
from jaxgpt.options.config import Config
from jaxgpt.training import step
from jaxgpt.training.state import initial_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gpt2_124m")
    for option, default in {"batch-size": 2, "length": 512, "rounds": 3}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--level", choices=LEVELS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.level:
        print(json.dumps(measure(configured(options))))
        return
    found: dict[str, list[dict[str, float]]] = {level: [] for level in LEVELS}
    for _ in range(options.rounds):
        for level in LEVELS:
            command = [sys.executable, "-m", "benchmarks.recompute", *sys.argv[1:], "--level", level]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[level].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        level: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for level, rounds in found.items()
    }
    print(f"{options.config}, {options.dtype}, B={options.batch_size} T={options.length}, {machine.cpu_name()}")
    most = medians[LEVELS[0]]
    for level, row in medians.items():
        print(
            f"{level:<6} {row['step_seconds']:7.2f} s a step ({row['step_seconds'] / most['step_seconds']:.3f})  "
            f"{row['temp_bytes'] / 2**20:7.0f} MiB of temporaries ({row['temp_bytes'] / most['temp_bytes']:.2f})"
        )
    if options.output:
        about = {"cpu": machine.cpu_name(), "cores": psutil.cpu_count(logical=False), **machine.versions("jax")}
        size = {key: vars(options)[key] for key in ("config", "dtype", "batch_size", "length", "rounds")}
        options.output.write_text(json.dumps({"machine": about, **size, "levels": medians}, indent=2) + "\n")


def configured(options: argparse.Namespace) -> Config:
    config = configuration.without_text(settings.read(settings.find_config(options.config)))
    training = dataclasses.replace(
        config.training, batch_size=options.batch_size, micro_batches=1, sequence_length=options.length
    )
    compute = dataclasses.replace(config.compute, dtype=options.dtype, recompute=options.level)
    compute, _ = choose_attention(config.model, compute, options.length)
    return dataclasses.replace(config, training=training, compute=compute)


def measure(config: Config) -> dict[str, float]:
    """Returns the median of three steps after one that isn't timed, and the program's temporaries."""
    program, state = step.compile_step(config), initial_state(config)
    shape = (1, config.training.batch_size, config.training.sequence_length)
    tokens = np.random.default_rng(0).integers(config.model.vocabulary_size, size=shape, dtype=np.int32)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        state, metrics = program(state, None, Batch(tokens, np.roll(tokens, -1, axis=-1)))
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    memory = program.memory_analysis()
    assert memory is not None
    return {"step_seconds": statistics.median(seconds[1:]), "temp_bytes": memory.temp_size_in_bytes}


if __name__ == "__main__":
    environment.restart_with_allocator()
    main()
