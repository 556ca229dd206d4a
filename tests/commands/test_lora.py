"""Adapters from the command line: trained beside a frozen base, resumed, merged, exported; another base is refused."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgpt.commands import cli
from jaxgpt.interop import detect_format
from jaxgpt.models import lora
from jaxgpt.options import settings
from jaxgpt.runs import checkpoints
from jaxgpt.runs.metrics_file import read_metrics
from tests import small_run

BASE = {"model.width": 64, "training.steps": 4, "training.evaluate-every": 0, "sampling.tokens": 4}
STEPS, SAVED = 6, 3
TUNED = {
    "data.text": "text.txt",
    "training.batch-size": 4,
    "training.sequence-length": 16,
    "training.steps": STEPS,
    "training.evaluate-every": 0,
    "optimizer.learning-rate": 0.02,
    "sampling.tokens": 4,
    "training.init-from": "runs/base",
    "lora.rank": 3,
    "lora.base": "nf4",
}


def tune(name: str, *more: str, **changes) -> small_run.Finished:
    """Trains adapters in runs/NAME; `lora_rank=4` changes an option."""
    Path("empty.toml").write_text("")
    words = small_run.words_of(TUNED, **changes)
    return small_run.run(["--config", "empty.toml", *words, *more], name)


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    with small_run.in_folder(tmp_path_factory.mktemp("work"), 100, small_run.WORDS[:6]) as folder:
        assert small_run.run(small_run.words(BASE), "base").status == 0
        yield folder


@pytest.fixture(scope="module")
def tuned(work) -> small_run.Finished:
    return small_run.saved_at(SAVED, tune, "tuned")


def test_it_trains_adapters_alone(tuned):
    """The loss falls; the checkpoint has the adapters and their moments, a few of the base's bytes."""
    assert "adapters  of rank 3: " in tuned.printed
    assert "frozen base (nf4)" in (tuned.folder / "start.txt").read_text()
    assert tuned.steps[-1]["loss"] < tuned.steps[0]["loss"]
    config = settings.read(tuned.folder / "config.toml")
    found = checkpoints.find(tuned.folder / "checkpoints")
    adapters = checkpoints.params_of(found)
    assert set(adapters.blocks) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == lora.parameter_count(config.model, config.lora)
    assert found.about["base"]["name"] == "runs/base"


def test_what_is_merged_has_the_validation_loss_that_training_saw(tuned, capsys):
    """The base is quantised to NF4, with the adapters; the loss differs by the float32 rounding of two orders of
    sums."""
    assert cli.main(["evaluate", "--run", str(tuned.folder)]) == 0
    printed = capsys.readouterr().out
    assert f"validation loss {tuned.validation[STEPS]:.4f}" in printed


def test_it_resumes_to_the_same_bits(tuned):
    stopped = Path(shutil.copytree(tuned.folder, "runs/stopped"))
    shutil.rmtree(stopped / "checkpoints" / str(STEPS))
    finished = tune("stopped", "--resume")
    assert finished.status == 0, finished.errors
    assert f"resuming after step {SAVED}" in finished.printed
    one, other = (checkpoints.params_of(checkpoints.find(folder / "checkpoints")) for folder in (tuned.folder, stopped))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    losses = (
        [line["loss"] for line in read_metrics(f / "metrics.jsonl") if "loss" in line] for f in (tuned.folder, stopped)
    )
    assert next(losses) == next(losses)


@pytest.mark.parametrize("change", [{"lora_rank": 4}, {"lora_base": "int8"}, {"lora_alpha": 8.0}])
def test_it_resumes_with_the_same_adapters_only(tuned, change):
    finished = tune("tuned", "--resume", **change)
    assert finished.status == 2
    assert "this run can't be resumed with other options: --lora." in finished.errors


def test_another_base_is_refused(tuned, fails):
    """Every command that reads the run refuses it, in one message that names the base."""
    shutil.move("runs/base", "runs/kept")
    try:
        assert small_run.run(small_run.words(BASE, training_seed=5), "base").status == 0
        for command in (["generate", "--run", "runs/tuned"], ["convert", "runs/tuned", "out"]):
            message = fails(*command)
            assert "were trained beside other weights than those of runs/base now" in message
        assert not Path("out").exists()
        shutil.rmtree("runs/base")
        assert "the weights beside which they were trained can't be read: " in fails("generate", "--run", "runs/tuned")
    finally:
        shutil.rmtree("runs/base", ignore_errors=True)
        shutil.move("runs/kept", "runs/base")


