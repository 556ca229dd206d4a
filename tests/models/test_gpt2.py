import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.models import attend, blocks, gpt2
from jaxgpt.options.config import Compute, Model
from jaxgpt.proof import objective_cases
from tests import whole

SMALL = Model(layers=2, heads=2, width=8, context=6, vocabulary_size=11)
COMPUTE = Compute(attention_block=4, classifier_chunk=4)


@pytest.mark.parametrize(
    ("batch", "length", "model", "compute"),
    [
        # One of everything; nothing is computed again.
        pytest.param(1, 1, Model(1, 1, 3, 1, 2), Compute(recompute="none"), marks=pytest.mark.slow),
        # Fewer tokens than places, a full vocabulary, a block per query, chunks that don't divide the tokens.
        (2, 3, Model(2, 2, 6, 6, 128), Compute(attention_block=1, classifier_chunk=4, recompute="block")),
        # A vocabulary padded by 126, block and chunk larger than what there is.
        pytest.param(1, 3, Model(3, 1, 4, 3, 130), Compute(recompute="norms"), marks=pytest.mark.slow),
        # Layers written out, the block cutting off a last query.
        (
            *(2, 5, Model(2, 3, 6, 5, 7)),
            Compute(classifier_chunk=5, attention_block=4, recompute="gelu", layers="unrolled"),
        ),
        # One token in three begins a document.
        pytest.param(
            *(2, 8, Model(2, 2, 6, 8, 3, document_start=1), Compute(attention_block=3)), marks=pytest.mark.slow
        ),
        (2, 8, Model(2, 2, 6, 8, 3, document_start=1), Compute(attention_block=3, recompute="block")),
    ],
    ids=["ones", "short", "padded", "unrolled", "documents", "documents computed again"],
)
def test_gradients(assert_exact, batch, length, model, compute):
    assert_exact(objective_cases.model_case(jax.random.key(0), batch, length, model, compute))


@pytest.mark.parametrize(
    ("layers", "width", "heads", "context", "count"),
    [
        (12, 768, 12, 1024, 124_439_808),
        (24, 1024, 16, 1024, 354_823_168),
        (36, 1280, 20, 1024, 774_030_080),
        (48, 1600, 25, 1024, 1_557_611_200),
        (12, 768, 12, 2048, 124_439_808 + 1024 * 768),  # GPT-3 125M: the same with twice the places
    ],
    ids=["124M", "350M", "774M", "1558M", "GPT-3 125M"],
)
def test_parameter_counts(layers, width, heads, context, count):
    model = Model(layers, heads, width, context, vocabulary_size=50257)
    params = jax.eval_shape(lambda key: gpt2.init(model, key), jax.random.key(0))
    padding = (50304 - 50257) * width
    assert gpt2.parameter_count(model) == count
    assert gpt2.parameter_count(model, padded=True) == count + padding
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count + padding
    if (width, context) == (768, 1024):
        assert count + padding == 124_475_904


def test_weight_decay_is_for_six_tensors():
    """wte, wpe and, in each block, the weights of qkv, attention_out, mlp_in and mlp_out: llm.c's list."""
    params = jax.eval_shape(lambda key: gpt2.init(SMALL, key), jax.random.key(0))
    decays = gpt2.decays(params)
    assert jax.tree.structure(decays) == jax.tree.structure(params)
    paths = [path for path, decay in jax.tree.leaves_with_path(decays) if decay]
    names = {jax.tree_util.keystr(path, simple=True, separator=".") for path in paths}
    weights = {f"blocks.{name}.weight" for name in ("qkv", "attention_out", "mlp_in", "mlp_out")}
    assert names == {"embedding.token", "embedding.position", *weights}


def test_initialisation():
    """The mean of n draws errs by their deviation/√n, their deviation by its own/√(2n): five times that is allowed."""
    model = Model(layers=4, heads=2, width=48, context=64, vocabulary_size=200)
    params = jax.jit(lambda key: gpt2.init(model, key))(jax.random.key(0))
    blocks = params.blocks
    normal = [
        (params.embedding.token[:200], 0.02),
        (params.embedding.position, 0.02),
        (blocks.qkv.weight, 0.02),
        (blocks.mlp_in.weight, 0.02),
        (blocks.attention_out.weight, 0.02 / math.sqrt(8)),
        (blocks.mlp_out.weight, 0.02 / math.sqrt(8)),
    ]
    for weight, deviation in normal:
        weight = np.asarray(weight)
        assert weight.dtype == np.float32
        assert abs(weight.mean()) < 5 * deviation / math.sqrt(weight.size)
        assert abs(weight.std() / deviation - 1) < 5 / math.sqrt(2 * weight.size)
    first_numbers = {float(np.asarray(weight).flat[0] / deviation) for weight, deviation in normal}
    assert len(first_numbers) == len(normal)  # no two tensors come from the same draw

    assert params.embedding.token.shape == (256, 48)
    assert not np.asarray(params.embedding.token[200:]).any()
    for norm in (blocks.attention_norm, blocks.mlp_norm, params.final_norm):
        assert (np.asarray(norm.scale) == 1).all()
        assert not np.asarray(norm.bias).any()
    for layer in (blocks.qkv, blocks.attention_out, blocks.mlp_in, blocks.mlp_out):
        assert not np.asarray(layer.bias).any()


