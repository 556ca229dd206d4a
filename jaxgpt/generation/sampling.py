"""Drawing tokens one at a time.

    p = softmax(z / temperature), cut to the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833), and of those to the
    likeliest that together have probability top_p (Holtzman et al. 2020, arXiv:1904.09751)

Each token costs one forward over the whole text so far, which is kept in an array of fixed length: one program serves
every place and every setting.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgpt.config import Compute, Model, Sampling
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.layers import unembedding
from jaxgpt.models import gpt2
from jaxgpt.training.step import cast

LENGTH_MULTIPLE = 64  # the array's length is a multiple of this, so that few programs are compiled


def only_known_tokens(model: Model, tokenizer: Tokenizer) -> Model:
    """The model as `generate` takes it, so that no token is drawn that the tokenizer hasn't got."""
    return dataclasses.replace(model, vocabulary_size=min(model.vocabulary_size, tokenizer.vocabulary_size))


def generate(
    params: gpt2.Params,
    prompt: np.ndarray,
    sampling: Sampling,
    seed: int,
    model: Model,
    compute: Compute,
) -> Iterator[int]:
    """Yields `sampling.tokens` token ids, one by one, that go on from `prompt` (at least one token).

    Beyond the model's context the oldest tokens are forgotten.
    """
    compute = dataclasses.replace(compute, attention="blocks")  # the one that takes any length, dtype and device
    wanted = len(prompt) + sampling.tokens
    length = min(model.context, -(-wanted // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    window = list(map(int, prompt[-length:]))
    key = jax.random.key(seed)
    for place in range(sampling.tokens):
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(window)] = window
        token = int(
            _next_token(
                params,
                padded,
                len(window) - 1,
                key,
                place,
                np.float32(sampling.temperature),
                sampling.top_k,
                np.float32(sampling.top_p),
                model=model,
                compute=compute,
            )
        )
        yield token
        window = [*window, token][-length:]


@functools.partial(jax.jit, static_argnames=("model", "compute"))
def _next_token(
    params: gpt2.Params,
    tokens: Int[Array, "1 T"],
    last: Int[Array, ""],
    key: Key[Array, ""],
    place: Int[Array, ""],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    *,
    model: Model,
    compute: Compute,
) -> Int[Array, ""]:
    params = cast(params, compute)
    x, _ = gpt2.features(params, tokens, model, compute)
    logits = unembedding.logits(unembedding.Params(params.embedding.token), x[last][None])
    return draw(logits[0, : model.vocabulary_size], jax.random.fold_in(key, place), temperature, top_k, top_p)


def draw(
    logits: Float[Array, " V"],
    key: Key[Array, ""],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, ""]:
    """A token from the logits; temperature 0 takes the likeliest, top_k 0 and top_p 1 leave all of them."""
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    descending = jnp.sort(scaled, descending=True)
    rank = jnp.arange(logits.size)
    kept = (rank < top_k) | (top_k == 0)
    probabilities = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf))
    before = jnp.cumsum(probabilities) - probabilities  # of the likelier ones: the first token always stays
    kept &= (before < top_p) | (top_p >= 1)
    smallest = jnp.min(jnp.where(kept, descending, jnp.inf))
    drawn = jax.random.categorical(key, jnp.where(scaled >= smallest, scaled, -jnp.inf))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits))
