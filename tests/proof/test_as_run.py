"""The check of a compiled step: it passes the step as it is, and finds faults that are planted in a copy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxgpt.layers import attention, cross_entropy, router
from jaxgpt.models import gpt2
from jaxgpt.optimizers import adamw, muon, newton_schulz
from jaxgpt.options.config import Compute, Config, Lora, Model, Optimizer, Parallel, Run, Training
from jaxgpt.options.objective import Objective
from jaxgpt.parallel import mesh, sharding
from jaxgpt.proof import as_run, as_run_step, gradcheck_oracle
from jaxgpt.proof.as_run import Check, Row
from jaxgpt.training.step import compile_step

SIZES: dict[str, Any] = {"layers": 1, "heads": 2, "width": 12, "context": 6, "vocabulary_size": 11}
MODELS = {
    "gpt2": Model(**SIZES),
    "llama": Model(**SIZES, family="llama", kv_heads=1, feed_forward=10),
    "mixtral": Model(**SIZES, family="mixtral", kv_heads=1, feed_forward=10, experts=3, router_z=0.01),
}
ORACLES: dict[Config, Any] = {}


def config(family: str = "gpt2", devices: int = 1, zero: int = 0, rank: int = 0, **compute: Any) -> Config:
    """A small step of odd sizes: chunks, blocks and shards that divide nothing."""
    chosen = {"classifier_chunk": 5, "attention_block": 4, "attention": "blocks", "recompute": "none", **compute}
    return Config(
        model=MODELS[family],
        compute=Compute(**chosen),
        parallel=Parallel(devices=devices, zero=zero),
        training=Training(steps=10, batch_size=max(2, devices), sequence_length=6, micro_batches=2),
        lora=Lora(rank=rank),
    )


def with_muon(*arguments: Any, moments: Any = "device", **options: Any) -> Config:
    made = config(*arguments, **options)
    return dataclasses.replace(
        made, optimizer=Optimizer(name="muon"), parallel=dataclasses.replace(made.parallel, moments=moments)
    )


@pytest.fixture(autouse=True)
def one_oracle(monkeypatch):
    """Compiles the oracle of a configuration once: no fault is planted in what it computes."""

    def made(config: Config):
        return ORACLES.setdefault(config, gradcheck_oracle.make_oracle(config))

    monkeypatch.setattr(as_run, "make_oracle", made)


def rows(config: Config, *names: str) -> list[Row]:
    """The rows of the inputs of these names, of all without any."""
    check = Check(config)
    return [
        row for inputs in check.batches().inputs() if not names or inputs.name in names for row in check.rows(inputs)
    ]


def step_rows(config: Config) -> list[Row]:
    return list(as_run_step.rows(Check(config), compile_step(config)))


def failed(rows: list[Row]) -> list[tuple[str, str]]:
    assert rows
    return [(row.tensor, row.inputs) for row in rows if not row.passed]


# It passes


@pytest.mark.slow
def test_a_right_step_passes_on_eight_devices():
    found = rows(config(devices=8, zero=2)) + step_rows(config(devices=8, zero=2))
    assert failed(found) == []
    assert max(row.error for row in found) > 0
    assert {"blocks.qkv.weight (q)", "blocks.qkv.weight (k)", "final_norm.bias", "loss"} <= {
        row.tensor for row in found
    }
    assert {row.inputs for row in found} == {
        *("random", "masked", "repeated", "ties"),
        *(f"one device, {device}" for device in range(8)),
        *("the step", "the step, parameters", "the step, first moments", "the step, second moments"),
    }


IN_HOST_MEMORY = Parallel(devices=1, moments="host"), Parallel(devices=4, zero=1, moments="host")
CONFIGURATIONS = [
    *(config(family, dtype=dtype) for family in MODELS for dtype in ("float32", "bfloat16")),
    *(config("llama", recompute=level) for level in ("gelu", "norms", "projection", "block")),
    *(config("gpt2", devices=8, zero=zero, layers="scanned") for zero in (0, 1, 2, 3)),
    *(config("mixtral", devices=4, zero=zero, dtype="bfloat16", parameters="bfloat16") for zero in (0, 3)),
    *(config(family, rank=2, devices=devices, zero=devices // 2) for family in MODELS for devices in (1, 2)),
    dataclasses.replace(config("llama", rank=2, dtype="bfloat16"), lora=Lora(rank=2, base="nf4")),
    *(with_muon(family, dtype=dtype) for family in MODELS for dtype in ("float32", "bfloat16")),
    *(with_muon("llama", 4, zero, layers=layers) for zero, layers in enumerate(("scanned", "unrolled") * 2)),
    with_muon("mixtral", 4, 3, dtype="bfloat16", parameters="bfloat16", moments="host"),
    *(dataclasses.replace(config(devices=of.devices), parallel=of) for of in IN_HOST_MEMORY),
    dataclasses.replace(config("gpt2", devices=8), parallel=Parallel(devices=2, reproducible=True)),
    dataclasses.replace(config("gpt2", devices=2), model=dataclasses.replace(MODELS["gpt2"], dropout=0.2)),
    dataclasses.replace(config("llama"), model=dataclasses.replace(MODELS["llama"], document_start=3)),
    *(
        dataclasses.replace(config("llama", devices=2, zero=1, rank=rank), objective=Objective(name=name, **options))
        for rank in (0, 2)
        for name, options in (
            ("reward", {"centre": 0.3, "completions": 3}),
            ("preference", {"beta": 0.7}),
            ("policy", {"value_coefficient": 0.5, "kl_coefficient": 0.1, "entropy_coefficient": 0.1}),
        )
    ),
]  # fmt: skip


@pytest.mark.slow
def test_no_rounding_decides_where_a_token_goes():
    """There are many tokens and experts, and layers that write much into the residual stream."""
    model = dataclasses.replace(MODELS["mixtral"], width=128, heads=4, kv_heads=2, context=96, layers=4, experts=8)
    shape = Training(steps=10, batch_size=4, sequence_length=96)
    for rank in (0, 2):
        made = dataclasses.replace(config(rank=rank, dtype="bfloat16"), model=model, training=shape)
        assert failed(rows(made, "random", "masked", "repeated")) == []


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: f"{config.model.family}-{config.compute.dtype}")
def test_right_steps_pass(config):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=2))
    if config.parallel.reproducible:
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=8))
    assert failed(rows(config) + step_rows(config)) == []


# And finds what is wrong


def on_device(number: int) -> Any:
    return lax.axis_index(mesh.AXIS) == number


def test_a_kernel_that_is_wrong_on_one_card(monkeypatch):
    """Its device is named, and the others are right."""
    right = attention.backward

    def backward(residuals, dy, **options):
        dq, dk, dv = right(residuals, dy, **options)
        return dq, jnp.where(on_device(5), 1.01 * dk, dk), dv

    monkeypatch.setattr(attention, "backward", backward)
    found = failed(rows(config(devices=8, zero=2), "one device"))
    assert ("blocks.qkv.weight (k)", "one device, 5") in found
    assert {inputs for _, inputs in found} == {"one device, 5"}


@pytest.mark.parametrize(
    "what", ["another rank's shard", pytest.param("the end of the tensor", marks=pytest.mark.slow)]
)
def test_gradients_that_are_written_out_of_bounds(monkeypatch, what):
    """A rank's last number is written over the next one's first, or behind the tensor's end."""
    right = lax.psum_scatter

    def psum_scatter(array, axis, **options):
        mine = right(array, axis, **options)
        if mine.shape[-1] < 2:
            return mine
        if what == "the end of the tensor":
            return mine.at[..., -1].set(jnp.where(on_device(7), 1.0, mine[..., -1]))
        before = lax.ppermute(mine[..., -1], axis, [(device, (device + 1) % 8) for device in range(8)])
        return mine.at[..., 0].set(jnp.where(on_device(3), before, mine[..., 0]))

    monkeypatch.setattr(sharding.lax, "psum_scatter", psum_scatter)
    found = [row for row in rows(config(devices=8, zero=2), "random") if not row.passed]
    assert found
    if what == "the end of the tensor":  # of 12 numbers, of which each device has 2 and two have none
        assert "the zeros that fill up the shards were written over" in {row.fault for row in found}


