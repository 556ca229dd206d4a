import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import router
from jaxgpt.proof import cases

sizes = st.integers(1, 9)


@pytest.mark.parametrize("softmax", ["after", "before"])
@given(N=sizes, C=sizes, E=sizes, k=sizes)
@example(N=1, C=1, E=1, k=1)
@example(N=3, C=2, E=4, k=4)
def test_gradients(assert_exact, softmax, N, C, E, k):
    assert_exact(cases.router_case(jax.random.key(0), N, C, E, min(k, E), softmax=softmax))


def routed(scores, choices):
    """The forward of tokens that have these scores."""
    scores = jnp.asarray(scores, jnp.float32)
    return router.forward(router.Params(jnp.eye(scores.shape[-1])), scores, choices=choices)


def test_weights_after_the_choice_are_the_renormalised_ones_before_it():
    _, _, residuals = routed(np.random.default_rng(0).normal(size=(7, 5)), 2)
    after, before = (router.weights(residuals, softmax=softmax) for softmax in ("after", "before"))
    np.testing.assert_allclose(after, before / before.sum(axis=-1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(after.sum(axis=-1), np.ones(7), rtol=1e-6)
    assert bool((before.sum(axis=-1) < 1).all())


def test_of_equal_scores_the_first_experts_are_chosen():
    chosen, statistics, _ = routed([[1.0, 1, 1, 1], [0, 2, 0, 2], [3, 0, 3, 3]], 2)
    np.testing.assert_array_equal(chosen, [[0, 1], [1, 3], [0, 2]])
    np.testing.assert_allclose(statistics.load, np.array([2, 2, 1, 1]) / 3, rtol=1e-6)


def test_scores_are_computed_in_float32_whatever_the_activations_are():
    """Two experts whose scores differ by less than bfloat16 can tell."""
    x = jnp.ones((1, 256), jnp.bfloat16)
    weight = jnp.ones((256, 2), jnp.float32).at[0, 1].set(1.0001)
    chosen, _, residuals = router.forward(router.Params(weight), x, choices=1)
    assert residuals.scores.dtype == jnp.float32
    np.testing.assert_array_equal(chosen, [[1]])


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_far_scores_stay_finite(far):
    chosen, statistics, residuals = routed([[far, 0.0, -far]], 2)
    dstatistics = router.Statistics(statistics.load, jnp.ones(3), jnp.ones(()))
    grads, dx = router.backward(router.Params(jnp.eye(3)), residuals, jnp.ones((1, 2)), dstatistics, softmax="after")
    assert int(chosen[0, 0]) == (0 if far > 0 else 2)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((statistics, grads, dx)))


def test_balance_and_z_against_numpy(x64):
    scores = np.random.default_rng(0).normal(size=(3, 11, 4))  # of 3 layers
    statistics = jax.tree.map(lambda *layers: jnp.stack(layers), *[routed(layer, 2)[1] for layer in scores])
    p = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    chosen = np.argsort(-scores, axis=-1)[..., :2]
    share = np.array([(chosen == expert).sum() for expert in range(4)]) / (3 * 11)
    value, dprobability = router.balance(statistics)
    np.testing.assert_allclose(value, 4 * (share * p.mean(axis=(0, 1))).sum(), rtol=1e-5)
    np.testing.assert_allclose(dprobability, 4 * share / 3, rtol=1e-5)
    np.testing.assert_allclose(statistics.z, (np.log(np.exp(scores).sum(axis=-1)) ** 2).mean(axis=-1), rtol=1e-5)


def test_balance_is_least_where_all_have_the_same():
    even = router.Statistics(jnp.full((2, 4), 0.5), jnp.full((2, 4), 0.25), jnp.zeros(2))
    assert float(router.balance(even)[0]) == pytest.approx(2.0)  # k
    uneven = router.Statistics(jnp.array([[1.0, 1, 0, 0]]), jnp.array([[0.5, 0.5, 0, 0]]), jnp.zeros(1))
    assert float(router.balance(uneven)[0]) == pytest.approx(4.0)