@pytest.fixture(scope="module")
def inputs():
    """(params, tokens, targets) with parameters in float32 that are none of them special, and two targets ignored."""
    shapes = jax.eval_shape(lambda key: gpt2.init(SMALL, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)
    params.embedding.token[SMALL.vocabulary_size :] = 0
    tokens, targets = rng.integers(SMALL.vocabulary_size, size=(2, 3, 5), dtype=np.int32)
    targets[0, 1] = targets[2, 4] = IGNORED
    return params, tokens, targets


@functools.cache
def compiled(compute):
    def run(params, tokens, targets, scale):
        return whole.loss_and_grads(params, tokens, targets, SMALL, compute, scale=scale)

    return jax.jit(run)


def loss_and_grads(params, tokens, targets, scale=None, compute=COMPUTE):
    """Returns loss and gradients as NumPy arrays."""
    return jax.tree.map(np.asarray, compiled(compute)(params, tokens, targets, scale))


@jax.jit
def _forward(params, tokens):
    return whole.logits(params, tokens, SMALL, COMPUTE)


def forward(params, tokens):
    return np.asarray(_forward(params, tokens))


def assert_close(actual, expected, tolerance):
    """Each tensor's difference measured against the tensor."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_float32(inputs):
    """In float32 they equal `jax.grad`'s but for the rounding of some 100 operations."""

    def loss(params, tokens, targets):
        return whole.loss(params, tokens, targets, SMALL, COMPUTE)

    oracle = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(*inputs))
    assert_close(loss_and_grads(*inputs), oracle, 1e-5)


def test_options_of_the_computation_change_rounding_only(inputs):
    other = Compute(attention_block=2, classifier_chunk=7, recompute="none")
    assert_close(loss_and_grads(*inputs, compute=other), loss_and_grads(*inputs), 1e-5)


def test_rows_beyond_the_vocabulary_get_no_gradient(inputs):
    _, grads = loss_and_grads(*inputs)
    V = SMALL.vocabulary_size
    assert grads.embedding.token.shape[0] == 128
    assert (grads.embedding.token[V:] == 0).all()
    assert (grads.embedding.token[:V] != 0).all()


def test_scale_times_the_sum(inputs):
    """The loss without `scale` is the mean over the targets that aren't ignored: the sum divided by their number."""
    loss, grads = loss_and_grads(*inputs)
    scaled_loss, scaled_grads = loss_and_grads(*inputs, scale=np.float32(3))
    factor = np.float32(3 * (inputs[2] != IGNORED).sum())
    assert scaled_loss == pytest.approx(factor * loss, rel=1e-6)
    assert_close(scaled_grads, jax.tree.map(lambda grad: factor * grad, grads), 1e-6)


def test_no_targets_no_loss_and_no_gradient(inputs):
    """A batch whose targets are all ignored: nothing is divided by their number, 0."""
    params, tokens, targets = inputs
    loss, grads = loss_and_grads(params, tokens, np.full_like(targets, IGNORED))
    assert loss == 0
    assert not any(grad.any() for grad in jax.tree.leaves(grads))


def test_logits_give_the_loss(inputs):
    params, tokens, targets = inputs
    logits = forward(params, tokens).astype(np.float64)
    assert logits.shape == (3, 5, SMALL.vocabulary_size)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    kept = targets != IGNORED
    expected = -np.log(probabilities[kept, targets[kept]]).mean()
    assert loss_and_grads(*inputs)[0] == pytest.approx(expected, rel=1e-5)


def test_a_prediction_depends_on_no_later_token(inputs):
    params, tokens, _ = inputs
    changed = tokens.copy()
    changed[:, 3:] = (changed[:, 3:] + 1) % SMALL.vocabulary_size
    before, after = forward(params, tokens), forward(params, changed)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).all()


