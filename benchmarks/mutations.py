"""Makes hostile files of valid ones, as a function of a random generator."""

import bz2
import functools
import gzip
import lzma
import os
import random
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.fuzz_readers import Input
from jaxgpt.data import unpacking

NUMBERS = [0, 1, -1, 2, 3, 5, 7, 127, 128, 255, 65535, 65536, 2**31 - 1, -(2**31), 2**30, 1024, 50257]
HUGE = [*NUMBERS, 2**32, 2**63 - 1, 2**64 - 1, 10**30, -(2**63)]
WORDS = [
    *("../../../../etc/passwd", "/etc/passwd", "/dev/zero", "..", ".", "", "a/b.safetensors", "x" * 5000, "a\\u0000b"),
    *("\\ud800", "model.safetensors", "con.safetensors", "~", "%2e%2e/x", "é" * 50, "h.0.ln_1.weight", "h.99.x", "F64"),
]
VALUES = ["null", "true", "{}", "[]", '""', "1e999", "NaN", "-0", "[[[[]]]]", '{"a":{"a":1}}', "1.5", "9" * 5000]
SPECIAL = ("missing", "folder", "pipe", "link to a device", "link out", "link to itself")

zstd = unpacking.extra("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
PACKING: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "gz": (gzip.decompress, functools.partial(gzip.compress, mtime=0)),
    "bz2": (bz2.decompress, bz2.compress),
    "xz": (lzma.decompress, functools.partial(lzma.compress, preset=0)),
    "zst": (zstd.decompress, zstd.compress),
}

Mutated = dict[str, bytes | str]  # a string: one of SPECIAL


def mutate(seed: Input, choose: random.Random) -> Mutated:
    """Makes one to three changes to one or two files."""
    result: Mutated = dict(seed)
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        name = choose.choice(sorted(result))
        content = result[name]
        if isinstance(content, str):
            continue
        result[name] = choose.choice(SPECIAL) if choose.random() < 0.02 else _changed(name, content, choose)
    return result


def _changed(name: str, content: bytes, choose: random.Random) -> bytes:
    """Returns other content for a file, hostile to the format of its name."""
    kind = name.rpartition(".")[2]
    if kind in PACKING and choose.random() < 0.6:
        unpack, pack = PACKING[kind]
        try:
            inside = unpack(content)
        except Exception:  # damaged by the change before
            inside = b""
        return pack(_changed(name.rpartition(".")[0], inside, choose))
    ways = [_bytes, _header]
    if kind == "toml":
        ways = [_bytes, _text, _toml, _toml]
    elif kind in ("json", "jsonl", "yaml", "csv") or name.endswith("metadata"):
        ways = [_bytes, _text, _text, _text]
    elif kind == "safetensors":
        ways = [_bytes, _header, _safetensors, _safetensors]
    elif kind == "parquet":
        ways = [_bytes, _footer, _footer]
    elif kind == "txt" or name.endswith("SHA256SUMS"):
        ways = [_bytes, _words, _words]
    if kind in ("txt", "jsonl") and choose.random() < 0.01:
        ways = [_long]
    return choose.choice(ways)(content, choose)


def _bytes(content: bytes, choose: random.Random) -> bytes:
    """Makes changes that are independent of the format."""
    data = bytearray(content)
    place = choose.randrange(len(data) + 1)
    end = min(len(data), place + choose.choice((1, 2, 4, 8, 100, 1000)))
    match choose.randrange(7):
        case 0:
            del data[place:]
        case 1:
            for _ in range(choose.choice((1, 1, 2, 8)) if data else 0):
                data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        case 2:
            del data[place:end]
        case 3:
            data[place:place] = data[place:end]
        case 4:
            data[place:place] = choose.randbytes(choose.choice((1, 4, 64, 2000)))
        case 5:
            data += choose.randbytes(choose.choice((1, 4, 1024)))
        case 6:
            data = bytearray(choose.randbytes(choose.choice((0, 1, 7, 8, 1023, 1024, 1025))))
    return bytes(data)


def _header(content: bytes, choose: random.Random) -> bytes:
    """Puts another number into one of the first places of a binary header."""
    data = bytearray(content)
    if choose.random() < 0.2:
        data[:8] = struct.pack("<Q", choose.choice(HUGE) % 2**64)
    else:
        place = 4 * choose.randrange(10)
        data[place : place + 4] = struct.pack("<i", choose.choice((*NUMBERS, choose.randrange(-10, 300))))
    return bytes(data)


