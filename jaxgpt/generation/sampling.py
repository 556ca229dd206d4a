"""Drawing the next token of several texts from their logits, each with its own settings.

    z of tokens that the text has already: z / r where z > 0, else z r     repetition penalty r (Keskar et al. 2019,
                                                                           arXiv:1909.05858, section 4.1)
    p = softmax(z / temperature)
    of p only the k likeliest tokens                                       (Fan et al. 2018, arXiv:1805.04833)
    of those the likeliest that together have probability top_p            (Holtzman et al. 2020, arXiv:1904.09751)
    of those the ones with p ≥ min_p max p                                 (Nguyen et al. 2025, arXiv:2407.01082)

A text's draw depends on its own logits, settings, seed and place alone, whichever texts are beside it.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.options.config import Model, Sampling

MOST_RUNNERS_UP = 20  # likeliest tokens of which a text's scores tell the log-probability
LEAST_TEMPERATURE = 1e-30  # below it the likeliest token is taken
LEAST_TOP_P = 1e-6


class SamplingSettings(NamedTuple):
    """Sampling settings, one of each for every text.

    Temperature 0 takes the likeliest; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 change nothing.
    """

    seed: UInt32[Array, "B 2"]  # the upper and the lower half of 64 bits
    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]


class Scores(NamedTuple):
    """Log-probabilities by the model alone: before the temperature, the penalty, and what a constraint forbids."""

    drawn: Float[Array, " B"]
    likeliest: Int[Array, "B R"]  # the R likeliest tokens, in this order
    theirs: Float[Array, "B R"]


def settings(options: Sequence[tuple[Sampling, int]]) -> SamplingSettings:
    """Returns texts' options and seeds as arrays. A seed has 64 bits, with or without a sign."""
    columns = {}
    for name in SamplingSettings._fields[1:]:
        dtype = np.int32 if name == "top_k" else np.float32
        columns[name] = np.array([getattr(sampling, name) for sampling, _ in options], dtype)
    # Logits divided by less would be infinite; and some token has to be left.
    columns["temperature"][columns["temperature"] < LEAST_TEMPERATURE] = 0
    columns["top_p"] = np.maximum(columns["top_p"], LEAST_TOP_P)
    seeds = np.array([divmod(seed % 2**64, 2**32) for _, seed in options], np.uint32)
    return SamplingSettings(seed=seeds, **columns)  # type: ignore[arg-type]


def only_known_tokens(model: Model, tokenizer: Tokenizer) -> Model:
    """Returns the model as text is drawn from it: with only the tokenizer's tokens, and each text one document."""
    vocabulary_size = min(model.vocabulary_size, tokenizer.vocabulary_size)
    return dataclasses.replace(model, vocabulary_size=vocabulary_size, document_start=-1)


def draw(
    logits: Float[Array, "B V"],
    settings: SamplingSettings,
    places: Int[Array, " B"],
    seen: Bool[Array, "B V"],
    allowed: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """Draws a token for each text, before which `places` tokens were drawn, and in which the tokens `seen` occur.

    With `allowed` only those tokens.
    """
    temperature, penalty = settings.temperature[:, None], settings.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def at_random() -> Int[Array, " B"]:
        scaled = logits / jnp.where(temperature > 0, temperature, 1)
        cut = (settings.top_k > 0) | (settings.top_p < 1)
        # Sorting a vocabulary takes longer than all else here: not done where no text asks for it.
        smallest = lax.cond(
            jnp.any(cut), _smallest_kept, lambda scaled, _: jnp.full(len(scaled), -jnp.inf), scaled, settings
        )
        smallest = jnp.maximum(smallest, jnp.max(scaled, axis=-1) + jnp.log(settings.min_p))
        keys = jax.random.wrap_key_data(settings.seed, impl="threefry2x32")  # below 2³¹ as jax.random.key has them
        keys = jax.vmap(jax.random.fold_in)(keys, places)
        kept = jnp.where(scaled >= smallest[:, None], scaled, -jnp.inf)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(settings.temperature > 0, drawn, likeliest)

    return lax.cond(jnp.any(settings.temperature > 0), at_random, lambda: likeliest)


def score(logits: Float[Array, "B V"], tokens: Int[Array, " B"], wanted: Bool[Array, ""]) -> Scores:
    """Returns the scores of drawn tokens; zeros where they aren't wanted, since a vocabulary takes long to sort."""
    most = min(MOST_RUNNERS_UP, logits.shape[1])

    def scores() -> Scores:
        found = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        theirs, likeliest = lax.top_k(found, most)
        return Scores(jnp.take_along_axis(found, tokens[:, None], 1)[:, 0], likeliest.astype(jnp.int32), theirs)

    return lax.cond(wanted, scores, lambda: no_scores(len(logits), most))


def no_scores(*shape: int) -> Scores:
    """Returns zeros in the place of scores, of a shape (..., R)."""
    return Scores(jnp.zeros(shape[:-1]), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))


def _smallest_kept(scaled: Float[Array, "B V"], settings: SamplingSettings) -> Float[Array, " B"]:
    """Returns the logit of the least likely token that top_k and top_p leave; equally likely ones are left together."""
    top_k, top_p = settings.top_k[:, None], settings.top_p[:, None]
    descending = jnp.sort(scaled, axis=-1, descending=True)
    kept = (jnp.arange(scaled.shape[-1]) < top_k) | (top_k == 0)
    probabilities = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of the likelier ones: the first token always stays
    kept &= (before < top_p) | (top_p >= 1)
    return jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1)
