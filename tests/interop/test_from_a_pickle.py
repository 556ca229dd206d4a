"""docs/formats.md's way from nanoGPT's checkpoint to a folder that is read."""

import pathlib
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxgpt import writing
from jaxgpt.interop import huggingface
from jaxgpt.models import gpt2
from tests.interop.weights import MODEL, assert_same_bits, random_params

PAGE = pathlib.Path(__file__).parents[2] / "docs/formats.md"


@pytest.mark.parametrize("bias", [True, False])
def test_the_lines_on_the_page(tmp_path, monkeypatch, bias):
    """The checkpoint is as nanoGPT's model.py makes it: nn.Linear, the mask, torch.compile's prefix, both names."""
    torch = pytest.importorskip("torch", reason="makes and reads a checkpoint of nanoGPT; the parity extra installs it")
    monkeypatch.chdir(tmp_path)
    params = random_params()
    with writing.new_folder(tmp_path / "hf") as folder:
        huggingface.write_folder(folder, params, MODEL, "float32", None, 1 << 30)
    named = {name: torch.from_numpy(array) for name, array in load_file(tmp_path / "hf/model.safetensors").items()}
    linear = ("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: array.T if name.endswith(linear) else array for name, array in named.items()}
    state = {name: array for name, array in state.items() if bias or not name.endswith(".bias")}
    state |= {"lm_head.weight": named["transformer.wte.weight"], "transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12)}
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 150, "bias": bias, "dropout": 0.0}
    pathlib.Path("out").mkdir()
    model = {f"_orig_mod.{name}": array for name, array in state.items()}
    torch.save({"model": model, "model_args": shape, "iter_num": 7}, "out/ckpt.pt")
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(compile(code, "formats.md", "exec"), {})
    source = huggingface.open_folder(pathlib.Path("exported"))
    assert source.model == MODEL
    loaded = source.load()
    if bias:
        assert_same_bits(loaded, params)
    else:
        assert isinstance(loaded.blocks, gpt2.Block)
        assert isinstance(params.blocks, gpt2.Block)
        assert loaded.blocks.qkv.bias is not None
        assert not loaded.blocks.qkv.bias.any()
        assert not loaded.final_norm.bias.any()
        assert np.array_equal(loaded.blocks.mlp_out.weight, params.blocks.mlp_out.weight)
