"""What the tests of formats share: weights that are no model's, and their comparison."""

import jax
import numpy as np

from jaxgpt.interop import gpt2_tensors, tensors
from jaxgpt.models import gpt2
from jaxgpt.options.config import Model

MODEL = Model(layers=2, heads=2, width=16, context=12, vocabulary_size=150)


def random_params(model: Model = MODEL, dtype: str = "float32", seed: int = 0) -> gpt2.Params:
    """Noise in every tensor; the token table's padding is 0."""
    generator = np.random.default_rng(seed)

    def one(tensor: gpt2_tensors.Tensor) -> np.ndarray:
        return generator.normal(0.1, 0.3, gpt2_tensors.shape(tensor, model)).astype(tensors.DTYPES[dtype])

    params = jax.tree.map(one, gpt2_tensors.LAYOUT)
    params.embedding.token[model.vocabulary_size :] = 0
    return params


def assert_same_bits(ours: gpt2.Params, theirs: gpt2.Params) -> None:
    for (tensor, a), (_, b) in zip(gpt2_tensors.paired(ours), gpt2_tensors.paired(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), tensor.ours
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), tensor.ours
