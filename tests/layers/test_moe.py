import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.layers import moe, router
from jaxgpt.proof import cases


@pytest.mark.parametrize(
    ("N", "C", "F", "E", "k", "softmax"),
    [
        (1, 1, 1, 1, 1, "after"),
        (5, 3, 2, 1, 1, "before"),
        (5, 3, 2, 4, 4, "after"),
        (1, 3, 7, 5, 2, "before"),  # fewer rows than experts
        (150, 3, 2, 3, 2, "after"),  # more rows than a block has
    ],
)
def test_gradients(assert_exact, N, C, F, E, k, softmax):
    assert_exact(cases.moe_case(jax.random.key(0), N, C, F, E, k, softmax=softmax))


@pytest.mark.parametrize(
    "scores", [[0.0, 0, 0, 0, 0], [1.0, 0, 1, 1, 0], [9.0, 8, 0, 0, 0]], ids=["all equal", "equal", "empty experts"]
)
def test_gradients_where_scores_are_equal(assert_exact, scores):
    assert_exact(cases.moe_case(jax.random.key(0), 7, 4, 3, 5, 2, scores=scores))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params_of(C, F, E):
    return moe.Params(router.Params(normal(C, E)), normal(E, C, 2 * F, seed=1), normal(E, F, C, seed=2))


@functools.partial(jax.jit, static_argnames="choices")
def run(params, x, dy, choices):
    y, statistics, residuals = moe.forward(params, x, choices=choices, softmax="after")
    dstatistics = jax.tree.map(jnp.zeros_like, statistics)
    return y, statistics, *moe.backward(params, residuals, dy, dstatistics, softmax="after")


def test_experts_without_tokens_have_no_gradient():
    """It is exactly 0, whatever their weights; and no token is dropped where all go to the same two."""
    params = params_of(4, 6, 5)._replace(router=router.Params(np.zeros((4, 5), np.float32)))
    x, dy = normal(300, 4), normal(300, 4, seed=3)
    y, statistics, grads, _ = run(params, x, dy, 2)
    np.testing.assert_array_equal(statistics.load, [1, 1, 0, 0, 0])
    for grad in (grads.w_in, grads.w_out):
        assert not np.any(grad[2:])
        assert np.all(np.any(grad[:2], axis=(1, 2)))
    assert np.all(np.any(y, axis=1))


def test_one_expert_is_an_mlp():
    params = params_of(4, 6, 1)
    x = normal(9, 4)
    y, _, grads, _ = run(params, x, normal(9, 4, seed=3), 1)
    gate, up = np.split(x @ params.w_in[0], 2, axis=-1)
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up @ params.w_out[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads.router.weight, np.zeros((4, 1)), atol=1e-6)


def test_the_order_of_tokens_does_not_matter():
    params, order = params_of(4, 6, 5), np.random.default_rng(4).permutation(40)
    x, dy = normal(40, 4), normal(40, 4, seed=3)
    y, _, grads, dx = run(params, x, dy, 2)
    y2, _, grads2, dx2 = run(params, x[order], dy[order], 2)
    np.testing.assert_allclose(y2, y[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx2, dx[order], rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads2, grads)


@pytest.mark.parametrize(("E", "k"), [(8, 2), (3, 3)])
def test_output_and_gradients_are_transformers(E, k):
    """MixtralSparseMoeBlock with PyTorch's autodiff, and its loss of balance."""
    torch = pytest.importorskip("torch", reason="PyTorch comes with the parity extra")
    reason = "transformers comes with the parity extra"
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason=reason)
    C, F, N = 8, 12, 37
    params, x, dy = params_of(C, F, E), normal(N, C, seed=4), normal(N, C, seed=5)
    config = mixtral.MixtralConfig(
        hidden_size=C, intermediate_size=F, num_local_experts=E, num_experts_per_tok=k, experts_implementation="eager"
    )
    block = mixtral.MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(torch.tensor(params.router.weight.T.copy()))
        block.experts.gate_up_proj.copy_(torch.tensor(params.w_in.swapaxes(1, 2).copy()))
        block.experts.down_proj.copy_(torch.tensor(params.w_out.swapaxes(1, 2).copy()))
    inputs = torch.tensor(x, requires_grad=True)
    expected = block(inputs[None])[0]
    scores, _, _ = block.gate(inputs)
    balance = mixtral.load_balancing_loss_func((scores,), E, k)
    ((expected * torch.tensor(dy)).sum() + 3 * balance).backward()

    @jax.jit
    def with_balance(params, x, dy):
        y, statistics, residuals = moe.forward(params, x, choices=k, softmax="after")
        value, dprobability = router.balance(jax.tree.map(lambda array: array[None], statistics))
        dstatistics = router.Statistics(statistics.load, 3 * dprobability, jnp.zeros(()))
        return y, value, *moe.backward(params, residuals, dy, dstatistics, softmax="after")

    y, value, grads, dx = with_balance(params, x, dy)
    assert float(value) == pytest.approx(float(balance.detach()), rel=1e-5)
    for ours, theirs in (
        (y, expected.detach()),
        (dx, inputs.grad),
        (grads.router.weight, block.gate.weight.grad.T),
        (grads.w_in, block.experts.gate_up_proj.grad.swapaxes(1, 2)),
        (grads.w_out, block.experts.down_proj.grad.swapaxes(1, 2)),
    ):
        assert np.linalg.norm(ours - theirs.numpy()) <= 1e-4 * np.linalg.norm(theirs)
