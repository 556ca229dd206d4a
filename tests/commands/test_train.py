"""Whole runs of a tiny model, from the command line to the files they leave."""

import dataclasses
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.commands import cli, configuration, train
from jaxgpt.data import loader
from jaxgpt.evaluation.scoring import make_validation_loss
from jaxgpt.options import settings
from jaxgpt.runs import checkpoints
from jaxgpt.training import step as train_step
from tests import small_run
from tests.small_run import Finished, run

ROOT = Path(cli.__file__).resolve().parents[2]
STEPS = 20
TOKENS = 4 * 16  # of one step
OPTIONS = {
    "training.steps": STEPS,
    "training.evaluate-every": 5,
    "optimizer.schedule": "wsd",  # flat until 80%, then falling
    "optimizer.warmup-steps": 4,
    "sampling.tokens": 24,
    "run.sample-every": 7,
    "run.note": "a [note]",
}
words = functools.partial(small_run.words, OPTIONS)


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """A folder with text.txt, which is the current folder of these tests."""
    with small_run.in_folder(tmp_path_factory.mktemp("work")) as folder:
        yield folder


class Observation(NamedTuple):
    """State of the process after a step has been recorded."""

    step: int
    compilations: int
    bytes: int  # of all arrays
    buffers: frozenset[int]  # the addresses of the train state's


@pytest.fixture(scope="module")
def observed(work):
    """The tiny run, and what was observed after each of its steps."""
    compilations, observations = [], []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    def observe(trainer, values):
        if "loss" in values:
            leaves = [leaf for leaf in jax.tree.leaves(trainer.state) if leaf.dtype == jnp.float32]
            addresses = frozenset(leaf.unsafe_buffer_pointer() for leaf in leaves)
            held = sum(array.nbytes for array in jax.live_arrays())
            observations.append(Observation(values["step"], len(compilations), held, addresses))

    gc.collect()
    jax.monitoring.register_event_duration_secs_listener(listen)
    finished = run(words(), "first", [observe])
    jax.monitoring.unregister_event_duration_listener(listen)
    return finished, observations


@pytest.fixture(scope="module")
def first(observed) -> Finished:
    return observed[0]


# What a run leaves


def test_it_writes_only_its_own_folder(work, first):
    assert first.status == 0
    assert {path.name for path in work.iterdir()} == {"text.txt", "runs"}
    kept = (
        "config.toml start.txt memory_plan.json metrics.jsonl samples.txt loss.png checkpoints machine.json report.html"
    )
    assert {path.name for path in first.folder.iterdir()} == set(kept.split())


def test_metrics_have_one_line_for_each_step(first):
    assert [line["step"] for line in first.steps] == list(range(1, STEPS + 1))
    for line in first.steps:
        assert list(line) == [
            "step",
            "loss",
            "learning_rate",
            "grad_norm",
            "loss_z",
            "grad_norm_z",
            "skipped",
            "tokens",
            "tokens_per_second",
            "mfu",
            "step_seconds",
            "data_wait_seconds",
        ]
        assert line["tokens"] == TOKENS * line["step"]
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(TOKENS)
        assert line["mfu"] is None  # a CPU's peak isn't known
        assert line["grad_norm"] > 0


def test_metrics_have_the_validation_losses(first):
    """They are computed before training, at each multiple of evaluate_every, and after; each line follows its
    step's."""
    assert list(first.validation) == [0, 5, 10, 15, 20]
    steps = [line["step"] for line in first.metrics]
    assert steps == sorted(steps)


def test_the_learning_rate_goes_through_all_of_its_phases(first):
    rates = [line["learning_rate"] for line in first.steps]
    assert rates[:4] == pytest.approx([0.005, 0.01, 0.015, 0.02])
    assert rates[4:17] == pytest.approx([0.02] * 13)
    assert 0.02 > rates[17] > rates[18] > rates[19] > 0


def test_it_learns(first):
    """The loss falls from ln V to more than a fifth of a nat below it in 20 steps."""
    alphabet = len(set(Path("text.txt").read_text()))
    assert first.validation[0] == pytest.approx(np.log(alphabet), abs=0.1)
    assert first.validation[20] < first.validation[0] - 0.2
    assert np.mean([line["loss"] for line in first.steps[-5:]]) < first.steps[0]["loss"] - 0.2


