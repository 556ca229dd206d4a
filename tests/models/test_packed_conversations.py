"""Packed conversations: their masked loss and its gradients are those of each conversation alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.data.loader import Batch
from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.models import family
from jaxgpt.models.blocks import Context
from jaxgpt.objectives import next_token
from jaxgpt.options.config import IN_DATA, Compute, Model
from tests.data.test_packing import conversations
from tests.nightly import nightly

MODEL = Model(layers=2, heads=2, width=8, context=24, vocabulary_size=50, document_start=IN_DATA)
LLAMA = dataclasses.replace(MODEL, family="llama", heads=4, kv_heads=2, feed_forward=12)
MODELS = {
    "gpt2": MODEL,
    "llama": LLAMA,
    "window": dataclasses.replace(LLAMA, window=3),
    "mixtral": dataclasses.replace(LLAMA, family="mixtral", experts=4, router_balance=0.0),
}
LENGTHS = (9, 4, 17, 2, 9, 4, 4, 2)


def grads(params, batch, model):
    """The sum of the losses over all targets, its gradients, and the number of targets."""
    context = Context(model, Compute(attention_block=8, classifier_chunk=16))
    scale = jnp.float64(1)
    value, _, found = next_token.loss_and_grads(family(model), params, batch, context, scale=scale)
    return value, found, next_token.count(batch)


compiled = jax.jit(grads, static_argnums=2)


@pytest.mark.parametrize("name", nightly(MODELS, every_time=["window"]))
def test_packed_is_unpacked_example_by_example(x64, name):
    model = MODELS[name]
    params = family(model).init(model, jax.random.key(0), jnp.float64)
    source = conversations(LENGTHS)
    tokens = np.asarray(source.tokens)
    tokens[:] = np.random.default_rng(1).integers(model.vocabulary_size, size=len(tokens))
    tokens[source.begins[:-1]] |= 1
    packed = source.packed(model.context)
    rows = list(source.rows(range(packed.rows), model.context))
    assert packed.rows < len(LENGTHS) // 2  # several in a row
    batch = Batch(*(jnp.asarray(np.stack(arrays)) for arrays in zip(*rows, strict=True)))
    value, found, count = compiled(params, batch, model)

    alone = dataclasses.replace(model, document_start=-1)
    total, wanted, targets = 0.0, jax.tree.map(jnp.zeros_like, found), 0
    for number in range(len(LENGTHS)):
        begin, end = source.begins[number : number + 2]
        ids, trained = source.tokens[begin:end].astype(np.int32), source.marks[begin + 1 : end] & 1 != 0
        example = Batch(jnp.asarray(ids[None, :-1]), jnp.asarray(np.where(trained, ids[1:], IGNORED)[None]))
        one, more, here = compiled(params, example, alone)
        total, wanted, targets = total + one, jax.tree.map(jnp.add, wanted, more), targets + here
        # The same conversation in the packed rows, with all other targets taken away.
        only = jnp.asarray(np.stack([_only(source, packed, row, number, model.context) for row in range(packed.rows)]))
        one_alone = batch._replace(targets=jnp.where(only, batch.targets, IGNORED))
        single, single_grads, _ = compiled(params, one_alone, model)
        _equal(single, one)
        jax.tree.map(_equal, single_grads, more)
    assert count == targets
    _equal(value, total)
    jax.tree.map(_equal, found, wanted)


def _only(source, packed, row, number, length):
    """Marks the places of one conversation in a row."""
    places, place = np.zeros(length, bool), 0
    for at in range(packed.bounds[row], packed.bounds[row + 1]):
        size = int(packed.lengths[at]) - 1
        places[place : place + size] = packed.chosen[at] == number
        place += size
    return places


def _equal(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)
