"""Reads and writes llm.c's tokenizer files, with which its programs decode.

256 int32    magic 20240328, version, V, id of end-of-text (version 2; with version 1 it is 50256), zeros
tokens       for each token a byte with its length, and its bytes
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxgpt import files
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import shown
from jaxgpt.interop import llmc

MAGIC = 20240328
END_OF_TEXT = 50256  # its id in version 1
LONGEST = 255  # bytes of a token


class Tokens(NamedTuple):
    tokens: tuple[bytes, ...]  # by id
    end_of_text: int


def read(path: Path) -> Tokens:
    """Reads a tokenizer file. UserError where it is none, or its size isn't what its contents say."""
    header = llmc.read_header(path, MAGIC, (1, 2), "an llm.c tokenizer file")
    version, V = header.numbers[1], llmc.positive(path, header.numbers[2], 2, "the vocabulary")
    end_of_text = END_OF_TEXT if version == 1 else header.numbers[3]
    if not 0 <= end_of_text < V:
        raise UserError(f"{shown(path)}: end-of-text is {end_of_text} (at byte 12), and the vocabulary has {V} tokens")
    if header.file_bytes < llmc.HEADER_BYTES + 2 * V:  # before anything is read: a length and a byte each
        llmc.check_size(path, header.file_bytes, llmc.HEADER_BYTES + 2 * V, f"{V} tokens, at least,")
    if header.file_bytes > llmc.HEADER_BYTES + 256 * V:
        llmc.check_size(path, header.file_bytes, llmc.HEADER_BYTES + 256 * V, f"{V} tokens, at most,")
    data = files.read_bytes(path, header.file_bytes)
    tokens, place = [], llmc.HEADER_BYTES
    for number in range(V):
        end = place + 1 + (data[place] if place < len(data) else 0)
        if not place + 1 < end <= len(data):
            problem = "is cut off" if end > len(data) or place >= len(data) else "has no bytes"
            raise UserError(f"{shown(path)}: token {number} of {V}, at byte {place}, {problem}")
        tokens.append(data[place + 1 : end])
        place = end
    llmc.check_size(path, len(data), place, f"these {V} tokens")
    return Tokens(tuple(tokens), end_of_text)


def write(path: Path, tokens: Sequence[bytes], end_of_text: int | None, version: int = 2) -> None:
    """Writes a tokenizer file. UserError for a vocabulary that the format can't hold."""
    if end_of_text is None:
        raise UserError("an llm.c tokenizer file names an end-of-text token, and this tokenizer has none")
    if version == 1 and end_of_text != END_OF_TEXT:
        raise UserError(f"version 1 of llm.c's tokenizer files has end-of-text at {END_OF_TEXT}, not at {end_of_text}")
    for number, token in enumerate(tokens):
        if not 1 <= len(token) <= LONGEST:
            raise UserError(
                f"token {number} has {len(token)} bytes, and an llm.c tokenizer file can hold tokens of 1 to {LONGEST}"
            )
    with path.open("wb") as file:
        file.write(llmc.write_header([MAGIC, version, len(tokens), *[end_of_text] * (version == 2)]))
        for token in tokens:
            file.write(bytes([len(token)]) + token)
