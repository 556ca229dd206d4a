"""The bytes that a compiled program sends between devices, read from its text."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "collective-permute", "all-to-all", "collective-broadcast")
BYTES = {"pred": 1, "bf16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}


class Collective(NamedTuple):
    kind: str
    bytes: int  # of the whole tensors: what is reduced by each device, or what each has when it is gathered; single
    # numbers, such as the loss, don't count
    times: int  # that it runs in one run of the program


def collectives(program: str) -> list[Collective]:
    """Each collective of the program's text, those in loops with the number of turns."""
    computations, entry, name = {}, "", ""
    for line in program.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if header:
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif line.startswith("  "):
            computations[name].append(line)
    return list(_walk(computations, entry, 1))


def _walk(computations, name, times):
    for line in computations[name]:
        operation = re.search(r" = (.*?) ([a-z\-]+)\(", line)
        if not operation:
            continue
        result, kind = operation.groups()
        if kind.removesuffix("-start") in KINDS:
            size = _bytes(result)
            if kind == "reduce-scatter":
                size *= group_size(line)
            yield Collective(kind, size, times)
        turns = int(re.findall(r'"known_trip_count":\{"n":"(\d+)"', line)[0]) if kind == "while" else 1
        for called in re.findall(
            r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line
        ):
            yield from _walk(computations, called, times * turns)


def group_size(operation: str) -> int:
    """Returns how many devices take part together, in each of the ways in which XLA writes `replica_groups`.

    They are the devices themselves, {{0,1},{2,3}}; a number of groups and their size, [2,2]<=[4]; or, as
    JAX 0.12 has it, names of a mesh's axes, mesh['a'=2,'b'=2] {'b'}.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", operation):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", operation):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", operation):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", named[2]))
    raise ValueError(f"groups of an unknown form: {operation}")


def _bytes(shapes: str) -> int:
    """Returns the bytes of a result, or of a tuple of them."""
    found = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)
    return sum(BYTES[dtype] * math.prod(int(size) for size in sizes.split(",")) for dtype, sizes in found if sizes)
