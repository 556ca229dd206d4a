"""Helpers of the tests of formats: random weights, and their comparison."""

from typing import Any

import jax
import numpy as np

from jaxgpt import models
from jaxgpt.interop import tensors
from jaxgpt.options.config import Model

MODEL = Model(layers=2, heads=2, width=16, context=12, vocabulary_size=150)
LLAMA = Model(layers=2, heads=4, kv_heads=2, width=16, feed_forward=24, context=12, vocabulary_size=150, family="llama")


def random_params(model: Model = MODEL, dtype: str = "float32", seed: int = 0) -> Any:
    """Noise in every tensor, stacked, around 1 in the norms' scales; the tables' padding is 0."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: models.family(model).init(model, jax.random.key(0)))

    def one(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        array = generator.normal(0.1, 0.3, like.shape)
        if path[-1].name == "scale":
            array += 0.9
        if path[-1].name == "token" or path[0].name == "head":
            array[model.vocabulary_size :] = 0
        return array.astype(tensors.DTYPES[dtype])

    return jax.tree_util.tree_map_with_path(one, shapes)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
