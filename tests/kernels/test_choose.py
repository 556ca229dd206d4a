"""The choice of an attention and the words for it: on faked devices, and in the output of every command."""

import dataclasses
import types

import jax
import pytest

from benchmarks import bench
from jaxgpt.commands import gradcheck
from jaxgpt.errors import UserError
from jaxgpt.generation.decoder import Decoder
from jaxgpt.kernels import choose, cudnn_attention, pallas_attention, pallas_softmax
from jaxgpt.layers import attention
from jaxgpt.models import gpt2
from jaxgpt.options.config import Compute, Model, Sampling

MODEL = Model(layers=1, heads=12, width=768, context=1024, vocabulary_size=50_257)
BFLOAT16 = Compute(dtype="bfloat16")


@pytest.fixture
def device(monkeypatch):
    """A function that makes this the device, an H100 where nothing else is said, with this version of cuDNN."""

    def fake(kind="NVIDIA H100", platform="gpu", backend="cuda 13000", capability="9.0", version=91002):
        client = types.SimpleNamespace(platform_version=f"PJRT C API\n{backend}")
        made = types.SimpleNamespace(device_kind=kind, platform=platform, client=client, compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda: [made])
        monkeypatch.setattr(cudnn_attention, "version", lambda: version)

    return fake


def chosen(compute, model=MODEL, length=1024):
    resolved, words = choose.choose_attention(model, compute, length)
    assert dataclasses.replace(resolved, attention=compute.attention) == compute  # nothing else is changed
    return resolved.attention, words


def test_documents_are_told_apart_in_blocks_only(device):
    device()
    attention, words = chosen(BFLOAT16, dataclasses.replace(MODEL, document_start=50256))
    assert attention == "blocks"
    assert "needs attention across the borders of documents (--data.document-mask)" in words


def forced(**options):
    return dataclasses.replace(BFLOAT16, attention="cudnn", **options)


def test_auto_takes_the_kernel_on_an_h100(device):
    device()
    assert chosen(BFLOAT16) == ("cudnn", "cuDNN's fused kernel")
    assert chosen(forced()) == ("cudnn", "cuDNN's fused kernel")


def test_blocks_are_blocks_anywhere(device):
    device()
    asked = dataclasses.replace(BFLOAT16, attention="blocks", attention_block=64)
    assert chosen(asked) == ("blocks", "in blocks of 64 queries")


def test_auto_on_a_cpu_needs_no_words_about_kernels():
    assert chosen(BFLOAT16) == ("blocks", "in blocks of 256 queries")


@pytest.mark.parametrize(
    ("faked", "compute", "heads", "length", "reason"),
    [
        ({}, Compute(), 12, 1024, "--compute.dtype bfloat16 (it is float32)"),
        ({}, BFLOAT16, 64, 1024, "multiple of 8 and at most 256 (--model.width / --model.heads is 12)"),
        ({}, BFLOAT16, 2, 1024, "multiple of 8 and at most 256 (--model.width / --model.heads is 384)"),
        ({"capability": "8.0"}, BFLOAT16, 4, 1024, "at most 128 (--model.width / --model.heads is 192)"),
        ({"capability": "10.0"}, BFLOAT16, 4, 1024, "at most 128 (--model.width / --model.heads is 192)"),
        ({"kind": "Tesla V100", "capability": "7.0"}, BFLOAT16, 12, 1024, "or later (here is Tesla V100, 7.0)"),
        ({"kind": "MI300X", "backend": "rocm 60300", "capability": "gfx942"}, BFLOAT16, 12, 1024, "(here is MI300X)"),
        ({"version": None}, BFLOAT16, 12, 1024, "cuDNN 9.0 or later (there is none): pip install -U 'jax[cuda12]'"),
        ({"version": 8907}, BFLOAT16, 12, 1024, "cuDNN 9.0 or later"),
        ({"capability": "10.3"}, BFLOAT16, 12, 1024, "cuDNN 9.11 or later (here is 9.10.2)"),
        ({}, BFLOAT16, 12, 1, "sequences of two tokens or more"),
    ],
)  # fmt: skip
def test_what_is_missing_on_a_gpu_is_said(device, faked, compute, heads, length, reason):
    """`auto` gives it as the reason, and a run that asks for the kernel as an error."""
    device(**faked)
    model = dataclasses.replace(MODEL, heads=heads)
    attention, words = chosen(compute, model, length)
    assert attention == "blocks"
    assert words.startswith("in blocks of 256 queries (cuDNN's fused kernel needs ")
    assert reason in words
    assert ";" not in words  # that alone
    with pytest.raises(UserError) as raised:
        chosen(dataclasses.replace(compute, attention="cudnn"), model, length)
    assert str(raised.value).startswith("--compute.attention cudnn can't run here. It needs ")
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("faked", "heads"),
    [
        ({"kind": "NVIDIA A100", "capability": "8.0"}, 6),  # D = 128
        ({}, 3),  # D = 256
        ({"capability": "12.0"}, 12),
        ({"capability": "10.3", "version": 91100}, 12),
    ],
)
def test_the_edges_of_what_it_takes(device, faked, heads):
    device(**faked)
    assert chosen(BFLOAT16, dataclasses.replace(MODEL, heads=heads), 2)[0] == "cudnn"


