"""The second family: its gradients, its logits beside another implementation's, and all that a run does with it."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.data.loader import Batch
from jaxgpt.models import blocks, cache, llama
from jaxgpt.models.blocks import Context
from jaxgpt.options.config import Compute, Config, Model, Optimizer, Parallel, Training
from jaxgpt.proof import objective_cases
from jaxgpt.runs.metrics_file import read_metrics
from jaxgpt.training import step
from jaxgpt.training.resharding import Resharding
from tests import whole
from tests.nightly import nightly

SMALL = Model(layers=2, heads=2, width=8, context=8, vocabulary_size=11, family="llama")


@pytest.mark.parametrize(
    ("batch", "length", "model", "compute"),
    [
        (1, 1, dataclasses.replace(SMALL, layers=1, heads=1, width=2), Compute(recompute="none")),
        (2, 3, dataclasses.replace(SMALL, vocabulary_size=128), Compute(attention_block=1, recompute="block")),
        (2, 5, SMALL, Compute(classifier_chunk=3, attention_block=4, recompute="gelu", layers="unrolled")),
        (2, 8, dataclasses.replace(SMALL, document_start=1), Compute(classifier_chunk=4, attention_block=3)),
    ],
    ids=["ones", "short", "unrolled", "documents"],
)
def test_gradients(assert_exact, batch, length, model, compute):
    assert_exact(objective_cases.model_case(jax.random.key(0), batch, length, model, compute))


QWEN = dataclasses.replace(
    SMALL, heads=4, kv_heads=2, head_width=6, feed_forward=10, query_key_norm=True, tied=True, norm_epsilon=1e-6
)
MISTRAL = dataclasses.replace(SMALL, heads=4, kv_heads=1, window=3, logit_soft_cap=2.0, rope_base=500.0)
LLAMA3 = dataclasses.replace(
    SMALL, heads=4, kv_heads=4, width=16, rope_scaling="llama3", rope_original_context=64, rope_base=100.0
)
RELATIVES = {"qwen": QWEN, "mistral": MISTRAL, "llama3": LLAMA3}


@pytest.mark.parametrize(("recompute", "layers"), whole.levels())
@pytest.mark.parametrize("name", nightly(RELATIVES, every_time=["qwen"]))
def test_gradients_of_relatives(assert_exact, name, recompute, layers):
    """The window is shorter than T in one case, and longer in the other."""
    model = RELATIVES[name]
    length = 7 if layers == "scanned" else 2
    compute = Compute(recompute=recompute, layers=layers, attention_block=2, classifier_chunk=4)
    assert_exact(objective_cases.model_case(jax.random.key(0), 2, length, model, compute))


def test_a_shape_of_another_family_is_refused(fails):
    words = ["--config", "quickstart", "--model.family", "llama"]
    assert "--model.kv-heads is 4, and must be a divisor of the number of heads, 6" in fails(
        *words, "--model.heads", "6", "--model.width", "96", "--model.kv-heads", "4"
    )
    assert "A mixture of experts is of the family mixtral" in fails(*words, "--model.experts", "4")
    message = fails("--config", "quickstart", "--model.family", "gpt2", "--model.kv-heads", "2", "--model.window", "8")
    assert "--model.kv-heads" in message
    assert "gpt2" in message


def random_params(model):
    """Stacked, in float32, none of them special."""
    shapes = jax.eval_shape(lambda: llama.init(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)
    for table in (params.embedding.token, *([] if params.head is None else [params.head.weight])):
        table[model.vocabulary_size :] = 0
    return params


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL)


def theirs(torch, transformers, params):
    """Returns Hugging Face's Llama of the same weights; it stores them as (out, in), and fused ones apart."""
    V, F = SMALL.vocabulary_size, llama.feed_forward(SMALL)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=SMALL.width,
        intermediate_size=F,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        max_position_embeddings=SMALL.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    named = {
        "model.embed_tokens.weight": params.embedding.token[:V],
        "model.norm.weight": params.final_norm.scale,
        "lm_head.weight": params.head.weight[:V],
    }
    for layer in range(SMALL.layers):
        block = jax.tree.map(lambda array, layer=layer: array[layer], params.blocks)
        own = {
            "input_layernorm": block.attention_norm.scale,
            "post_attention_layernorm": block.mlp_norm.scale,
            "self_attn.o_proj": block.attention_out.weight.T,
            "mlp.down_proj": block.mlp_out.weight.T,
            **{f"self_attn.{x}_proj": part.T for x, part in zip("qkv", np.split(block.qkv.weight, 3, -1), strict=True)},
            **{f"mlp.{x}_proj": part.T for x, part in zip(("gate", "up"), np.split(block.mlp_in.weight, 2, -1))},  # noqa: B905
        }
        named |= {f"model.layers.{layer}.{name}.weight": array for name, array in own.items()}
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict({name: torch.tensor(np.ascontiguousarray(array)) for name, array in named.items()})
    return model


