"""llm.c's token files: their bytes, and every way in which a file can be false."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data import token_files
from jaxgpt.errors import UserError

FORMATS = [(token_files.GPT2, 20240520, 1, "H"), (token_files.LLAMA3, 20240801, 7, "I")]


@pytest.mark.parametrize(("form", "magic", "version", "letter"), FORMATS)
def test_the_bytes_are_llm_cs(tmp_path, form, magic, version, letter):
    tokens = [50256, 0, 1, 65535]
    token_files.write(tmp_path / "x.bin", np.array(tokens), form)
    expected = struct.pack("<256i", magic, version, 4, *[0] * 253) + struct.pack(f"<4{letter}", *tokens)
    assert (tmp_path / "x.bin").read_bytes() == expected
    read = token_files.tokens_of(tmp_path / "x.bin")
    assert read.tolist() == tokens
    assert read.dtype == form.dtype
    assert not read.flags.writeable


def test_the_format_is_the_narrowest_that_holds_the_vocabulary():
    assert token_files.format_for(50257) == token_files.format_for(65536) == token_files.GPT2
    assert token_files.format_for(65537) == token_files.format_for(128256) == token_files.LLAMA3


@pytest.mark.parametrize("count", [2**31 + 5, 2**32 + 7])
def test_counts_beyond_32_bits(tmp_path, count):
    """A sparse file, whose zeros take no room: its header can hold the count's low 32 bits only."""
    path = tmp_path / "long.bin"
    path.write_bytes(token_files.header(token_files.GPT2, count))
    os.truncate(path, 1024 + 2 * count)
    with path.open("r+b") as file:
        file.seek(1024 + 2 * (count - 1))
        file.write(struct.pack("<H", 4711))
    tokens = token_files.tokens_of(path)
    assert len(tokens) == count
    assert tokens[-1] == 4711
    del tokens
    os.truncate(path, 1024 + 2 * (count - 1))
    with pytest.raises(UserError, match="damaged"):
        token_files.tokens_of(path)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="70000"):
        token_files.write(tmp_path / "x.bin", np.array([1, 70000]), token_files.GPT2)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_replaced_is_whole_at_every_moment(tmp_path):
    path = tmp_path / "x.bin"
    token_files.write(path, np.arange(3), token_files.GPT2)
    writer = token_files.Writer(path, token_files.GPT2)
    writer.write(np.arange(5))
    assert token_files.tokens_of(path).tolist() == [0, 1, 2]
    writer.close()
    assert token_files.tokens_of(path).tolist() == [0, 1, 2, 3, 4]


good = st.sampled_from([token_files.header(form, 3) + np.arange(3, dtype=form.dtype).tobytes() for form, *_ in FORMATS])
word = st.integers(-(2**31), 2**31 - 1).map(lambda number: struct.pack("<i", number))


@st.composite
def damaged(draw):
    """A token file with words of its header replaced, its end cut off, or something added."""
    data = bytearray(draw(good))
    for place in draw(st.lists(st.integers(0, 4), max_size=3)):
        data[4 * place : 4 * place + 4] = draw(word)
    data = data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data
    return bytes(data + draw(st.binary(max_size=9)))


@settings(max_examples=300)
@given(data=st.one_of(damaged(), st.binary(max_size=1100)))
def test_only_files_that_agree_with_their_header_are_read(tmp_path, data):
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    try:
        tokens = token_files.tokens_of(path)
    except UserError:
        return
    magic, version, count = struct.unpack("<3i", data[:12])
    assert (magic, version) in [(form.magic, form.version) for form in token_files.FORMATS.values()]
    assert tokens.tobytes() == data[1024:]
    assert len(tokens) == count > 0


@pytest.mark.parametrize("name", ["absent.bin", ".", "a\0b"])
def test_what_can_not_be_read_is_said(tmp_path, name):
    with pytest.raises(UserError, match=r"can't be read|a folder, where a file"):
        token_files.tokens_of(tmp_path / name)