def _text(content: bytes, choose: random.Random) -> bytes:
    """Puts another number, word or value into a JSON text, or endless brackets."""
    text = content.decode("utf-8", "replace")
    kind = choose.randrange(8)
    if kind == 0:
        return (choose.choice("[{") * choose.choice((10, 5000, 100000))).encode()
    if kind == 1 and text:
        place = choose.randrange(len(text))
        return (text[:place] + choose.choice('{}[],:"\\0e- ') + text[place + choose.randrange(2) :]).encode()
    pattern, values = [
        (r"-?\d+", [*map(str, HUGE), *VALUES]),
        (r"-?\d+", [str(choose.randrange(-3, 300))]),
        (r'"[^"]*"', [f'"{word}"' for word in WORDS]),
        (r'"[^"]*"', VALUES),
        (r"\[[^\[\]]*\]|true|false|null|\{[^{}]*\}", VALUES),
        (r'"[^"]*"', re.findall(r'"[^"]*"', text)[:50] or ['""']),
    ][kind - 2 if kind >= 2 else 0]
    found = list(re.finditer(pattern, text))
    if not found:
        return content
    where = choose.choice(found)
    return (text[: where.start()] + choose.choice(values) + text[where.end() :]).encode("utf-8", "surrogatepass")


def _toml(content: bytes, choose: random.Random) -> bytes:
    """Adds a line of unusual TOML syntax, or endlessly nested tables."""
    many = choose.choice((10, 100, 3000, 50_000))
    lines = [
        "[" + "a." * many + "a]",
        "a." * many + "a = 1",
        "a = " + "[" * many,
        "a = " + "{a=" * many,
        "[[model]]",
        "[model.layers]",
        "a = " + choose.choice(["9" * many, "0x" + "f" * many, "1e999", "nan", "-inf", "1979-05-27", "07:32:00", "_"]),
        f'"{choose.choice(WORDS)}" = 1',
        f'[data]\ntext = """{choose.choice(WORDS)}""" \n',
        "\ufeff" if choose.random() < 0.5 else "\x1b[31m = 1",
    ]
    place = choose.choice([0, len(content), content.find(b"\n") + 1])
    return content[:place] + choose.choice(lines).encode() + b"\n" + content[place:]


def _footer(content: bytes, choose: random.Random) -> bytes:
    """Changes bits and bytes near the end, where Parquet has its description."""
    start = max(0, len(content) - choose.choice((8, 100, 1000)))
    return content[:start] + _bytes(content[start:], choose)


def _words(content: bytes, choose: random.Random) -> bytes:
    """Puts another word, or other line ends, spaces and control characters, into a plain text."""
    ends = [b"\n", b"\r\n", b"\r", b"\f", b"", b" ", b"\xc2\x85", b"\xe2\x80\xa8", b"\0", b"\n\n\n"]
    pieces = [*map(str.encode, WORDS), b"\xef\xbb\xbf", b"\x1b[2J", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f"]
    if choose.random() < 0.5:
        return content.replace(choose.choice((b"\n", b"\r\n", b" ", b"be")), choose.choice(ends))
    where = choose.choice(list(re.finditer(rb"\S+|$", content)))
    return content[: where.start()] + choose.choice(pieces) + content[where.end() :]


def _long(content: bytes, choose: random.Random) -> bytes:
    """Repeats a character, or a piece of the text, many times."""
    pieces = (b"a", b" ", b"\n", b"\r\n", b"[", b'{"text": "', "是".encode(), content[:40] or b"x")
    piece = choose.choice(pieces)
    return content + piece * (choose.choice((1 << 12, 1 << 14, 1 << 16)) // len(piece))


def _safetensors(content: bytes, choose: random.Random) -> bytes:
    """Changes the JSON at the beginning, whose length is then stated rightly, or nearly."""
    if len(content) < 8:
        return content
    length = struct.unpack("<Q", content[:8])[0]
    header = _text(content[8 : 8 + length], choose)
    told = len(header) + choose.choice((0, 0, 0, 0, 0, 1, -1))
    return struct.pack("<Q", max(told, 0)) + header + content[8 + length :]


def lay_out(mutated: Mutated, folder: Path) -> int:
    """Writes an input's files into an empty folder; returns their bytes."""
    for name, content in mutated.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
            continue
        match content:
            case "folder":
                path.mkdir()
            case "pipe":
                os.mkfifo(path)
            case "link to a device":
                path.symlink_to("/dev/zero")
            case "link out":
                path.symlink_to("/etc/passwd")
            case "link to itself":
                path.symlink_to(path.name)
    return sum(len(content) for content in mutated.values() if isinstance(content, bytes))
