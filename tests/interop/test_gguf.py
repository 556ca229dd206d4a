"""GGUF files beside transformers, which reads them too: logits, numbers, and every way in which a file is false."""

import dataclasses
import struct
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt import models
from jaxgpt.commands import cli
from jaxgpt.data import chat_templates
from jaxgpt.data.chat_templates import Template
from jaxgpt.errors import UserError
from jaxgpt.interop import detect_format, gguf_header, tensors
from jaxgpt.interop import gguf as reader
from jaxgpt.models import grouped_attention
from jaxgpt.models.blocks import Context
from jaxgpt.options.config import Compute, Model
from tests.data import templates
from tests.interop import gguf_files
from tests.interop.gguf_files import gguf, state, write
from tests.nightly import nightly

LLAMA = Model(
    family="llama", layers=2, heads=4, kv_heads=2, width=32, feed_forward=64, context=64, vocabulary_size=276,
    rope_base=50_000.0,
)  # fmt: skip
QWEN3 = dataclasses.replace(LLAMA, head_width=128, query_key_norm=True, tied=True)
MIXTRAL = dataclasses.replace(LLAMA, family="mixtral", experts=3, experts_per_token=2)
TOKENS = [1, 17, 260, 3, 99, 5, 200, 31, 31, 0]


def logits(source: tensors.WeightSource) -> np.ndarray:
    context = Context(source.model, Compute())
    return np.asarray(models.logits(jax.device_put(source.load()), jax.numpy.array([TOKENS]), context)[0])


def theirs(path: Path) -> np.ndarray:
    """The logits of transformers, which reads the file by itself."""
    torch = pytest.importorskip("torch", reason="runs transformers; the parity extra installs it")
    transformers = pytest.importorskip("transformers", reason="is compared with; the parity extra installs it")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("kind", nightly(["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"], every_time=["F16", "Q4_0"]))
@pytest.mark.parametrize(("architecture", "model"), [("llama", LLAMA), ("qwen3", QWEN3)], ids=["llama", "qwen3"])
def test_the_logits_are_those_of_transformers(tmp_path, architecture, model, kind):
    path = tmp_path / "m.gguf"
    write(path, model, state(model), kind=kind, architecture=architecture)
    source = detect_format.open_weights(str(path))
    assert source.model == model
    assert source.dtype == "float32"  # the norms are not of half the precision
    expected = theirs(path)
    np.testing.assert_allclose(logits(source), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_the_numbers_are_those_of_transformers(tmp_path, kind):
    """Blocks of noise: transformers has its own dequantisation, in torch."""
    torch = pytest.importorskip("torch", reason="runs transformers; the parity extra installs it")
    dequant = pytest.importorskip("transformers.integrations.gguf.dequant", reason="is compared with")
    code = int(gguf.GGMLQuantizationType[kind])
    form = gguf_header.TYPES[code]
    assert dequant.GGML_BLOCK[code] == (form.numbers, form.bytes)
    blocks = np.random.default_rng(0).integers(0, 256, (6, 2, form.bytes), np.uint8)
    scales = np.random.default_rng(1).normal(0, 0.1, (6, 2, 2)).astype("<f2").view(np.uint8)
    first = -2 if kind == "Q6_K" else 0  # where a block's scale lies; the others are finite in float16 too
    blocks[..., first : (first + 2) or None] = scales[..., :2]
    if kind in ("Q4_1", "Q4_K"):
        blocks[..., 2:4] = scales[..., 2:]
    (tmp_path / "raw").write_bytes(b"x" * 5 + blocks.tobytes())
    tensor = gguf_header.Tensor(form, code, (6, 2 * form.numbers), 5)
    ours = reader._read(tmp_path / "raw", tensor)
    expected = dequant.dequantize(torch.from_numpy(blocks.reshape(6, -1)), code).numpy().reshape(ours.shape)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16")])
def test_half_precision_stays_where_every_number_has_it(tmp_path, kind, dtype):
    made = {name: array.astype(tensors.DTYPES[dtype]).astype(np.float32) for name, array in state(LLAMA).items()}
    write(tmp_path / "m.gguf", LLAMA, made, kind=kind)
    source = detect_format.open_weights(str(tmp_path / "m.gguf"))
    assert source.dtype == dtype
    params = source.load()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {tensors.DTYPES[dtype]}
    rows = np.asarray(params.blocks.mlp_out.weight[1], np.float32)
    assert np.array_equal(rows.T, made["blk.1.ffn_down.weight"])


def test_experts_of_either_way_to_write_them(tmp_path):
    """Experts stand in one tensor for all, or in one for each, as older files have them."""
    made = state(MIXTRAL)
    apart = {name: array for name, array in made.items() if "_exps" not in name}
    for name in made.keys() - apart.keys():
        apart |= {name.replace("_exps", f".{i}"): array for i, array in enumerate(made[name])}
    for kind in ("F32", "Q8_0"):
        write(tmp_path / "merged.gguf", MIXTRAL, made, kind=kind)
        write(tmp_path / "apart.gguf", MIXTRAL, apart, kind=kind)
        merged, older = (detect_format.open_weights(str(tmp_path / f"{name}.gguf")) for name in ("merged", "apart"))
        assert merged.model == older.model == MIXTRAL
        loaded = merged.load()
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded, older.load()))
        if kind == "F32":
            gate, up = made["blk.1.ffn_gate_exps.weight"][2], made["blk.1.ffn_up_exps.weight"][2]
            assert np.array_equal(loaded.blocks.experts.w_in[1, 2], np.concatenate([gate, up]).T)
            assert np.array_equal(loaded.blocks.experts.w_out[0, 1], made["blk.0.ffn_down_exps.weight"][1].T)
            assert np.array_equal(loaded.blocks.experts.router.weight[1], made["blk.1.ffn_gate_inp.weight"].T)


