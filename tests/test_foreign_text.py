"""Text, JSON and TOML from outside: what is parsed, what is refused, and what reaches a terminal."""

import sys

import pytest

from jaxgpt import foreign_text
from jaxgpt.foreign_text import DEEPEST, parse_json, parse_toml, printable, shown


def test_printable_writes_out_what_moves_a_cursor_and_keeps_line_breaks():
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x1b[2J\x07\r") == "\\x1b[2J\\x07\\x0d"
    assert printable("\x9b31m") == "\\x9b31m"  # the one-character form of ESC [
    assert printable("a\u202eb\u2028c") == "a\\u202eb\\u2028c"
    assert printable("\ud800") == "\\ud800"
    assert printable("naïve 日本 🙂") == "naïve 日本 🙂"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\nb\x1b", "a\\nb\\x1b"),
        ([1, 2], "a list of 2 values"),
        ({"a": 1}, "an object of 1 values"),
        (1.5, "1.5"),
        ("x" * 300, "x" * 197 + "..."),
    ],
)
def test_shown_is_one_short_line(value, expected):
    assert shown(value) == expected


def test_an_integer_that_python_refuses_to_write_is_shown_by_its_bits():
    assert shown(10**5000) == "a number of 16,610 bits"


def test_json_is_as_deep_as_the_limit_and_no_deeper():
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        with pytest.raises(ValueError, match="within one another"):
            parse_json(opening * 100_000 + "1" + closing * 100_000)
        with pytest.raises(ValueError, match="within one another"):
            parse_json(opening * (DEEPEST + 1))


def test_brackets_in_strings_are_no_depth():
    text = '["' + "[{" * 1000 + '\\"[' + '", 1]'
    assert parse_json(text)[1] == 1
    assert len(parse_json("[" + ",".join(["[]"] * 1000) + "]")) == 1000


@pytest.mark.parametrize("text", ["1" * 5000, "[" + "9" * 21 + "]", "", "{", b"\xff", '"\x00"', "{'a': 1}"])
def test_json_that_is_none_is_a_short_value_error(text):
    with pytest.raises(ValueError, match=r"digits|Expecting|UTF-8|control|property") as caught:
        parse_json(text)
    assert len(str(caught.value)) < 200


def test_json_takes_a_byte_order_mark_and_64_bits():
    assert parse_json(b'\xef\xbb\xbf{"a": 18446744073709551615}') == {"a": 2**64 - 1}


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 1000 + "]" * 1000,
        ".".join("a" * 1000) + " = 1",
        "\n".join("[" + ".".join("a" * n) + "]" for n in (10, 300)),
        "a = " + "1" * 5000,
        "a = 0x" + "f" * 5000,
        "a = 9223372036854775808",
        "a = \x1b",
        "a",
    ],
)
def test_toml_that_is_none_is_a_short_value_error(text):
    with pytest.raises(ValueError, match=r".+") as caught:
        parse_toml(text)
    message = str(caught.value)
    assert len(message) < 220
    assert "\x1b" not in message


def test_toml_is_read():
    assert parse_toml(b"\xef\xbb\xbf[a]\nb = 1.5\nc = [1, [2]]\n") == {"a": {"b": 1.5, "c": [1, [2]]}}
    assert parse_toml("a = -9223372036854775808") == {"a": -(2**63)}


def test_the_limit_of_recursion_is_as_it_was():
    before = sys.getrecursionlimit()
    with pytest.raises(ValueError, match="within one another"):
        parse_json("[" * 10**6)
    assert sys.getrecursionlimit() == before
    assert before / 4 > foreign_text.DEEPEST


def test_a_key_that_is_there_twice():
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match=r"the key 'x\\x1b' is there twice"):
        parse_json('[{"b": {"x\\u001b": 1, "y": {}, "x\\u001b": 2}}]', unique=True)
