"""Hugging Face's folders: what transformers makes of ours, what we make of its, and what is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgpt import writing
from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.interop import gpt2_tables, huggingface, safetensors_files, tensors
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute, Model
from tests import whole
from tests.interop.weights import MODEL, assert_same_bits, random_params

ONE_FILE = 1 << 30


def export(folder, dtype="float32", *, shard_bytes=ONE_FILE, tokenizer=None, model=MODEL):
    params = random_params(model, dtype)
    with writing.new_folder(folder) as new:
        huggingface.write_folder(new, params, model, dtype, tokenizer, shard_bytes)
    return params


def change(path, **values):
    """Changes keys of a JSON file; None takes one away."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# Round trips


def test_the_table_of_tensors_is_the_model():
    """Names, order and shapes, beside `gpt2.init`'s own."""
    shapes = jax.eval_shape(lambda: gpt2.init(MODEL, jax.random.key(0)))
    for (path, leaf), tensor in zip(jax.tree.leaves_with_path(shapes), gpt2_tables.TENSORS, strict=True):
        assert ".".join(key.name for key in path) == tensor.ours
        assert leaf.shape == gpt2_tables.shape(tensor, MODEL)
    assert gpt2_tables.count(MODEL) == gpt2.parameter_count(MODEL, padded=True)


@pytest.mark.parametrize("dtype", tensors.DTYPES)
@pytest.mark.parametrize("shard_bytes", [ONE_FILE, 3000, 1], ids=["one file", "some files", "a file for each tensor"])
def test_there_and_back_changes_no_bit(tmp_path, dtype, shard_bytes):
    params = export(tmp_path / "hf", dtype, shard_bytes=shard_bytes)
    source = huggingface.open_folder(tmp_path / "hf")
    assert (source.model, source.dtype, source.tokenizer) == (MODEL, dtype, None)
    assert_same_bits(source.load(), params)
    shards = list((tmp_path / "hf").glob("*.safetensors"))
    assert (len(shards) > 1) == (tmp_path / "hf" / safetensors_files.INDEX).exists() == (shard_bytes < ONE_FILE)
    assert len(shards) == {ONE_FILE: 1, 3000: len(shards), 1: 28}[shard_bytes]


def test_old_files_have_no_prefix_masks_and_a_head_of_their_own(tmp_path):
    """The file is like openai-community/gpt2's; and mixed types become float32."""
    params = export(tmp_path / "hf")
    path = tmp_path / "hf" / safetensors_files.WEIGHTS
    named = {name.removeprefix("transformer."): array for name, array in load_file(path).items()}
    named["h.0.attn.bias"] = np.tril(np.ones((1, 1, 12, 12), np.float32))
    named["lm_head.weight"] = named["wte.weight"].copy()
    named["ln_f.bias"] = named["ln_f.bias"].astype(np.float16)
    save_file(named, path)
    source = huggingface.open_folder(tmp_path / "hf")
    assert source.dtype == "float32"
    rounded = params.final_norm.bias.astype(np.float16).astype(np.float32)
    assert_same_bits(source.load(), params._replace(final_norm=params.final_norm._replace(bias=rounded)))
    named["lm_head.weight"][3, 3] += 1
    save_file(named, path)
    with pytest.raises(UserError, match=r"lm_head.weight differs from wte.weight"):
        huggingface.open_folder(tmp_path / "hf").load()


# What transformers makes of it


@pytest.fixture(scope="module")
def transformers():
    reason = "loads the export with transformers, which the parity extra installs: pip install -e .[parity]"
    pytest.importorskip("torch", reason=reason)
    return pytest.importorskip("transformers", reason=reason)


