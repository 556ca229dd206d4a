"""The form of docstrings: a first line begins with a verb or a noun, not in the middle of a sentence."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxgpt"
FOLDERS = ["", *sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")]
WORDS = ("Of", "Those", "That", "What", "Which", "As", "The same", "Whether", "Where", "How")
FORBIDDEN = re.compile(rf"\s*(?:{'|'.join(WORDS)})\b")
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def without_form(source: str) -> list[str]:
    """The first lines of docstrings that begin with one of the words, inside of functions too, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if FORBIDDEN.match(first):
                found.append(f"line {node.body[0].lineno}: {first}")
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_first_lines_begin_with_a_verb_or_a_noun(folder):
    files = (PACKAGE / folder).rglob("*.py") if folder else PACKAGE.glob("*.py")
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
