"""The proof notices wrong gradients: each hand-written backward, with one thing dropped, must fail gradcheck.

The mutants are made from the source: of every + and - one side is taken as 0, of every * and / (and of every product of
matrices) one factor as 1; a power is dropped, a sum becomes a mean, a condition holds always or never, an `.at[].add`
doesn't happen, dropout has no masks, and each gradient that is returned, or that comes back from another layer's
backward, is set to 0. All keep the shapes, so that what catches a mutant is its numbers.
"""

import ast
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.layers import (
    attention,
    cross_entropy,
    dropout,
    embedding,
    entropy,
    fp8,
    gelu,
    layernorm,
    linear,
    lora,
    moe,
    residual,
    rmsnorm,
    rotary,
    router,
    scalar_head,
    soft_cap,
    swiglu,
    unembedding,
)
from jaxgpt.models import gpt2, grouped_attention, llama, mixtral, norms
from jaxgpt.objectives import next_token
from jaxgpt.options.config import Compute, Model
from jaxgpt.proof import cases as proof_cases
from jaxgpt.proof import gradcheck, objective_cases

# Small shapes at which no dropped term happens to be 0 and no dropped factor to be 1.
MODEL = Model(layers=1, heads=2, width=4, context=4, vocabulary_size=5)
COMPUTE = Compute(attention_block=2, classifier_chunk=4)
LAYERS = [
    *(embedding, linear, layernorm, gelu, attention, residual, cross_entropy, unembedding),
    *(rmsnorm, rotary, soft_cap, swiglu, router, moe),
]
FUNCTIONS = [(module, "backward") for module in LAYERS] + [
    (dropout, "backward"),
    (lora, "backward"),
    (fp8, "backward"),
    (entropy, "backward"),
    (scalar_head, "backward"),
    (lora, "through_weight"),
    (lora, "through_adapter"),
    (lora, "dx_by_merged"),
    (lora, "dx_by_two_products"),
    (attention, "_sum_over_blocks"),
    (unembedding, "forward"),  # where its gradients are computed
    (gpt2, "block_backward"),
    (gpt2, "features_backward"),
    (norms, "backward"),
    (grouped_attention, "backward"),
    (llama, "block_backward"),
    (llama, "features_backward"),
    (mixtral, "block_backward"),
    (mixtral, "features_backward"),
    (next_token, "loss_and_grads"),
    (next_token, "_chunk_loss"),
]
NOT_A_GRADIENT = {
    "jnp.stack([x.largest, weight.largest, gradient.largest])",  # what fp8.backward saw, and returns
    "pallas_norm.backward(params, residuals, dy, past)",  # in tests/kernels
}
FAMILIES = ("gpt2", "llama", "mixtral")
# Whole models, and the layers that take most operations, each of which is compiled by itself.
NIGHTLY = (
    gpt2,
    norms,
    grouped_attention,
    llama,
    mixtral,
    attention,
    embedding,
    fp8,
    moe,
    next_token,
    router,
    unembedding,
)
PROVED_BY = {
    "next_token": "gpt2",
    "norms": "gpt2",
    "grouped_attention": "llama",
}  # the case, where it is that of another


Mutation = tuple[str, ast.AST, Any]  # what is dropped, and the node of the syntax tree that gives way to another


