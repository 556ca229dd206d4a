"""Plans of a train step beside the memory that it takes: `python -m benchmarks.fit`.

20 configurations: families, widths, micro-batches, recompute levels, chunks, ZeRO stages on simulated devices, dtypes,
LoRA. For each of them, on a CPU:

    planned     the plan's total (`training/memory_plan.py`), of all devices, as it is known before the first step
    program     arguments, results that are no argument's, temporaries and code of the program, compiled for itself
    estimated   the estimate that orders candidates (`training/estimate.py`), by the planned total
    grown       by how much the process's resident memory grows at most, as Linux accounts for it, over making the state
                and three steps, by the planned total

A process has more than its arrays: the library of a CPU's products packs their operands, which is in no program's plan.
The C library is told to give freed memory back, or pieces of it would count (`environment.give_memory_back`).
"""

import ctypes
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxgpt import environment
from jaxgpt.data.loader import Batch
from jaxgpt.options import command_line
from jaxgpt.options.config import Compute, Config, Lora, Model, Parallel, Training
from jaxgpt.terminal import say
from jaxgpt.training import memory_plan, step
from jaxgpt.training.candidates import Place, with_layers
from jaxgpt.training.device_memory import Capacity
from jaxgpt.training.estimate import estimate
from jaxgpt.training.state import frozen_shapes, initial_state
from jaxgpt.training.step_time import CPU

DEVICES = 4
LAYERS, LENGTH = 12, 512


@dataclass(frozen=True)
class Options:
    """Measures the memory of 20 configurations' steps on a CPU, beside what their plans say."""

    only: Annotated[tuple[int, ...], tyro.conf.arg(metavar="NUMBERS")] = ()
    """Take these of the configurations alone, from 0."""
    output: str = ""
    """Write the figures to this JSON file."""


def configurations() -> list[Config]:
    """Returns the grid."""
    gpt2 = {"family": "gpt2", "heads": 8, "width": 512}
    llama = {"family": "llama", "heads": 8, "kv_heads": 2, "width": 512, "feed_forward": 1408}
    mixtral = {"family": "mixtral", "heads": 4, "kv_heads": 2, "width": 256, "feed_forward": 704, "experts": 4}
    narrow, half = {"width": 256, "heads": 4}, {"dtype": "bfloat16"}
    return [
        _config(gpt2),
        _config(gpt2, recompute="none"),
        _config(gpt2, recompute="gelu", chunk=2048),
        _config(gpt2, recompute="projection", micro_batches=2),
        _config(gpt2, recompute="block", batch_size=8),
        _config(gpt2 | narrow, batch_size=8, compute=half),
        _config(gpt2, zero=0, devices=2),
        _config(gpt2, zero=1, devices=DEVICES, micro_batches=2),
        _config(llama),
        _config(llama, recompute="none", chunk=128),
        _config(llama, recompute="block", batch_size=8, micro_batches=2),
        _config(llama, recompute="gelu", compute=half | {"parameters": "bfloat16"}),
        _config(llama, recompute="norms", compute={"layers": "scanned"}),
        _config(llama, zero=1, devices=DEVICES),
        _config(llama, zero=2, devices=DEVICES, recompute="block", compute={"layers": "scanned"}),
        _config(llama, zero=3, devices=DEVICES),
        _config(llama, recompute="none", lora=Lora(rank=8)),
        _config(mixtral, recompute="none"),
        _config(mixtral, recompute="block", compute=half),
        _config(mixtral, recompute="norms", zero=3, devices=2),
    ]


def _config(
    model: dict[str, Any],
    *,
    recompute: str = "norms",
    chunk: int = 512,
    batch_size: int = 4,
    micro_batches: int = 1,
    zero: int = 0,
    devices: int = 1,
    compute: dict[str, Any] | None = None,
    lora: Lora | None = None,
) -> Config:
    options = {"recompute": recompute, "classifier_chunk": chunk, "attention": "blocks"} | (compute or {})
    return Config(
        model=Model(layers=LAYERS, context=LENGTH, vocabulary_size=8192, **model),
        training=Training(batch_size=batch_size, micro_batches=micro_batches, sequence_length=LENGTH),
        compute=Compute(**options),
        parallel=Parallel(devices=devices, zero=zero),  # type: ignore[arg-type]
        lora=lora or Lora(),
    )


def measured(config: Config) -> dict[str, Any]:
    """Returns the figures of one configuration, in bytes of all devices together."""
    devices = config.parallel.devices
    program = step.compile_step(config)
    planned = memory_plan.make(config, program, Capacity(None, "")).total
    found: Any = program.memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes + found.generated_code_size_in_bytes
    of_program = found.argument_size_in_bytes + found.temp_size_in_bytes + new
    place = Place(devices, gpu=False, hosts=False, speeds=CPU)
    _take_steps(config, program)  # compiles the programs of the first state, and starts what a process starts once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    before = _resident("VmRSS")
    _take_steps(config, program)
    grown = _resident("VmHWM") - before
    return {
        "configuration": describe(config),
        "planned": planned * devices,
        "program": of_program * devices,
        "estimated": estimate(with_layers(config, place), devices, gpu=False).total * devices,
        "grown": grown,
    }


def _take_steps(config: Config, program: jax.stages.Compiled) -> None:
    training, random = config.training, np.random.default_rng(0)
    shape = (training.micro_batches, training.batch_size, training.sequence_length)
    tokens = random.integers(0, config.model.vocabulary_size, shape, dtype=np.int32)
    frozen = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), frozen_shapes(config))
    state = initial_state(config)
    for _ in range(3):
        state, _ = program(state, frozen, Batch(tokens, tokens))
    jax.block_until_ready(state)


def _resident(which: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


def describe(config: Config) -> str:
    model, compute, training, parallel = config.model, config.compute, config.training, config.parallel
    parts = [
        f"{model.family} {model.width}",
        f"{training.micro_batches} x {training.batch_size}",
        compute.dtype if compute.parameters == "float32" else f"{compute.dtype}, no masters",
        f"recompute {compute.recompute}",
        f"chunk {compute.classifier_chunk}",
        *(["scanned"] if compute.layers == "scanned" else []),
        *([f"zero {parallel.zero} on {parallel.devices}"] if parallel.devices > 1 else []),
        *([f"LoRA {config.lora.rank}"] if config.lora.rank else []),
    ]
    return ", ".join(parts)


def rows(only: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for number, config in enumerate(configurations()):
        if not only or number in only:
            yield {"number": number} | measured(config)
            gc.collect()
            jax.clear_caches()


def run(words: list[str]) -> int:
    """Prints the table."""
    options = command_line.read(Options, words, "-m benchmarks.fit")
    environment.give_memory_back()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_enable_compilation_cache", False)
    say(f"{'':<3}{'configuration':<72}{'planned MiB':>12}{'program':>9}{'estimated':>11}{'grown':>8}")
    found = []
    for row in rows(options.only):
        found.append(row)
        shares = (row[name] / row["planned"] for name in ("program", "estimated", "grown"))
        of_program, estimated, grown = (f"{share:.3f}" for share in shares)
        planned = f"{row['planned'] / 2**20:,.0f}"
        say(f"{row['number']:<3}{row['configuration']:<72}{planned:>12}{of_program:>9}{estimated:>11}{grown:>8}")
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