def test_the_logits_of_a_mixture_are_those_of_transformers(tmp_path):
    """Compares with its MixtralForCausalLM of the same weights, since transformers reads no mixture from GGUF."""
    torch = pytest.importorskip("torch", reason="runs transformers; the parity extra installs it")
    transformers = pytest.importorskip("transformers", reason="is compared with; the parity extra installs it")
    made = state(MIXTRAL)
    write(tmp_path / "m.gguf", MIXTRAL, made)
    config = transformers.MixtralConfig(
        vocab_size=MIXTRAL.vocabulary_size, hidden_size=MIXTRAL.width, intermediate_size=MIXTRAL.feed_forward,
        num_hidden_layers=MIXTRAL.layers, num_attention_heads=MIXTRAL.heads, num_key_value_heads=MIXTRAL.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": MIXTRAL.rope_base}, num_local_experts=MIXTRAL.experts,
        num_experts_per_tok=MIXTRAL.experts_per_token, rms_norm_eps=1e-5, sliding_window=None,
    )  # fmt: skip
    within = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp"}
    within |= {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"} | {"self_attn.o_proj": "attn_output"}
    named = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(MIXTRAL.layers):
        named |= {f"model.layers.{i}.{ours}": f"blk.{i}.{name}" for ours, name in within.items()}
    weights = {f"{name}.weight": made[f"{found}.weight"] for name, found in named.items()}
    for i in range(MIXTRAL.layers):
        gate, up, down = (made[f"blk.{i}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        experts = f"model.layers.{i}.mlp.experts"
        weights |= {f"{experts}.gate_up_proj": np.concatenate([gate, up], 1), f"{experts}.down_proj": down}
    model = transformers.MixtralForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    ours = logits(detect_format.open_weights(str(tmp_path / "m.gguf")))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def divisors(base: float, width: int, factor: float = 8.0) -> np.ndarray:
    """The divisors of Llama 3.1, as llama.cpp's conversion computes them."""
    found = []
    for frequency in base ** (-np.arange(0, width, 2) / width):
        length = 2 * np.pi / frequency
        smooth = (8192 / length - 1) / 3
        middle = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if length < 8192 / 4 else factor if length > 8192 else middle)
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_1_is_found_from_its_divisors(tmp_path, factor):
    model = dataclasses.replace(LLAMA, rope_base=500_000.0)
    made = state(model) | {"rope_freqs.weight": divisors(500_000.0, 8, factor)}
    write(tmp_path / "m.gguf", model, made)
    source = detect_format.open_weights(str(tmp_path / "m.gguf"))
    assert source.model == dataclasses.replace(model, rope_scaling="llama3", rope_factor=factor)
    frequencies = grouped_attention.frequencies(source.model).values(8)
    np.testing.assert_allclose(frequencies, 500_000.0 ** (-np.arange(0, 8, 2) / 8) / made["rope_freqs.weight"], 1e-5)


def test_a_linear_scaling_and_a_window(tmp_path):
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "attention.sliding_window": 24}
    write(tmp_path / "m.gguf", LLAMA, state(LLAMA), keys=keys)
    found = detect_format.open_weights(str(tmp_path / "m.gguf")).model
    assert found == dataclasses.replace(LLAMA, rope_scaling="linear", rope_factor=4.0, window=24)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "llama.rope.scaling.type is 'yarn'; this version"),
        ({"attention.head_count": [4, 2]}, "llama.attention.head_count differs from layer to layer"),
        ({"attention.head_count_kv": 3}, "head_count_kv is 3, and doesn't divide 4"),
        ({"rope.dimension_count": 4}, "rope.dimension_count is 4, and a head is 8 wide"),
        ({"block_count": None}, "llama.block_count is missing"),
        ({"block_count": 0}, "llama.block_count is 0, and must be a whole number from 1"),
        ({"block_count": 2**31 - 1}, "21 tensors, and a Llama of 2,147,483,647 layers has"),
        ({"block_count": "2"}, "llama.block_count is b'2', and must be a whole number"),
        ({"vocab_size": 275}, "vocab_size is 275, and there are 276 rows"),
        ({"feed_forward_length": 96}, r"blk.0.ffn_gate.weight is \[64, 32\], and \[96, 32\] by its keys"),
        ({"logit_scale": 0.5}, "llama.logit_scale is 0.5; this project's models have 0.0"),
        ({"attention.causal": False}, "attention.causal is False"),
        ({"rope.freq_base": float("nan")}, "rope.freq_base is nan, and must be a number"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "rms_epsilon is 0.0, and must be a number above 0"),
        ({"expert_count": 4, "expert_used_count": 2}, "21 tensors, and a mixture of experts of 2 layers has"),
    ],
)
def test_keys_of_another_model_are_refused(tmp_path, keys, message):
    write(tmp_path / "m.gguf", LLAMA, state(LLAMA), keys=keys)
    with pytest.raises(UserError, match=message):
        detect_format.open_weights(str(tmp_path / "m.gguf"))