def test_all_that_is_missing_is_said_at_once():
    with pytest.raises(UserError) as raised:
        chosen(Compute(attention="cudnn"), dataclasses.replace(MODEL, heads=64))
    for need in ("an NVIDIA GPU", "--compute.dtype bfloat16", "a multiple of 8"):
        assert need in str(raised.value)


def test_the_model_takes_the_kernel_only_where_it_was_chosen():
    names = ("auto", "blocks", "cudnn", "pallas")
    assert [choose.attention_layer(Compute(attention=name)) for name in names] == [
        *(attention, attention, cudnn_attention, pallas_attention)
    ]


def test_the_kernels_in_pallas_are_taken_by_name_alone(device):
    device()
    assert chosen(Compute())[0] == "blocks"  # float32, which cuDNN's doesn't take
    asked = Compute(attention="pallas")
    of_documents = dataclasses.replace(MODEL, document_start=50256, window=100, family="llama", kv_heads=4)
    for model in (MODEL, of_documents, dataclasses.replace(MODEL, heads=3)):
        assert chosen(asked, model) == ("pallas", "fused kernels in Pallas")
    assert choose.attention_of_card(MODEL, asked, 1024, (8, 0)) == asked


@pytest.mark.parametrize(
    ("faked", "options", "reason"),
    [
        ({"kind": "Tesla T4", "capability": "7.5"}, {}, "an NVIDIA GPU of compute capability 8.0"),
        ({}, {"heads": 2}, "heads of a width of at most 256 (--model.width / --model.heads is 384)"),
        ({}, {"dropout": 0.1}, "no dropout (--model.dropout is 0.1)"),
    ],
)
def test_what_the_kernels_in_pallas_need(device, faked, options, reason):
    device(**faked)
    with pytest.raises(UserError) as raised:
        chosen(Compute(attention="pallas"), dataclasses.replace(MODEL, **options))
    assert str(raised.value).startswith("--compute.attention pallas can't run here. It needs ")
    assert reason in str(raised.value)
    assert ";" not in str(raised.value)


def test_the_version_is_cudnns_or_none(monkeypatch):
    monkeypatch.setattr(cudnn_attention.cudnn, "cuda_versions", None)
    assert cudnn_attention.version() is None
    monkeypatch.setattr(cudnn_attention.cudnn, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91002))
    assert cudnn_attention.version() == 91002


# The commands


def test_a_forced_kernel_ends_training_before_a_folder_is_made(fails, tmp_path):
    message = fails("--compute.attention", "cudnn", "--run.folder", str(tmp_path))
    assert "--compute.attention cudnn can't run here. It needs an NVIDIA GPU" in message
    assert list(tmp_path.iterdir()) == []


def test_a_forced_kernel_ends_a_profile(fails, tmp_path):
    words = ("--profile", str(tmp_path), "--sizes", "1x64", "--dtypes", "bfloat16", "--compute.attention", "cudnn")
    assert "--compute.attention cudnn can't run here" in fails("--config", "quickstart", *words, command=bench.run)


def test_samples_are_drawn_where_the_kernel_cant_run():
    """A run trained on a GPU can draw samples anywhere, by the attention in blocks."""
    model = Model(layers=1, heads=1, width=4, context=8, vocabulary_size=5)
    params = gpt2.init(model, jax.random.key(0))
    tokens = [
        Decoder(params, model, compute, slots=1, capacity=8).start(0, [1], Sampling(), 0)
        for compute in (Compute(attention="cudnn"), Compute())
    ]
    assert tokens[0] == tokens[1]


def test_gradcheck_of_a_config_with_the_kernel_checks_the_blocks(tmp_path):
    path = tmp_path / "gpu.toml"
    path.write_text("[compute]\nattention = 'cudnn'\n[data]\ntokenizer = 'bytes'")
    _, compute, *_ = gradcheck._shapes(str(path))
    assert compute.attention == "blocks"


def test_kernels_in_pallas_are_taken_by_name_where_they_run(device):
    device()
    assert chosen(dataclasses.replace(BFLOAT16, kernels="pallas"))[0] == "cudnn"
    assert choose.softmax_kernel(Compute(kernels="pallas")) is pallas_softmax.forward
    assert choose.softmax_kernel(Compute()) is None


@pytest.mark.parametrize(
    ("faked", "width", "reason"),
    [
        (
            None,
            768,
            r"needs an NVIDIA GPU of compute capability 8\.0 \(Ampere\) or later \(here is cpu\)\. --compute\.",
        ),
        ({"kind": "Tesla V100", "capability": "7.0"}, 768, r"or later \(here is Tesla V100, 7\.0\)"),
        (
            {},
            49152,
            r"needs a width of at most 32768 \(--model\.width is 49152\)\. --compute\.kernels xla, the default",
        ),
    ],
)
def test_why_kernels_in_pallas_do_not_run_is_said(device, faked, width, reason):
    if faked is not None:
        device(**faked)
    model = dataclasses.replace(MODEL, width=width)
    with pytest.raises(UserError, match=rf"^--compute\.kernels pallas can't run here\. It .*{reason}"):
        chosen(dataclasses.replace(BFLOAT16, kernels="pallas"), model)
