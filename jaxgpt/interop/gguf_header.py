"""The header of a GGUF file, llama.cpp's format: its metadata, and where its tensors lie.

    "GGUF", version uint32, numbers of tensors and of keys uint64
    for each key     name, type uint32, value; an array has its elements' type, their number, and the elements
    for each tensor  name, number of axes uint32, their sizes uint64 (the innermost first), type uint32, offset uint64
    the tensors      from the next multiple of the alignment on; their offsets count from there

Strings are a uint64 length and UTF-8. All is little-endian. The package `gguf` maps a file and believes its numbers, so
that a damaged file makes it allocate or loop without end. Here each number is checked against the file's size first.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import files
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_HEADER = 1 << 26  # bytes; with the 262,144 tokens of the largest vocabularies there are some 10 million
LONGEST_NAME = 1 << 10  # bytes
MOST_AXES = 4
ALIGNMENT = "general.alignment"
BOOL, STRING, ARRAY = 7, 8, 9
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip


class Type(NamedTuple):
    """A type of tensors: so many numbers lie in a block of so many bytes."""

    name: str
    numbers: int
    bytes: int


TYPES = {
    0: Type("F32", 1, 4), 1: Type("F16", 1, 2), 30: Type("BF16", 1, 2), 8: Type("Q8_0", 32, 34),
    2: Type("Q4_0", 32, 18), 3: Type("Q4_1", 32, 20), 12: Type("Q4_K", 256, 144), 14: Type("Q6_K", 256, 210),
}  # fmt: skip
OTHERS = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class Tensor(NamedTuple):
    type: Type
    code: int  # of the type, as ggml and the package gguf number them
    shape: tuple[int, ...]  # the outermost axis first, as NumPy has it
    place: int  # bytes from the file's beginning

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) // self.type.numbers * self.type.bytes


class Header(NamedTuple):
    values: dict[str, Any]  # numbers, bytes (of strings), and lists or arrays of them, by key
    tensors: dict[str, Tensor]


class _Reader:
    """Takes numbers and strings off the file's beginning. UserError where it ends before."""

    def __init__(self, path: Path, data: bytes, size: int):
        self.path, self.place, self._data, self._size = path, 0, data, size

    def error(self, problem: str) -> UserError:
        return UserError(f"{shown(self.path)}: {problem}. Get the file again from where it came")

    def take(self, count: int, what: str) -> bytes:
        if count > len(self._data) - self.place:
            if len(self._data) < self._size and count <= self._size - self.place:
                raise self.error(f"its header has more than {LARGEST_HEADER:,} bytes")
            raise self.error(
                f"{what} at byte {self.place:,} has {count:,} bytes, and {len(self._data) - self.place:,} follow"
            )
        self.place += count
        return self._data[self.place - count : self.place]

    def number(self, form: str, what: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str) -> bytes:
        return self.take(self.number("<Q", what), what)

    def name(self, what: str) -> str:
        length = self.number("<Q", what)
        if not 1 <= length <= LONGEST_NAME:
            raise self.error(f"{what} at byte {self.place - 8:,} has {length:,} bytes, and may have {LONGEST_NAME:,}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} at byte {self.place - length:,} is not UTF-8") from None

    def value(self, key: str) -> Any:
        code = self.number("<I", f"the type of {key}")
        if code == STRING:
            return self.string(key)
        if code == ARRAY:
            return self._array(key)
        return self._scalars(code, 1, key)[0].item()

    def _array(self, key: str) -> Any:
        code, count = self.number("<I", f"the type of {key}"), self.number("<Q", f"the length of {key}")
        if code == STRING:
            if 8 * count > len(self._data) - self.place:
                raise self.error(f"{shown(key)} has {count:,} strings, and too few bytes follow")
            return self._strings(count, key)
        return self._scalars(code, count, key)

    def _strings(self, count: int, key: str) -> list[bytes]:
        """Returns so many strings: `string` in a loop, written out, since a vocabulary has some 400,000 of them."""
        data, end, length_at = self._data, len(self._data), struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            start = self.place + 8
            if start > end or (stop := start + length_at(data, self.place)[0]) > end:
                return [self.string(key)]  # which raises
            found.append(data[start:stop])
            self.place = stop
        return found

    def _scalars(self, code: int, count: int, key: str) -> np.ndarray:
        if code not in SCALARS:
            raise self.error(f"{shown(key)} is of type {code}, and there is no such type of a value")
        dtype = np.dtype(SCALARS[code])
        found = np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        return found != 0 if code == BOOL else found  # a byte of a file may be neither 0 nor 1


