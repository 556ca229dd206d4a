"""A step that trains adapters of rank 16 beside one that trains the whole model: its time and its memory.

    python -m benchmarks.lora --rounds 7

A Llama of 100 million parameters, B=2, T=512, float32. Both are compiled first, then take steps in turn. Besides the
time by the clock there is that of all cores together, which says more where others use the machine too.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np

from jaxgpt.data.loader import Batch
from jaxgpt.models import family, lora
from jaxgpt.options.config import Compute, Config, Lora, Model, Training
from jaxgpt.training import step
from jaxgpt.training.state import TrainState, initial_state

MODEL = Model(
    family="llama",
    layers=12,
    heads=12,
    kv_heads=4,
    width=768,
    feed_forward=2048,
    vocabulary_size=32000,
    context=512,
)
FULL = Config(
    model=MODEL,
    compute=Compute(attention="blocks"),
    training=Training(batch_size=2, sequence_length=512, init_from="random weights"),
)


class Contestant:
    """A compiled step, its state, and the seconds of its steps: by the clock, and of all cores."""

    def __init__(self, config: Config):
        self.step = step.compile_step(config)
        self.state: TrainState = initial_state(config)
        self.frozen, self.times = None, []
        if config.lora.rank:
            weights = jax.jit(lambda: family(MODEL).init(MODEL, jax.random.key(0)))()
            self.frozen = lora.freeze(weights, config.lora, config.compute)

    def take(self, batch: Batch) -> None:
        began, cores = time.perf_counter(), time.process_time()
        self.state, metrics = self.step(self.state, self.frozen, batch)
        jax.block_until_ready((self.state, metrics))
        self.times.append((time.perf_counter() - began, time.process_time() - cores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--base", choices=("float32", "bfloat16", "int8", "nf4"), default="float32")
    options = parser.parse_args()
    tokens = np.random.default_rng(0).integers(0, MODEL.vocabulary_size, (1, 2, 512), dtype=np.int32)
    adapted = dataclasses.replace(FULL, lora=Lora(rank=16, base=options.base))
    contestants = {"whole model": Contestant(FULL), "adapters": Contestant(adapted)}
    for _ in range(options.rounds + 1):
        for contestant in contestants.values():
            contestant.take(Batch(tokens, tokens))
    for name, contestant in contestants.items():
        clock, cores = (statistics.median(times) for times in zip(*contestant.times[1:], strict=True))
        found: Any = contestant.step.memory_analysis()
        temporaries, arguments = found.temp_size_in_bytes / 2**20, found.argument_size_in_bytes / 2**20
        print(
            f"{name:<12} {clock:6.2f} s a step, {cores:6.2f} s of all cores, {temporaries:6,.0f} MiB of temporaries, "
            f"{arguments:6,.0f} MiB of state and base"
        )
    whole, adapters = (np.array(contestant.times[1:]) for contestant in contestants.values())
    clock, cores = np.median(adapters / whole, axis=0)
    print(
        f"adapters / whole model, median of {options.rounds} rounds: {clock:.2f} by the clock, {cores:.2f} of all cores"
    )


if __name__ == "__main__":
    main()
