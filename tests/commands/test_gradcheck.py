"""`run.py gradcheck`: its table and its exit status."""

import dataclasses
import re
from typing import Any

import jax
import pytest

from jaxgpt.commands import cli
from jaxgpt.commands import gradcheck as gradcheck_report
from jaxgpt.layers import gelu
from jaxgpt.models import family
from jaxgpt.options import settings
from jaxgpt.proof import cases, objective_cases


@pytest.fixture
def one_layer(monkeypatch):
    """gradcheck with only the GELU to check; what it sets for its process is put back."""

    def only_gelu(model, compute, batch, length, key):
        yield cases.gelu_case(key, batch, length, 4 * model.width)

    monkeypatch.setattr(cases, "cases", only_gelu)
    monkeypatch.setattr(objective_cases, "cases", lambda *shapes: iter(()))
    process: Any = jax.config
    precision = process.jax_default_matmul_precision
    yield
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_default_matmul_precision", precision)


@pytest.mark.parametrize("words", [[], ["--dtype=float32"], ["--dtype=bfloat16"], ["--config=quickstart"]])
def test_gradcheck_passes_with_status_0(one_layer, capsys, words):
    assert cli.main(["gradcheck", *words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^gelu\.x +\d\.\d\de-\d\d +\d\.\de-\d\d +ok$", out, re.MULTILINE)
    assert out.endswith("\n1 of 1 gradients agree with jax.grad\n")


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_gradcheck_fails_with_status_1(one_layer, capsys, monkeypatch, factor):
    """One gradient is one percent too large, or NaN."""
    backward = gelu.backward
    monkeypatch.setattr(gelu, "backward", lambda residuals, dy: factor * backward(residuals, dy))
    assert cli.main(["gradcheck", "--dtype=float32"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^gelu\.x .* FAILED$", out, re.MULTILINE)
    assert out.endswith("0 of 1 gradients agree with jax.grad; 1 FAILED\n")


def test_gradcheck_of_a_model_that_does_not_fit(one_layer, fails, monkeypatch):
    monkeypatch.setattr(gradcheck_report.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**22}.get)
    message = fails("gradcheck", "--config", "gpt2_1558m")
    assert "would need about 93 GiB for a model of this size, and this machine has 16 GiB" in message


def test_the_checked_model_is_the_configs(one_layer, capsys):
    """Its parameters are counted in the first line, with the tokenizer's vocabulary."""
    assert cli.main(["gradcheck", "--config=quickstart"]) == 0
    quickstart = dataclasses.replace(settings.read(settings.find_config("quickstart")).model, vocabulary_size=256)
    count = family(quickstart).parameter_count(quickstart)
    assert capsys.readouterr().out.startswith(f"{count:,} parameters, 2 sequences")


def test_the_chart_is_a_picture_and_one_that_cannot_be_written_is_named(one_layer, tmp_path, capsys):
    path = tmp_path / "errors.png"
    assert cli.main(["gradcheck", "--chart", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert cli.main(["gradcheck", "--chart", str(tmp_path / "gone" / "errors.png")]) == 1
    assert "writing failed (No such file or directory)" in capsys.readouterr().err
