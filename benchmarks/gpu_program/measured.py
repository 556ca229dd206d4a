"""Measures a train step's kernels on this machine's device, each beside its bound.

    python -m benchmarks.gpu_program.measured --config gpt2_124m --size 32x1024 --folder trace [--output figures.json]

The bound is there where the device is one of `cards.py`. On a CPU the operations of its own program are measured.
"""

import collections
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import step_profile
from benchmarks.gpu_program import command, hlo, kernels, roofline
from benchmarks.gpu_program.cards import CARDS, Card
from jaxgpt import environment
from jaxgpt.commands import cli, configuration
from jaxgpt.data.loader import Batch
from jaxgpt.options import command_line
from jaxgpt.options.config import Config
from jaxgpt.terminal import say
from jaxgpt.training import step
from jaxgpt.training.state import initial_state

STEPS = 3


@dataclass(frozen=True)
class Row:
    name: str
    kernels: int  # in a step
    milliseconds: float  # measured, in a step
    bound: float | None
    where: str = ""


class Measured(NamedTuple):
    kernel: kernels.Kernel
    milliseconds: float  # in a step


def run(words: list[str]) -> int:
    """Measures what the words ask for and prints it."""
    folder, rest = command_line.take(words, "--folder")
    options, config = command.configured(rest)
    config, attention = configuration.with_attention(config)
    device = jax.devices()[0]
    card = next((card for card in CARDS.values() if card.name == device.device_kind), None)
    seen, step_milliseconds = measure(config, Path(folder or "trace"))
    rows = _rows(seen, card, lambda kernel: (kernel.kind,))
    dearest = _rows(seen, card, lambda kernel: (roofline.described(kernel), roofline.place(kernel)))[:20]

    say(f"{options.config}, {options.size}, {config.compute.dtype}, on {device.device_kind}, attention {attention}")
    say(f"a step {step_milliseconds:.2f} ms; its kernels, measured, and their bound where the card is known\n")
    say(f"{'':28}{'kernels':>8}{'ms':>10}{'bound ms':>10}{'bound':>8}")
    for row in rows:
        say(_line(f"{row.name:28}", row))
    everything = Row("", sum(row.kernels for row in rows), sum(row.milliseconds for row in rows), _sum(rows))
    say(_line(" " * 28, everything))
    say("\nThe dearest, those of all layers together:")
    for row in dearest:
        say(f"{_line('', row)}  {row.name}  {row.where}")
    if options.output:
        figures = {"device": device.device_kind, "step_milliseconds": step_milliseconds}
        figures |= {"kinds": [vars(row) for row in rows], "dearest": [vars(row) for row in dearest]}
        Path(options.output).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(config: Config, folder: Path) -> tuple[list[Measured], float]:
    """Traces some steps into the folder; returns the kernels' times, and the milliseconds from the first to the last
    event of a step."""
    program = step.compile_step(config)
    shape = (1, config.training.batch_size, config.training.sequence_length)
    tokens = np.random.default_rng(0).integers(config.model.vocabulary_size, size=shape, dtype=np.int32)
    batch = Batch(tokens, np.roll(tokens, -1, axis=-1))
    state = initial_state(config)

    def one_step() -> None:
        nonlocal state
        state, metrics = program(state, None, batch)
        jax.block_until_ready((state, metrics))

    one_step()
    events = step_profile.trace(one_step, STEPS, folder)
    time: collections.Counter[str] = collections.Counter()
    for event in events:
        time[event.get("args", {}).get("hlo_op", event["name"])] += event["dur"] / 1000 / STEPS
    found = kernels.kernels(hlo.parse(program.as_text() or ""))
    seen = [Measured(kernel, time[kernel.instruction.name]) for kernel in found if time[kernel.instruction.name]]
    names = {kernel.instruction.name for kernel in found}
    spans = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("args", {}).get("hlo_op", event["name"]) in names
    ]
    whole = (max(end for _, end in spans) - min(start for start, _ in spans)) / 1000 / STEPS if spans else 0.0
    return seen, whole


def _rows(seen: list[Measured], card: Card | None, key: Any) -> list[Row]:
    groups: dict[tuple[str, ...], list[Measured]] = collections.defaultdict(list)
    for one in seen:
        groups[key(one.kernel)].append(one)
    rows = []
    for (name, *where), members in groups.items():
        bound = None if card is None else sum(roofline.milliseconds(one.kernel, card) for one in members)
        times = sum(one.kernel.times for one in members)
        rows.append(Row(name, times, sum(one.milliseconds for one in members), bound, *where))
    return sorted(rows, key=lambda row: -row.milliseconds)


def _sum(rows: list[Row]) -> float | None:
    bounds = [row.bound for row in rows if row.bound is not None]
    return sum(bounds) if bounds else None


def _line(name: str, row: Row) -> str:
    bound, share = ("-", "-") if row.bound is None else (f"{row.bound:.2f}", f"{row.bound / row.milliseconds:.0%}")
    return f"{name}{row.kernels:8}{row.milliseconds:10.2f}{bound:>10}{share:>8}"


if __name__ == "__main__":
    environment.restart_with_allocator()
    sys.exit(cli.run(run, sys.argv[1:]))
