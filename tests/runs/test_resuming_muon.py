"""Runs of Muon that go on where they were saved, with the same bits; another optimizer is refused."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.options import settings
from jaxgpt.runs import checkpoints
from jaxgpt.runs.metrics_file import read_metrics
from jaxgpt.training.state import init_state
from tests import small_run

pytestmark = pytest.mark.usefixtures("compiled_once")

OPTIONS = {"optimizer.name": "muon", "training.steps": 6, "training.evaluate-every": 0, "sampling.tokens": 1}


def run(name: str, *more: str, **changes) -> small_run.Finished:
    return small_run.run([*small_run.words(OPTIONS, **changes), *more], name)


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    with small_run.in_folder(tmp_path_factory.mktemp("work")) as folder:
        yield folder


@pytest.fixture(scope="module")
def whole(work) -> Path:
    assert run("whole", checkpoint_every_steps=3, checkpoint_keep_last=9).status == 0
    return Path("runs/whole")


def state(folder: Path):
    target = jax.eval_shape(lambda: init_state(settings.read(folder / "config.toml")))
    restored = checkpoints.load_state(checkpoints.find(folder / "checkpoints").path, target)
    return restored._replace(key=jax.random.key_data(restored.key))


def test_it_ends_with_the_same_bits_as_a_run_that_was_never_stopped(whole):
    """The run stops after 3 of 6 steps of its schedule; parameters, momenta, moments and losses are compared."""
    first = Path("runs/stopped")
    shutil.copytree(whole, first)
    shutil.rmtree(first / "checkpoints" / "6")
    finished = run("stopped", "--resume")
    assert finished.status == 0
    assert "resuming after step 3" in finished.printed
    jax.tree.map(np.testing.assert_array_equal, state(first), state(whole))
    losses = [[line["loss"] for line in read_metrics(of / "metrics.jsonl") if "loss" in line] for of in (first, whole)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_the_checkpoint_has_no_second_moment_of_a_matrix(whole):
    moments = state(whole).moments
    assert moments.first.blocks[0].qkv.weight.any()
    assert moments.second.blocks[0].qkv.weight is None
    assert moments.second.blocks[0].qkv.bias.any()
    assert moments.second.embedding.token.any()


@pytest.mark.parametrize(("was", "now"), [pytest.param("muon", "adamw", marks=pytest.mark.slow), ("adamw", "muon")])
def test_another_optimizer_is_refused(whole, was, now):
    assert run(f"by_{was}", optimizer_name=was, training_steps=1).status == 0
    refused = run(f"by_{was}", "--resume", optimizer_name=now, training_steps=2)
    assert refused.status == 2
    assert f"this run can't be resumed with other options: --optimizer.name was {was} and is {now}" in refused.errors
    assert refused.errors.count("\n") <= 3


def test_adapters_are_refused(whole):
    refused = run("adapted", "--lora.rank", "2", "--init-from", "runs/whole")
    assert refused.status == 2
    assert "--optimizer.name is muon, and must be adamw where adapters are trained" in refused.errors


def test_weights_of_any_run_are_something_to_begin_with(whole):
    """Parameters are kept as AdamW's are."""
    assert run("tuned", "--init-from", "runs/whole", training_steps=1, optimizer_name="adamw").status == 0
