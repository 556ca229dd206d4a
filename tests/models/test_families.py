"""Model families: the names that each has, and that no file outside of the few allowed ones names a family."""

import ast
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxgpt import models
from jaxgpt.interop import huggingface, peft
from jaxgpt.options.config import Model

PACKAGE = Path(models.__file__).parents[1]
FAMILIES = typing.get_args(typing.get_type_hints(Model)["family"])
CONTRACT = {
    *("Params", "Block", "init", "features", "features_backward", "head", "block_forward", "decays"),
    *("parameter_count", "flops_per_token", "check", "describe", "projections", "LEARNED_POSITIONS"),
}
# Where a family's name belongs: the option, the families and their layers' users, the proof, and other projects' names.
TABLES = {f"interop/{name}_tables.py" for name in FAMILIES}
MAY_IMPORT = {"models", "proof", *TABLES}
MAY_WRITE = MAY_IMPORT | {
    "options/config.py",
    "interop/huggingface.py",
    "interop/gguf_config.py",
    "interop/llama2c.py",
    "interop/peft.py",
}


def belongs(path: Path, places: set[str]) -> bool:
    name = path.relative_to(PACKAGE).as_posix()
    return name in places or name.split("/")[0] in places


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules that are imported, with their dotted path."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module, names):
                yield from (f"{module}.{name.name}" for name in names)


def literals(tree: ast.Module) -> Iterator[str]:
    """The family names that stand as strings in statements which don't speak of a tokenizer of that name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            own = [child for child in ast.walk(node) if isinstance(child, ast.Constant) and child.value in FAMILIES]
            if own and "tokenizer" not in ast.unparse(node) and "encoding" not in ast.unparse(node):
                yield f"line {node.lineno}: {ast.unparse(node)[:60]}"


def files(places: set[str]) -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not belongs(path, places)]


def test_no_family_is_imported():
    named = {f"jaxgpt.models.{family}" for family in FAMILIES}
    found = {path.name: named & set(imports(ast.parse(path.read_text()))) for path in files(MAY_IMPORT)}
    assert {name for name, there in found.items() if there} == set()
    assert named & set(imports(ast.parse((PACKAGE / "interop/gpt2_tables.py").read_text())))  # so that they are found


def test_no_family_is_written():
    tokenizers = {"data"}  # one of them has the name of a family
    found = {path.name: list(literals(ast.parse(path.read_text()))) for path in files(MAY_WRITE | tokenizers)}
    assert {name: there for name, there in found.items() if there} == {}
    assert list(literals(ast.parse('if model.family == "gpt2":\n    pass')))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_names_of_the_contract(name):
    module = models.family(Model(family=name))
    assert module.__name__ == f"jaxgpt.models.{name}"
    assert set(dir(module)) >= CONTRACT
    first = models.family(Model(family=FAMILIES[0]))
    for function in CONTRACT - {"Params", "Block", "LEARNED_POSITIONS"}:
        assert list(inspect.signature(getattr(module, function)).parameters) == list(
            inspect.signature(getattr(first, function)).parameters
        )
    assert "blocks" in module.Params._fields


def test_every_family_has_its_tables_of_other_projects():
    assert set(huggingface.TABLES) == set(peft.PREFIXES) == set(FAMILIES)
