"""llm.c's multiple-choice files: the bytes that its own writer gives, and no others are believed."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.errors import UserError
from jaxgpt.evaluation import task_files
from jaxgpt.evaluation.task_files import TokenExample

EXAMPLES = [
    TokenExample(
        np.array([32, 582, 318]), (np.array([3555]), np.array([262, 3996]), np.array([50256]), np.array([1])), 2
    ),
    TokenExample(np.array([7]), (np.array([8, 9, 10]), np.array([11])), 1),
]
STREAM = [
    *(65535, 36, 0, 2, 4, 3, 32, 582, 318, 1, 3555, 2, 262, 3996, 1, 50256, 1, 1),
    *(65535, 26, 1, 1, 2, 1, 7, 3, 8, 9, 10, 1, 11),
]
BYTES = struct.pack("<256i", 20240522, 1, 2, 36, *[0] * 252) + struct.pack(f"<{len(STREAM)}H", *STREAM)


def test_what_is_written_is_llmcs(tmp_path):
    task_files.write_llmc(tmp_path / "a.bin", EXAMPLES)
    assert (tmp_path / "a.bin").read_bytes() == BYTES
    assert list(tmp_path.iterdir()) == [tmp_path / "a.bin"]


def test_what_is_read_is_what_was_written(tmp_path):
    (tmp_path / "a.bin").write_bytes(BYTES)
    for found, example in zip(task_files.read_llmc(tmp_path / "a.bin"), EXAMPLES, strict=True):
        assert found.label == example.label
        for part, expected in zip(
            (found.context, *found.completions), (example.context, *example.completions), strict=True
        ):
            np.testing.assert_array_equal(part, expected)


def changed(place: int, value: int) -> bytes:
    """The file with another number: of the header where `place` is negative, else of the stream."""
    data = bytearray(BYTES)
    if place < 0:
        struct.pack_into("<i", data, 4 * (-place - 1), value)
    else:
        struct.pack_into("<H", data, 1024 + 2 * place, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes, and the header alone has 1024"),
        (BYTES[:1000], "1000 bytes, and the header alone has 1024"),
        (changed(-1, 20240520), "its header begins with 20240520, 1, and llm.c's multiple-choice files with 20240522"),
        (changed(-2, 3), "its header begins with 20240522, 3"),
        (changed(-3, -1), "the header says -1 examples of up to 36 bytes"),
        (changed(-3, 2**31 - 1), "the header says 2147483647 examples"),
        (changed(-4, 2**31 - 1), "of up to 2147483647 bytes, which don't fit in the 62 bytes after it"),
        (changed(-3, 3), "example 2 at byte 1086: the file ends there"),
        (changed(-3, 1), "26 bytes more than its 1 examples have"),
        (changed(-4, 34), "example 0 at byte 1026: it says that it has 36 bytes, and the longest has 34"),
        (BYTES[:-2], "example 1 at byte 1062: it says that it has 26 bytes"),
        (BYTES[:-1], "which don't fit in the 61 bytes after it"),
        (changed(18, 7), "example 1 at byte 1060: it begins with 7 and index 1, where 65535 and 1 are expected"),
        (changed(20, 5), "example 1 at byte 1060: it begins with 65535 and index 5"),
        (changed(3, 4), "example 0 at byte 1030: the right choice is number 4, counted from 0, of 4"),
        (changed(4, 0), "the right choice is number 2, counted from 0, of 0"),
        (changed(4, 65535), "0 tokens, of 0 that are left in it"),
        (changed(4, 3), "4 bytes more than its choices have"),
        (changed(5, 0), "example 0 at byte 1034: 0 tokens, of 12 that are left in it"),
        (changed(11, 60000), "example 0 at byte 1046: 60000 tokens, of 6 that are left in it"),
    ],
)
def test_a_damaged_file_is_refused_with_its_byte(tmp_path, data, message):
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(UserError) as error:
        task_files.read_llmc(tmp_path / "a.bin")
    assert message in str(error.value)


def test_no_file(tmp_path):
    for path in (tmp_path / "none.bin", tmp_path, Path("a\0b")):
        with pytest.raises(UserError):
            task_files.read_llmc(path)


@settings(max_examples=300)
@given(st.integers(0, len(BYTES)), st.lists(st.tuples(st.integers(0, len(BYTES) - 1), st.integers(0, 255)), max_size=4))
def test_only_user_errors(tmp_path_factory, length, changes):
    """The file may have any content; what is read from it lies within it."""
    data = bytearray(BYTES)
    for place, value in changes:
        data[place] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    path.write_bytes(data[:length] if length > 1024 else data)
    try:
        examples = task_files.read_llmc(path)
    except UserError:
        return
    tokens = sum(len(part) for example in examples for part in (example.context, *example.completions))
    assert tokens <= len(STREAM)


@pytest.mark.parametrize(
    "example",
    [
        TokenExample(np.array([], int), (np.array([1]),), 0),
        TokenExample(np.array([1]), (np.array([70000]),), 0),
        TokenExample(np.ones(33_000, int), (np.array([1]),), 0),
    ],
)
def test_what_has_no_room_is_not_written(tmp_path, example):
    with pytest.raises(UserError, match="example 1 can't be written"):
        task_files.write_llmc(tmp_path / "a.bin", [EXAMPLES[0], example])
    assert not list(tmp_path.iterdir())
