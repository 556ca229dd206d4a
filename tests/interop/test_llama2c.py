"""llama2.c's files, beside a forward in plain NumPy that follows its layout, and its way to encode a text."""

import itertools
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt import models
from jaxgpt.commands import cli
from jaxgpt.errors import UserError
from jaxgpt.interop import detect_format, llama2c
from jaxgpt.models.blocks import Context
from jaxgpt.options.config import Compute

C, F, L, H, K, V, T = 24, 40, 2, 4, 2, 270, 16
D = C // H
SHAPES = {
    "token": (V, C), "norm1": (L, C), "q": (L, C, C), "k": (L, K * D, C), "v": (L, K * D, C), "o": (L, C, C),
    "norm2": (L, C), "w1": (L, F, C), "w2": (L, C, F), "w3": (L, F, C), "norm": (C,), "cos": (T, D // 2),
    "sin": (T, D // 2), "head": (V, C),
}  # fmt: skip
PIECES = ["▁", "t", "h", "e", "▁t", "he", "▁the", "a", "▁a", "é", "th"]  # their scores fall


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    made = {name: generator.normal(0, 0.3, shape).astype("<f4") for name, shape in SHAPES.items()}
    angles = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, D, 2) / D)
    return made | {"cos": np.cos(angles).astype("<f4"), "sin": np.sin(angles).astype("<f4")}


def write(path: Path, made: dict[str, np.ndarray], *, own_head: bool, header: tuple[int, ...] = ()) -> None:
    numbers = header or (C, F, L, H, K, -V if own_head else V, T)
    names = [name for name in SHAPES if own_head or name != "head"]
    path.write_bytes(struct.pack("<7i", *numbers) + b"".join(made[name].tobytes() for name in names))


def write_tokenizer(path: Path, pieces: list[str] = PIECES) -> None:
    texts = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    data = struct.pack("<i", max(map(len, texts)))
    for number, text in enumerate(texts):
        written = text.replace("▁", " ").encode()
        data += struct.pack("<fi", -float(number) if number >= 259 else 0.0, len(written)) + written
    path.write_bytes(data)


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return scale * x / np.sqrt((x * x).mean() + 1e-5)


