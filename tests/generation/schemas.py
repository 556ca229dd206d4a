"""Random JSON schemas, each with a check of a value that is written independently of any library for schemas."""

import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

Check = Callable[[Any], bool]


class Schema(NamedTuple):
    schema: dict[str, Any]
    fits: Check


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def whole(choose: random.Random) -> Schema:
    """A schema with or without definitions: a part of it, or the whole, by reference."""
    part = make(choose, 1)
    if choose.random() < 0.5:
        return make(choose)
    schema = {"$defs": {"part": part.schema}, "type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 3}
    return Schema(schema, lambda value: isinstance(value, list) and len(value) <= 3 and all(map(part.fits, value)))


def make(choose: random.Random, depth: int = 3) -> Schema:
    """A schema whose texts have no more than a few hundred characters."""
    kinds = [_integer, _number, _string, _pattern, _enum, _boolean, _null]
    return choose.choice(kinds + 2 * [_object, _array, _any_of] if depth else kinds)(choose, depth)


def _integer(choose: random.Random, depth: int) -> Schema:
    low = choose.randint(-1000, 1000)
    high = low + choose.randint(0, 500)
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Schema(schema, lambda value: is_integer(value) and low <= value <= high)


def _number(choose: random.Random, depth: int) -> Schema:
    """A number of two decimals at most: a random model would go on with others until its last token."""
    low, high = choose.randint(-50, 0), choose.randint(1, 50)
    schema = {"type": "number", "minimum": low, "exclusiveMaximum": high, "multipleOf": 0.25}

    def fits(value: Any) -> bool:
        return (
            isinstance(value, int | float) and value is not True and low <= value < high and 4 * value == int(4 * value)
        )

    return Schema(schema, fits)


def _string(choose: random.Random, depth: int) -> Schema:
    least = choose.randint(0, 4)
    most = least + choose.randint(0, 8)
    schema = {"type": "string", "minLength": least, "maxLength": most}
    return Schema(schema, lambda value: isinstance(value, str) and least <= len(value) <= most)


def _pattern(choose: random.Random, depth: int) -> Schema:
    pattern = choose.choice(
        ["^[a-c]{1,4}$", "^(yes|no|maybe)$", "^[0-9]{4}-[0-9]{2}$", "^x?y{2,3}z$", '^[^a-z"\\\\]{2}$']
    )
    schema = {"type": "string", "pattern": pattern}
    return Schema(schema, lambda value: isinstance(value, str) and re.search(pattern, value) is not None)


def _enum(choose: random.Random, depth: int) -> Schema:
    values: list[Any] = choose.sample(["red", "green", "", "naïve", 'a"b', 7, -1.5, None, True, [1, "a"], {"k": 1}], 3)
    known = [(type(value), value) for value in values]
    if choose.random() < 0.3:
        return Schema({"const": values[0]}, lambda value: (type(value), value) == known[0])
    return Schema({"enum": values}, lambda value: (type(value), value) in known)


def _boolean(choose: random.Random, depth: int) -> Schema:
    return Schema({"type": "boolean"}, lambda value: isinstance(value, bool))


def _null(choose: random.Random, depth: int) -> Schema:
    return Schema({"type": "null"}, lambda value: value is None)


def _object(choose: random.Random, depth: int) -> Schema:
    names = choose.sample(["a", "b", "name", "größe", "x y", 'quote"', "0"], choose.randint(0, 4))
    parts = {name: make(choose, depth - 1) for name in names}
    required = [name for name in names if choose.random() < 0.7]
    schema = {"type": "object", "properties": {name: part.schema for name, part in parts.items()}}
    schema |= {"required": required, "additionalProperties": False}

    def fits(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and set(required) <= set(value) <= set(parts)
            and all(parts[name].fits(item) for name, item in value.items())
        )

    return Schema(schema, fits)


def _array(choose: random.Random, depth: int) -> Schema:
    item, least = make(choose, depth - 1), choose.randint(0, 2)
    most = least + choose.randint(0, 2)
    schema = {"type": "array", "items": item.schema, "minItems": least, "maxItems": most}
    return Schema(
        schema, lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(item.fits, value))
    )


def _any_of(choose: random.Random, depth: int) -> Schema:
    parts = [make(choose, depth - 1) for _ in range(choose.randint(1, 3))]
    return Schema({"anyOf": [part.schema for part in parts]}, lambda value: any(part.fits(value) for part in parts))
