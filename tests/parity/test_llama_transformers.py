"""Llama and its relatives beside Hugging Face's: Llama-, Mistral-, Qwen3- and MixtralForCausalLM.

An implementation that shares nothing with this one: its own forward, PyTorch's autodiff. The weights go there through
the folder that `run.py convert` writes.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import writing
from jaxgpt.generation.decoder import Decoder
from jaxgpt.interop import huggingface
from jaxgpt.layers.cross_entropy import IGNORED
from jaxgpt.options.config import Compute, Model, Sampling
from tests import whole
from tests.interop.weights import LLAMA, random_params
from tests.nightly import nightly

REASON = "compares with PyTorch and transformers, which the parity extra installs: pip install -e .[parity]"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)


TOLERANCE = 1e-4  # ‖a - b‖ / ‖b‖, float32
BASE = dataclasses.replace(LLAMA, context=32, rope_base=100.0)  # so that even the slowest pair turns within T
LENGTH = 24


def relative(**changed: Any) -> Model:
    return dataclasses.replace(BASE, **changed)


# Of 8 pairs the first stays as it is, two are between, and five are divided by the factor.
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context": 32, "context": 64}
MODELS = {
    "K equal to H": (relative(kv_heads=0), "Llama"),
    "K dividing H": (relative(vocabulary_size=128), "Llama"),
    "K = 1, three layers, tied": (relative(kv_heads=1, layers=3, tied=True, norm_epsilon=1e-6), "Llama"),
    "heads wider than C / H": (relative(head_width=6), "Llama"),
    "linear scaling": (relative(rope_scaling="linear", rope_factor=3.0), "Llama"),
    "llama3 scaling": (relative(head_width=16, **LLAMA3), "Llama"),
    "window shorter than T": (relative(window=5), "Mistral"),
    "window longer than T": (relative(window=29), "Mistral"),
    "heads that don't divide C": (relative(width=18, head_width=6), "Mistral"),
    "norms of queries and keys": (relative(query_key_norm=True, head_width=6, tied=True), "Qwen3"),
    "experts": (relative(family="mixtral", experts=3, router_balance=0.0), "Mixtral"),
    "norms and a window": (relative(query_key_norm=True, window=7), "Qwen3"),
}


def theirs(folder: Path, model: Model, architecture: str, params: Any) -> Any:
    """Returns the same model as transformers reads it."""
    with writing.new_folder(folder) as new:
        huggingface.write_folder(new, params, model, "float32", None, 1 << 30)
    read, said = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(read).__name__ == f"{architecture}ForCausalLM"
    assert not any(said.values()), said
    return read.eval()


def gradients(read: Any, model: Model) -> Any:
    """The model's gradients, as parameters of ours."""
    by_name = {name.removeprefix("model."): parameter.grad.numpy() for name, parameter in read.named_parameters()}
    for layer in range(model.layers if model.experts else 0):  # transformers' modules are not what it stores
        ours, mlp = f"layers.{layer}.block_sparse_moe", f"layers.{layer}.mlp"
        by_name[f"{ours}.gate.weight"] = by_name[f"{mlp}.gate.weight"]
        for expert in range(model.experts):
            gate, up = np.split(by_name[f"{mlp}.experts.gate_up_proj"][expert], 2)
            down = by_name[f"{mlp}.experts.down_proj"][expert]
            by_name |= {f"{ours}.experts.{expert}.{w}.weight": g for w, g in (("w1", gate), ("w3", up), ("w2", down))}
    table = huggingface.table_of(model)
    return huggingface.filled(table, model, np.dtype(np.float32), by_name.__getitem__)


def assert_close(ours: Any, expected: Any, name: object) -> None:
    difference = np.linalg.norm(np.asarray(ours) - expected) / np.linalg.norm(expected)
    assert difference <= TOLERANCE, f"{name}: relative difference {difference:.1e}"


@pytest.mark.parametrize(
    "name",
    nightly(MODELS, every_time=["K dividing H", "llama3 scaling", "window shorter than T", "norms and a window"]),
)
def test_logits_and_gradients_are_those_of_transformers(tmp_path, name):
    model, architecture = MODELS[name]
    params = random_params(model)
    tokens, targets = np.random.default_rng(2).integers(model.vocabulary_size, size=(2, 2, LENGTH), dtype=np.int32)
    targets[0, 5:9] = IGNORED
    read = theirs(tmp_path / "hf", model, architecture, params)
    expected_logits = read(input_ids=torch.from_numpy(tokens).long()).logits
    expected_loss = torch.nn.functional.cross_entropy(
        expected_logits.flatten(0, 1), torch.from_numpy(targets).long().flatten(), ignore_index=IGNORED
    )
    expected_loss.backward()
    compute = Compute(attention_block=10, classifier_chunk=20)

    @jax.jit  # one program: its compilation is most of the time
    def everything(params, tokens, targets):
        logits = whole.logits(params, tokens, model, compute)
        return logits, *whole.loss_and_grads(params, tokens, targets, model, compute)

    logits, loss, grads = everything(params, tokens, targets)
    assert_close(logits, expected_logits.detach().numpy(), "logits")
    assert float(loss) == pytest.approx(float(expected_loss.detach()), rel=TOLERANCE)
    expected = jax.tree.leaves(gradients(read, model))
    for (path, ours), of_theirs in zip(jax.tree_util.tree_leaves_with_path(grads), expected, strict=True):
        assert_close(ours, of_theirs, path)


# Greedy generation: the prompt's keys and values by `prefill`, then token by token by `decode`

ATTENTION = ("qkv", "attention_out")
PROMPT, DRAWN = 11, 60  # beyond the window and past the context, 32


def attentive(params: Any) -> Any:
    """Returns the parameters with stronger attention; else a text soon repeats one token whatever came before."""
    stronger = {name: jax.tree.map(lambda array: 6 * array, getattr(params.blocks, name)) for name in ATTENTION}
    return params._replace(blocks=params.blocks._replace(**stronger))


@pytest.mark.parametrize(
    "name",
    ["K dividing H", "K = 1, three layers, tied", "linear scaling", "window shorter than T", "norms and a window"],
)
def test_greedy_text_is_transformers_token_for_token(tmp_path, name):
    model, architecture = MODELS[name]
    params = attentive(random_params(model, seed=7))
    read = theirs(tmp_path / "hf", model, architecture, params)
    prompt = np.random.default_rng(3).integers(model.vocabulary_size, size=PROMPT)
    read.generation_config.eos_token_id = None
    expected = read.generate(
        torch.from_numpy(prompt)[None], max_new_tokens=DRAWN, do_sample=False, pad_token_id=0, use_cache=True
    )[0, PROMPT:].tolist()
    decoder = Decoder(jax.tree.map(jnp.asarray, params), model, Compute(), slots=1, capacity=PROMPT + DRAWN)
    drawn = [decoder.start(0, prompt, Sampling(temperature=0.0), 0)]
    while len(drawn) < DRAWN:
        drawn += decoder.go_on()[0]
    assert drawn[:DRAWN] == expected
    assert len(set(expected[-16:])) > 2  # no text that repeats one token, which a wrong place could draw too
