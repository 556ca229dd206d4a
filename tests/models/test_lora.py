"""Adapters of whole models: their gradients, the base in each storage, and that nothing is computed for the base."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.data.loader import Batch
from jaxgpt.errors import UserError
from jaxgpt.layers import quantised
from jaxgpt.models import blocks, family, lora
from jaxgpt.objectives import next_token
from jaxgpt.options.config import Compute, Config, Lora, Model, Parallel, Training
from jaxgpt.proof import objective_cases
from jaxgpt.training import memory_plan, step
from jaxgpt.training.device_memory import Capacity
from jaxgpt.training.resharding import Resharding
from jaxgpt.training.state import frozen_shapes, initial_state, layout_of, working
from tests.nightly import nightly

GPT2 = Model(layers=2, heads=2, width=64, context=16, vocabulary_size=50)
LLAMA = dataclasses.replace(GPT2, family="llama", heads=4, kv_heads=2, feed_forward=128)
MIXTRAL = dataclasses.replace(LLAMA, family="mixtral", experts=3)
NORMED = dataclasses.replace(LLAMA, query_key_norm=True, tied=True, window=3)
MODELS = {"gpt2": GPT2, "llama": LLAMA, "normed": NORMED, "mixtral": MIXTRAL}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 8), dtype=np.int32))


def config(model: Model = LLAMA, **changes) -> Config:
    """A run of adapters; `lora_rank=4` changes an option."""
    made = Config(
        model=model,
        compute=Compute(attention="blocks", attention_block=4, classifier_chunk=8),
        training=Training(batch_size=8, sequence_length=8, init_from="a base"),
        lora=Lora(rank=2, base="float32"),
    )
    for name, value in changes.items():
        section, _, key = name.partition("_")
        made = dataclasses.replace(made, **{section: dataclasses.replace(getattr(made, section), **{key: value})})
    return made


def base_of(model: Model, seed: int = 0) -> blocks.Params:
    return family(model).init(model, jax.random.key(seed))


def adapters_of(made: Config) -> blocks.Adapters:
    """Returns adapters whose b isn't 0."""
    adapters = lora.init(made.model, made.lora, jax.random.key(1))
    return jax.tree.map(lambda array: array + 0.02 * jax.random.normal(jax.random.key(2), array.shape), adapters)