def read(path: Path) -> Header:
    """Returns a file's header. UserError where it isn't GGUF, or says what can't be true of a file of its size."""
    files.refuse_pointer(path)
    size = files.size(path)
    with files.open_file(path) as file:
        reader = _Reader(path, file.read(min(size, LARGEST_HEADER)), size)
    if reader.take(4, "the magic number") != MAGIC:
        raise reader.error("not a GGUF file: it doesn't begin with GGUF")
    version = reader.number("<I", "the version")
    if version not in VERSIONS:
        order = "; it is of big-endian numbers" if version and not version & 0xFFFF else ""
        raise UserError(f"{shown(path)}: GGUF of version {version}{order}; version 2 or 3 can be read")
    tensor_count, key_count = reader.number("<Q", "the number of tensors"), reader.number("<Q", "the number of keys")
    values: dict[str, Any] = {}
    for _ in range(key_count):  # each takes some bytes, so that a large number ends at the end of the file
        key = reader.name("a key")
        if key in values:
            raise reader.error(f"the key {quoted(key)} is there twice")
        values[key] = reader.value(key)
    found: dict[str, Tensor] = {}
    for _ in range(tensor_count):
        name = reader.name("the name of a tensor")
        if name in found:
            raise reader.error(f"the tensor {quoted(name)} is there twice")
        found[name] = _tensor(reader, name)
    return Header(values, _placed(reader, found, values.get(ALIGNMENT, 32), size))


def _tensor(reader: _Reader, name: str) -> Tensor:
    axes = reader.number("<I", f"the axes of {name}")
    if not 1 <= axes <= MOST_AXES:
        raise reader.error(f"the tensor {quoted(name)} has {axes:,} axes, where 1 to {MOST_AXES} are expected")
    shape = tuple(reader.number("<Q", f"the shape of {name}") for _ in range(axes))[::-1]
    code, offset = reader.number("<I", f"the type of {name}"), reader.number("<Q", f"the offset of {name}")
    if code not in TYPES:
        known = ", ".join(kind.name for kind in TYPES.values())
        raise UserError(
            f"{shown(reader.path)}: the tensor {quoted(name)} is of type {OTHERS.get(code, code)}; {known} can be read"
        )
    if 0 in shape or shape[-1] % TYPES[code].numbers:
        raise reader.error(
            f"the tensor {quoted(name)} is {list(shape)}, which {TYPES[code].name} with its blocks of "
            f"{TYPES[code].numbers} can't be"
        )
    return Tensor(TYPES[code], code, shape, offset)


def _placed(reader: _Reader, found: dict[str, Tensor], alignment: Any, size: int) -> dict[str, Tensor]:
    """Returns the tensors with their places in the file, which don't overlap in all and end before its end."""
    if not (type(alignment) is int and 1 <= alignment <= 1 << 20 and not alignment & (alignment - 1)):
        raise reader.error(f"{ALIGNMENT} is {shown(alignment)}, and must be a power of two")
    start = -(-reader.place // alignment) * alignment
    room = max(0, size - start)
    for name, tensor in found.items():
        if tensor.place % alignment or tensor.place + tensor.bytes > room:
            raise reader.error(
                f"the tensor {quoted(name)} of {tensor.bytes:,} bytes begins at byte {tensor.place:,} of {room:,}: it "
                "is cut off or damaged"
            )
    if sum(tensor.bytes for tensor in found.values()) > room:
        raise reader.error("its tensors have more bytes than the file")
    return {name: tensor._replace(place=start + tensor.place) for name, tensor in found.items()}
