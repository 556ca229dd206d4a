import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.layers import rotary
from jaxgpt.proof import cases

B, T, H, D = 2, 5, 3, 8


@given(B=st.integers(1, 4), T=st.integers(1, 9), H=st.integers(1, 4), half=st.integers(1, 9))
@example(B=1, T=1, H=1, half=1)
def test_gradients(assert_exact, B, T, H, half):
    assert_exact(cases.rotary_case(jax.random.key(0), B, T, H, 2 * half))


def test_it_is_a_product_of_complex_numbers(x64):
    """Column i and column i + D/2 as the real and the imaginary part, times e^(i n ω)."""
    x = np.random.default_rng(0).normal(size=(B, T, H, D))
    places = np.array([[0, 1, 2, 3, 4], [3, 4, 0, 1, 7]])
    turns = np.exp(1j * places[..., None, None] * 10_000.0 ** (-2 * np.arange(D // 2) / D))
    expected = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * turns
    found = np.asarray(jax.jit(rotary.forward)(jnp.asarray(x), jnp.asarray(places)))
    np.testing.assert_allclose(found, np.concatenate([expected.real, expected.imag], axis=-1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "frequencies",
    [
        rotary.Frequencies(base=500_000.0),
        rotary.Frequencies(factor=3.0, linear=True),
        rotary.Frequencies(base=500.0, factor=8.0, low=1.0, high=4.0, original_context=64),
    ],
)
def test_gradients_of_scaled_frequencies(assert_exact, frequencies):
    assert_exact(cases.rotary_case(jax.random.key(0), 2, 5, 2, 8, frequencies))


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("default", {"rope_theta": 500_000.0}),
        ("linear", {"rope_theta": 10_000.0, "factor": 4.0}),
        (
            "llama3",
            {
                "rope_theta": 500_000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_frequencies_are_transformers(kind, parameters):
    """Heads have 64 columns; transformers computes in float32."""
    pytest.importorskip("torch", reason="PyTorch comes with the parity extra")
    pytest.importorskip("transformers", reason="transformers comes with the parity extra")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": kind, **parameters},
    )
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    ours = rotary.Frequencies(
        base=parameters["rope_theta"],
        factor=parameters.get("factor", 1.0),
        linear=kind == "linear",
        original_context=8192,
    )
    np.testing.assert_allclose(ours.values(64), expected, rtol=2e-6)


def test_scores_depend_on_the_distance_only(x64):
    q, k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 1, D)))

    def score(of_query, of_key):
        a, b = (rotary.forward(x, jnp.array([[n]])) for x, n in ((q, of_query), (k, of_key)))
        return float(jnp.sum(a * b))

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-12)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_the_inverse_turns_back(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, H, D)))
    places = jnp.arange(T)[None]
    np.testing.assert_allclose(rotary.backward(rotary.forward(x, places), places), x, rtol=1e-13, atol=1e-14)