@pytest.mark.parametrize(
    ("recompute", "layers"),
    [
        pytest.param("none", "unrolled", marks=pytest.mark.slow),
        ("norms", "scanned"),
        pytest.param("block", "scanned", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", nightly(MODELS, every_time=["llama", "mixtral"]))
def test_gradients(assert_exact, name, recompute, layers):
    model = MODELS[name]
    model = dataclasses.replace(model, width=8, head_width=0, feed_forward=0 if model.family == "gpt2" else 12)
    compute = Compute(attention_block=2, classifier_chunk=4, recompute=recompute, layers=layers)
    assert_exact(objective_cases.adapted_model_case(jax.random.key(0), 2, 5, model, compute))


@pytest.mark.parametrize(("base", "double"), [("float32", False), ("int8", False), ("nf4", True)])
@pytest.mark.parametrize(
    ("model", "layers"),
    [pytest.param(GPT2, "unrolled", marks=pytest.mark.slow), (LLAMA, "scanned"), (MIXTRAL, "scanned")],
    ids=["gpt2", "llama", "mixtral"],
)
def test_merged_it_computes_the_same(model, base, double, layers):
    """The loss of adapters beside the base in each type is the merged model's, but for rounding."""
    made = config(model, lora_base=base, lora_double_quantization=double, compute_layers=layers)
    frozen = lora.freeze(base_of(model), made.lora, made.compute)
    adapters = blocks.arrange(adapters_of(made), made.compute)
    params, context = working(adapters, frozen, made, layout_of(made))
    loss = jax.jit(lambda params: next_token.loss(family(model), params, Batch(TOKENS, TOKENS), context))(params)
    merged = lora.merge(adapters, frozen, model, made.lora)
    plain = blocks.Context(model, made.compute)
    expected = jax.jit(lambda params: next_token.loss(family(model), params, Batch(TOKENS, TOKENS), plain))(merged)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_adapters_begin_without_effect():
    made = config()
    frozen = lora.freeze(base_of(LLAMA), made.lora, Compute(layers="scanned"))
    merged = lora.merge(lora.init(LLAMA, made.lora, jax.random.key(1)), frozen, LLAMA, made.lora)
    jax.tree.map(np.testing.assert_array_equal, merged, base_of(LLAMA))


def test_an_adapter_changes_its_own_columns_alone():
    made = config(lora_targets=("k_proj",))
    frozen = lora.freeze(base_of(LLAMA), made.lora, Compute(layers="scanned"))
    merged = lora.merge(adapters_of(made), frozen, LLAMA, made.lora)
    changed = np.any(np.asarray(merged.blocks.qkv.weight != base_of(LLAMA).blocks.qkv.weight), axis=(0, 1))
    assert np.flatnonzero(changed).tolist() == list(range(64, 96))  # 4 heads of 16 for queries, 2 for keys


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("all-linear",), ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        (("c_proj",), ["attn.c_proj", "mlp.c_proj"]),
        (("attn.c_proj", "c_fc"), ["attn.c_proj", "mlp.c_fc"]),
        (("mlp.*",), ["mlp.c_fc", "mlp.c_proj"]),
    ],
)
def test_targets_by_name_end_and_pattern(targets, expected):
    assert list(lora.chosen(GPT2, targets)) == expected


def test_unknown_targets_are_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"q_proj: the model has no such projection\. There are: attn\.c_attn, attn.*"):
        lora.check(GPT2, Lora(rank=2, targets=("c_attn", "q_proj")))
    with pytest.raises(UserError, match="is empty"):
        lora.check(GPT2, Lora(rank=2, targets=()))


def test_a_base_whose_rows_have_no_whole_blocks_is_refused():
    with pytest.raises(UserError, match=r"--lora.base nf4 .* rows of 288: take float32 or bfloat16"):
        lora.check(dataclasses.replace(GPT2, width=96), Lora(rank=2, base="nf4"))


# What is not computed


