"""No autodiff in the package: the syntax trees of all its files but the two oracles, and of run.py, name none of it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORACLES = [ROOT / "jaxgpt" / "proof" / name for name in ("gradcheck.py", "gradcheck_oracle.py")]
AUTODIFF = {
    *("grad", "value_and_grad", "vjp", "jvp", "linearize", "linear_transpose", "fwd_and_bwd"),
    *("jacfwd", "jacrev", "jacobian", "hessian"),
    *("custom_vjp", "custom_jvp", "custom_gradient", "custom_transpose", "custom_derivatives", "jet"),
    *("checkpoint", "ad_checkpoint", "remat", "checkpoint_policies", "ad"),
}


def uses(source: str) -> Iterator[str]:
    """'line: what' of each use of JAX's autodiff.

    A dotted name is followed back through the imports and the plain assignments of the file (`j = jax`, `g = j.grad`),
    so that what counts is what a name stands for: `jax.grad` is one, an own variable `grad` or orbax's `checkpoint` is
    not. What JAX's modules hold under a name that only exists at run time can't be read, and counts as well.
    """
    tree = ast.parse(source)
    names = dict(_imports(tree))
    nodes = sorted(
        (node for node in ast.walk(tree) if isinstance(node, ast.expr | ast.stmt)), key=lambda node: node.lineno
    )
    for node in nodes:
        match node:
            case ast.Assign([ast.Name(target)], value) if path := _path(value, names):
                names.setdefault(target, path)
    for node in nodes:
        match node:
            case ast.Import(aliases):
                paths = [alias.name for alias in aliases]
            case ast.ImportFrom(module, aliases, 0):
                paths = [f"{module}.{alias.name}" for alias in aliases]
            case ast.Attribute() | ast.Call(ast.Name("getattr")) | ast.Call(ast.Attribute(_, "import_module")):
                paths = [_path(node, names)]
            case _:
                continue
        for path in paths:
            first, *rest = (path or "").split(".")
            if first == "jax" and (AUTODIFF & set(rest) or rest[-1:] in (["*"], ["?"])):
                yield f"{node.lineno}: {path}"


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name, what it stands for) for all imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(aliases):
                for alias in aliases:
                    first = alias.name.partition(".")[0]
                    yield (alias.asname, alias.name) if alias.asname else (first, first)
            case ast.ImportFrom(module, aliases, 0):
                for alias in aliases:
                    yield alias.asname or alias.name, f"{module}.{alias.name}"


def _path(node: ast.AST, names: dict[str, str]) -> str | None:
    """The dotted path that an expression stands for; "?" for a part that is computed."""
    match node:
        case ast.Name(name):
            return names.get(name)
        case ast.Attribute(value, name):
            parent = _path(value, names)
            return parent and f"{parent}.{name}"
        case ast.Call(ast.Name("getattr"), [value, name, *_]):
            parent = _path(value, names)
            return parent and f"{parent}.{name.value if isinstance(name, ast.Constant) else '?'}"
        case ast.Call(ast.Attribute(_, "import_module") | ast.Name("__import__" | "import_module"), [name, *_]):
            return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None
    return None


def files() -> list[Path]:
    found = [path for path in (ROOT / "jaxgpt").rglob("*.py") if path not in ORACLES]
    return sorted([*found, *ROOT.glob("run.py")])


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_autodiff(path):
    assert list(uses(path.read_text(encoding="utf-8"))) == []


def test_the_files_are_found():
    assert {"linear.py", "gpt2.py", "step.py"} <= {path.name for path in files()}
    assert all(list(uses(path.read_text(encoding="utf-8"))) for path in ORACLES)


@pytest.mark.parametrize(
    "source",
    [
        "import jax\njax.grad(f)",
        "import jax as j\nj.value_and_grad(f)",
        "from jax import grad",
        "from jax import grad as g\ng(f)",
        "from jax import *",
        "import jax\nd = jax.grad",
        "import jax\nj = jax\ng = j.vjp",
        "import jax\ngetattr(jax, 'grad')(f)",
        "import jax\ngetattr(jax, 'gr' + 'ad')(f)",
        "import importlib\nimportlib.import_module('jax').grad(f)",
        "from importlib import import_module\nimport_module('jax').grad(f)",
        "__import__('jax').jvp(f)",
        "import jax\n@jax.custom_vjp\ndef f(x): return x",
        "import jax\ndef f():\n    import functools\n    return functools.partial(jax.jacfwd, f)",
        "def f():\n    import jax as j\n    return j.hessian(f)",
        "import jax.numpy as jnp\nimport jax.ad_checkpoint",
        "from jax.ad_checkpoint import checkpoint_name",
        "import jax\njax.checkpoint(f)",
        "import jax\njax.remat(f)",
        "from jax import checkpoint as c",
        "from jax._src import ad_checkpoint",
        "from jax.interpreters import ad",
        "import jax.numpy\njax.linearize(f)",
        "import jax\njax.linear_transpose(f, x)",
        "from jax.custom_derivatives import linear_call",
    ],
)
def test_planted_autodiff_is_found(source):
    assert len(list(uses(source))) >= 1


@pytest.mark.parametrize(
    "source",
    [
        "grad = 1\ngrads = [grad for grad in range(3)]",
        "def checkpoint(grad): return grad.hessian",
        "import orbax.checkpoint as ocp\nocp.checkpoint",
        "from orbax import checkpoint\ncheckpoint.Checkpointer()",
        "from jaxgpt.training import checkpoint\ncheckpoint.save()",
        "from . import checkpoint",
        "import jax\njax.tree.map(lambda grad: grad, 1)",
        "import jax\nnew = getattr(self, name)",
        "'jax.grad is not used here'",
    ],
)
def test_what_is_not_autodiff_passes(source):
    assert list(uses(source)) == []
