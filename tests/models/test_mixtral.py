"""The mixture of experts as a family: its gradients, counts, losses, devices, and all that a run does with it."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.data.loader import Batch
from jaxgpt.models import blocks, cache, mixtral
from jaxgpt.models.blocks import Context
from jaxgpt.objectives import next_token
from jaxgpt.options.config import Compute, Config, Model, Optimizer, Parallel, Training
from jaxgpt.proof import objective_cases
from jaxgpt.runs.metrics_file import read_metrics
from jaxgpt.training import step
from jaxgpt.training.resharding import Resharding
from tests import whole

SMALL = Model(
    layers=2,
    heads=2,
    kv_heads=1,
    width=8,
    feed_forward=6,
    context=8,
    vocabulary_size=11,
    family="mixtral",
    experts=4,
    router_balance=0.3,
    router_z=0.2,
)
MIXTRAL_8X7B = Model(
    layers=32,
    heads=32,
    kv_heads=8,
    width=4096,
    feed_forward=14336,
    context=32768,
    vocabulary_size=32000,
    family="mixtral",
    experts=8,
)


@pytest.mark.parametrize(("recompute", "layers"), whole.levels())
def test_gradients(assert_exact, recompute, layers):
    compute = Compute(recompute=recompute, layers=layers, attention_block=2, classifier_chunk=4)
    assert_exact(objective_cases.model_case(jax.random.key(0), 2, 5, SMALL, compute))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"experts": 1, "experts_per_token": 1}, marks=pytest.mark.slow),
        pytest.param({"experts_per_token": 4, "window": 2}, marks=pytest.mark.slow),
        {"router_softmax": "before", "tied": True, "document_start": 1},
    ],
    ids=["one expert", "all experts", "before"],
)
def test_gradients_of_relatives(assert_exact, options):
    model = dataclasses.replace(SMALL, **options)
    assert_exact(objective_cases.model_case(jax.random.key(0), 2, 5, model, Compute(classifier_chunk=4)))


def test_parameters_and_what_decays():
    """Mixtral 8x7B's by hand: attention 2 (4096·4096 + 4096·1024), norms, router 4096·8, experts 3·4096·14336 each."""
    C, F, V, L = 4096, 14336, 32000, 32
    attention, expert = 2 * C * C + 2 * C * 1024, 3 * C * F
    for experts, active in ((8, False), (2, True)):
        by_hand = 2 * V * C + C + L * (attention + 2 * C + 8 * C + experts * expert)
        assert mixtral.parameter_count(MIXTRAL_8X7B, active=active) == by_hand
    assert mixtral.parameter_count(MIXTRAL_8X7B) == 46_702_792_704
    assert mixtral.parameter_count(MIXTRAL_8X7B, active=True) == 12_879_925_248
    assert "46,702,792,704 parameters, 12,879,925,248 of them for a token" in mixtral.describe(MIXTRAL_8X7B)

    for model in (SMALL, dataclasses.replace(SMALL, tied=True, layers=3, query_key_norm=True)):
        shapes = jax.eval_shape(lambda model=model: mixtral.init(model, jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == mixtral.parameter_count(model, padded=True)
    shapes = jax.eval_shape(lambda: mixtral.init(SMALL, jax.random.key(0)))
    marked = jax.tree.leaves_with_path(mixtral.decays(shapes))
    names = {jax.tree_util.keystr(path, simple=True, separator=".") for path, on in marked if on}
    experts = {f"blocks.experts.{name}" for name in ("router.weight", "w_in", "w_out")}
    attention_names = {f"blocks.{name}.weight" for name in ("qkv", "attention_out")}
    assert names == {"embedding.token", "head.weight", *experts, *attention_names}


def test_operations_are_those_of_the_active_parameters():
    """Six for each weight of a product that a token meets, beside attention's."""
    T = 1
    attention = 6 * 2 * MIXTRAL_8X7B.width * MIXTRAL_8X7B.layers  # q kᵀ and p v of one key
    table, norms = 32000 * 4096, 65 * 4096
    in_products = mixtral.parameter_count(MIXTRAL_8X7B, active=True) - table - norms
    assert mixtral.flops_per_token(MIXTRAL_8X7B, T) == 6 * in_products + attention


def test_weights_at_the_start():
    params = jax.jit(lambda: mixtral.init(dataclasses.replace(SMALL, width=64, layers=8), jax.random.key(0)))()
    experts = params.blocks.experts
    assert float(experts.w_in.std()) == pytest.approx(0.02, rel=0.02)
    assert float(experts.w_out.std()) == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
    assert float(experts.router.weight.std()) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(experts.w_in[0, 0], experts.w_in[0, 1])


def random_params(model=SMALL):
    """Stacked, in float32, none of them special."""
    shapes = jax.eval_shape(lambda: mixtral.init(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)
    for table in (params.embedding.token, params.head.weight):
        table[model.vocabulary_size :] = 0
    return params


def test_the_routers_weight_stays_in_float32():
    """Activations are bfloat16, and the experts' weights are cast to it."""
    shapes = jax.eval_shape(lambda: mixtral.init(SMALL, jax.random.key(0)))
    for params in (shapes, shapes._replace(blocks=blocks.block_shapes(shapes))):
        experts = jax.eval_shape(lambda params: blocks.cast(params, jnp.bfloat16), params).blocks.experts
        if params is shapes:
            assert experts.router.weight.dtype == jnp.float32
            assert (experts.w_in.dtype, experts.w_out.dtype) == (jnp.bfloat16, jnp.bfloat16)
    block = jax.eval_shape(lambda block: blocks.cast(block, jnp.bfloat16), blocks.block_shapes(shapes))
    assert (block.experts.router.weight.dtype, block.experts.w_in.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("form", ["stacked", "apart"])
def test_a_cache_gives_the_logits_of_the_whole_text(form):
    """Prompts of different lengths, then token by token."""
    context = Context(SMALL, Compute(recompute="none"))
    params = random_params()
    texts = np.random.default_rng(0).integers(SMALL.vocabulary_size, size=(2, 8), dtype=np.int32)
    expected = jax.jit(functools.partial(whole.logits, model=SMALL, compute=Compute()))(params, texts)
    params = jax.tree.map(jnp.asarray, params)
    params = params if form == "stacked" else blocks.unstacked(params)
    prefill = jax.jit(lambda *of: cache.prefill(mixtral, *of, context))
    decode = jax.jit(lambda *of: cache.decode(mixtral, *of, context))
    lengths, caches = np.array([4, 1], np.int32), []
    for text, length in enumerate(lengths):
        padded = np.where(np.arange(6) < length, texts[text, :6], 9)[None]  # what is behind must not matter
        logits, filled = prefill(params, cache.init_cache(params, 8, SMALL, "float32"), padded, length)
        np.testing.assert_allclose(logits[0], expected[text, length - 1], rtol=1e-4, atol=1e-5)
        caches.append(filled)
    for _ in range(4):
        logits, caches = decode(params, tuple(caches), texts[np.arange(2), lengths], lengths)
        np.testing.assert_allclose(logits, expected[np.arange(2), lengths], rtol=1e-4, atol=1e-5)
        lengths += 1


def config_of(devices: int, zero: int, micro_batches: int = 2) -> Config:
    return Config(
        model=dataclasses.replace(SMALL, experts=3, feed_forward=5),  # no size is divisible by 8
        compute=Compute(classifier_chunk=8),
        parallel=Parallel(devices=devices, zero=zero),
        training=Training(steps=5, micro_batches=micro_batches, batch_size=8, sequence_length=5),
        optimizer=Optimizer(learning_rate=0.01, clip_norm=0.0, weight_decay=0.0),
    )


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_devices_have_the_mean_of_their_parts_losses(zero):
    """A step's loss, metrics and gradient, of 8 devices with a sequence of each of 2 micro-batches."""
    config = config_of(8, zero)
    batch = Batch(*np.random.default_rng(0).integers(11, size=(2, 2, 8, 5), dtype=np.int32))
    placement = Resharding(config)
    state = placement.first_state()
    before = jax.tree.map(np.asarray, blocks.stacked(placement.to_save(state).params))
    after, metrics = step.make_train_step(config)(state, None, batch)

    context = Context(config.model, config.compute)
    one = jax.jit(lambda params, batch: next_token.loss_and_grads(mixtral, params, batch, context))
    parts = [one(before, Batch(*(array[a, b : b + 1] for array in batch[:2]))) for a in range(2) for b in range(8)]
    loss, named, grads = jax.tree.map(lambda *of: np.mean(of, axis=0), *parts)
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
    assert {name: float(value) for name, value in metrics.family.items()} == pytest.approx(named, rel=1e-5)
    norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads)))
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-4)
    # AdamW's first step is the sign of the gradient, where it is far above epsilon.
    moved = jax.tree.map(np.asarray, blocks.stacked(placement.to_save(after).params))
    for new, old, grad in zip(*map(jax.tree.leaves, (moved, before, grads)), strict=True):
        clear = np.abs(grad) > 1e-5
        np.testing.assert_array_equal(np.sign(old - new)[clear], np.sign(grad)[clear])