def forward(made: dict[str, np.ndarray], tokens: list[int], head: np.ndarray) -> np.ndarray:
    """The logits of the last token, one token at a time with a cache, as llama2.c computes them."""
    w = {name: array.astype(np.float64) for name, array in made.items()}
    cache: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(L)]
    x = np.empty(0)
    for place, token in enumerate(tokens):
        x = w["token"][token].copy()

        def turned(rows: np.ndarray, at: int = place) -> np.ndarray:
            pairs = rows.reshape(-1, D // 2, 2)
            first, second = pairs[..., 0], pairs[..., 1]
            cos, sin = w["cos"][at], w["sin"][at]
            return np.stack([first * cos - second * sin, first * sin + second * cos], -1).reshape(-1, D)

        for layer in range(L):
            inner = norm(x, w["norm1"][layer])
            q, k = turned(w["q"][layer] @ inner), turned(w["k"][layer] @ inner)
            cache[layer].append((k, (w["v"][layer] @ inner).reshape(K, D)))
            mixed = []
            for one in range(H):
                keys, values = (np.stack([pair[i][one * K // H] for pair in cache[layer]]) for i in range(2))
                scores = keys @ q[one] / np.sqrt(D)
                share = np.exp(scores - scores.max())
                mixed.append(share / share.sum() @ values)
            x = x + w["o"][layer] @ np.concatenate(mixed)
            inner = norm(x, w["norm2"][layer])
            gate = w["w1"][layer] @ inner
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ inner))
        x = norm(x, w["norm"])
    return head.astype(np.float64) @ x


@pytest.mark.parametrize("own_head", [False, True])
def test_the_logits_are_those_of_its_layout(tmp_path, own_head):
    made, tokens = weights(), [1, 17, 260, 3, 99, 5, 200]
    write(tmp_path / "m.bin", made, own_head=own_head)
    source = detect_format.open_weights(str(tmp_path / "m.bin"))
    assert (source.kind, source.dtype) == ("a llama2.c model file, version 0", "float32")
    assert (source.model.tied, source.model.kv_heads, source.model.feed_forward) == (not own_head, K, F)
    context = Context(source.model, Compute())
    logits = models.logits(jax.device_put(source.load()), jax.numpy.array([tokens]), context)[0, -1]
    expected = forward(made, tokens, made["head" if own_head else "token"])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def by_scores(text: str) -> list[int]:
    """llama2.c's own way: a space before, then the neighbours whose piece has the highest score, until none has."""
    pieces = {piece: 259 + number for number, piece in enumerate(PIECES)}
    ids: list[int] = []
    for character in ("▁" + text.replace(" ", "▁")) if text else "":
        ids += [pieces[character]] if character in pieces else [3 + byte for byte in character.encode()]
    names = {number: piece for piece, number in pieces.items()}
    while True:
        pairs = [(names.get(a, "?") + names.get(b, "?"), i) for i, (a, b) in enumerate(itertools.pairwise(ids))]
        found = [(-pieces[joined], -i) for joined, i in pairs if joined in pieces]
        if not found:
            return ids
        best, place = max(found)
        ids[-place : -place + 2] = [-best]


def test_its_tokenizer_encodes_by_scores(tmp_path):
    write(tmp_path / "m.bin", weights(), own_head=False)
    write_tokenizer(tmp_path / "tokenizer.bin")
    tokenizer = detect_format.open_weights(str(tmp_path / "m.bin")).tokenizer
    assert tokenizer is not None
    for text in ("", "the", "the  the tée", " a the\n", "日本 the🎭", "thea theé\r\n"):
        assert tokenizer.encode(text).tolist() == by_scores(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.begin(tokenizer.encode("a")).tolist() == [1, *by_scores("a")]
    assert (tokenizer.end_of_text, tokenizer.vocabulary_size) == (1, V)
    for name in ("m.bin", "tokenizer.bin"):
        again = detect_format.tokenizer_of(tmp_path / name)
        assert again is not None
        assert again.state() == tokenizer.state()


def test_it_becomes_a_run_that_generates(tmp_path, capsys):
    write(tmp_path / "m.bin", weights(), own_head=True)
    write_tokenizer(tmp_path / "tokenizer.bin")
    assert cli.main(["convert", str(tmp_path / "m.bin"), str(tmp_path / "run")]) == 0
    assert cli.main(["generate", "--run", str(tmp_path / "run"), "--prompt", "the", "--tokens", "5"]) == 0
    assert "the" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-4], "is cut off or damaged"),
        (lambda data: data + bytes(8), "has bytes that its header doesn't speak of"),
        (lambda data: struct.pack("<7i", C, F, 2**30, H, K, V, T) + data[28:], "is cut off or damaged"),
        (lambda data: struct.pack("<7i", C, F, L, H, 3, V, T) + data[28:], "not an llm.c model file"),
        (lambda data: struct.pack("<7i", C, F, L, H, K, 2**31 - 1, T) + data[28:], "not an llm.c model file"),
        (lambda data: b"24ka" + data[4:], "version 1 or 2; export it with --version 0"),
    ],
)
def test_a_damaged_model_is_refused(tmp_path, change, message):
    path = tmp_path / "m.bin"
    write(path, weights(), own_head=False)
    path.write_bytes((change(path.read_bytes()) + bytes(1024))[: None if "speak" in message else -1024])
    with pytest.raises(UserError, match=message):
        detect_format.open_weights(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-2], "token 269, at byte .* is cut off or damaged"),
        (lambda data: data + bytes(8), "271 tokens, and the model has 270"),
        (lambda data: data[:8] + struct.pack("<i", -1) + data[12:], "token 0, at byte 4, is cut off"),
        (lambda data: data[:8] + struct.pack("<i", 2**31 - 1) + data[12:], "token 0, at byte 4, is cut off"),
        (lambda data: data.replace(b"<0x41>", b"<0x42>"), "tokens 3 to 258 are not the bytes"),
        (lambda data: data.replace(b" the", b" tha").replace(b" tha", b"the\xff"), "a token is not UTF-8"),
        (lambda data: data.replace("é".encode(), b"he"), "the token 'he' is there twice"),
    ],
)
def test_weights_with_a_damaged_tokenizer_still_open(tmp_path, change, message):
    write(tmp_path / "m.bin", weights(), own_head=False)
    path = tmp_path / "tokenizer.bin"
    write_tokenizer(path)
    path.write_bytes(change(path.read_bytes()))
    source = llama2c.open_model(tmp_path / "m.bin")
    assert (source.tokenizer, source.unreadable_tokenizer) == (None, True)
    assert len(source.notes) == 1
    with pytest.raises(UserError, match=message):
        llama2c.read_tokenizer(path, V)