def test_logits_and_loss_are_transformers(params):
    torch = pytest.importorskip("torch", reason="PyTorch comes with the parity extra")
    transformers = pytest.importorskip("transformers", reason="transformers comes with the parity extra")
    tokens = np.random.default_rng(1).integers(SMALL.vocabulary_size, size=(3, 8), dtype=np.int32)
    ours = jax.jit(lambda *of: whole.logits(*of, SMALL, Compute(attention_block=3)))(params, tokens)
    with torch.no_grad():
        expected = theirs(torch, transformers, params)(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["stacked", "apart"])
@pytest.mark.parametrize("model", [SMALL, QWEN, MISTRAL], ids=["llama", "qwen", "mistral"])
def test_a_cache_gives_the_logits_of_the_whole_text(model, form):
    """Prompts of different lengths, then token by token; beyond a window, and beyond the model's context of 8."""
    context = Context(model, Compute(recompute="none"))
    params = random_params(model)
    texts = np.random.default_rng(0).integers(model.vocabulary_size, size=(2, 12), dtype=np.int32)
    expected = jax.jit(functools.partial(whole.logits, model=model, compute=Compute()))(params, texts)
    params = jax.tree.map(jnp.asarray, params)
    params = params if form == "stacked" else blocks.unstacked(params)
    prefill = jax.jit(lambda *of: cache.prefill(llama, *of, context))
    decode = jax.jit(lambda *of: cache.decode(llama, *of, context))
    lengths, caches = np.array([5, 1], np.int32), []
    for text, length in enumerate(lengths):
        padded = np.where(np.arange(6) < length, texts[text, :6], 9)[None]  # what is behind must not matter
        logits, filled = prefill(params, cache.init_cache(params, 12, model, "float32"), padded, length)
        np.testing.assert_allclose(logits[0], expected[text, length - 1], rtol=1e-4, atol=1e-5)
        caches.append(filled)
    for _ in range(7):
        logits, caches = decode(params, tuple(caches), texts[np.arange(2), lengths], lengths)
        np.testing.assert_allclose(logits, expected[np.arange(2), lengths], rtol=1e-4, atol=1e-5)
        lengths += 1


