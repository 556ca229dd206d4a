"""Training by products of 8 bits: the magnitudes that a step keeps, on devices and micro-batches, and its error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.data.loader import Batch
from jaxgpt.errors import UserError
from jaxgpt.layers import fp8 as layer
from jaxgpt.options import checks
from jaxgpt.options.config import Compute, Config, Lora, Model, Objective, Optimizer, Parallel, Training
from jaxgpt.training import fp8, fp8_error, memory_plan, step
from jaxgpt.training.state import init_state
from tests import small_run
from tests.runs.test_resuming import metrics, state

MODEL = Model(layers=2, heads=2, width=16, context=8, vocabulary_size=11)
CONFIG = Config(
    model=MODEL,
    compute=Compute(products="fp8", fp8_history=3, classifier_chunk=16, layers="unrolled"),
    training=Training(batch_size=4, sequence_length=8, steps=10, stop_after_nonfinite=5),
    optimizer=Optimizer(learning_rate=0.01),
    parallel=Parallel(devices=1),
)


def changed(section, config=CONFIG, **options):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **options)})


def batch(micro_batches=1, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 11, (4, 9), dtype=np.int32)
    return Batch(*(jnp.asarray(part).reshape(micro_batches, -1, 8) for part in (tokens[:, :-1], tokens[:, 1:])))


def stepped(config, data, steps=2):
    """The state after so many steps from the calibrated first one, and the metrics of the last."""
    first = fp8_error.Gauge(config).calibrated(init_state(config), None, data)
    train_step, found = step.make_train_step(config), first
    for _ in range(steps):
        found, metrics = train_step(found, None, data)
    return found, metrics


@pytest.fixture(scope="module")
def one_device():
    found, metrics = stepped(CONFIG, batch())
    return np.asarray(found.magnitudes), float(metrics.loss)


def test_a_history_keeps_the_newest_steps_that_were_taken():
    history = fp8.init(init_state(CONFIG).params, CONFIG.compute)
    assert history is not None
    assert history.shape == (3, 2, 4, 3)
    for number, taken in ((1.0, True), (9.0, False), (2.0, True), (3.0, True), (0.5, True)):
        history = fp8.update(history, jnp.full((2, 4, 3), number), jnp.bool_(taken))
    np.testing.assert_array_equal(history[:, 0, 0, 0], [0.5, 3, 2])
    np.testing.assert_array_equal(fp8.expected(history), np.full((2, 4, 3), 3))
    history = fp8.update(history, jnp.full((2, 4, 3), jnp.nan), jnp.bool_(True))
    np.testing.assert_array_equal(history[:, 0, 0, 0], [0.5, 0.5, 3])


def test_clamped_tensors_are_counted():
    """Scales for 3 have room for 3.5 in e4m3; of a gradient in e5m2 too, since 57344 = 448 · 128."""
    expected = jnp.full((2, 4, 3), 3.0)
    seen = expected.at[0, 0, 0].set(3.4).at[1, 0, 0].set(3.6).at[1, 3, 2].set(100)
    assert fp8.clamped(expected, seen) == 2


def test_a_step_scales_by_what_was_seen_before_and_keeps_what_it_sees(one_device):
    history, loss = one_device
    assert np.isfinite(loss)
    assert (history > 0).all()  # the calibration's and two steps'
    state, metrics = stepped(CONFIG, batch(), steps=1)
    np.testing.assert_array_equal(np.asarray(state.magnitudes)[:2], history[1:])
    assert metrics.family["fp8_clamped"] == 0


def test_a_skipped_step_leaves_the_history(monkeypatch):
    """The step is skipped for an infinite activation, which in 8 bits is NaN."""
    state = fp8_error.Gauge(CONFIG).calibrated(init_state(CONFIG), None, batch())
    params = state.params
    bad = params.blocks[1]._replace(mlp_norm=params.blocks[1].mlp_norm._replace(bias=jnp.full(16, jnp.inf)))
    state = state._replace(params=params._replace(blocks=(params.blocks[0], bad)))
    before = np.asarray(state.magnitudes)
    after, metrics = step.make_train_step(CONFIG)(state, None, batch())
    assert not metrics.taken
    assert metrics.nonfinite == 1
    np.testing.assert_array_equal(after.magnitudes, before)


OTHERWISE = {
    "micro-batches": changed("training", batch_size=1, micro_batches=4),
    "two devices": changed("parallel", devices=2),
    **{f"four devices, ZeRO {zero}": changed("parallel", devices=4, zero=zero) for zero in (1, 2, 3)},
    "scanned, two devices, ZeRO 3": changed("compute", changed("parallel", devices=2, zero=3), layers="scanned"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERWISE)
def test_magnitudes_are_those_of_the_whole_batch(one_device, name):
    """They equal one device's but for the order of sums, which puts an 8-bit number here and there an eighth off."""
    config = OTHERWISE[name]
    state, metrics = stepped(config, batch(config.training.micro_batches))
    assert float(metrics.loss) == pytest.approx(one_device[1], rel=2e-3)
    found, expected = (np.asarray(history)[:2] for history in (state.magnitudes, one_device[0]))
    np.testing.assert_allclose(found[1, ..., :2], expected[1, ..., :2], rtol=0.02)  # before any update
    np.testing.assert_allclose(found, expected, rtol=0.3)


def test_without_products_of_8_bits_there_is_no_history():
    plain = changed("compute", products="dtype")
    assert init_state(plain).magnitudes is None
    assert init_state(changed("compute", fp8_scaling="current")).magnitudes is None
    one, other = (
        jax.tree.leaves(jax.eval_shape(lambda config=config: init_state(config))) for config in (plain, CONFIG)
    )
    assert len(other) == len(one) + 1


