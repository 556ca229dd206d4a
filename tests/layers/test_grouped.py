"""Products of rows sorted by group, in a CPU's form and in XLA's own, beside a loop over the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgpt.layers import grouped

C, F = 3, 5


@pytest.fixture(params=["cpu", "default"])
def form(request, monkeypatch):
    """A CPU's form, and that of all other platforms, which a CPU can run too."""
    if request.param == "default":
        monkeypatch.setattr(lax, "platform_dependent", lambda *operands, default, **_: default(*operands))


def sizes_of(rows, groups, kind):
    if kind == "drawn":
        cuts = np.sort(np.random.default_rng(rows).integers(0, rows + 1, groups - 1))
        return np.diff([0, *cuts, rows])
    return rows * np.eye(groups, dtype=int)[0 if kind == "all in the first" else -1]


@pytest.mark.parametrize("kind", ["drawn", "all in the first", "all in the last"])
@pytest.mark.parametrize(
    ("rows", "groups"), [(1, 1), (1, 4), (3, 4), (5, 4), (64, 2), (65, 3), (255, 3), (256, 4), (700, 3)]
)
def test_against_a_loop(x64, form, rows, groups, kind):
    """Fewer rows than groups, than a small block, than a large one, and sizes that no block divides."""
    rng, sizes = np.random.default_rng(1), sizes_of(rows, groups, kind)
    x, dy, w = (rng.normal(size=size) for size in ((rows, C), (rows, F), (groups, C, F)))
    group = np.repeat(np.arange(groups), sizes)

    @jax.jit
    def everything(x, dy, w, sizes):
        back = grouped.multiply(dy, w, sizes, transposed=True)
        return grouped.multiply(x, w, sizes), back, grouped.gradient(x, dy, sizes)

    y, back, dw = everything(x, dy, w, jnp.asarray(sizes))
    np.testing.assert_allclose(y, np.einsum("rc,rcf->rf", x, w[group]), atol=1e-12)
    np.testing.assert_allclose(back, np.einsum("rf,rcf->rc", dy, w[group]), atol=1e-12)
    for number in range(groups):
        np.testing.assert_allclose(dw[number], x[group == number].T @ dy[group == number], atol=1e-11)
        if not sizes[number]:
            assert not np.any(dw[number])


def test_a_group_sees_no_row_of_another(x64):
    """A row of another group has no influence even if it is not finite."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(100, C))).at[70:].set(jnp.nan)
    w, sizes = jnp.ones((3, C, F)), jnp.array([40, 30, 30])
    y = jax.jit(grouped.multiply)(x, w, sizes)
    assert bool(jnp.isfinite(y[:70]).all())
    assert bool(jnp.isnan(y[70:]).all())
    dw = jax.jit(grouped.gradient)(x, jnp.ones((100, F)), sizes)
    assert bool(jnp.isfinite(dw[:2]).all())
    assert bool(jnp.isnan(dw[2]).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(form, dtype):
    """Rows have the dtype of x, and the weight's gradient is float32."""
    rng, sizes = np.random.default_rng(0), jnp.array([30, 0, 40])
    x, dy, w = (jnp.asarray(rng.normal(size=size), dtype) for size in ((70, C), (70, F), (3, C, F)))
    y, dw = jax.jit(grouped.multiply)(x, w, sizes), jax.jit(grouped.gradient)(x, dy, sizes)
    assert (y.dtype, dw.dtype) == (jnp.dtype(dtype), jnp.dtype("float32"))
    exact = np.concatenate([x[:30].astype("float32") @ w[0].astype("float32"), x[30:].astype("float32") @ w[2]])
    np.testing.assert_allclose(y.astype("float32"), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-5)
