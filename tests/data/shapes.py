"""Texts of ten shapes as people have them, of any size, the same at every call."""

import base64
import functools
import random

WORDS = ["the", "Hear", "café", "don't", "12345", "I'll", "x/y", "naïve", "e.g.", "(so)", "well,", "end.", "what?!"]
HAN = "東京は大阪より北にある都市人口水火木金土日月年時分国会学校生先"


def _words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def _lines(draw: random.Random, start: str = "", end: str = "\n") -> str:
    return start + _words(draw, draw.randint(1, 15)) + end


def _blank(draw: random.Random) -> str:
    return draw.choice(["\n", "\r\n", " ", "\t", "\n\n\n", "   ", "\u3000", "\x0c", "\u0085", "\u00a0"])


SHAPES = {
    "crlf": lambda draw: _lines(draw, end="\r\n" * draw.randint(1, 2)),
    "one line a paragraph": lambda draw: _lines(draw, end="\n\n"),
    "quoted": lambda draw: _lines(draw, start="> " * draw.randint(1, 2)),
    "indented": lambda draw: _lines(draw, start=" " * draw.randint(1, 8)),
    "bulleted": lambda draw: _lines(draw, start=draw.choice(["- ", "* ", "• ", "/ "])),
    "no line breaks": lambda draw: _words(draw, 20) + " ",
    "only line breaks": lambda draw: "\n",
    "han without spaces": lambda draw: "".join(draw.choices(HAN, k=30)) + draw.choice("。、"),
    "base64": lambda draw: base64.b64encode(draw.randbytes(60)).decode(),
    "mixed": lambda draw: "".join(
        draw.choice([_words(draw, 2), _blank(draw), "'s", "/", "!", "_", "́", "🙂", "".join(draw.choices(HAN, k=3))])
        for _ in range(20)
    ),
}


@functools.cache
def text(shape: str, characters: int, seed: int = 0) -> str:
    """Returns a text of this shape, of at least so many characters."""
    if shape == "only line breaks":
        return "\n" * characters
    draw, parts, length = random.Random(seed), [], 0
    while length < characters:
        parts.append(SHAPES[shape](draw))
        length += len(parts[-1])
    return "".join(parts)
