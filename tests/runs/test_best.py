"""The best checkpoint by validation loss, and early stopping: the same wherever a run was killed."""

import json
import math
import random
import shutil
import time
from pathlib import Path

import pytest

from jaxgpt.commands import cli
from jaxgpt.commands.batches import Evaluation
from jaxgpt.commands.text_batches import TextBatches
from jaxgpt.errors import UserError
from jaxgpt.interop import detect_format, loading
from jaxgpt.runs import best, checkpoints
from jaxgpt.runs.best import Best
from tests import small_run

LOSSES = {0: 5.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0, 10: 2.75, 12: 2.25}  # of the evaluation after each step
OPTIONS = {
    "training.steps": 12,
    "training.evaluate-every": 2,
    "sampling.tokens": 0,
    "checkpoint.keep-last": 1,
    "model.dropout": 0.2,  # so that the masks have to be the same too
}
KEEP = ["--checkpoint.keep-best"]


def test_the_best_is_the_first_of_the_lowest_losses():
    """The reference is a list of all losses, some of which are equal and some not finite."""
    draw = random.Random(0)
    for _ in range(200):
        losses = [draw.choice([1.0, 2.0, 3.0, 4.0, math.nan, math.inf]) for _ in range(8)]
        found = None
        for step, loss in enumerate(losses):
            found = best.after(found, step, loss)
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            assert found is None
            continue
        place = losses.index(min(finite))
        assert found == Best(place, min(finite), len(losses) - 1 - place, len(losses) - 1)
        assert best.after(found, 7, 0.5) == found  # an evaluation that is made again counts once


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """A folder with text.txt, which is the current folder of these tests; losses are those of `LOSSES`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextBatches, "evaluate", lambda self, step, state: Evaluation(LOSSES[step], {}, "made up"))
        with small_run.in_folder(tmp_path_factory.mktemp("work")) as folder:
            yield folder


def run(name, *more, observers=(), **changes):
    return small_run.run([*small_run.words(OPTIONS, **changes), *more], name, observers)


def resume(name, *more):
    return small_run.run([*small_run.words(OPTIONS), *KEEP, *more, "--resume"], name)


def result(name):
    """Returns a run's validation losses, the marked checkpoint, and the checkpoints that are there."""
    folder = Path("runs", name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    return losses, best.read(folder), checkpoints.whole_steps(folder / "checkpoints")


def training_losses(name):
    lines = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def stopped_early(work):
    """A run with patience 2, with a copy of its folder as it was at each validation loss."""

    def copy(trainer, values):
        if "val_loss" in values and trainer.done:
            while not trainer.writer.idle:
                time.sleep(0.01)
            half_written = shutil.ignore_patterns(".*.new-*")  # the report's thread replaces its page meanwhile
            shutil.copytree(trainer.folder.path, f"runs/killed-{trainer.done}", dirs_exist_ok=True, ignore=half_written)

    finished = run("early", *KEEP, "--training.patience=2", observers=[copy])
    assert finished.status == 0
    return finished


def test_the_best_checkpoint_is_kept_beside_the_newest(work):
    finished = run("kept", *KEEP)
    assert finished.status == 0
    assert result("kept") == ([*LOSSES.items()], (4, 2.0), [4, 12])
    assert "best checkpoint  runs/kept/checkpoints/best: after step 4, validation loss 2.0000" in finished.printed


def test_patience_ends_a_run(stopped_early):
    assert result("early") == ([(step, LOSSES[step]) for step in (0, 2, 4, 6, 8)], (4, 2.0), [4, 8])
    assert (
        "after step 8: 2 evaluations without a lower validation loss than 2.0000, after step 4" in stopped_early.printed
    )


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.slow), 6, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_comes_to_the_same(stopped_early, step):
    """It was killed just after writing the validation loss: the checkpoint of this step isn't there yet."""
    assert resume(f"killed-{step}", "--training.patience=2").status == 0
    assert result(f"killed-{step}") == result("early")
    assert training_losses(f"killed-{step}") == training_losses("early")


@pytest.mark.slow
def test_a_run_that_has_stopped_early_stays_so_or_goes_on(stopped_early):
    before = result("early")
    assert resume("early", "--training.patience=2").status == 0
    assert result("early") == before
    assert resume("early", "--training.patience=9").status == 0
    assert result("early") == ([*LOSSES.items()], (4, 2.0), [4, 12])


@pytest.mark.slow
def test_the_last_evaluation_counts_when_a_run_is_given_more_steps(work, monkeypatch):
    monkeypatch.setitem(LOSSES, 12, 1.5)
    assert run("longer", *KEEP).status == 0
    assert result("longer")[1:] == ((12, 1.5), [12])
    monkeypatch.setitem(LOSSES, 14, 1.75)
    assert resume("longer", "--training.steps=14").status == 0
    assert result("longer")[1:] == ((12, 1.5), [12, 14])


def test_a_checkpoint_is_named_by_its_path(stopped_early):
    folder = Path("runs/early/checkpoints")
    assert loading.load(str(folder / "best"), devices=1).about["step"] == 4
    assert loading.load(str(folder / "4"), devices=1).about["step"] == 4
    assert detect_format.open_weights(str(folder / "best")).where == str(folder / "4")
    assert cli.main(["evaluate", "--run", str(folder / "best"), "--data", "text.txt"]) == 0
    shutil.copytree("runs/early", "runs/unmarked")
    Path("runs/unmarked/best.json").unlink()
    with pytest.raises(UserError, match="no checkpoint was kept as the best"):
        loading.load("runs/unmarked/checkpoints/best", devices=1)


def test_without_the_option_nothing_is_marked(stopped_early):
    shutil.copytree("runs/early", "runs/plain", dirs_exist_ok=True)
    assert small_run.run([*small_run.words(OPTIONS), "--resume"], "plain").status == 0
    assert result("plain")[1] is None


@pytest.mark.parametrize(
    "text", ["", "{}", '{"step": -1, "val_loss": 1.0}', '{"step": "../..", "val_loss": 1.0}', "[]"]
)
def test_a_damaged_best_json_names_nothing(tmp_path, text):
    (tmp_path / "best.json").write_text(text)
    assert best.read(tmp_path) is None
