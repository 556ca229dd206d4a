"""`run.py gradcheck --as-run`: its output, the place of its verdict, and the part of a large run that it checks."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxgpt.commands import cli, configuration
from jaxgpt.errors import UserError
from jaxgpt.layers import layernorm
from jaxgpt.options import settings
from jaxgpt.options.config import Compute, Config, Data, Model, Parallel, Run, Training
from jaxgpt.proof import as_run_inputs, as_run_sampling, as_run_step
from jaxgpt.reports import page
from jaxgpt.reports.history import History
from jaxgpt.runs import verdict
from tests.reports.runs import HOSTILE

CONFIG = Config(
    model=Model(layers=1, heads=2, width=8, context=4),
    compute=Compute(recompute="none"),
    data=Data(text="text.txt", tokenizer="characters"),
    training=Training(steps=3, batch_size=2),
    run=Run(name="tiny"),
)


@pytest.fixture
def run(work, monkeypatch):
    """A run's folder as it is before its first step, and a check at one kind of inputs alone."""

    def inputs(batches):
        yield as_run_inputs.Inputs("random", "random tokens", [batches.random(0)])

    monkeypatch.setattr(as_run_inputs.Batches, "inputs", inputs)
    monkeypatch.setattr(as_run_step, "rows", lambda check, program: check.rows(next(inputs(check.batches()))))
    folder = work / "runs" / "tiny"
    folder.mkdir(parents=True)
    settings.write(CONFIG, work / "tiny.toml")
    settings.write(configuration.without_text(CONFIG), folder / "config.toml")  # which has its sizes
    (folder / "metrics.jsonl").touch()
    return folder


def test_a_run_and_what_its_page_shows(run, capsys):
    assert cli.main(["gradcheck", "--as-run", "runs/tiny"]) == 0
    out = capsys.readouterr().out
    assert "all of the run's step" in out
    assert "21 of 21 are right" in out
    written = json.loads((run / verdict.NAME).read_text())
    assert written["passed"]
    assert written["device"] == "1 × cpu (cpu)"
    assert {"jax", "jaxlib", "python"} <= written["versions"].keys()
    assert written["options"]["compute"]["attention"] == "blocks"  # as it was decided for this machine
    shown = page.of_run(run, History(run / "metrics.jsonl").read_all())["gradcheck"]
    assert [row["tensor"] for row in shown["tensors"]] == [row["tensor"] for row in written["tensors"]]
    assert all(row["passed"] and 0 <= row["error"] <= row["tolerance"] for row in shown["tensors"])


def test_a_wrong_gradient_ends_with_its_tensors_name(run, capsys, monkeypatch):
    """The step is named by a config this time, and the verdict is written to a file of its own too."""
    right = layernorm.backward

    def backward(params, residuals, dy):
        grads, dx = right(params, residuals, dy)
        return grads._replace(scale=1.001 * grads.scale), dx

    monkeypatch.setattr(layernorm, "backward", backward)
    words = ["gradcheck", "--as-run", "--config", "tiny.toml", "--output", "found.json"]
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "error: 3 of 21 are WRONG on this device: blocks.attention_norm.scale (relative error 1.0e-03"
    )
    assert "blocks.mlp_norm.scale" in said
    assert not json.loads((run / verdict.NAME).read_text())["passed"]
    assert json.loads(Path("found.json").read_text())["tensors"][1]["passed"]


@pytest.mark.slow
def test_a_verdict_of_another_step_is_not_written(run, capsys):
    words = ["gradcheck", "--as-run", "--config", "tiny.toml", "--compute.dtype", "bfloat16"]
    assert cli.main(words) == 0
    assert "not written: runs/tiny was trained with another --compute.dtype" in capsys.readouterr().out
    assert not (run / verdict.NAME).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/tin"], "--as-run runs/tin: not a run's folder. In runs there are: tiny"),
        (["runs/tiny", "--config", "quickstart"], "says already which config: leave --config away"),
        (["--compute.dtpye", "bfloat16"], "did you mean --compute.dtype?"),
        (["runs/tiny", "--parallel.processes", "2", "--parallel.process", "0"], "the devices of one process"),
        (["runs/tiny", "--parallel.devices", "99"], "--parallel.devices is 99"),
        (["runs/tiny", "--compute.products", "fp8"], "--compute.products dtype checks all the other code"),
    ],
)
def test_mistakes(run, fails, words, said):
    assert said in fails("gradcheck", "--as-run", *words)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"passed": 1, "tensors": []}', '{"passed": true, "tensors": [1]}', '{"passed": true}']
)
def test_a_damaged_verdict_is_one_message(run, fails, text):
    (run / verdict.NAME).write_text(text)
    assert f"{Path('runs/tiny', verdict.NAME)}: not " in fails("report", "runs/tiny")


def test_what_another_has_written_is_text(run):
    """Any content may stand where a number or a short text is expected."""
    rows = [{"tensor": HOSTILE, "error": HOSTILE, "entry": 1e400, "tolerance": True, "passed": "yes"}]
    found = {"passed": True, "tensors": rows, "device": [1], "versions": {"jax": {}}, "compared": "x" * 10**6}
    (run / verdict.NAME).write_text(json.dumps(found))
    (row,) = verdict.read(run)["tensors"]
    assert row["error"] is row["entry"] is row["tolerance"] is None
    assert not row["passed"]
    assert len(verdict.read(run)["compared"]) == verdict.MOST_CHARACTERS
    written = page.render([page.of_run(run, History(run / "metrics.jsonl").read_all())])
    assert b'<img src="http://example.invalid' not in written


# Sampling

LARGE = Config(
    model=Model(layers=30, heads=8, width=512, context=2048, vocabulary_size=50_257),
    training=Training(batch_size=16, micro_batches=8, sequence_length=2048),
    parallel=Parallel(devices=4),
)


def test_nothing_is_left_out_where_there_is_room():
    assert as_run_sampling.sample(LARGE, 2**50, 10**6) == (LARGE, [])


def test_what_is_left_out_keeps_the_widths():
    """The form of the layers is kept too: 30 are scanned, and so are the 2."""
    found, words = as_run_sampling.sample(LARGE, 2**33, 1)
    assert words == [
        "2 of 8 micro-batches",
        "4 of 16 sequences of a micro-batch",
        "2 of 30 layers",
        "512 of 2,048 tokens of a sequence",
        "4,096 of 50,257 tokens of the vocabulary",
    ]
    assert (found.model.layers, found.compute.layers) == (2, "scanned")
    same = ("heads", "width", "context", "family")
    assert all(getattr(found.model, key) == getattr(LARGE.model, key) for key in same)
    assert dataclasses.replace(found.compute, layers="auto") == LARGE.compute


def test_less_is_left_out_where_that_is_enough():
    found, words = as_run_sampling.sample(LARGE, 2**40, 500)
    assert words == ["2 of 8 micro-batches"]
    assert found.model == LARGE.model


def test_a_model_that_is_too_wide_is_refused():
    with pytest.raises(
        UserError, match="would need about 1 GiB for 2 layers of this model, and this machine has 0 GiB"
    ):
        as_run_sampling.sample(LARGE, 2**28, 1)