@pytest.mark.parametrize("shard_bytes", [ONE_FILE, 3000])
def test_transformers_has_our_logits(tmp_path, transformers, shard_bytes):
    import torch

    params = export(tmp_path / "hf", shard_bytes=shard_bytes)
    theirs, said = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(said.values()), said
    tokens = np.random.default_rng(1).integers(MODEL.vocabulary_size, size=(3, 12), dtype=np.int32)
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
    logits = jax.jit(lambda *of: whole.logits(*of, MODEL, Compute()))(params, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_saves_is_read(tmp_path, transformers, dtype):
    import torch

    export(tmp_path / "ours", dtype)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", dtype=getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    source = huggingface.open_folder(tmp_path / "theirs")
    assert (source.model, source.dtype) == (MODEL, dtype)
    assert_same_bits(source.load(), random_params(dtype=dtype))


TEXT = "To be, or not to be:\n  that isn't   the question 42! naïve <|endoftext|> 日本"


@pytest.mark.parametrize("name", ["gpt2", "bytes", "characters", "bpe"])
def test_the_exported_tokenizer_and_pipeline(tmp_path, transformers, name):
    """Their tokenizer gives our ids and our text; the pipeline goes on from a prompt, greedily, with known tokens."""
    own = [bytes([byte]) for byte in range(256)] + [
        b"th",
        b" th",
        b" the",
        b"to",
        b" b",
        b" be",
        b" q",
        b"ue",
        b" que",
        b"\xe6\x97",
    ]
    tokenizer = tokenizers.TrainedBytePairs(own) if name == "bpe" else tokenizers.make(name, TEXT)
    model = Model(layers=1, heads=2, width=8, context=64, vocabulary_size=tokenizer.vocabulary_size)
    export(tmp_path / "hf", tokenizer=tokenizer, model=model)
    read = huggingface.open_folder(tmp_path / "hf").tokenizer
    assert read is not None
    assert read.state() == tokenizer.state()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = TEXT.replace("<|endoftext|>", "") if name in ("gpt2", "bpe") else TEXT
    ids = tokenizer.encode(text)
    assert theirs(text)["input_ids"] == ids.tolist()
    assert theirs.decode(ids.tolist()) == text
    generate = transformers.pipeline("text-generation", str(tmp_path / "hf"), device="cpu")
    [result] = generate("to be", max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert result["generated_text"].startswith("to be")
    assert len(result["generated_text"]) > len("to be")


# What is refused


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.transformer."])
def test_what_other_programs_put_before_a_name_is_taken_off(tmp_path, prefix):
    """torch.compile's and DistributedDataParallel's, as in state dictionaries that were saved without unwrapping."""
    params = export(tmp_path / "hf")
    path = tmp_path / "hf" / safetensors_files.WEIGHTS
    save_file({prefix + name: array for name, array in load_file(path).items()}, path)
    assert_same_bits(huggingface.open_folder(tmp_path / "hf").load(), params)


def test_the_head_alone_is_the_token_table(tmp_path):
    params = export(tmp_path / "hf")
    path = tmp_path / "hf" / safetensors_files.WEIGHTS
    named = load_file(path)
    named["lm_head.weight"] = named.pop("transformer.wte.weight")
    save_file(named, path)
    assert_same_bits(huggingface.open_folder(tmp_path / "hf").load(), params)
    del named["lm_head.weight"]
    save_file(named, path)
    with pytest.raises(UserError, match=r"the tensor wte.weight is missing"):
        huggingface.open_folder(tmp_path / "hf")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "bloom"},
            "model_type is 'bloom'; this version reads models of gpt2, llama, mistral, mixtral and",
        ),
        ({"n_layer": 3}, "the tensor h.2.ln_1.weight is missing, which a GPT-2 of 3 layers has"),
        ({"n_layer": 1}, "the tensor 'h.1.attn.c_attn.bias' is none of a GPT-2 of 1 layers"),
        ({"n_layer": 2**31 - 1}, "the tensor h.2.ln_1.weight is missing"),
        ({"n_layer": -1}, "n_layer is -1, and must be a whole number from 1 to"),
        ({"n_layer": True}, "n_layer is True, and must be a whole number"),
        ({"n_embd": 2**31 - 2}, "by config.json"),
        ({"n_head": 3}, "n_embd is 16, and 3 heads (n_head) don't divide it"),
        ({"vocab_size": 151}, "[150, 16], and [151, 16] by config.json"),
        ({"n_positions": "12"}, "n_positions is '12', and must be a whole number"),
        ({"n_inner": 32}, "n_inner is 32; this project's GPT-2 has four times n_embd"),
        ({"activation_function": "relu"}, "activation_function is relu; this project's GPT-2 has gelu_new"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False; this project's GPT-2 has True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    ],
)
def test_a_config_that_is_not_the_weights(tmp_path, values, message):
    export(tmp_path / "hf")
    change(tmp_path / "hf" / huggingface.CONFIG, **values)
    with pytest.raises(UserError) as error:
        huggingface.open_folder(tmp_path / "hf")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "model.bin",
        "x\0.safetensors",
        "~.safetensors",
    ],
)
def test_a_hostile_name_in_the_index(tmp_path, name):
    export(tmp_path / "hf", shard_bytes=1)
    index = tmp_path / "hf" / safetensors_files.INDEX
    weights = json.loads(index.read_text())["weight_map"]
    change(index, weight_map=weights | {"transformer.wte.weight": name})
    with pytest.raises(UserError, match="is refused: it must be the plain name"):
        huggingface.open_folder(tmp_path / "hf")