def command(capsys, *words: str) -> str:
    assert cli.main(words) == 0
    return capsys.readouterr().out


def test_a_run_records_its_router_is_resumed_generates_and_is_evaluated(work, capsys):
    sizes = {"layers": 1, "heads": 2, "width": 16, "context": 16, "experts": 4, "router-z": 0.001}
    words = [word for key, value in sizes.items() for word in (f"--model.{key}", str(value))]
    words += ["--model.family", "mixtral", "--data.text", "text.txt", "--data.tokenizer", "characters"]
    words += ["--training.batch-size", "2", "--sampling.tokens", "3", "--run.no-report", "--training.steps", "4"]
    printed = command(capsys, *words, "--run.name", "whole", "--checkpoint.every-steps", "2")
    assert "model     Mixtral, " in printed
    command(capsys, *words, "--run.name", "cut", "--checkpoint.every-steps", "2")
    Path("runs/cut/checkpoints/4/SHA256SUMS").unlink()
    assert "resuming after step 2" in command(capsys, *words, "--run.name", "cut", "--resume")
    whole_run, cut = (
        [line for line in read_metrics(Path(f"runs/{name}/metrics.jsonl")) if "loss" in line]
        for name in ("whole", "cut")
    )
    for key in ("loss", "router_balance", "router_z", "router_largest_load"):
        assert [line[key] for line in whole_run] == [line[key] for line in cut]
    assert all(0.5 <= line["router_largest_load"] <= 1 for line in whole_run)  # of 4 experts, 2 of them a token's
    assert all(line["router_balance"] > 1.9 for line in whole_run)
    assert command(capsys, "generate", "--run", "runs/whole", "--prompt", "to be", "--tokens", "5")
    assert "loss" in command(capsys, "evaluate", "--run", "runs/whole")


def test_what_no_mixture_has_is_refused(fails):
    words = ["--config", "quickstart", "--model.family", "mixtral"]
    assert "--model.experts is 0" in fails(*words)
    message = fails(*words, "--model.experts", "2", "--model.experts-per-token", "3")
    assert "--model.experts-per-token is 3, but --model.experts is 2" in message
    assert "--model.router-balance" in fails(*words, "--model.experts", "2", "--model.router-balance", "-1")
