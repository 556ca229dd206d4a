"""llm.c's files, beside bytes that are laid out here by hand."""

import struct

import numpy as np
import pytest

from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.interop import gpt2_tables, llmc
from jaxgpt.interop.detect_format import open_weights, with_tokenizer
from jaxgpt.options.config import Model
from tests.interop.weights import MODEL, assert_same_bits, random_params

ROWS = 256  # Vp of 150 tokens


def header(*numbers: int) -> bytes:
    return struct.pack("<256i", *numbers, *[0] * (256 - len(numbers)))


def by_hand(params, rows: int = ROWS) -> list[np.ndarray]:
    """llm.c's 16 tensors in its order, as its README and train_gpt2.py's exporter have it."""
    b = params.blocks
    wte = np.zeros((rows, MODEL.width), params.embedding.token.dtype)
    wte[:150] = params.embedding.token[:150]
    return [
        *(wte, params.embedding.position),
        *(b.attention_norm.scale, b.attention_norm.bias),
        *(np.transpose(b.qkv.weight, (0, 2, 1)), b.qkv.bias),
        *(np.transpose(b.attention_out.weight, (0, 2, 1)), b.attention_out.bias),
        *(b.mlp_norm.scale, b.mlp_norm.bias),
        *(np.transpose(b.mlp_in.weight, (0, 2, 1)), b.mlp_in.bias),
        *(np.transpose(b.mlp_out.weight, (0, 2, 1)), b.mlp_out.bias),
        *(params.final_norm.scale, params.final_norm.bias),
    ]


def model_bytes(params, version: int, rows: int = ROWS) -> bytes:
    shapes = header(20240326, version, 12, 150, 2, 2, 16, rows)
    return shapes + b"".join(array.tobytes() for array in by_hand(params, rows))


@pytest.fixture
def state():
    generator = np.random.default_rng(3)
    tokens, targets = generator.integers(150, size=(2, 3, 7), dtype=np.int32)
    logits = generator.normal(size=(3, 7, 150)).astype(np.float32)
    return llmc.State(tokens, targets, logits, 4.25, random_params(seed=5))


# Models


@pytest.mark.parametrize(("version", "dtype"), [(3, "float32"), (5, "bfloat16")])
def test_a_model_file_is_the_bytes_laid_out_by_hand_and_back(tmp_path, version, dtype):
    params = random_params(dtype=dtype)
    llmc.write_model(tmp_path / "m.bin", params, MODEL, dtype)
    assert (tmp_path / "m.bin").read_bytes() == model_bytes(params, version)
    source = llmc.open_model(tmp_path / "m.bin")
    assert (source.model, source.dtype) == (MODEL, dtype)
    assert_same_bits(source.load(), params)


@pytest.mark.parametrize("rows", [150, 300])
def test_other_paddings_of_the_vocabulary_are_read(tmp_path, rows):
    params = random_params()
    (tmp_path / "m.bin").write_bytes(model_bytes(params, 3, rows))
    assert_same_bits(llmc.open_model(tmp_path / "m.bin").load(), params)


def test_bfloat16_is_rounded_to_the_nearest(tmp_path):
    llmc.write_model(tmp_path / "m.bin", random_params(), MODEL, "bfloat16")
    assert_same_bits(llmc.open_model(tmp_path / "m.bin").load(), random_params(dtype="bfloat16"))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 20240520, "not an llm.c model file: it begins with 20240520, and 20240326 is expected at byte 0"),
        (1, 4, "an llm.c model file of version 4 (at byte 4); version 3 or 5 can be read"),
        (2, 0, "the context is 0 (at byte 8), and must be from 1 to 2147483647"),
        (3, -5, "the vocabulary is -5 (at byte 12)"),
        (4, 2**31 - 1, "the file is cut off or damaged"),
        (4, 1, "has bytes that its header doesn't speak of"),
        (5, 3, "the width is 16 (at byte 24), and 3 heads don't divide it"),
        (6, 2**31 - 2, "the file is cut off or damaged"),
        (7, 149, "Vp is 149 (at byte 28), less than the vocabulary of 150"),
    ],
)
def test_a_header_that_lies(tmp_path, place, value, message):
    content = bytearray(model_bytes(random_params(), 3))
    content[4 * place : 4 * place + 4] = struct.pack("<i", value)
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(UserError) as error:
        llmc.open_model(tmp_path / "m.bin")
    assert message in str(error.value)
    assert str(tmp_path / "m.bin") in str(error.value)


def test_too_short_for_a_header(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"\0" * 1023)
    with pytest.raises(UserError, match=r"1023 bytes, and an llm.c model file begins with a header of 1024"):
        llmc.open_model(tmp_path / "m.bin")


# Debug states