def test_parameters_and_what_decays():
    model = dataclasses.replace(SMALL, layers=3, width=24, vocabulary_size=200)
    for other in (model, *RELATIVES.values()):
        shapes = jax.eval_shape(lambda other=other: llama.init(other, jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == llama.parameter_count(other, padded=True)
    shapes = jax.eval_shape(lambda: llama.init(model, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == llama.parameter_count(model, padded=True)
    assert llama.parameter_count(model, padded=True) - llama.parameter_count(model) == 2 * 56 * 24
    decays = llama.decays(shapes)
    names = {
        jax.tree_util.keystr(path, simple=True, separator=".") for path, on in jax.tree.leaves_with_path(decays) if on
    }
    weights = {f"blocks.{name}.weight" for name in ("qkv", "attention_out", "mlp_in", "mlp_out")}
    assert names == {"embedding.token", "head.weight", *weights}


@functools.cache
def trained(devices: int, zero: int, model: Model = dataclasses.replace(SMALL, heads=3, width=18)):  # noqa: B008
    """Losses of some steps, and the parameters as they are saved."""
    config = Config(
        model=model,
        compute=Compute(classifier_chunk=8),
        parallel=Parallel(devices=devices, zero=zero),
        training=Training(steps=5, micro_batches=2, batch_size=8, sequence_length=5),
        optimizer=Optimizer(learning_rate=0.01, clip_norm=0.5),
    )
    placement, train_step, losses = Resharding(config), step.make_train_step(config), []
    state = placement.first_state()
    for seed in range(5):
        batch = Batch(*np.random.default_rng(seed).integers(11, size=(2, 2, 8, 5), dtype=np.int32))
        state, metrics = train_step(state, None, batch)
        losses.append(float(metrics.loss))
    return losses, jax.tree.map(np.asarray, blocks.stacked(placement.to_save(state).params))


@pytest.mark.parametrize("zero", [*(pytest.param(zero, marks=pytest.mark.slow) for zero in (0, 1, 2)), 3])
@pytest.mark.parametrize("name", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in RELATIVES)])
def test_eight_devices_train_as_one(zero, name):
    """The sizes are not divisible by 8."""
    model = dataclasses.replace(SMALL if name is None else RELATIVES[name], heads=3, kv_heads=0, width=18)
    if name:
        model = dataclasses.replace(model, kv_heads=1)
    losses, params = trained(8, zero, model)
    expected, alone = trained(1, 0, model)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def command(capsys, *words: str) -> str:
    assert cli.main(words) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_resumed_generates_and_is_evaluated(work, capsys, fails):
    """It ends with the numbers of one that was never stopped; llm.c's format refuses it."""
    sizes = {"layers": 1, "heads": 2, "width": 16, "context": 16}
    words = [word for key, value in sizes.items() for word in (f"--model.{key}", str(value))]
    words += [
        "--model.family",
        "llama",
        "--data.text",
        "text.txt",
        "--data.tokenizer",
        "characters",
        "--training.batch-size",
    ]
    words += ["2", "--sampling.tokens", "3", "--run.no-report"]
    printed = command(capsys, *words, "--run.name", "whole", "--training.steps", "6", "--checkpoint.every-steps", "3")
    assert "model     Llama, " in printed
    command(capsys, *words, "--run.name", "cut", "--training.steps", "6", "--checkpoint.every-steps", "3")
    Path("runs/cut/checkpoints/6/SHA256SUMS").unlink()
    assert "resuming after step 3" in command(capsys, *words, "--run.name", "cut", "--training.steps", "6", "--resume")
    ends = [
        [line for line in read_metrics(Path(f"runs/{name}/metrics.jsonl")) if "loss" in line]
        for name in ("whole", "cut")
    ]
    assert [line["loss"] for line in ends[0]] == [line["loss"] for line in ends[1]]
    assert command(capsys, "generate", "--run", "runs/whole", "--prompt", "to be", "--tokens", "5")
    assert "loss" in command(capsys, "evaluate", "--run", "runs/whole")
    message = fails("convert", "runs/whole", "elsewhere.bin")
    assert "a model of the family llama" in message
    assert not Path("elsewhere.bin").exists()
    message = fails(*words, "--run.name", "whole", "--training.steps", "6", "--resume", "--model.family", "gpt2")
    assert "--model.family was llama and is gpt2" in message


def test_a_head_of_odd_width_has_no_pairs(fails):
    message = fails("--config", "quickstart", "--model.family", "llama", "--model.width", "12", "--model.heads", "4")
    assert "--model.heads is 4, which makes heads 3 wide" in message
