"""The form of docstrings: a first line begins with a verb or a noun, not in the middle of a sentence."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxgpt"
PARTS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")
FOLDERS = ["jaxgpt", *(f"jaxgpt/{part}" for part in PARTS), "benchmarks", "docs", "notebooks", "scripts", "tests"]
WORDS = ("Of", "Those", "That", "What", "Which", "Whose", "As", "The same", "Whether", "Where", "How")
FORBIDDEN = re.compile(rf"\s*(?:{'|'.join(WORDS)})\b")
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def without_form(source: str) -> list[str]:
    """Returns the first lines that begin with one of the words, each with its line.

    They are those of docstrings, inside of functions too, and of the strings below a class's fields, which are the
    texts of `--help`.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED):
            for place, statement in enumerate(node.body):
                is_docstring = not place or isinstance(node.body[place - 1], ast.AnnAssign)
                if is_docstring and (text := text_of(statement)) and FORBIDDEN.match(text):
                    found.append(f"line {statement.lineno}: {text.strip().partition(chr(10))[0]}")
    return found


def text_of(statement: ast.stmt) -> str:
    """Returns the text of a statement that is only a string, "" for any other."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return statement.value.value if isinstance(statement.value.value, str) else ""
    return ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_first_lines_begin_with_a_verb_or_a_noun(folder):
    files = (ROOT / folder).glob("*.py") if folder == "jaxgpt" else (ROOT / folder).rglob("*.py")
    found = {str(path.relative_to(ROOT)): without_form(path.read_text(encoding="utf-8")) for path in files}
    assert found
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(
    "source",
    [
        '"""{} it is."""',
        'class A(B):\n    """{} it is."""',
        'def f():\n    """{} it is."""',
        'async def f():\n    """{} it is."""',
        'class A:\n    def f(self):\n        def g():\n            """{} it is.\n\n            More.\n            """',
        'def f():\n    """\n    {}: it is.\n    """',
        'class A:\n    x: int = 0\n    """{} it is."""',
    ],
)
def test_a_first_line_with_a_word_is_found(source, word):
    assert len(without_form(source.format(word))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "Returns whether it is.",
        "Shapes of the initial train state.",
        "The sums of rows.",
        "Assigns what is given.",
        "Offset in bytes.\n\n    Of no other unit.",
    ],
)
def test_another_first_line_is_not(line):
    assert not without_form(f'def f():\n    """{line}"""\n    x = """Of a text."""')
