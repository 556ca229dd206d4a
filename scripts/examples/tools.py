"""Two tools for react.py that do no harm whatever a model writes: a calculator, and a search in a folder's texts."""

import ast
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path

LONGEST = 200  # characters of an expression, or of a line that was found
LARGEST = 1 << 20  # bytes of a file that is searched
LARGEST_BASE, LARGEST_POWER = 10**6, 64
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}  # fmt: skip


def calculate(expression: str) -> str:
    """Returns the value of an expression of numbers, brackets and + - * / // % **, or what is wrong with it.

    The expression is parsed and never run as code: what isn't in OPERATORS is refused.
    """
    if len(expression) > LONGEST:
        return f"error: an expression may have {LONGEST} characters"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return f"{value:.12g}" if isinstance(value, float) else str(value)
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        return f"error: {str(error) if type(error) is ValueError else 'this is no expression of numbers'}"


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            first, second = _value(left), _value(right)
            power = isinstance(op, ast.Pow)
            if power and not (abs(first) <= LARGEST_BASE and abs(second) <= LARGEST_POWER):
                raise ValueError(f"a power may be of {LARGEST_BASE} at most, to {LARGEST_POWER}")
            if isinstance(result := OPERATORS[type(op)](first, second), complex):
                raise ValueError("a root of a negative number is no real number")
            return result
    raise ValueError("only numbers, brackets and + - * / // % ** can be calculated")


def search(folder: Path, words: str, most: int = 3) -> str:
    """Returns the lines of the folder's texts that have the most of these words, each with its place.

    Words of one or two letters are passed over. The words are never a path.
    """
    wanted = set(re.findall(r"\w{3,}", words.lower()))
    scored = [
        (-score, f"{name}:{number}: {line.strip()[:LONGEST]}")
        for name, text in texts_in(folder)
        for number, line in enumerate(text.splitlines(), start=1)
        if (score := sum(word in line.lower() for word in wanted))
    ]
    return "\n".join(line for _, line in sorted(scored, key=lambda one: one[0])[:most]) or "nothing was found"


def texts_in(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each .txt and .md file in a folder and below it.

    No link is followed out of the folder, and large files are left out.
    """
    root = folder.resolve()
    for inside, folders, names in os.walk(root):  # which follows no link to a folder
        folders.sort()
        for path in (Path(inside, name) for name in sorted(names)):
            within = path.suffix in (".txt", ".md") and path.resolve().is_relative_to(root)
            if within and path.is_file() and path.stat().st_size <= LARGEST:
                yield str(path.relative_to(root)), path.read_text(encoding="utf-8", errors="replace")