@pytest.mark.slow
def test_an_update_that_is_written_out_of_bounds(monkeypatch):
    """The gradients are right; the new parameters of one device's shard are not."""
    right = adamw.update

    def update(params, *arguments, **options):
        new, moments = right(params, *arguments, **options)
        bias = new.final_norm.bias
        bias = bias.at[0].set(jnp.where(on_device(1), params.final_norm.bias[0], bias[0]))
        return new._replace(final_norm=new.final_norm._replace(bias=bias)), moments

    monkeypatch.setattr(adamw, "update", update)
    assert failed(step_rows(config(devices=8, zero=3))) == [("final_norm.bias", "the step, parameters")]


@pytest.mark.slow
def test_devices_that_come_to_differ(monkeypatch):
    """Each device has all parameters, as nothing is sharded, and one of them updates its own in another way."""
    right = adamw.update

    def update(params, *arguments, **options):
        new, moments = right(params, *arguments, **options)
        return jax.tree.map(lambda array: jnp.where(on_device(2), 1.0001 * array, array), new), moments

    monkeypatch.setattr(adamw, "update", update)
    faults = {row.fault for row in step_rows(config(devices=4)) if not row.passed}
    assert faults == {"device 2 has other numbers than device 0"}


@pytest.mark.slow
def test_ties_of_a_router(monkeypatch):
    """A choice's gradient goes to every expert with as large a score: the same, unless there are ties."""

    def one_hot(chosen, scores):
        least = jnp.min(jnp.take_along_axis(scores, chosen, axis=-1), axis=-1, keepdims=True)
        hot = jax.nn.one_hot(chosen, scores.shape[-1], dtype=scores.dtype)
        return hot.at[:, 0].add((scores >= least) & (jnp.sum(hot, axis=1) == 0))

    monkeypatch.setattr(router, "_one_hot", one_hot)
    found = failed(rows(config("mixtral"), "random", "ties"))
    assert ("blocks.experts.router.weight", "ties") in found
    assert {inputs for _, inputs in found} == {"ties"}


