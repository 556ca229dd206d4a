import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import embedding
from jaxgpt.proof import cases

sizes = st.integers(1, 9)


@given(B=sizes, T=sizes, C=sizes, Vp=st.integers(1, 20), beyond=st.integers(0, 5))
@example(B=1, T=1, C=1, Vp=1, beyond=0)
@example(B=2, T=5, C=3, Vp=128, beyond=0)
@example(B=2, T=7, C=3, Vp=2, beyond=4)  # tokens repeat
def test_gradients(assert_exact, B, T, C, Vp, beyond):
    assert_exact(cases.embedding_case(jax.random.key(0), B, T, C, Vp, T + beyond))


@given(B=sizes, T=sizes, C=sizes, beyond=st.integers(0, 5))
def test_gradients_of_documents(assert_exact, B, T, C, beyond):
    assert_exact(cases.embedding_case(jax.random.key(0), B, T, C, 20, T + beyond, documents=True))


def test_positions_are_counted_from_the_beginning_of_a_document():
    params = embedding.Params(jnp.zeros((3, 1)), 1.0 * jnp.arange(5)[:, None])
    y, _ = embedding.forward(params, jnp.zeros((1, 5), jnp.int32), starts=jnp.array([[0, 0, 2, 2, 4]]))
    assert y[0, :, 0].tolist() == [0, 1, 0, 1, 0]


@pytest.fixture
def params():
    """Five tokens, four places, three channels."""
    rng = np.random.default_rng(0)
    return embedding.Params(*(rng.normal(size=(rows, 3)).astype(np.float32) for rows in (5, 4)))


@jax.jit
def forward(params, tokens):
    return embedding.forward(params, tokens)[0]


@jax.jit
def backward(params, tokens, dy, token_gradient=None):
    return embedding.backward(params, embedding.Residuals(tokens), dy, token_gradient=token_gradient)


def test_a_token_is_its_row_plus_the_row_of_its_place(params):
    tokens = [4, 0, 4]
    expected = [params.token[token] + params.position[place] for place, token in enumerate(tokens)]
    np.testing.assert_array_equal(forward(params, np.array([tokens])), [expected])


def test_a_row_receives_the_gradient_of_every_place_that_read_it(params):
    dy = 2 ** np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    grads = backward(params, np.array([[1, 1], [3, 1]]), dy)
    expected = np.zeros((5, 3), np.float32)
    expected[1] = dy[0, 0] + dy[0, 1] + dy[1, 1]
    expected[3] = dy[1, 0]
    np.testing.assert_array_equal(grads.token, expected)
    np.testing.assert_array_equal(grads.position, np.concatenate([dy[0] + dy[1], np.zeros((2, 3))]))


def test_the_tied_gradient_is_added(params):
    """A gradient that the table already has from elsewhere is added to the layer's own."""
    tokens, dy = np.array([[1, 1, 2]]), np.ones((1, 3, 3), np.float32)
    already = np.arange(15, dtype=np.float32).reshape(5, 3)
    alone = backward(params, tokens, dy)
    together = backward(params, tokens, dy, already)
    np.testing.assert_array_equal(together.token, np.asarray(alone.token) + already)
    np.testing.assert_array_equal(together.position, alone.position)


def test_gradients_of_bfloat16_are_summed_in_float32(params):
    """A bfloat16 sum of ones would stop growing at 256."""
    tables = jax.tree.map(lambda table: table.astype(jnp.bfloat16), params)
    grads = backward(tables, np.zeros((301, 1), np.int32), np.ones((301, 1, 3), jnp.bfloat16))
    np.testing.assert_array_equal(grads.token[0], np.full(3, 301, np.float32))
    np.testing.assert_array_equal(grads.position[0], np.full(3, 301, np.float32))
