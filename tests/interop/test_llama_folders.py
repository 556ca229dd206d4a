"""Hugging Face's folders of Llama and its relatives: there and back, what transformers saves, what is wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgpt import models, writing
from jaxgpt.errors import UserError
from jaxgpt.interop import huggingface, safetensors_files, tensors
from jaxgpt.options.config import Model
from tests.interop.weights import LLAMA, assert_same_bits, random_params

ONE_FILE = 1 << 30
MODELS = {
    "llama": LLAMA,
    "tied": dataclasses.replace(LLAMA, tied=True, kv_heads=0),
    "mistral": dataclasses.replace(LLAMA, window=5, kv_heads=1),
    "qwen3": dataclasses.replace(LLAMA, query_key_norm=True, head_width=6),
    "mixtral": dataclasses.replace(LLAMA, family="mixtral", experts=3, rope_base=1e6),
}


def export(folder: Path, model: Model = LLAMA, dtype: str = "float32", shard_bytes: int = ONE_FILE) -> Any:
    params = random_params(model, dtype)
    with writing.new_folder(folder) as new:
        huggingface.write_folder(new, params, model, dtype, None, shard_bytes)
    return params


def change(folder: Path, **values: Any) -> None:
    path = folder / safetensors_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: Path, **values: Any) -> dict[str, np.ndarray]:
    """Sets tensors by name, . written as __; None takes one away. Returns what is left."""
    path = folder / safetensors_files.WEIGHTS
    found = load_file(path) | {name.replace("__", "."): array for name, array in values.items()}
    found = {name: array for name, array in found.items() if array is not None}
    save_file(found, path)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_table_covers_every_number_of_the_model_once(name):
    """The family's own `init` gives the reference."""
    model = MODELS[name]
    table = huggingface.table_of(model)
    shapes = jax.eval_shape(lambda: models.family(model).init(model, jax.random.key(0)))
    covered = {huggingface._path(path): np.zeros(like.shape, int) for path, like in jax.tree.leaves_with_path(shapes)}
    for part in table.parts:
        for _, numbers in part.names():
            view = part.of(covered[part.ours], numbers)
            assert view.shape == part.shape
            view += 1
    for path, times in covered.items():
        padded = path in ("embedding.token", "head.weight")
        assert (times[: model.vocabulary_size] if padded else times).min() == 1, path
        assert times.max() == 1, path
    numbers = sum(np.prod(part.counts, dtype=int) * np.prod(part.shape) for part in table.parts)
    assert numbers == models.family(model).parameter_count(model)