def test_the_loss_curve_is_a_png(first):
    assert (first.folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_samples_are_drawn_before_while_and_after(first):
    """All have the same prompt, and they change as the model learns."""
    text = (first.folder / "samples.txt").read_text()
    samples = dict(part.split("\n", 1) for part in text.split("--- step ")[1:])
    assert list(samples) == ["0", "7", "14", "20"]
    (prompt,) = {sample[:5] for sample in samples.values()}
    assert prompt in Path("text.txt").read_text()
    assert len(set(samples.values())) > 1


def test_the_checkpoint_is_the_model_of_the_last_step(first):
    """Its validation loss is the last line's, to the last bit."""
    config = settings.read(first.folder / "config.toml")
    params, found = checkpoints.load_params(first.folder, config.model)
    assert found.about["step"] == STEPS
    data, _ = configuration.complete(config)
    evaluate = make_validation_loss(config, data.validation, config.training.sequence_length)
    assert evaluate(params) == first.validation[20]


def test_it_tells_what_it_does_and_where_things_are(first):
    printed = first.printed
    for expected in (
        "3,792 parameters: 1 layers, 2 heads, width 16, context 16",
        "the file text.txt",
        "20 steps of 64 tokens, float32",
        "note      a [note]",
        f"step 10: validation loss {first.validation[10]:.4f}",
        "--- sample after step 7 ---",
        "--- sample before training ---",
        "--- sample after training ---",
        f"validation loss  {first.validation[20]:.4f}",
        "runs/first/loss.png",
        "checkpoints/20",
        "python run.py generate runs/first --prompt",
    ):
        assert expected in printed
    assert first.errors == ""
    assert all(character.isprintable() or character == "\n" for character in printed)  # into a file: no live line


def test_generate_goes_on_where_the_run_ended(first, capsys):
    """Given the run's prompt, seed and options, it draws the run's last sample."""
    config = settings.read(first.folder / "config.toml")
    data, _ = configuration.complete(config)
    prompt = data.tokenizer.decode(data.prompt)
    assert cli.main(["generate", "--run", str(first.folder), "--prompt", prompt, "--tokens", "24"]) == 0
    samples = (first.folder / "samples.txt").read_text()
    assert samples.endswith(f"--- step 20\n{capsys.readouterr().out}\n")


# How it runs


def test_nothing_is_compiled_after_the_first_step(observed):
    """This holds while the learning rate changes phase, losses are evaluated and texts are drawn."""
    _, observations = observed
    assert [observation.step for observation in observations] == list(range(1, STEPS + 1))
    counts = {observation.compilations for observation in observations}
    assert len(counts) == 1
    assert counts.pop() >= 3  # the listener did hear of the step, the validation loss and the sampler


def test_nothing_is_allocated_after_the_first_step(observed):
    """No array is added, and the buffers of the state are reused."""
    _, observations = observed
    assert max(observation.bytes for observation in observations) == observations[0].bytes
    assert {observation.buffers for observation in observations} == {observations[0].buffers}


def test_the_handler_of_ctrl_c_is_put_back(first):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_runs_own_configuration_repeats_it_bit_for_bit(first):
    """All numbers but the times are the same, and so are the samples."""
    again = run(["--config", str(first.folder / "config.toml")], "again")
    assert again.status == 0
    timed = {"tokens_per_second", "step_seconds", "data_wait_seconds"}

    def numbers(finished: Finished) -> list[dict[str, Any]]:
        return [{key: line[key] for key in line.keys() - timed} for line in finished.metrics]

    assert numbers(again) == numbers(first)
    assert (again.folder / "samples.txt").read_bytes() == (first.folder / "samples.txt").read_bytes()
    configs = [settings.read(finished.folder / "config.toml") for finished in (first, again)]
    assert configs[1] == dataclasses.replace(configs[0], run=dataclasses.replace(configs[0].run, name="again"))


def test_micro_batches_train_the_same_model(first):
    """Two times two sequences train as one times four, but for rounding; validation losses agree likewise."""
    halves = run(words(training_batch_size=2, training_micro_batches=2), "halves")
    assert halves.status == 0
    for line, expected in zip(halves.steps, first.steps, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert line["tokens"] == expected["tokens"]
    assert halves.steps[0]["loss"] == pytest.approx(first.steps[0]["loss"], rel=1e-6)
    assert halves.steps[0]["grad_norm"] == pytest.approx(first.steps[0]["grad_norm"], rel=1e-5)
    assert list(halves.validation.values()) == pytest.approx(list(first.validation.values()), rel=1e-3)


# How it ends badly


def saved_params(finished: Finished) -> Any:
    """Returns the saved parameters, all of which must be finite."""
    model = settings.read(finished.folder / "config.toml").model
    params, _ = checkpoints.load_params(finished.folder, model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    return params


def test_nan_stops_the_run_at_its_step(first):
    """The step is so large that the next loss is NaN: the state before it is saved."""
    finished = run(words(optimizer_learning_rate=1e30, training_evaluate_every=0), "nan")
    assert finished.status == 1
    assert finished.errors.startswith(
        "error: step 2: the loss is nan, so the run stops here; the last good state is in"
    )
    assert "runs/nan/checkpoints/1. Try a lower --optimizer.learning-rate" in finished.errors
    assert [line["loss"] is None for line in finished.steps] == [False, True]
    assert (finished.folder / "loss.png").exists()
    saved_params(finished)


def test_steps_in_a_row_that_are_not_finite(first, monkeypatch):
    """Under --training.stop-after-nonfinite 3, two steps in a row are skipped, and the third stops the run."""
    config = settings.read(first.folder / "config.toml")
    data, _ = configuration.complete(config)
    sizes = {"micro_batches": 1, "batch_size": 4, "sequence_length": 16, "seed": config.training.seed}
    sums = [int(loader.batch_at(data.train, step=step, **sizes).tokens.sum()) for step in range(STEPS)]
    assert len(set(sums)) == STEPS  # a batch is known by the sum of its tokens
    poisoned = [3, 7, 8, 11, 12, 13]  # steps, from 1
    loss_and_grads = train_step.batch_loss_and_grads

    def poison(params, frozen, batch, *rest):
        loss, *others = loss_and_grads(params, frozen, batch, *rest)
        bad = jnp.isin(jnp.sum(batch.tokens), jnp.asarray([sums[step - 1] for step in poisoned]))
        return jnp.where(bad, jnp.nan, loss), *others

    monkeypatch.setattr(train_step, "batch_loss_and_grads", poison)
    finished = run(words(training_stop_after_nonfinite=3, training_evaluate_every=0, run_sample_every=0), "skips")
    assert finished.status == 1
    assert "error: step 13: the loss is nan" in finished.errors
    assert [line["step"] for line in finished.steps if line["loss"] is None] == poisoned
    for step in poisoned[:-1]:
        assert f"step {step}: the loss is nan; the step is skipped" in finished.printed
    assert "step 13: the loss is nan; the step is skipped" not in finished.printed
    assert finished.steps[1]["loss"] == first.steps[1]["loss"]  # step 2: nothing was different before step 3
    assert finished.steps[9]["loss"] < finished.steps[0]["loss"]
    assert f"the last good state is in {finished.folder.relative_to(Path.cwd())}/checkpoints/12." in finished.errors
    saved_params(finished)


def test_ctrl_c_saves_and_the_model_generates(work, capsys):
    """A real process and a real signal: the step ends, the state is saved, the exit status is that of an interrupt."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = words(training_steps=1_000_000, training_evaluate_every=0, run_sample_every=0, sampling_tokens=5)
    process = subprocess.Popen(
        [sys.executable, ROOT / "run.py", *command, "--run.name", "stopped"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    metrics = Path("runs/stopped/metrics.jsonl")
    with process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and '"step": 3,' in metrics.read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    last = lines[-1]["step"]
    assert process.returncode == 130
    saved = f"runs/stopped/checkpoints/{last}"
    stopped, _, on = err.removesuffix("\n").partition(". To go on: ")
    assert stopped == f"stopped with Ctrl-C after step {last} of 1000000; saved in {saved}"
    assert on.endswith(f"{ROOT / 'run.py'} --resume runs/stopped")
    assert "stopping with Ctrl-C: saving" in out
    assert "--- sample after training ---" in out
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, last + 1))
    assert "val_loss" in lines[-1]

    assert cli.main(["generate", "--run", "runs/stopped", "--prompt", "the cat", "--tokens", "5"]) == 0
    generated = capsys.readouterr().out
    assert generated.startswith("the cat")
    assert len(generated) == len("the cat") + 5 + 1


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_saves_nothing(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_run", interrupted)
    finished = run(words(), "early")
    assert finished.status == 130
    assert finished.errors == "\nstopped with Ctrl-C\n"
    assert not finished.folder.joinpath("checkpoints").exists()
    monkeypatch.undo()
    assert run(words(training_steps=1), "early").status == 0  # what it left is not in the way