def test_a_state_is_the_bytes_laid_out_by_hand_and_back(tmp_path, state):
    path = tmp_path / "s.bin"
    llmc.write_state(path, state)
    parts = [state.tokens, state.targets, state.logits, np.float32(4.25), *by_hand(state.grads)]
    assert path.read_bytes() == header(20240327, 2, 3, 7) + b"".join(part.tobytes() for part in parts)
    back = llmc.read_state(path, MODEL)
    for ours, theirs in zip(back[:4], state[:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert_same_bits(back.grads, state.grads)


def test_a_state_of_another_model_or_with_unknown_tokens(tmp_path, state):
    path = tmp_path / "s.bin"
    llmc.write_state(path, state)
    other = Model(layers=3, heads=2, width=16, context=12, vocabulary_size=150)
    with pytest.raises(UserError, match="a state of 3 x 7 tokens of this model takes"):
        llmc.read_state(path, other)
    with pytest.raises(UserError, match=r"T is 7 .at byte 12., and the model's context is 6"):
        llmc.read_state(path, Model(layers=2, heads=2, width=16, context=6, vocabulary_size=150))
    state.targets[1, 2] = 150
    llmc.write_state(path, state)
    with pytest.raises(UserError, match="target 150 at position 9 is not in the vocabulary of 150"):
        llmc.read_state(path, MODEL)


# Tokenizers

TOKENS = (b"a", b"bcd", b"x" * 255, b"<|endoftext|>")


def test_a_tokenizer_file_and_back(tmp_path):
    path = tmp_path / "t.bin"
    llmc.write_tokenizer(path, TOKENS, 3)
    body = b"\x01a\x03bcd\xff" + b"x" * 255 + b"\x0d<|endoftext|>"
    assert path.read_bytes() == header(20240328, 2, 4, 3) + body
    assert llmc.read_tokenizer(path) == (TOKENS, 3)


def test_version_1_has_end_of_text_where_gpt2_has_it(tmp_path):
    path, tokens = tmp_path / "t.bin", (b"t",) * 50257
    path.write_bytes(header(20240328, 1, 50257) + b"\x01t" * 50257)
    assert llmc.read_tokenizer(path) == (tokens, 50256)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(20240328, 3, 4, 3), "version 3"),
        (header(20240328, 2, 2**31 - 1, 3), "is cut off or damaged"),
        (header(20240328, 2, -1, 3), "the vocabulary is -1 (at byte 8)"),
        (header(20240328, 2, 2, 2) + b"\x01a\x01b", "end-of-text is 2 (at byte 12), and the vocabulary has 2"),
        (header(20240328, 2, 2, 1) + b"\x01a\x00b", "token 1 of 2, at byte 1026, has no bytes"),
        (header(20240328, 2, 2, 1) + b"\x01a\x05b", "token 1 of 2, at byte 1026, is cut off"),
        (header(20240328, 2, 2, 1) + b"\x03abc", "token 1 of 2, at byte 1028, is cut off"),
        (header(20240328, 2, 2, 1) + b"\x01a\x01bc", "has bytes that its header doesn't speak of"),
        (header(20240328, 2, 2, 1) + b"\x01a" * 300, "has bytes that its header doesn't speak of"),
    ],
)
def test_a_tokenizer_that_lies(tmp_path, content, message):
    (tmp_path / "t.bin").write_bytes(content)
    with pytest.raises(UserError) as error:
        llmc.read_tokenizer(tmp_path / "t.bin")
    assert message in str(error.value)


@pytest.mark.parametrize("tokens", [(b"", b"a"), (b"x" * 256, b"a")])
def test_tokens_that_the_format_cannot_hold(tmp_path, tokens):
    with pytest.raises(UserError, match="token 0 has"):
        llmc.write_tokenizer(tmp_path / "t.bin", tokens, 1)
    with pytest.raises(UserError, match="this tokenizer has none"):
        llmc.write_tokenizer(tmp_path / "t.bin", TOKENS, None)


def test_which_tokenizer_belongs_to_the_weights(tmp_path):
    """llm.c's model files don't say."""
    path = tmp_path / "m.bin"
    llmc.write_model(path, random_params(), MODEL, "float32")
    source = open_weights(str(path))
    assert source.tokenizer is None
    with pytest.raises(UserError, match=r"--tokenizer gpt2 has 50,257 tokens, and .* has 150"):
        with_tokenizer(source, "gpt2")
    llmc.write_tokenizer(tmp_path / "t.bin", TOKENS, 3)
    with pytest.raises(UserError, match="its 4 tokens are not GPT-2's"):
        with_tokenizer(source, str(tmp_path / "t.bin"))
    model = Model(layers=1, heads=1, width=2, context=2, vocabulary_size=50257)
    llmc.write_model(path, random_params(model), model, "float32")
    assert isinstance(open_weights(str(path)).tokenizer, tokenizers.GPT2)
    assert gpt2_tables.count(model) * 4 + 1024 == path.stat().st_size
