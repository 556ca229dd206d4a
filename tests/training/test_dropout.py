"""Training with dropout: the same masks however a step is computed, and none where none is wanted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.commands import train
from jaxgpt.data.loader import Batch
from jaxgpt.errors import UserError
from jaxgpt.evaluation.scoring import make_validation_loss
from jaxgpt.kernels.choose import choose_attention
from jaxgpt.options.config import Compute, Config, Model, Objective, Parallel, Training
from jaxgpt.training import step
from jaxgpt.training.state import init_state, layout_of

MODEL = Model(layers=2, heads=2, width=8, context=8, vocabulary_size=11, dropout=0.25)
CONFIG = Config(
    model=MODEL,
    compute=Compute(attention_block=8, layers="scanned", recompute="none"),
    training=Training(batch_size=4, sequence_length=8, steps=10),
    parallel=Parallel(devices=1),
)


def batch(micro_batches=1):
    tokens = np.random.default_rng(0).integers(0, 11, (4, 9), dtype=np.int32)
    return Batch(*(jnp.asarray(part).reshape(micro_batches, -1, 8) for part in (tokens[:, :-1], tokens[:, 1:])))


def changed(section, **options):
    return dataclasses.replace(CONFIG, **{section: dataclasses.replace(getattr(CONFIG, section), **options)})


def after_two_steps(config, data):
    train_step, state = step.make_train_step(config), init_state(config)
    losses = []
    for _ in range(2):
        state, metrics = train_step(state, None, data)
        losses.append(float(metrics.loss))
    layout = layout_of(config)
    params = layout.unshard(state.params)
    if type(params.blocks) is tuple:
        params = params._replace(blocks=jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.blocks))
    return losses, jax.tree.map(np.asarray, params)


@pytest.fixture(scope="module")
def expected():
    return after_two_steps(CONFIG, batch())


OTHERWISE = {
    "every block again": (changed("compute", recompute="block"), 1),
    "the branch's sum again": (changed("compute", recompute="projection"), 1),
    "unrolled": (changed("compute", layers="unrolled"), 1),
    "blocks of 3 queries": (changed("compute", attention_block=3), 1),
    "micro-batches": (changed("training", batch_size=2, micro_batches=2), 2),
    "two devices": (changed("parallel", devices=2), 1),
    "two devices, ZeRO 3": (changed("parallel", devices=2, zero=3), 1),
}


NIGHTLY = ("two devices", "blocks of 3 queries", "unrolled", "the branch's sum again", "two devices, ZeRO 3")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in NIGHTLY)) for name in OTHERWISE]
)
def test_the_masks_are_the_same_however_the_step_is_computed(expected, name):
    """Another mask anywhere would move the loss by percents; what is left is the rounding of sums in another order."""
    config, micro_batches = OTHERWISE[name]
    losses, params = after_two_steps(config, batch(micro_batches))
    np.testing.assert_allclose(losses, expected[0], rtol=2e-6)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def test_masks_differ_from_step_to_step_and_with_the_seed():
    state, layout = init_state(CONFIG), layout_of(CONFIG)

    @jax.jit
    def loss(state):
        key = step.key_of_masks(state)
        return step.batch_loss_and_grads(state.params, None, batch(), CONFIG, layout, key)[0]

    found = [loss(state), loss(state._replace(step=state.step + 1)), loss(state._replace(key=jax.random.key(9)))]
    assert len({float(value) for value in found}) == 3
    assert float(loss(state)) == float(found[0])


def test_a_model_without_dropout_draws_nothing_in_its_program():
    """Threefry's rounds are exclusive ors, of which a step has no other."""

    def program(config):
        return step.make_train_step(config).lower(*step.shapes(config)).as_text()

    assert "stablehlo.xor" in program(CONFIG)
    assert "stablehlo.xor" not in program(changed("model", dropout=0.0))


def test_validation_has_no_dropout():
    tokens, params = np.arange(40, dtype=np.uint16) % 11, init_state(CONFIG).params
    losses = [make_validation_loss(c, tokens, 8)(params) for c in (CONFIG, changed("model", dropout=0.0))]
    assert losses[0] == losses[1]


def test_the_fused_kernel_says_that_it_has_no_dropout():
    with pytest.raises(UserError, match=r"no dropout \(--model.dropout is 0.25\)"):
        choose_attention(MODEL, Compute(attention="cudnn", dtype="bfloat16"), 8)


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [("model", "dropout", 0.1), ("checkpoint", "keep_best", True), ("training", "patience", 2)],
)
def test_a_policy_has_no_use_for_it(section, option, value):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dropout=0.0))
    config = dataclasses.replace(config, objective=Objective(name="policy"))
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{option: value})})
    with pytest.raises(UserError, match=f"--{section}.{option.replace('_', '-')}: leave it away"):
        train._check_policy(config)
