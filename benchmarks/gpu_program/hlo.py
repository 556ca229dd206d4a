"""XLA's optimised programs, read from their text (`compiled.as_text()`).

A module is computations by name, and a computation is instructions in the order in which they are run. Fusions, loops
and calls name the computations that they run.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

HEADER = re.compile(r"(ENTRY )?%?([\w.$-]+) (?:\(.*)?\{$")
INSTRUCTION = re.compile(r" +(ROOT )?%?([\w.$-]+) = ")
SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)[^}]*\})?")
OPCODE = re.compile(r" ?([a-z][\w-]*)\(")
NAME = re.compile(r"%([\w.$-]+)")


class Shape(NamedTuple):
    dtype: str  # as XLA writes it: f32, bf16, s8
    dims: tuple[int, ...]
    layout: str = ""  # the axes, from the one that lies closest in memory on: "1,0"

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Returns the bytes of memory; a tuple, a token and the like have none."""
        bits = re.search(r"\d+", self.dtype)
        return self.size * (8 if self.dtype == "pred" else int(bits[0]) if bits else 0) // 8


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of its results
    operands: tuple[str, ...]
    arguments: str  # what stands between the parentheses, for a constant and a parameter
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    def called(self, attribute: str) -> str:
        """Returns the name of the computation that an attribute (calls, body, to_apply) names, or ""."""
        found = re.search(rf"\b{attribute}=%?([\w.$-]+)", self.attributes)
        return found[1] if found else ""

    def sizes(self, attribute: str) -> tuple[int, ...]:
        """Returns the numbers of an attribute such as lhs_contracting_dims={1,2}."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return _numbers(found[1]) if found else ()

    @property
    def target(self) -> str:
        """Returns the library function of a custom call, or ""."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def op_name(self) -> str:
        """Returns the path of functions and scopes that JAX gave it, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @cached_property
    def backend(self) -> dict[str, Any]:
        """Returns what the backend knows of it, such as a product's dimensions or a loop's number of turns."""
        _, found, text = self.attributes.partition("backend_config=")
        return json.JSONDecoder().raw_decode(text)[0] if found and text.startswith("{") else {}

    @property
    def turns(self) -> int:
        """Returns how many turns a loop has; 1 where the compiler doesn't know."""
        return int(self.backend.get("known_trip_count", {}).get("n", 1))


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self if instruction.is_root)

    def roots(self) -> list[Instruction]:
        """Returns what computes each of the results."""
        root = self.root
        return [self.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]

    @cached_property
    def parameters(self) -> list[Instruction]:
        found = [instruction for instruction in self if instruction.opcode == "parameter"]
        return sorted(found, key=lambda instruction: int(instruction.arguments))

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Returns what reads each instruction's result, by its name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users


class Frame(NamedTuple):
    """A line on the stack when JAX traced an instruction."""

    file: str
    line: int
    caller: int  # the number of the frame that called it, 0 for none


@dataclass
class Module:
    computations: dict[str, Computation]
    entry: str
    frames: dict[int, Frame]

    def sources(self, instruction: Instruction) -> list[tuple[str, int]]:
        """Returns the files and lines that an instruction is from, the innermost first, where the program says so."""
        found = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes)
        places = [(found[1], int(found[2]))] if found else []
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        frame = self.frames.get(int(found[1])) if found else None
        while frame:
            places.append((frame.file, frame.line))
            frame = self.frames.get(frame.caller)
        return places


def parse(text: str) -> Module:
    """Reads the text of an optimised module."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    lines = text.splitlines()
    for line in lines:
        if line.startswith(" ") and current is not None:
            if instruction := _instruction(line):
                current.instructions[instruction.name] = instruction
        elif line.endswith("{") and (header := HEADER.match(line)):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
    return Module(computations, entry, _stack_frames(lines))


def _instruction(line: str) -> Instruction | None:
    start = INSTRUCTION.match(line)
    if not start:
        return None
    after = _closed(line, start.end()) if line[start.end()] == "(" else line.index(" ", start.end())
    opcode = OPCODE.match(line, after)
    if not opcode:
        return None
    end = _closed(line, opcode.end() - 1)
    arguments = line[opcode.end() : end - 1]
    shapes = tuple(
        Shape(dtype, _numbers(dims), layout) for dtype, dims, layout in SHAPE.findall(line[start.end() : after])
    )
    operands = tuple(NAME.findall(arguments)) if opcode[1] not in ("constant", "parameter") else ()
    return Instruction(start[2], opcode[1], shapes, operands, arguments, line[end:], bool(start[1]))


def _closed(line: str, start: int) -> int:
    """Returns the place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", line[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    raise ValueError(f"a parenthesis isn't closed: {line[:200]}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _stack_frames(lines: list[str]) -> dict[int, Frame]:
    """Reads the tables at the head of a module: files, places in them, and the stack frames that name the places."""
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] = {}
    for line in lines:
        if line.startswith(("%", "ENTRY")):
            break
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif found := re.match(r"(\d+) (.*)", line):
            table[int(found[1])] = found[2]

    def number(text: str, key: str) -> int:
        found = re.search(rf"\b{key}=(\d+)", text)
        return int(found[1]) if found else 0

    files = {key: name.strip('"') for key, name in tables.get("FileNames", {}).items()}
    frames = {}
    for key, text in tables.get("StackFrames", {}).items():
        place = tables.get("FileLocations", {}).get(number(text, "file_location_id"), "")
        # XLA counts callers from 1, so that 0 and 1 are none, and prints frames from 1 as well.
        caller = number(text, "parent_frame_id") - 1
        frames[key] = Frame(
            files.get(number(place, "file_name_id"), ""), number(place, "line"), caller if caller < key else 0
        )
    return frames