def test_a_link_out_of_the_folder(tmp_path):
    export(tmp_path / "hf")
    path = tmp_path / "hf" / safetensors_files.WEIGHTS
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match=r"leads out of .*hf by a link"):
        huggingface.open_folder(tmp_path / "hf")
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(UserError, match=r"neither model.safetensors nor"):
        huggingface.open_folder(tmp_path / "hf")


def test_the_hubs_cache_links_to_its_blobs(tmp_path):
    params = export(tmp_path / "models--x" / "snapshots" / "abc")
    path = tmp_path / "models--x" / "snapshots" / "abc" / safetensors_files.WEIGHTS
    (tmp_path / "models--x" / "blobs").mkdir()
    path.rename(tmp_path / "models--x" / "blobs" / "0123")
    path.symlink_to("../../blobs/0123")
    assert_same_bits(huggingface.open_folder(path.parent).load(), params)


def test_a_pickle_is_not_read(tmp_path):
    export(tmp_path / "hf")
    (tmp_path / "hf" / safetensors_files.WEIGHTS).unlink()
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle, which can run code and is not read"):
        huggingface.open_folder(tmp_path / "hf")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 548105171\n"


@pytest.mark.parametrize("name", [safetensors_files.WEIGHTS, huggingface.CONFIG, "tokenizer.json"])
def test_a_git_lfs_pointer(tmp_path, name):
    export(tmp_path / "hf", tokenizer=tokenizers.Bytes(), model=Model(1, 1, 8, 8, 256))
    (tmp_path / "hf" / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{name}: a git-lfs pointer .*: `git lfs pull` in its folder"):
        huggingface.open_folder(tmp_path / "hf")


def linear_names(named):
    """nanoGPT's: matrices as torch.nn.Linear has them."""
    of_linear = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {name: array.T.copy() if name.endswith(of_linear) else array for name, array in named.items()}


def test_matrices_that_lie_the_other_way(tmp_path):
    export(tmp_path / "hf")
    path = tmp_path / "hf" / safetensors_files.WEIGHTS
    save_file(linear_names(load_file(path)), path)
    with pytest.raises(
        UserError, match=r"\[48, 16\], and \[16, 48\] by config.json: as nn.Linear and nanoGPT store it"
    ):
        huggingface.open_folder(tmp_path / "hf")


def safetensors_file(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (2**63).to_bytes(8, "little") + b"{}",
        safetensors_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":'
                         b"[0,4]}}", b"1234"),
        safetensors_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":'
                         b"[2,6]}}", b"123456"),
        safetensors_file(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', b"1234"),
        safetensors_file(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"),
        safetensors_file(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', b"1234"),
        safetensors_file(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"),
        safetensors_file(b'{"a":{"dtype":"X7","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        safetensors_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"1234"),
        safetensors_file(b'{"a":' + b"[" * 100_000, b"1234"),
        safetensors_file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"1234"),
    ],
)  # fmt: skip
def test_a_header_that_lies(tmp_path, content):
    export(tmp_path / "hf")
    (tmp_path / "hf" / safetensors_files.WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        huggingface.open_folder(tmp_path / "hf")


def test_a_file_cut_off(tmp_path):
    export(tmp_path / "hf")
    path = tmp_path / "hf" / safetensors_files.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        huggingface.open_folder(tmp_path / "hf")


def test_float16_holds_no_more_than_65504(tmp_path):
    params = random_params()
    params.final_norm.bias[0] = 1e5
    with pytest.raises(UserError, match="numbers beyond 65504"), writing.new_folder(tmp_path / "hf") as folder:
        huggingface.write_folder(folder, params, MODEL, "float16", None, ONE_FILE)
    assert list(tmp_path.iterdir()) == []