def test_current_scaling_needs_no_history():
    config = changed("compute", fp8_scaling="current")
    found, metrics = step.make_train_step(config)(init_state(config), None, batch())
    assert metrics.taken
    assert found.magnitudes is None
    assert "fp8_clamped" not in metrics.family


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.slow
def test_errors_are_those_of_the_gradients(zero):
    """NumPy computes them from two gradients. e5m2 rounds by 1/8 at most, with random sign."""
    config = changed("parallel", devices=1 + (zero > 0), zero=zero)
    gauge = fp8_error.Gauge(config)
    state = gauge.calibrated(init_state(config), None, batch())
    errors = gauge.errors(state, None, batch())
    plain = dataclasses.replace(config, compute=dataclasses.replace(config.compute, products="dtype"))
    rounded, _ = gauge._gradients(state.params, None, batch(), fp8.expected(state.magnitudes))
    exact, _ = fp8_error._program(plain, gauge.layout)(state.params, None, batch(), None)

    def off(choose):
        a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(choose(tree))]) for tree in (rounded, exact))
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    assert errors["fp8_error"] == pytest.approx(off(lambda grads: grads), rel=1e-4)
    mlp_in = [off(lambda grads, at=at: grads.blocks[at].mlp_in.weight) for at in (0, 1)]
    assert errors["fp8_error_mlp_in"] == pytest.approx(
        off(lambda grads: [block.mlp_in.weight for block in grads.blocks]), rel=1e-4
    )
    assert errors["fp8_error_largest"] >= max(mlp_in) * (1 - 1e-4)
    assert 0.001 < errors["fp8_error"] < 0.1


def test_the_plan_has_residuals_of_8_bits_and_the_second_gradient():
    keep = changed("compute", recompute="none", dtype="bfloat16", layers="scanned")
    plain = changed("compute", keep, products="dtype")
    sizes, without = memory_plan.measure(keep), memory_plan.measure(plain)
    tokens = 4 * 8
    assert without.activations["mlp_out"] == 2 * 2 * tokens * 64
    assert sizes.activations["mlp_out"] == 2 * (tokens * 64 + 2 * 4)  # with scale and magnitude
    assert sizes.second_gradient == sizes.gradients
    assert without.second_gradient == memory_plan.measure(changed("compute", keep, fp8_error_every=0)).second_gradient
    assert without.second_gradient == 0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed("model", family="mixtral", experts=2), "--model.experts is 2; with --compute.products fp8"),
        (dataclasses.replace(CONFIG, lora=Lora(rank=2)), "--lora.rank is 2; with --compute.products fp8"),
        (
            changed("compute", dataclasses.replace(CONFIG, objective=Objective(name="policy")), fp8_head=True),
            "--objective.name is policy; with --compute.products fp8 it must be next_token for --compute.fp8-head",
        ),
        (changed("parallel", reproducible=True), "--parallel.reproducible is True; with --compute.products fp8"),
    ],
)
def test_what_has_no_products_of_8_bits_is_refused(config, said):
    config = changed("training", config, init_from="a")
    with pytest.raises(UserError, match=said):
        checks.check(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with small_run.in_folder(tmp_path_factory.mktemp("work"), 100, small_run.WORDS[:6]) as folder:
        yield folder


RUN = {
    "training.steps": 8,
    "training.evaluate-every": 4,
    "sampling.tokens": 4,
    "compute.products": "fp8",
    "compute.fp8-error-every": 3,
    "checkpoint.every-steps": 4,
    "checkpoint.keep-last": 9,
}


@pytest.mark.slow
def test_a_resumed_run_has_the_same_scales(folder):
    """State and metrics to the last bit; the errors are in metrics.jsonl, and on the report's page."""
    command = small_run.words(RUN)
    whole = small_run.run(command, "whole")
    assert whole.status == 0
    assert small_run.run([*command, "--training.steps", "4"], "stopped").status == 0
    assert small_run.run([*command, "--resume"], "stopped").status == 0
    one, other = state(whole.folder), state(folder / "runs" / "stopped")
    assert (np.asarray(one.magnitudes)[:9] > 0).all()
    jax.tree.map(np.testing.assert_array_equal, other.magnitudes, one.magnitudes)
    assert [line for line in metrics(folder / "runs" / "stopped") if line["step"] > 4] == [
        line for line in metrics(whole.folder) if line["step"] > 4
    ]
    errors = [line for line in whole.metrics if "fp8_error" in line]
    assert [line["step"] for line in errors] == [3, 6]
    assert {name for name in errors[0] if name.startswith("fp8")} == {
        "fp8_error",
        "fp8_error_largest",
        *(f"fp8_error_{name}" for name in ("qkv", "attention_out", "mlp_in", "mlp_out")),
    }
    assert "Error of the gradient by products of 8 bits" in (whole.folder / "report.html").read_text()
    refused = small_run.run([*small_run.words(RUN, compute_products="dtype"), "--resume"], "stopped")
    assert refused.status == 2
    assert "--compute.products was fp8 and is dtype" in refused.errors


def test_rounding_is_in_the_steps_program():
    """The step rounds x, w and the gradient of each of 8 products to 8 bits before it is compiled."""
    text = step.make_train_step(CONFIG).lower(*step.shapes(CONFIG)).as_text()
    assert text.count("f8E5M2>") >= 8
    assert text.count("f8E4M3FN>") >= 16
    assert layer.FORMATS.forward == jnp.float8_e4m3fn
