"""Text, JSON, TOML and YAML that others have made: parsing within limits, and escaping for a terminal.

Parsing raises a ValueError with a short reason; `jaxgpt.files` turns it into a message that names the file.
"""

import functools
import json
import re
import tomllib
import unicodedata
from typing import Any

DEEPEST = 64  # levels of nested arrays and tables
TOO_DEEP = f"more than {DEEPEST} arrays or objects within one another"
LONGEST_NUMBER = 20  # digits of an integer: one of 64 bits has no more
LONGEST_SHOWN = 200  # characters of a value in a message
MOST_DOTS = 256  # in a line of TOML: each could open a table within a table

# Characters that move a terminal's cursor, break a line invisibly, or (below) reverse the reading order.
_HIDDEN = {"Cc", "Cs", "Zl", "Zp"}
_BREAKS = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_BIDIRECTIONAL = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    r"""Returns the text with control characters escaped, line breaks and tabs excepted: an ESC as \x1b.

    Sent to a terminal as they are, some would move its cursor, change its title or hide what stands before them.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if character in "\n\t" else _written_out(character) for character in text)


def shown(value: object, most: int = LONGEST_SHOWN) -> str:
    """Returns foreign text, or a value of JSON or TOML, on one line of at most `most` characters for a message."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, (list, tuple, set, dict)):
        text = f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,} values"
    elif isinstance(value, int) and value.bit_length() > 64:  # Python may refuse to write it in decimal
        text = f"a number of {value.bit_length():,} bits"
    else:
        text = str(value)
    line = "".join(_BREAKS.get(character) or _written_out(character) for character in text[: most + 1])
    return line if len(line) <= most else f"{line[: most - 3]}..."


def quoted(value: object) -> str:
    """Returns `shown(value)`, for a string between quotation marks."""
    return f"'{shown(value)}'" if isinstance(value, str) else shown(value)


def _written_out(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN and character not in _BIDIRECTIONAL:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def parse_json(text: str | bytes, *, unique: bool = False, digits: int = LONGEST_NUMBER) -> Any:
    """Returns the value of a JSON text; bytes must be UTF-8, and may begin with a byte order mark.

    With `unique` an object with a key twice is refused. Otherwise the last value counts. ValueError where the text is
    no JSON, arrays and objects are nested more than `DEEPEST` deep, or an integer has more than so many digits.
    """
    text = decode(text) if isinstance(text, bytes) else text.removeprefix("\ufeff")
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(text)
    try:
        read = functools.partial(_integer, digits)
        return json.loads(text, parse_int=read, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def parse_toml(text: str | bytes) -> dict[str, Any]:
    """Returns the tables of a TOML text; bytes must be UTF-8, and may begin with a byte order mark.

    ValueError where it is no TOML, tables and arrays are nested too deep, or an integer needs more than 64 bits.
    """
    text = decode(text) if isinstance(text, bytes) else text.removeprefix("\ufeff")
    if any(line.count(".") > MOST_DOTS for line in text.splitlines()):
        raise ValueError(f"a line has more than {MOST_DOTS} dots")
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(shown(error)) from None
    except ValueError:  # an integer of more digits than Python converts
        raise ValueError("a number has thousands of digits") from None
    _check_values(tables)
    return tables


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML document, in which all scalars are texts.

    ValueError where it is no YAML, lists are nested too deep, or it has an alias, which could stand for itself.
    """
    import yaml  # takes a while, and few commands need it

    class Loader(yaml.BaseLoader):
        def fetch_flow_collection_start(self, token: Any) -> Any:  # its time grows with the square of the depth
            if self.flow_level >= DEEPEST:
                raise ValueError(TOO_DEEP)
            return super().fetch_flow_collection_start(token)

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has an alias")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(shown(" ".join(str(error).split()))) from None


def decode(data: bytes) -> str:
    """Returns UTF-8 bytes as text, without a byte order mark. ValueError, with the offset, where they aren't UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,} ({error.reason})"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object's keys and values. ValueError for a key that is there twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {quoted(shown(twice, 40))} is there twice")
    return result


def _integer(most: int, digits: str) -> int:
    if len(digits) > most:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|$)|[\[{\]}]', re.DOTALL)


def _check_depth(text: str) -> None:
    """Raises a ValueError where the arrays and objects of a JSON text are nested too deep."""
    depth = 0
    for found in _BRACKETS.finditer(text):
        match found[0]:
            case "[" | "{":
                depth += 1
                if depth > DEEPEST:
                    raise ValueError(TOO_DEEP)
            case "]" | "}":
                depth -= 1


def _check_values(tables: dict[str, Any]) -> None:
    waiting: list[tuple[Any, int]] = [(tables, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(TOO_DEEP)
        if isinstance(value, (dict, list)):
            waiting += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("a number needs more than 64 bits")
