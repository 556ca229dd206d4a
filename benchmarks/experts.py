"""The speed of a mixture of experts per active operation, as a share of a dense model's: train steps in turn.

python -m benchmarks.experts [--experts 8] [--per-token 2] [--layers 12] [--batch-size 2] [--length 512]
    [--dtype float32] [--rounds 5] [--output F]

The dense model is `llama_125m`, and the mixture the same with that many experts of its MLP's size. An active operation
is one of the model's products for a token, forward and backward (`flops_per_token`). Beside the whole step, forward and
backward alone: AdamW takes time for each expert, whether a token went there or not.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import psutil
from jaxtyping import Array

from benchmarks import machine
from jaxgpt import environment
from jaxgpt.commands import configuration
from jaxgpt.data.loader import Batch
from jaxgpt.models import family
from jaxgpt.models.blocks import Context, Params
from jaxgpt.objectives import next_token
from jaxgpt.optimizers import clipping
from jaxgpt.options import settings
from jaxgpt.options.config import Config
from jaxgpt.training import step
from jaxgpt.training.state import initial_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"experts": 8, "per-token": 2, "layers": 12, "batch-size": 2, "length": 512, "rounds": 5}
    for option, default in defaults.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    configs = {"dense": configured(options, mixture=False), "mixture": configured(options, mixture=True)}
    print(f"{options.dtype}, B={options.batch_size} T={options.length}, {machine.cpu_name()}")
    results = {"forward and backward": measure(configs, gradients, options.rounds)}
    results["train step"] = measure(configs, whole_step, options.rounds)
    for what, seconds in results.items():
        rate = {name: operations(config) / seconds[name] for name, config in configs.items()}
        times = ", ".join(f"{name} {seconds[name]:.2f} s, {rate[name] / 1e9:.0f} GFLOP/s" for name in configs)
        print(f"{what}: {times}; the mixture's speed per active operation is {rate['mixture'] / rate['dense']:.2f}")
    if options.output:
        about = {"cpu": machine.cpu_name(), "cores": psutil.cpu_count(logical=False), **machine.versions("jax")}
        size = {key: value for key, value in vars(options).items() if key != "output"}
        counts = {f"{name}_operations": operations(config) for name, config in configs.items()}
        content = {"machine": about, **size, **counts, "seconds": results}
        options.output.write_text(json.dumps(content, indent=2) + "\n")


def configured(options: argparse.Namespace, *, mixture: bool) -> Config:
    config = configuration.without_text(settings.read(settings.find_config("llama_125m")))
    model = dataclasses.replace(config.model, layers=options.layers)
    if mixture:
        model = dataclasses.replace(
            model, family="mixtral", experts=options.experts, experts_per_token=options.per_token
        )
    training = dataclasses.replace(
        config.training, batch_size=options.batch_size, micro_batches=1, sequence_length=options.length
    )
    compute = dataclasses.replace(config.compute, dtype=options.dtype, attention="blocks")
    return dataclasses.replace(config, model=model, training=training, compute=compute)


def operations(config: Config) -> float:
    """Returns the active operations of a step."""
    tokens = config.training.batch_size * config.training.sequence_length
    return tokens * family(config.model).flops_per_token(config.model, config.training.sequence_length)


def measure(
    configs: dict[str, Config], make: Callable[[Config], Callable[[], object]], rounds: int
) -> dict[str, float]:
    """Returns the median times of both, measured in turn after one time that doesn't count."""
    programs = {name: make(config) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, program in programs.items():
            started = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def gradients(config: Config) -> Callable[[], object]:
    """Returns a function that computes loss and gradients once and keeps their norm only: new memory takes time."""
    model, context = family(config.model), Context(config.model, config.compute)
    params = initial_state(config).params
    batch = jax.tree.map(lambda array: array[0], tokens(config))

    @jax.jit
    def program(params: Params, batch: Batch) -> tuple[Array, Array]:
        loss, _, grads = next_token.loss_and_grads(model, params, batch, context)
        return loss, clipping.global_norm(grads)

    return lambda: jax.block_until_ready(program(params, batch))


def whole_step(config: Config) -> Callable[[], object]:
    """Returns a function that takes the next train step."""
    program, state, batch = step.compile_step(config), initial_state(config), tokens(config)

    def take() -> None:
        nonlocal state
        state, metrics = program(state, None, batch)
        jax.block_until_ready((state, metrics))

    return take


def tokens(config: Config) -> Batch:
    shape = (1, config.training.batch_size, config.training.sequence_length)
    found = np.random.default_rng(0).integers(config.model.vocabulary_size, size=shape, dtype=np.int32)
    return Batch(found, np.roll(found, -1, axis=-1))


if __name__ == "__main__":
    environment.restart_with_allocator()
    main()