def mutations(node: ast.AST) -> Iterator[Mutation]:
    """Yields the mutations at this node of a syntax tree: the terms that can be dropped."""
    match node:
        case ast.BinOp(left, ast.Add() | ast.Sub(), right):
            for term in (left, right):
                yield f"{ast.unparse(term)} = 0", term, call("zero", term)
        case ast.BinOp(left, ast.Mult() | ast.Div(), right):
            for factor in (left, right):
                if ast.unparse(factor) != "1":
                    yield f"{ast.unparse(factor)} = 1", factor, call("one", factor)
        case ast.BinOp(base, ast.Pow(), _):
            yield f"no power in {ast.unparse(node)}", node, base
        case ast.Call(ast.Name("product"), [_, *factors]):
            for factor in factors:
                yield f"{ast.unparse(factor)} = 1", factor, call("one", factor)
        case ast.Call(ast.Attribute(ast.Name("jnp") as jnp_name, "sum" | "mean" as name) as function):
            other = "mean" if name == "sum" else "sum"
            yield f"{other} in place of {name}", function, ast.Attribute(jnp_name, other, ast.Load())
        case ast.Call(ast.Attribute(ast.Name("jnp"), "where"), [condition, *_]):
            for value in (True, False):
                yield f"({ast.unparse(condition)}) = {value}", condition, ast.Constant(value)
        case ast.Call(ast.Attribute(ast.Subscript(ast.Attribute(array, "at")), "add" | "set" as name)):
            yield f"{ast.unparse(array)} without {name}", node, array
        case ast.Call(ast.Attribute(_, "drop_backward") | ast.Name("drop_embedded_backward"), [dropped, _]):
            yield f"{ast.unparse(node)} without masks", node, dropped
        case ast.Return(ast.expr() as value):
            for array in returned(value):
                if ast.unparse(array) not in NOT_A_GRADIENT:
                    yield f"returned {ast.unparse(array)} = 0", array, call("zero", array)
        case ast.Assign([target], ast.Call(ast.Name("block_backward") | ast.Attribute(_, "backward"))):
            for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                zeroed = ast.Assign([name], call("zero", ast.Name(ast.unparse(name), ast.Load())))
                yield f"{ast.unparse(name)} = 0", node, [node, zeroed]


def returned(value: ast.expr) -> Iterator[ast.expr]:
    """The arrays of a return: the elements of tuples and of `Params(...)` and the like."""
    match value:
        case ast.Tuple(parts) | ast.Call(ast.Name("Params" | "Block" | "Residuals"), parts):
            for part in parts:
                yield from returned(part)
        case ast.Starred() | ast.Constant():  # a backward's gradients, each of which was dropped there; and none
            return
        case _:
            yield value


def call(function: str, argument: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(function, ast.Load()), [argument], [])


def replaced(tree: Any, old: ast.AST, new: Any) -> Any:
    """A copy of a syntax tree, or of a list of them, with `new` in the place of the node `old`."""
    if tree is old:
        return new
    if isinstance(tree, list):
        parts = [replaced(part, old, new) for part in tree]
        return [node for part in parts for node in (part if isinstance(part, list) else [part])]
    if not isinstance(tree, ast.AST):
        return tree
    result = copy.copy(tree)
    for field, value in ast.iter_fields(tree):
        setattr(result, field, replaced(value, old, new))
    return result


def definition(module: ModuleType, name: str) -> ast.FunctionDef:
    tree = ast.parse(inspect.getsource(module))
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


def compiled(module: ModuleType, function: ast.FunctionDef) -> Callable:
    """The function of this syntax tree, among the names of its module."""
    names = dict(vars(module))
    names["zero"] = functools.partial(jax.tree.map, jnp.zeros_like)
    names["one"] = functools.partial(jax.tree.map, jnp.ones_like)
    tree = ast.fix_missing_locations(ast.Module([function], []))
    exec(compile(tree, f"<mutant of {module.__name__}>", "exec"), names)
    return names[function.name]


