"""Where a step's time goes: a trace of it, and a table of time per layer, forward and backward.

The compiled program says of each of its operations which source lines it came from; the trace says how long each
operation ran. The innermost line in one of the package's files names the layer and, by its function, the direction.
Operations that the compiler has fused are counted where the fusion's last operation came from.
"""

import collections
import gzip
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

PACKAGE = "jaxgpt/"


class Share(NamedTuple):
    """What a function of the package costs in one step."""

    where: str  # such as "attention.backward"
    milliseconds: float  # summed over threads or streams
    operations: float


def trace(step: Callable[[], Any], steps: int, folder: Path) -> list[dict[str, Any]]:
    """Runs `step` (which waits for its result) under the profiler; returns the events of the trace.

    The trace in `folder` is one that XProf and Perfetto open.
    """
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        for _ in range(steps):
            step()
    newest = max(folder.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(newest) as file:
        events = json.load(file)
    return [event for event in events["traceEvents"] if event.get("ph") == "X"]


def shares(events: Iterable[dict[str, Any]], program: str, steps: int) -> list[Share]:
    """Time by function, the largest first. `program` is the compiled program's text."""
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
    """From the name of each operation in the text of a compiled program to "file.function" of the package."""
    files = dict(re.findall(r'^(\d+) "(.*)"$', _section(program, "FileNames"), re.M))
    functions = dict(re.findall(r'^(\d+) "(.*)"$', _section(program, "FunctionNames"), re.M))
    locations = {
        number: (files[file], functions[function])
        for number, file, function in re.findall(
            r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+)", _section(program, "FileLocations"), re.M
        )
    }
    frames = {
        number: (location, parent)
        for number, location, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", _section(program, "StackFrames"), re.M
        )
    }

    def origin(frame: str) -> str:
        while frame in frames:
            location, parent = frames[frame]
            file, function = locations[location]
            if PACKAGE in file and not file.endswith("numerics.py"):
                return f"{Path(file).stem}.{function.removesuffix('.<lambda>').split('.')[0]}"
            if parent == frame:
                break
            frame = parent
        return "elsewhere"

    origins = {}
    for name, rest in re.findall(r"^ *(?:ROOT )?%?([\w.\-]+) = (.*)$", program, re.M):
        # Parameters, tuples and loops take no time of their own: what is in a loop is counted itself.
        if not re.search(r"\b(parameter|tuple|get-tuple-element|while|bitcast|constant)\(", rest):
            frame = re.search(r"stack_frame_id=(\d+)", rest)
            origins[name] = origin(frame[1]) if frame else "elsewhere"
    return origins


def _section(program: str, name: str) -> str:
    found = re.search(rf"^{name}\n(.*?)\n\n", program, re.M | re.S)
    return found[1] if found else ""
