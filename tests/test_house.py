"""The imports of the package: a folder imports only from folders below it, and nothing from outside of the package."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxgpt"
FOLDERS = (  # from the top to the bottom; what lies beside them in jaxgpt/ itself is below all
    "commands",
    "reports",
    "evaluation",
    "generation",
    "interop",
    "runs",
    "proof",
    "training",
    "parallel",
    "objectives",
    "models",
    "kernels",
    "optimizers",
    "data",
    "layers",
    "options",
)
ELSEWHERE = {"benchmarks", "tests", "notebooks", "docs", "scripts"}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """The line and the dotted name of everything that is imported, inside of functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written from the top of the package"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def upward(folder: str, source: str) -> list[str]:
    """The imports that a file in this folder of jaxgpt/ ("" for jaxgpt/ itself) may not have."""
    below = FOLDERS[FOLDERS.index(folder) :] if folder else ()
    found = []
    for line, name in imports(source):
        package, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        if package in ELSEWHERE or (package == "jaxgpt" and room in FOLDERS and room not in below):
            found.append(f"line {line}: {name}")
    return found


def test_every_folder_has_its_place():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)


def test_every_folder_and_the_configs_are_installed():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(tables["tool"]["setuptools"]["packages"]) == {
        "jaxgpt", *(f"jaxgpt.{name}" for name in ("configs", *FOLDERS))
    }  # fmt: skip


@pytest.mark.parametrize("folder", ["", *FOLDERS])
def test_imports_run_down(folder):
    files = (PACKAGE / folder).rglob("*.py") if folder else PACKAGE.glob("*.py")
    found = {str(path.relative_to(ROOT)): upward(folder, path.read_text(encoding="utf-8")) for path in files}
    assert found
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("layers", "from jaxgpt.models import gpt2"),
        ("training", "def f():\n    from jaxgpt.commands.train import train"),
        ("", "import jaxgpt.options.config"),
        ("commands", "from benchmarks import bench"),
    ],
)
def test_an_import_that_runs_up_is_found(folder, source):
    assert upward(folder, source)
    assert not upward("commands", "from jaxgpt.layers import linear\nimport numpy")