def layer(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def mutants(functions: list[tuple[ModuleType, str]]) -> Iterator[Any]:
    for module, name in functions:
        function = definition(module, name)
        for node in ast.walk(ast.Module(function.body, [])):
            for what, old, new in mutations(node):
                tree = replaced(function, old, new)
                line = getattr(old, "lineno", 0)
                marks = [pytest.mark.slow] * (module in NIGHTLY)
                yield pytest.param(module, tree, marks=marks, id=f"{layer(module)}.{name}, line {line}: {what}")


def softmax(logits, targets, *, vocabulary_size, dtype):
    """Return values of the fused kernel, with anything in the rows of ignored targets."""
    losses, kept = cross_entropy.forward(logits, targets, vocabulary_size=vocabulary_size)
    gradient = cross_entropy.backward(kept, jnp.ones_like(losses), vocabulary_size=vocabulary_size)
    return losses, jnp.where((targets == cross_entropy.IGNORED)[:, None], 1, gradient).astype(dtype)


@functools.cache
def cases() -> dict[str, gradcheck.Case]:
    """The layers' with several blocks and chunks, the model's with one of each."""
    key = jax.random.key(0)
    names = {layer(module) for module in LAYERS}
    layers = [case for case in proof_cases.cases(MODEL, COMPUTE, 2, 3, key) if case.name in names]
    adapters = [proof_cases.lora_case(key, 2, 3, 4, 5, 2, two_products=both) for both in (False, True)]
    of_entropy = objective_cases.entropy_case(key, 6, 5, 7), objective_cases.unembedding_case(key, 6, 4, 5, 7, 4)
    scalars = [objective_cases.scalar_head_case(key, 6, 4, read=read) for read in (0, 2)]
    of_documents = proof_cases.embedding_case(key, 2, 3, 4, 5, 4, documents=True)  # whose gradient has lines of its own
    dropped = [
        proof_cases.dropout_case(key, 2, 3, 4),
        proof_cases.dropout_case(key, 2, 3, 4, rate=0)._replace(name="dropout_of_none"),
        proof_cases.attention_case(key, 2, 3, 2, 2, 2, group=2, rate=0.4)._replace(name="attention_of_dropout"),
    ]
    of_8_bits = [proof_cases.fp8_case(key, 2, 3, 4, 5, again=again) for again in (False, True)]
    by_kernel = proof_cases.unembedding_case(key, 2, 3, 4, 5, 7, 4, cap=3.0, softmax=softmax)
    in_window = proof_cases.attention_case(key, 2, 3, 1, 2, 1, group=2, window=2)
    tied = dataclasses.replace(MODEL, family="llama", tied=True, query_key_norm=True, kv_heads=1)
    relative = objective_cases.model_case(key, 2, 3, tied, Compute())._replace(name="llama_of_qwen")
    of_switch = proof_cases.router_case(key, 6, 4, 5, 2, softmax="before")
    mixture = dataclasses.replace(MODEL, layers=2, kv_heads=1, experts=3, router_balance=0.7, router_z=0.6)
    models = [dataclasses.replace(mixture if name == "mixtral" else MODEL, family=name) for name in FAMILIES]
    whole = [objective_cases.model_case(key, 2, 3, model, Compute(), scale=0.3) for model in models]
    whole += [
        objective_cases.model_case(key, 2, 3, model, Compute(), rate=0.4)._replace(name=f"{model.family}_of_dropout")
        for model in models
    ]
    of_tied = objective_cases.model_case(key, 2, 3, dataclasses.replace(models[-1], tied=True), Compute())
    more = (of_documents, in_window, relative, of_switch, of_tied._replace(name="mixtral_of_tied"), *adapters)
    more += (proof_cases.lora_case(key, 2, 3, 4, 5, 0), *of_entropy, *scalars, *dropped, *of_8_bits, by_kernel)
    return {case.name: case for case in (*layers, *whole, *more)}


def failures(module: ModuleType) -> list[gradcheck.Row]:
    """The rows of gradcheck that fail, of the first case with some: a layer's lines aren't all in one case.

    Without jit, since operations stay compiled from one mutant to the next.
    """
    with jax.disable_jit():
        name = PROVED_BY.get(layer(module), layer(module))
        checked = [case for case in cases().values() if case.name == name or case.name.startswith(f"{name}_of_")]
        failed = ([row for row in gradcheck.check(case, "float64") if not row.passed] for case in checked)
        return next(filter(None, failed), [])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param(module, name, marks=[pytest.mark.slow] * (module in NIGHTLY), id=f"{layer(module)}.{name}")
        for module, name in FUNCTIONS
    ],
)
def test_the_source_as_it_is_passes(x64, monkeypatch, module, name):
    """Mutants thus fail by what was dropped, not by how they are made; and something is dropped from each."""
    function = definition(module, name)
    assert any(list(mutations(node)) for node in ast.walk(function))
    monkeypatch.setattr(module, name, compiled(module, function))
    assert failures(module) == []


@pytest.mark.parametrize(("module", "mutant"), list(mutants(FUNCTIONS)))
def test_gradcheck_fails(x64, monkeypatch, module, mutant):
    monkeypatch.setattr(module, mutant.name, compiled(module, mutant))
    assert failures(module)
