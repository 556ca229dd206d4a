"""Profile of a train step: a trace of it, and a table of time per layer, forward and backward.

The layers and the optimizer name what they do with `jax.named_scope` ("attention.forward"), and the compiled program
keeps those names beside its operations; the trace says how long each operation ran. A fused operation counts for the
scope of the last operation in it, and what belongs to no layer counts as "between layers".
"""

import collections
import dataclasses
import gzip
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt.data.loader import Batch
from jaxgpt.kernels.choose import choose_attention
from jaxgpt.options.config import Config, Parallel
from jaxgpt.terminal import say
from jaxgpt.training.state import init_state
from jaxgpt.training.step import make_train_step


class Share(NamedTuple):
    """Cost of one of the package's functions in one step."""

    where: str  # such as "attention.backward"
    milliseconds: float  # summed over threads or streams
    operations: float


def trace(step: Callable[[], Any], steps: int, folder: Path) -> list[dict[str, Any]]:
    """Runs `step` under the profiler, `steps` times; returns the events of the trace.

    `step` must wait for its result. XProf and Perfetto open the trace in `folder`.
    """
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        for _ in range(steps):
            step()
    newest = max(folder.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(newest) as file:
        events = json.load(file)
    return [event for event in events["traceEvents"] if event.get("ph") == "X"]


def shares(events: Iterable[dict[str, Any]], program: str, steps: int) -> list[Share]:
    """Returns the time of one step by function, the largest first.

    Args:
        events: The events of a trace.
        program: The compiled program's text.
        steps: Number of steps in the trace.
    """
    origins = operation_origins(program)
    time: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for event in events:
        operation = event.get("args", {}).get("hlo_op", event["name"])
        if operation in origins:
            time[origins[operation]] += event["dur"] / 1000 / steps
            count[origins[operation]] += 1
    return [Share(where, milliseconds, count[where] / steps) for where, milliseconds in time.most_common()]


def operation_origins(program: str) -> dict[str, str]:
    """Returns the innermost named scope of each operation in a compiled program's text, by the operation's name."""
    origins = {}
    for name, rest in re.findall(r"^ *(?:ROOT )?%?([\w.\-]+) = (.*)$", program, re.MULTILINE):
        # Loops, calls and the like take no time of their own: what is in them is counted itself.
        if not re.search(
            r"(?<![\w-])(parameter|tuple|get-tuple-element|while|conditional|call|bitcast|constant)\(", rest
        ):
            path = re.search(r'op_name="([^"]*)"', rest)
            scopes = re.findall(r"\b[a-z_]+\.[a-z_]+\b", path[1]) if path else []
            origins[name] = scopes[-1] if scopes else "between layers"
    return origins


def report(config: Config, batch: int, length: int, folder: Path, steps: int = 3) -> int:
    """Profiles a configuration's train step on random tokens, and prints the table.

    Args:
        config: The options. The step runs on one device.
        batch: Number of sequences (B).
        length: Tokens in a sequence (T).
        folder: Where to write the trace.
        steps: Number of steps to trace.
    """
    compute, attention = choose_attention(config.model, config.compute, length)
    config = dataclasses.replace(config, compute=compute, parallel=Parallel(devices=1))
    train_step = make_train_step(config)
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.model.vocabulary_size, (1, batch, length), dtype=np.int32)
    inputs = Batch(tokens, np.roll(tokens, -1, axis=-1))
    state = jax.jit(lambda: init_state(config))()
    compiled = train_step.lower(state, None, inputs).compile()

    def one_step() -> None:
        nonlocal state
        state, metrics = compiled(state, None, inputs)
        jax.block_until_ready(metrics)

    one_step()
    events = trace(one_step, steps, folder)
    table = shares(events, compiled.as_text(), steps)
    total = sum(share.milliseconds for share in table)
    say(f"{config.compute.dtype}, B={batch}, T={length}, on {jax.devices()[0].device_kind}: one step")
    say(f"attention {attention}\n")
    say(f"{'':<24} {'ms':>9} {'share':>6} {'operations':>11}")
    for share in table:
        say(
            f"{share.where:<24} {share.milliseconds:>9.2f} {share.milliseconds / total:>6.1%} {share.operations:>11.0f}"
        )
    say(f"\ntrace: {folder} (open it with XProf, or its perfetto_trace.json.gz at ui.perfetto.dev)")
    return 0
