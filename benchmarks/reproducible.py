"""Cost of --parallel.reproducible: the step with it and without, in turn, on the same devices.

python -m benchmarks.reproducible [--devices N] [--config NAME] [--batch-size 8] [--length 256] [--steps 5]
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

from jaxgpt.commands import configuration
from jaxgpt.data.loader import Batch
from jaxgpt.kernels.choose import choose_attention
from jaxgpt.options import settings
from jaxgpt.options.config import Config, Parallel
from jaxgpt.parallel import mesh
from jaxgpt.training import step
from jaxgpt.training.resharding import Resharding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gpt2_124m")
    for option, default in {"devices": 0, "batch-size": 8, "length": 256, "steps": 5}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    config = configuration.without_text(settings.read(settings.find_config(options.config)))
    training = dataclasses.replace(
        config.training, batch_size=options.batch_size, micro_batches=1, sequence_length=options.length
    )
    compute, _ = choose_attention(config.model, config.compute, options.length)
    config = dataclasses.replace(config, training=training, compute=compute)
    seconds = {
        kind: measure(dataclasses.replace(config, parallel=Parallel(options.devices, reproducible=kind)), options.steps)
        for kind in (False, True)
    }
    devices = mesh.make(Parallel(options.devices)).size
    where = f"{devices} x {jax.devices()[0].device_kind}"
    print(f"{options.config}, {compute.dtype}, {where}, median of {options.steps} steps")
    print(f"as it comes   {1000 * seconds[False]:10.1f} ms")
    print(f"reproducible  {1000 * seconds[True]:10.1f} ms   {seconds[True] / seconds[False]:.2f} times as long")


def measure(config: Config, steps: int) -> float:
    """Returns the seconds of a step, after one that isn't timed."""
    mesh.check(config)
    program, state = step.compile_step(config), Resharding(config).first_state()
    shape = (1, config.training.batch_size, config.training.sequence_length)
    tokens = np.random.default_rng(0).integers(config.model.vocabulary_size, size=shape, dtype=np.int32)
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        state, metrics = program(state, None, Batch(tokens, np.roll(tokens, -1, axis=-1)))
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