def test_another_architecture_and_another_type_are_refused_by_name(tmp_path):
    write(tmp_path / "m.gguf", LLAMA, state(LLAMA), architecture="gemma2")
    with pytest.raises(UserError, match="is 'gemma2'; this version reads llama, qwen3"):
        detect_format.open_weights(str(tmp_path / "m.gguf"))
    write(tmp_path / "m.gguf", LLAMA, state(LLAMA), kind="Q5_0")
    with pytest.raises(UserError, match="is of type Q5_0; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K can be read"):
        detect_format.open_weights(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.pop("blk.1.attn_v.weight"), "20 tensors, and a Llama of 2 layers has 21"),
        (lambda made: made.update({"blk.0.attn_q.bias": np.ones(32, np.float32)}), "'blk.0.attn_q.bias' is unknown"),
        (
            lambda made: made.update({"x.weight": made.pop("blk.1.attn_v.weight")}),
            "tensor blk.1.attn_v.weight is missing",
        ),
        (lambda made: made.pop("token_embd.weight"), "the tensor token_embd.weight is missing"),
        (lambda made: made.update({"rope_freqs.weight": np.full(4, -1, np.float32)}), "no list of 4 positive numbers"),
        (lambda made: made.update({"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}), "doesn't know"),
    ],
)
def test_tensors_of_another_model_are_refused(tmp_path, change, message):
    made = state(LLAMA)
    change(made)
    write(tmp_path / "m.gguf", LLAMA, made)
    with pytest.raises(UserError, match=message):
        detect_format.open_weights(str(tmp_path / "m.gguf"))


def at(data: bytes, after: bytes, offset: int, value: bytes) -> bytes:
    place = data.index(after) + len(after) + offset
    return data[:place] + value + data[place + len(value) :]


def number(value: int, form: str = "<Q") -> bytes:
    return struct.pack(form, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:-40], "is cut off or damaged"),
        (lambda d: d[:10], "the number of tensors at byte 8 has 8 bytes, and 2 follow"),
        (lambda d: d[:4] + number(1, "<I") + d[8:], "GGUF of version 1; version 2 or 3"),
        (lambda d: d[:4] + number(3, ">I") + d[8:], "it is of big-endian numbers"),
        (lambda d: d[:8] + number(2**63) + d[16:], r"m\.gguf: "),
        (lambda d: d[:16] + number(2**63) + d[24:], r"m\.gguf: "),
        (lambda d: at(d, b"llama.block_count", 0, number(9999, "<I")), "of type 9999, and there is no such type"),
        (lambda d: at(d, b"llama.block_count", -25, number(2**60)), "a key at byte .* may have 1,024"),
        (lambda d: at(d, b"tokenizer.ggml.tokens", 8, number(2**61)), "has 2,305,843,009,213,693,952 strings"),
        (lambda d: at(d, b"tokenizer.ggml.scores", 8, number(2**61)), "9,223,372,036,854,775,808 bytes, and"),
        (lambda d: at(d, b"blk.0.attn_v.weight", 0, number(9, "<I")), "has 9 axes"),
        (lambda d: at(d, b"blk.0.attn_v.weight", 4, number(2**62)), "is cut off or damaged"),
        (lambda d: at(d, b"blk.0.attn_v.weight", 4, number(0)), "can't be"),
        (lambda d: at(d, b"blk.0.attn_v.weight", 24, number(2**62)), "begins at byte 4,611,686,018,427,387,904"),
        (lambda d: at(d, b"blk.0.attn_v.weight", 24, number(33)), "begins at byte 33"),
        (lambda d: at(d, b"blk.0.attn_v.weight", 20, number(77, "<I")), "is of type 77; F32"),
        (lambda d: d.replace(b"blk.0.attn_v.weight", b"blk.0.attn_k.weight"), "'blk.0.attn_k.weight' is there twice"),
        (
            lambda d: d.replace(b"ggml.bos_token_id", b"ggml.eos_token_id"),
            "'tokenizer.ggml.eos_token_id' is there twice",
        ),
        (lambda d: b"GGML" + d[4:], "not a GGUF file"),
    ],
)
def test_a_file_that_lies_is_refused(tmp_path, change, message):
    path = tmp_path / "m.gguf"
    write(path, LLAMA, state(LLAMA), tokenizer=gguf_files.sentencepiece())
    changed = change(path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    with pytest.raises(UserError, match=message):
        reader.open_model(path)


def test_loading_takes_the_models_memory_and_little_more(tmp_path):
    """A tensor at a time: at most some copies of the largest one beside the parameters."""
    model = dataclasses.replace(LLAMA, layers=12, width=128, feed_forward=256)
    write(tmp_path / "m.gguf", model, state(model), kind="Q8_0")
    source = detect_format.open_weights(str(tmp_path / "m.gguf"))
    tracemalloc.start()
    params = source.load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    assert sum(sizes) > 20 * 4 * model.vocabulary_size * model.width
    assert peak - sum(sizes) < 5 * 4 * model.vocabulary_size * model.width + (1 << 20)


def test_a_folder_of_such_files_is_told_so(tmp_path):
    write(tmp_path / "m.gguf", LLAMA, state(LLAMA))
    with pytest.raises(UserError, match=r"a folder of GGUF files: give the file itself, such as .*m\.gguf"):
        detect_format.open_weights(str(tmp_path))


def test_without_the_package(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", LLAMA, state(LLAMA))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="need the package gguf: make env EXTRAS=gguf"):
        detect_format.open_weights(str(tmp_path / "m.gguf"))


def test_its_chat_template_comes_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said, names = gguf_files.sentencepiece(), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(Path("m.gguf"), LLAMA, state(LLAMA), tokenizer=said, template=templates.MISTRAL)
    assert cli.main(["convert", "m.gguf", "run"]) == 0
    template = detect_format.open_weights("run").template
    assert template == Template("jinja", templates.MISTRAL, names) == detect_format.open_weights("m.gguf").template
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert chat_templates.render(messages, template) == "<s>[INST] a[/INST] b</s>"
    write(Path("m.gguf"), LLAMA, state(LLAMA), tokenizer=said)
    assert detect_format.open_weights("m.gguf").template is None


def test_it_becomes_a_run_that_generates_and_is_trained_further(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("m.gguf"), LLAMA, state(LLAMA), kind="Q8_0", tokenizer=gguf_files.sentencepiece())
    assert cli.main(["convert", "m.gguf", "run"]) == 0
    said = capsys.readouterr().out
    assert "a GGUF file of Q8_0, float32" in said
    assert "Q8_0 is dequantised to float32" in said
    assert cli.main(["generate", "--run", "run", "--prompt", "the", "--tokens", "5"]) == 0
    assert "the" in capsys.readouterr().out
    Path("a.txt").write_text("the dog and the tea. " * 200)
    words = ["--init-from", "m.gguf", "--data.text", "a.txt", "--run.name", "tuned", "--training.steps", "2"]
    words += ["--training.batch-size", "2", "--training.sequence-length", "16", "--sampling.tokens", "4"]
    assert cli.main(["train", *words]) == 0
    assert "a GGUF file of Q8_0" in capsys.readouterr().out