@pytest.mark.slow
def test_ties_of_a_maximum(monkeypatch):
    """Softmax's largest logit gets a part of the gradient back for each of its equals but itself."""
    right = cross_entropy.backward

    def backward(residuals, dloss, **options):
        dlogits = right(residuals, dloss, **options)
        largest = residuals.logits == jnp.max(residuals.logits, axis=-1, keepdims=True)
        more = jnp.sum(largest, axis=-1, keepdims=True) - 1
        return dlogits + jnp.where(largest, more * dloss[:, None], 0)

    monkeypatch.setattr(cross_entropy, "backward", backward)
    found = failed(rows(config(), "random", "ties"))
    assert ("embedding.token", "ties") in found
    assert {inputs for _, inputs in found} == {"ties"}


def test_a_leaf_whose_gradient_is_zero(monkeypatch):
    right = gpt2.block_backward

    def block_backward(*arguments):
        grads, dx = right(*arguments)
        return grads._replace(mlp_out=grads.mlp_out._replace(bias=jnp.zeros_like(grads.mlp_out.bias))), dx

    monkeypatch.setattr(gpt2, "block_backward", block_backward)
    found = [row for row in rows(config(layers="scanned"), "random") if not row.passed]
    assert [(row.tensor, row.fault) for row in found] == [("blocks.mlp_out.bias", "0, and the oracle's is not")]


def test_adapters_that_never_move(monkeypatch):
    """The update of one adapter is lost."""
    right = adamw.update

    def update(params, *arguments, **options):
        new, moments = right(params, *arguments, **options)
        return new._replace(blocks=({**new.blocks[0], "mlp.c_fc": params.blocks[0]["mlp.c_fc"]},)), moments

    monkeypatch.setattr(adamw, "update", update)
    found = [row for row in step_rows(config(rank=2)) if not row.passed]
    assert {row.tensor for row in found} == {"blocks.mlp.c_fc.a", "blocks.mlp.c_fc.b"}


# Muon

MATRICES = {f"blocks.{name}.weight" for name in ("qkv", "attention_out", "mlp_in", "mlp_out")}


def test_a_momentum_that_is_never_updated(monkeypatch):
    right = muon.update

    def update(params, moments, *arguments, **options):
        new, changed = right(params, moments, *arguments, **options)
        return new, changed._replace(first=changed.first._replace(blocks=moments.first.blocks))

    monkeypatch.setattr(muon, "update", update)
    found = [row for row in step_rows(with_muon(layers="scanned", moments="host")) if not row.passed]
    assert {(row.inputs, row.fault) for row in found} == {("the step, first moments", "it doesn't move")}
    assert {row.tensor for row in found} >= MATRICES


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_owner_that_gives_another_layers_update(monkeypatch, dtype):
    right = sharding.Layout.to_shards
    monkeypatch.setattr(sharding.Layout, "to_shards", lambda *arguments: jnp.roll(right(*arguments), 1, axis=0))
    made = with_muon(devices=4, zero=1, dtype=dtype)
    made = dataclasses.replace(made, model=dataclasses.replace(made.model, layers=2))
    assert failed(step_rows(made)) == [
        (f"blocks.{name}.weight", "the step, parameters") for name in ("qkv", "attention_out", "mlp_in", "mlp_out")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_matrix_that_is_orthogonalised_transposed(monkeypatch, dtype):
    """It shows in square ones: others are laid on their side in any case."""
    right = newton_schulz.orthogonalise

    def orthogonalise(matrices):
        found = right(matrices)
        return found.mT if found.shape[1] == found.shape[2] else found

    monkeypatch.setattr(newton_schulz, "orthogonalise", orthogonalise)
    assert failed(step_rows(with_muon(dtype=dtype))) == [
        (f"blocks.{name}.weight", "the step, parameters") for name in ("qkv", "attention_out")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_that_are_orthogonalised_as_one(monkeypatch, dtype):
    monkeypatch.setattr(gpt2, "columns", lambda model: {})
    found = failed(step_rows(dataclasses.replace(with_muon(dtype=dtype), run=Run(name=dtype))))
    assert found == [("blocks.qkv.weight", "the step, parameters")]


@pytest.mark.slow
def test_a_coefficient_that_is_off_by_a_thousandth(monkeypatch):
    *others, (a, b, c) = newton_schulz.COEFFICIENTS
    monkeypatch.setattr(newton_schulz, "COEFFICIENTS", (*others, (1.001 * a, b, c)))
    assert {name for name, _ in failed(step_rows(with_muon()))} == MATRICES