def test_exports(tuned, capsys):
    """A merged Hugging Face folder, PEFT's folder, and from that a run of adapters again: all compute the same."""
    for words in (["tuned", "merged"], ["tuned", "peft", "--to", "peft"], ["tuned", "whole", "--to", "run", "--merge"]):
        assert cli.main(["convert", f"runs/{words[0]}", *words[1:]]) == 0
    assert cli.main(["convert", "peft", "runs/imported"]) == 0
    merged, whole = (detect_format.open_weights(name) for name in ("merged", "whole"))
    assert merged.adapters is whole.adapters is None
    expected = detect_format.open_weights("runs/tuned").load()
    jax.tree.map(np.testing.assert_array_equal, merged.load(), expected)
    jax.tree.map(np.testing.assert_array_equal, whole.load(), expected)
    adapters = detect_format.open_weights("runs/imported").adapters
    assert adapters
    found = checkpoints.find(tuned.folder / "checkpoints")
    assert adapters.fingerprint == found.about["base"]["sha256"]
    assert (adapters.options.rank, adapters.options.alpha) == (3, 16.0)
    jax.tree.map(
        np.testing.assert_array_equal,
        adapters.load(),
        checkpoints.params_of(found),
    )
    capsys.readouterr()


@pytest.fixture(scope="module")
def exported(tuned) -> str:
    """A PEFT folder of the tuned adapters, which names a base that doesn't exist here."""
    assert cli.main(["convert", "runs/tuned", "elsewhere", "--to", "peft"]) == 0
    config = Path("elsewhere/adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "not/here"}))
    weights = Path("elsewhere/adapter_model.safetensors")
    save_file(load_file(weights), weights)  # without the base's fingerprint
    return "elsewhere"


def train_on(adapters: str, name: str, *more: str, **changes) -> small_run.Finished:
    without = {key: value for key, value in TUNED.items() if key not in ("lora.rank", "training.init-from")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "TUNED", without)
        return tune(name, "--lora.adapters", adapters, *more, **changes)


@pytest.mark.slow
def test_it_trains_on_from_adapters(tuned, exported):
    """Adapters of a run and of PEFT begin where they ended, with their rank, alpha, targets and base."""
    for adapters, name, more in (
        ("runs/tuned", "on", {}),
        (exported, "from-peft", {"training_init_from": "runs/base"}),
    ):
        finished = train_on(adapters, name, **{key.replace("init_from", "init-from"): v for key, v in more.items()})
        assert finished.status == 0, finished.errors
        assert f"adapters  from {adapters}" in finished.printed
        options = settings.read(finished.folder / "config.toml")
        assert (options.lora.rank, options.training.init_from) == (3, "runs/base")
        assert finished.validation[0] == pytest.approx(tuned.validation[STEPS], abs=1e-6)
        begun, ended = (detect_format.open_weights(str(run)).adapters for run in (tuned.folder, finished.folder))
        assert begun
        assert ended
        changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), begun.load(), ended.load())
        assert min(jax.tree.leaves(changes)) > 1e-4
    again = train_on("runs/tuned", "on", "--resume", training_steps=STEPS + 1)
    assert again.status == 0, again.errors
    assert f"resuming after step {STEPS}" in again.printed


def test_adapters_that_cant_be_trained_on(exported):
    """The base that PEFT names is missing; ranks differ; the weights are whole; the base has other numbers."""
    assert small_run.run(small_run.words(BASE, training_seed=5), "other").status == 0
    for adapters, more, expected in (
        (exported, [], "not/here: there is no such file or folder"),
        ("runs/tuned", ["--lora.rank", "4"], "rank of these adapters is 3, and --lora.rank is 4"),
        ("runs/base", [], "--lora.adapters runs/base: has whole weights"),
        ("runs/tuned", ["--init-from", "runs/other"], "were trained beside other weights than those of runs/other"),
    ):
        finished = train_on(adapters, "wrong", *more)
        assert finished.status == 2
        assert expected in finished.errors
        assert not Path("runs/wrong").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lora.rank", "2", "--training.init-from", ""], "--training.init-from is empty, and must be given"),
        (
            ["--lora.targets", "q_proj"],
            "--lora.targets q_proj: the model has no such projection. There are",
        ),
        (["--lora.rank", "-1"], "--lora.rank is -1"),
        (["--lora.alpha", "0"], "--lora.alpha is 0"),
        (["--lora.base", "float32", "--lora.double-quantization"], "--lora.double-quantization is True, and must be"),
    ],
)
def test_mistakes(fails, words, expected):
    Path("empty.toml").write_text("")
    options = [word for key, value in TUNED.items() for word in (f"--{key}", str(value))]
    assert expected in fails("--config", "empty.toml", *options, "--run.name", "wrong", *words)
    assert not Path("runs/wrong").exists()


def test_weights_without_adapters_have_none_to_export(fails):
    assert "has whole weights, and no adapters" in fails("convert", "runs/base", "out", "--to", "peft")