def weights_gradients(text: str, tokens: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The sizes, in order, of what a compiled program's matrix products have that sum over so many tokens."""
    shapes = dict(re.findall(r"(%\S+) = [a-z0-9]+\[([0-9,]*)\]", text))
    found = re.findall(r"= [a-z0-9]+\[(\d+,\d+)\]\S* dot\((%[^,]+),.*lhs_contracting_dims=\{(\d)\}", text)
    by_tokens = {result for result, left, axis in found if int(shapes[left].split(",")[int(axis)]) in tokens}
    return {tuple(sorted(map(int, result.split(",")))) for result in by_tokens}


def test_the_step_forms_no_gradient_of_the_base():
    """No sum over tokens in the compiled step has a weight's shape, and only the token table has the table's.

    On a CPU products of adapters have a weight's shape, and sum over the rank: they are merged for a layer at a time.
    """
    made = config(compute_layers="unrolled", training_sequence_length=9, model_vocabulary_size=300)
    shapes = {(64, 128), (64, 64), (64, 256), (64, 384)}
    programs = step.compile_step(made), step.compile_step(dataclasses.replace(made, lora=Lora()))
    adapted, full = (program.as_text() or "" for program in programs)
    tokens = (8 * 9, made.compute.classifier_chunk)  # of a block, and of a chunk of the classifier
    assert shapes <= weights_gradients(full, tokens)
    assert not shapes & weights_gradients(adapted, tokens)
    tables = [line for line in adapted.splitlines() if re.search(r"= f32\[384,64\]\S* (?!parameter)", line)]
    assert not [line for line in tables if re.search(r"scatter|dot|add\(|fusion\(", line)]


def test_the_plan_has_the_base_once_and_no_gradient_or_moment_of_it():
    made = config()
    plan, full = (
        memory_plan.make(one, step.compile_step(one), Capacity(None, ""))
        for one in (made, dataclasses.replace(made, lora=Lora()))
    )
    trained = 4 * lora.parameter_count(LLAMA, made.lora)
    assert plan.parts["frozen base (float32)"] == 4 * family(LLAMA).parameter_count(LLAMA, padded=True)
    assert plan.parts["moments (float32)"] == 2 * trained
    assert plan.parts["gradients"] == trained
    assert plan.total < full.total


@pytest.mark.slow
def test_one_billion_parameters_are_tuned_in_six_gigabytes():
    """Llama 3.2 1B with NF4, of 512 tokens in bfloat16, by the plan of the compiled step."""
    model = Model(
        family="llama",
        layers=16,
        heads=32,
        kv_heads=8,
        width=2048,
        feed_forward=8192,
        vocabulary_size=128256,
        context=131072,
        tied=True,
        rope_base=500_000.0,
        rope_scaling="llama3",
    )
    made = Config(
        model=model,
        compute=Compute(dtype="bfloat16", attention="blocks", layers="scanned", classifier_chunk=256),
        training=Training(batch_size=1, sequence_length=512, init_from="a base"),
        lora=Lora(rank=16, base="nf4", double_quantization=True),
    )
    plan = memory_plan.make(made, step.compile_step(made), Capacity(None, ""))
    assert plan.parts["frozen base (nf4)"] < 1.1e9
    assert plan.total < 6e9


# Devices


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_each_stage_trains_the_same_adapters(zero):
    """Three steps on 4 devices are those of one device, but for the order of float32 sums."""

    def trained(made: Config):
        resharding = Resharding(made)
        state = resharding.first_state(jax.tree.map(np.asarray, adapters_of(made)))
        frozen = resharding.placed_base(jax.tree.map(np.asarray, base_of(LLAMA)))
        program, losses = step.compile_step(made), []
        for seed in range(3):
            tokens = np.random.default_rng(seed).integers(0, 50, (1, 8, 8), dtype=np.int32)
            state, metrics = program(state, frozen, Batch(tokens, tokens))
            losses.append(float(metrics.loss))
        return losses, jax.tree.map(np.asarray, blocks.stacked(resharding.to_save(state).params))

    made = config(lora_base="nf4", compute_dtype="float32")
    losses, params = trained(made)
    several = dataclasses.replace(made, parallel=Parallel(devices=4, zero=zero))
    assert layout_of(several).sharded == (zero > 0)
    found, also = trained(several)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), also, params)


def test_the_shapes_of_the_step_are_those_of_its_arrays():
    """The plan of a quantised base too, which is compiled for before it is there."""
    made = config(lora_base="nf4", lora_double_quantization=True)
    frozen = Resharding(made).placed_base(base_of(LLAMA))
    jax.tree.map(
        lambda shape, array: np.testing.assert_equal((shape.shape, shape.dtype), (array.shape, array.dtype)),
        frozen_shapes(made),
        frozen,
    )
    assert any(map(quantised.is_quantised, jax.tree.leaves(frozen, is_leaf=quantised.is_quantised)))
    assert jax.tree.structure(initial_state(made).params) == jax.tree.structure(
        blocks.arrange(adapters_of(made), made.compute)
    )


def test_bfloat16_computes_with_bfloat16():
    """The base's and the adapters' matrices meet activations of their own dtype."""
    made = config(lora_base="nf4", compute_dtype="bfloat16")
    frozen = lora.freeze(base_of(LLAMA), made.lora, made.compute)
    params, context = working(blocks.arrange(adapters_of(made), made.compute), frozen, made, layout_of(made))
    block = context.gather(params.blocks[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(block) if leaf.ndim > 1} == {jnp.dtype("bfloat16")}
    assert params.embedding.token.dtype == jnp.bfloat16