def test_a_new_model_knows_nothing():
    """Its loss is that of guessing, log V."""
    model = Model(layers=2, heads=2, width=32, context=16, vocabulary_size=300)
    tokens, targets = np.random.default_rng(0).integers(300, size=(2, 4, 16), dtype=np.int32)

    @jax.jit
    def loss_of_a_new_model(key, tokens, targets):
        return whole.loss(gpt2.init(model, key), tokens, targets, model, COMPUTE)

    # The logits' deviation is about 0.02 √C = 0.11, which costs half its square.
    assert float(loss_of_a_new_model(jax.random.key(0), tokens, targets)) == pytest.approx(math.log(300), abs=0.05)


@pytest.mark.parametrize(("dtype", "gradient_dtype"), [("float32", "float32"), ("bfloat16", "float32")])
def test_gradients_are_in_float32(dtype, gradient_dtype):
    def loss_and_grads(params, tokens):
        compute = dataclasses.replace(COMPUTE, dtype=dtype)
        return whole.loss_and_grads(params, tokens, tokens, SMALL, compute)

    params = jax.eval_shape(lambda key: gpt2.init(SMALL, key, dtype), jax.random.key(0))
    loss, grads = jax.eval_shape(loss_and_grads, params, jax.ShapeDtypeStruct((2, 4), jnp.int32))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(gradient_dtype)}
    assert loss.dtype == jnp.float32
    assert [leaf.shape for leaf in jax.tree.leaves(grads)] == [leaf.shape for leaf in jax.tree.leaves(params)]


def test_heads_are_split_by_columns_and_merged_again():
    x = np.arange(6 * 4, dtype=np.float32).reshape(6, 4)  # two sequences of three tokens, two heads of two columns
    split = attend.split_heads(jnp.asarray(x), 2, 2)
    assert split.shape == (2, 3, 2, 2)
    np.testing.assert_array_equal(split[1, 2, 1], x[5, 2:])
    np.testing.assert_array_equal(attend.merge_heads(split), x)


def primitives(jaxpr) -> list[str]:
    """Operations in their order, those of a jitted function in its place: JAX 0.12 keeps it as one equation."""
    found = []
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr")
        found += primitives(inner.jaxpr) if inner is not None else [equation.primitive.name]
    return found


def test_a_block_apart_is_gathered_while_the_one_before_it_computes():
    """It may wait for what that one computes from, but not for what it computes; and never are three there at once."""
    gathered = []

    def gather(block):
        gathered.append(block.qkv)
        return block._replace(qkv=jnp.sin(block.qkv))

    def body(carry, block):
        return carry + jnp.cos(block.qkv), block.qkv

    layers = tuple(gpt2.Block(*[jnp.float32(layer)] * 6) for layer in range(3))
    for reverse in (False, True):
        gathered.clear()
        x, outputs = blocks.scan_blocks(body, jnp.zeros((1, 1)), layers, gather=gather, reverse=reverse)
        assert gathered == [0, 1, 2][:: -1 if reverse else 1]
        np.testing.assert_allclose(outputs, np.sin([0, 1, 2]), rtol=1e-6)
        np.testing.assert_allclose(x, [[np.cos(np.sin([0, 1, 2])).sum()]], rtol=1e-6)
        program = jax.make_jaxpr(lambda x, layers: blocks.scan_blocks(body, x, layers, gather=gather, reverse=reverse))  # noqa: B023
        order = primitives(program(jnp.zeros((1, 1)), layers).jaxpr)
        assert [name for name in order if name in ("sin", "cos")] == ["sin", "sin", "cos", "sin", "cos", "cos"]


@pytest.mark.slow
def test_documents_are_as_each_is_alone(x64):
    """The loss of a sequence of several documents, the first without its beginning, is the sum of theirs."""
    model = Model(layers=2, heads=2, width=8, context=16, vocabulary_size=9, document_start=8)
    params = gpt2.init(model, jax.random.key(0), jnp.float64)
    tokens = jnp.array([[1, 2, 8, 3, 4, 5, 8, 8, 6, 7]])
    targets = jnp.roll(tokens, -1)
    one = jnp.float64(1)

    def loss(part, model):
        return float(
            whole.loss(params, tokens[:, part], targets[:, part], model, Compute(attention_block=3), scale=one)
        )

    apart = [slice(0, 2), slice(2, 6), slice(6, 7), slice(7, 10)]
    plain = dataclasses.replace(model, document_start=-1)
    assert loss(slice(None), model) == pytest.approx(sum(loss(part, plain) for part in apart), rel=1e-12)
    assert loss(slice(None), plain) != pytest.approx(loss(slice(None), model), rel=1e-4)