@pytest.mark.parametrize("dtype", tensors.DTYPES)
@pytest.mark.parametrize("shard_bytes", [ONE_FILE, 5000])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_changes_no_bit(tmp_path, name, dtype, shard_bytes):
    params = export(tmp_path / "hf", MODELS[name], dtype, shard_bytes)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shard_bytes < ONE_FILE)
    source = huggingface.open_folder(tmp_path / "hf")
    assert (source.model, source.dtype, source.notes) == (MODELS[name], dtype, ())
    assert_same_bits(source.load(), params)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_saves_is_read(tmp_path, name, dtype):
    torch = pytest.importorskip("torch", reason="saves with transformers, which the parity extra installs")
    transformers = pytest.importorskip("transformers", reason="saves with transformers: extra parity")
    params = export(tmp_path / "ours", MODELS[name], dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    source = huggingface.open_folder(tmp_path / "theirs")
    assert (source.model, source.dtype) == (MODELS[name], dtype)
    assert_same_bits(source.load(), params)


def test_old_files_have_the_frequencies_of_the_rotary_positions(tmp_path):
    params = export(tmp_path / "hf")
    change_tensors(tmp_path / "hf", model__layers__0__self_attn__rotary_emb__inv_freq=np.zeros(2, np.float32))
    assert_same_bits(huggingface.open_folder(tmp_path / "hf").load(), params)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", ""])
def test_names_with_other_prefixes(tmp_path, prefix):
    params = export(tmp_path / "hf")
    path = tmp_path / "hf" / safetensors_files.WEIGHTS
    save_file({prefix + name.removeprefix("model."): array for name, array in load_file(path).items()}, path)
    assert_same_bits(huggingface.open_folder(tmp_path / "hf").load(), params)


def test_a_tied_model_may_have_its_head_too_if_both_are_one(tmp_path):
    params = export(tmp_path / "hf", MODELS["tied"])
    folder = tmp_path / "hf"
    token = change_tensors(folder)["model.embed_tokens.weight"]
    change_tensors(folder, lm_head__weight=token.copy())
    assert_same_bits(huggingface.open_folder(folder).load(), params)
    change_tensors(folder, lm_head__weight=token + 1)
    with pytest.raises(UserError, match=r"lm_head.weight differs from embed_tokens.weight, and by config.json both"):
        huggingface.open_folder(folder).load()
    change_tensors(folder, lm_head__weight=token, model__embed_tokens__weight=None)
    assert_same_bits(huggingface.open_folder(folder).load(), params)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_hidden_layers": 3},
            "the tensor layers.2.input_layernorm.weight is missing, which a Llama of 3 layers has",
        ),
        ({"num_hidden_layers": 1}, "the tensor 'layers.1.input_layernorm.weight' is none of a Llama of 1 layers"),
        ({"num_hidden_layers": 2**31 - 1}, "the tensor layers.2.input_layernorm.weight is missing"),
        ({"num_key_value_heads": 4}, "layers.0.self_attn.k_proj.weight is [8, 16], and [16, 16] by config.json"),
        ({"head_dim": 6}, "[8, 16], and [12, 16] by config.json"),
        ({"hidden_size": 2**31 - 2, "head_dim": 4}, "by config.json"),
        ({"intermediate_size": 25}, "by config.json"),
        ({"vocab_size": 151}, "[150, 16], and [151, 16] by config.json"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from embed_tokens.weight"),
        ({"model_type": "qwen3", "architectures": None}, "q_norm.weight is missing, which a Qwen3 of 2 layers has"),
        ({"model_type": "mixtral", "architectures": None}, "'layers.0.mlp.down_proj.weight' is none of a Mixtral"),
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
    ],
)
def test_a_config_that_is_not_the_weights(tmp_path, values, message):
    export(tmp_path / "hf")
    change(tmp_path / "hf", **values)
    with pytest.raises(UserError) as error:
        huggingface.open_folder(tmp_path / "hf").load()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lm_head__weight": None}, "the tensor lm_head.weight is missing, which a Llama of 2 layers has"),
        ({"model__norm__weight": None}, "the tensor norm.weight is missing"),
        ({"model__layers__1__mlp__up_proj__weight": None}, "the tensor layers.1.mlp.up_proj.weight is missing"),
        ({"score__weight": np.zeros(3, np.float32)}, "the tensor 'score.weight' is none of a Llama of 2 layers"),
        ({"model__layers__0__self_attn__q_proj__bias": np.zeros(16, np.float32)}, "q_proj.bias' is none of a Llama"),
        ({"model__layers__00__mlp__up_proj__weight": np.zeros(16, np.float32)}, "is none of a Llama"),
        ({"model__layers__7__mlp__up_proj__weight": np.zeros(16, np.float32)}, "is none of a Llama"),
        ({"model__layers__#__mlp__up_proj__weight": np.zeros(16, np.float32)}, "is none of a Llama"),
        ({"model__norm__weight": np.zeros(16, np.int32)}, "the tensor norm.weight is of type I32; F32, BF16, F16"),
        (
            {"model__layers__0__mlp__up_proj__weight": np.zeros((16, 24), np.float32)},
            "is [16, 24], and [24, 16] by config.json: as GPT-2 stores it",
        ),
    ],
)
def test_tensors_that_are_not_the_models(tmp_path, values, message):
    export(tmp_path / "hf")
    change_tensors(tmp_path / "hf", **values)
    with pytest.raises(UserError) as error:
        huggingface.open_folder(tmp_path / "hf")
    assert message in str(error.value)


def test_a_mixture_that_claims_more_than_there_is(tmp_path):
    """It is refused in no more time or memory than the file itself takes."""
    export(tmp_path / "hf")
    change(tmp_path / "hf", model_type="mixtral", architectures=None, num_local_experts=2**31 - 1)
    change_tensors(tmp_path / "hf", **{f"model__layers__{i}__mlp__{name}_proj__weight": None for i in range(2)
                                       for name in ("gate", "up", "down")})  # fmt: skip
    with pytest.raises(UserError, match=r"block_sparse_moe.gate.weight is missing, which a Mixtral of 2 layers has"):
        huggingface.open_folder(tmp_path / "hf")
