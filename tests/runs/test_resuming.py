"""Runs that go on where they were saved: the same bits as a run that was never stopped, or a refusal."""

import dataclasses
import functools
import json
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.commands import cli, configuration, train
from jaxgpt.data import loader
from jaxgpt.errors import UserError
from jaxgpt.options import settings
from jaxgpt.runs import checkpoints, saving
from jaxgpt.runs.metrics_file import read_metrics
from jaxgpt.training import fit
from jaxgpt.training import step as train_step
from jaxgpt.training.state import init_state
from tests import small_run

pytestmark = pytest.mark.usefixtures("compiled_once")

slow, SIGHUP = functools.partial(pytest.param, marks=pytest.mark.slow), getattr(signal, "SIGHUP", None)
STEPS = 12
SAVED = 4  # the step that runs are resumed from
OPTIONS = {"training.steps": STEPS, "training.evaluate-every": 3, "sampling.tokens": 8, "run.sample-every": 5}


def run(name: str, *more: str, observers: Sequence[train.Observer] = (), **changes: Any) -> tuple[int, str, str]:
    """Trains in runs/NAME; status and what was printed. `training_steps=3` changes an option."""
    return small_run.run([*small_run.words(OPTIONS, **changes), *more], name, observers)[:3]


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """A folder with text.txt, which is the current folder of these tests."""
    with small_run.in_folder(tmp_path_factory.mktemp("work"), 300, small_run.WORDS[:6]) as folder:
        yield folder


@pytest.fixture(scope="module")
def whole(work) -> Path:
    """A run that was never stopped, with all of its checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.Writer, "due", lambda self, step: step % SAVED == 0)
        assert run("whole", checkpoint_keep_last=10)[0] == 0
    return Path("runs/whole")


@pytest.fixture
def stopped(whole):
    """A copy of it, runs/stopped, as it was some steps after the first checkpoint, when the process was killed."""
    folder = Path("runs/stopped")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for step in checkpoints.whole_steps(folder / "checkpoints"):
        if step > SAVED:
            shutil.rmtree(folder / "checkpoints" / str(step))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-5]) + lines[-5][:10])  # the last line is half written
    return folder


@pytest.fixture
def not_compiled(monkeypatch):
    """Makes it an error to compile the train step: a refusal comes before that."""
    monkeypatch.setattr(fit, "prepare", None)


def state(folder: Path):
    """The state of the run's last checkpoint."""
    target = jax.eval_shape(lambda: init_state(settings.read(folder / "config.toml")))
    found = checkpoints.find(folder / "checkpoints")
    restored = checkpoints.load_state(found.path, target)
    return restored._replace(key=jax.random.key_data(restored.key))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns a run's metrics without what depends on the clock."""
    timed = {"tokens_per_second", "step_seconds", "data_wait_seconds"}
    return [{key: line[key] for key in line.keys() - timed} for line in read_metrics(folder / "metrics.jsonl")]


def assert_same_run(folder: Path, expected: Path) -> None:
    jax.tree.map(np.testing.assert_array_equal, state(folder), state(expected))
    assert metrics(folder) == metrics(expected)
    assert (folder / "samples.txt").read_text() == (expected / "samples.txt").read_text()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_ends_as_the_run_that_was_never_stopped(whole, stopped):
    """Parameters, moments, counts, spike windows, metrics and samples, to the last bit."""
    status, out, _ = run("stopped", "--resume")
    assert status == 0
    assert f"resuming after step {SAVED}, from runs/stopped/checkpoints/{SAVED}" in out
    assert "changed" not in out
    assert "before training" not in out
    assert_same_run(stopped, whole)


def test_a_run_that_had_ended_has_nothing_to_do(whole):
    """It evaluates and draws its last sample again, which are not recorded twice."""
    ended = Path(shutil.copytree(whole, "runs/ended"))
    assert run("ended", "--resume")[0] == 0
    assert_same_run(ended, whole)


def test_with_another_split_of_the_steps_it_ends_the_same_but_for_rounding(whole, stopped):
    status, out, _ = run("stopped", "--resume", training_batch_size=1, training_micro_batches=4)
    assert status == 0
    assert "changed   --training.batch-size was 4 and is 1" in out
    assert "changed   --training.micro-batches was 1 and is 4" in out
    losses, expected = ([line["loss"] for line in metrics(folder) if "loss" in line] for folder in (stopped, whole))
    assert losses == pytest.approx(expected, rel=1e-4)  # two orders of adding float32, through eight steps of Adam
    assert losses[:SAVED] == expected[:SAVED]
    tokens = [line["tokens"] for line in metrics(stopped) if "loss" in line]
    assert tokens == [line["tokens"] for line in metrics(whole) if "loss" in line]
    for a, b in zip(jax.tree.leaves(state(stopped).params), jax.tree.leaves(state(whole).params), strict=True):
        assert np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(b)


def test_the_newest_is_damaged_and_the_one_before_is_used(whole, stopped):
    """The damage is reported, the damaged checkpoint deleted, and the run ends the same."""
    newest = Path(shutil.copytree(whole / "checkpoints" / "8", stopped / "checkpoints" / "8"))
    (newest / "optimizer" / "_METADATA").write_text("{}")
    status, out, _ = run("stopped", "--resume")
    assert status == 0
    assert f"{newest}: this checkpoint is not whole (optimizer/_METADATA is not what was written)" in out
    assert f"resuming after step {SAVED}" in out
    assert not newest.exists()
    assert_same_run(stopped, whole)


def test_when_all_are_damaged_only_auto_begins_anew(whole, stopped):
    """A restarted job has to make progress. Damaged checkpoints are kept: they may be repaired."""
    (stopped / "checkpoints" / str(SAVED) / "about" / "metadata").unlink()
    before = contents(stopped)
    status, _, err = run("stopped", "--resume")
    assert status == 2
    assert "this checkpoint is not whole (about/metadata is missing), and there is no other that is" in err
    assert contents(stopped) == before
    status, out, _ = run("stopped", "--resume", "auto")
    kept = Path("runs/stopped.damaged-1")
    assert status == 0
    assert "(about/metadata is missing), and there is no other that is" in out
    assert f"This run is kept as {kept}, and begins anew" in out
    assert {path.relative_to(kept): content for path, content in contents(kept).items()} == {
        path.relative_to(stopped): content for path, content in before.items()
    }
    assert_same_run(stopped, whole)
    shutil.rmtree(kept)


def test_a_kill_before_the_checksums_of_the_only_checkpoint_does_not_stop_a_job(whole, stopped):
    (stopped / "checkpoints" / str(SAVED) / "SHA256SUMS").unlink()
    assert run("stopped", "--resume")[0] == 2
    status, out, _ = run("stopped", "--resume", "auto")
    assert (status, "there is no whole checkpoint" in out) == (0, True)
    assert_same_run(stopped, whole)
    shutil.rmtree("runs/stopped.damaged-1")


def test_resuming_leaves_what_others_have_put_beside_the_checkpoints(stopped):
    """A half-written or damaged checkpoint is deleted, and only under the names that we give."""
    folder = stopped / "checkpoints"
    theirs = ["my_notes", "best_model_backup", "4.old", "04", "٤", "4.orbax-checkpoint-tmp-mine", "optimizer"]
    ours = ["2", "6", "8.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp-1700000000000000"]
    for name in (*theirs, *ours):
        (folder / name).mkdir()
        (folder / name / "file").write_text("precious")
    (folder / "5").symlink_to(folder / "my_notes")
    (folder / "notes.txt").write_text("precious")
    assert run("stopped", "--resume")[0] == 0
    for name in theirs:
        assert (folder / name / "file").read_text() == "precious"
    assert (folder / "notes.txt").exists()
    assert (folder / "5").is_symlink()
    assert not any((folder / name).exists() for name in ours)


def test_a_damaged_line_of_the_metrics_is_said_at_the_start(whole, stopped):
    path = stopped / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][: len(lines[2]) // 2] + b"\0" * (len(lines[2]) - len(lines[2]) // 2 - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    status, out, _ = run("stopped", "--resume")
    assert status == 0
    assert f"{path}: line 3 can't be read; it is put aside into metrics.damaged" in out
    expected = metrics(whole)
    assert metrics(stopped) == expected[:2] + expected[3:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_width": 32}, "--model.width was 16 and is 32"),
        ({"model_layers": 2, "model_heads": 4}, "--model.layers was 1 and is 2; --model.heads was 2 and is 4"),
        ({"data_tokenizer": "bytes"}, "--data.tokenizer was characters and is bytes"),
        ({"data_validation_fraction": 0.2}, "--data.validation-fraction was 0.1 and is 0.2"),
        ({"training_seed": 1}, "--training.seed was 0 and is 1"),
        ({"training_sequence_length": 8}, "--training.sequence-length was 16 and is 8"),
        ({"training_batch_size": 2}, "a step had 4 sequences and has 2 (--training.batch-size times"),
    ],
)
def test_another_run_is_refused_with_both_values(stopped, not_compiled, changes, message):
    before = contents(stopped)
    status, _, err = run("stopped", "--resume", **changes)
    assert status == 2
    assert "this run can't be resumed with other options: " in err
    assert message in err
    assert contents(stopped) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-40], "it ends at byte offset"),
        (lambda text: text.replace("cat", "act", 1), "it differs between the byte offsets 0 and 4096"),
        (lambda text: text + text[:40], "it goes on after byte offset"),
    ],
)
def test_another_text_is_refused_by_name_and_offset(stopped, not_compiled, change, message):
    text = Path("text.txt").read_text()
    Path("other.txt").write_text(change(text))
    before = contents(stopped)
    status, _, err = run("stopped", "--resume", data_text="other.txt")
    assert status == 2
    assert f"--data.text other.txt: not the text that runs/stopped/checkpoints/{SAVED} was trained on: {message}" in err
    assert contents(stopped) == before


def test_a_plan_that_does_not_fit_leaves_the_run_as_it_is(stopped, monkeypatch):
    """The next start can open it, so no lock is left; a run that isn't there is not begun."""

    def refuse(*arguments):
        raise UserError("the train step needs more")

    monkeypatch.setattr(fit, "prepare", refuse)
    before = contents(stopped)
    for name, words in (("stopped", ["--resume"]), ("stopped", ["--resume", "auto"]), ("none", ["--resume", "auto"])):
        assert run(name, *words)[::2] == (2, "error: the train step needs more\n")
    assert contents(stopped) == before
    assert not Path("runs/none").exists()


def test_other_options_may_change_and_are_said(whole, stopped):
    """The run gets longer, with another learning rate, on the same text under another name."""
    shutil.copy("text.txt", "moved.txt")
    changes = {"training_steps": STEPS + 1, "optimizer_learning_rate": 0.01, "data_text": "moved.txt"}
    status, out, _ = run("stopped", "--resume", **changes)
    assert status == 0
    assert f"changed   --training.steps was {STEPS} and is {STEPS + 1}" in out
    assert "changed   --optimizer.learning-rate was 0.02 and is 0.01" in out
    assert "changed   --data.text was text.txt and is moved.txt" in out
    assert settings.read(stopped / "config.toml").training.steps == STEPS + 1
    steps = [line["step"] for line in metrics(stopped) if "loss" in line]
    assert steps == list(range(1, STEPS + 2))


def test_other_versions_are_said(stopped, monkeypatch):
    versions = settings.versions()
    monkeypatch.setattr(settings, "versions", lambda: versions | {"jax": "99"})
    _, out, _ = run("stopped", "--resume")
    assert f"changed   jax was {versions['jax']} and is 99: the numbers may differ in their last bits" in out


def test_a_run_that_stopped_for_nan_can_go_on(whole, monkeypatch):
    """It goes on from the last good state; the failed step comes again and, with the fault repaired, succeeds.

    The program with the fault may round otherwise than the one without, so all runs here are made with a fault, which
    in two of them no batch meets.
    """
    config = settings.read(whole / "config.toml")
    data, _ = configuration.complete(config)
    sizes = {"micro_batches": 1, "batch_size": 4, "sequence_length": 16, "seed": 0}
    step_6 = int(loader.batch_at(data.train, step=5, **sizes).tokens.sum())  # a batch is known by this sum
    loss_and_grads = train_step.batch_loss_and_grads

    def run_with_fault(met_by: int, *words: str) -> tuple[int, str, str]:
        def poison(params, frozen, batch, *rest):
            loss, *others = loss_and_grads(params, frozen, batch, *rest)
            return jnp.where(jnp.sum(batch.tokens) == met_by, jnp.nan, loss), *others

        with monkeypatch.context() as patch:
            patch.setattr(train_step, "batch_loss_and_grads", poison)
            return run(*words)

    assert run_with_fault(-1, "never-nan")[0] == 0
    status, _, err = run_with_fault(step_6, "nan")
    assert status == 1
    assert "error: step 6: the loss is nan, so the run stops here; the last good state is in" in err
    assert metrics(Path("runs/nan"))[-1]["step"] == 6
    assert run_with_fault(-1, "nan", "--resume")[0] == 0
    assert_same_run(Path("runs/nan"), Path("runs/never-nan"))


@pytest.mark.parametrize(("number", "status"), [slow(signal.SIGINT, 130), (signal.SIGTERM, 143), slow(SIGHUP, 129)])
def test_a_run_that_a_signal_stopped_goes_on(not_under_nohup, whole, number, status):
    """The evaluation and sample that it wrote while it ended are cut off, and come at their own time."""

    def interrupt(trainer, values):
        if values["step"] == 7 and "loss" in values:
            signal.raise_signal(number)

    ended, _, err = run("signal", "--run.overwrite", observers=[interrupt])
    assert ended == status
    assert "; saved in runs/signal/checkpoints/" in err
    after = checkpoints.whole_steps(Path("runs/signal/checkpoints"))
    assert after in ([7], [8])
    assert run("signal", "--resume")[0] == 0
    assert_same_run(Path("runs/signal"), whole)


@pytest.mark.slow
def test_it_stops_before_the_end_of_a_slurm_allocation(whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
        status, out, err = run("slurm", checkpoint_stop_minutes_before_end=2)
    assert status == 143
    assert "stopping before the end of the Slurm allocation: saving" in out
    assert err.startswith("stopped before the end of the Slurm allocation after step 0 of 12; saved in")
    assert run("slurm", "--resume", "auto")[0] == 0
    assert_same_run(Path("runs/slurm"), whole)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(whole, monkeypatch):
    """The next may succeed; the last must."""

    def full(path):
        if path.name in ("4", "8"):
            raise OSError(28, "No space left on device")
        write(path)

    write = checkpoints.checksums.write
    monkeypatch.setattr(checkpoints.checksums, "write", full)
    monkeypatch.setattr(saving.Writer, "due", lambda self, step: step % SAVED == 0)
    wait = saving.Writer.save

    def save_and_wait(self, *arguments):
        path = wait(self, *arguments)
        self._wait()
        return path

    monkeypatch.setattr(saving.Writer, "save", save_and_wait)
    status, out, _ = run("full")
    assert status == 0
    for step in (4, 8):
        assert f"runs/full/checkpoints: the checkpoint of step {step} could not be written: [Errno 28]" in out
    assert "; training goes on" in out
    assert checkpoints.whole_steps(Path("runs/full/checkpoints")) == [STEPS]
    assert_same_run(Path("runs/full"), whole)


def test_the_checkpoint_says_all_that_the_run_was(whole):
    about = checkpoints.find(whole / "checkpoints").about
    assert about["configuration"] == json.loads(json.dumps(dataclasses.asdict(settings.read(whole / "config.toml"))))
    assert about["versions"] == settings.versions()
    assert about["tokenizer"]["name"] == "characters"
    assert about["text"]["bytes"] == len(Path("text.txt").read_bytes())


@pytest.mark.slow
def test_a_run_on_token_files_goes_on_and_one_whose_files_changed_does_not(work):
    """Two sources in shares, each in several files; the file that changed is named, and the place in it."""
    for name in ("web", "books"):
        words = ["prepare", "text.txt", "--tokenizer", "bytes", "--output", name, "--shard-tokens", "2000"]
        assert cli.main([*words, "--processes", "1"]) == 0
    mixture = {"data_mixture": "web=0.3, books=0.7", "optimizer_schedule": "constant"}
    assert run("mixed-whole", **mixture)[0] == 0
    assert run("mixed", training_steps=7, **mixture)[0] == 0
    status, out, _ = run("mixed", "--resume", **mixture)
    assert (status, "resuming after step 7" in out) == (0, True)
    jax.tree.map(np.testing.assert_array_equal, state(Path("runs/mixed")), state(Path("runs/mixed-whole")))
    lines = [line for line in read_metrics(Path("runs/mixed/metrics.jsonl")) if "loss" in line]
    assert all(0 <= line["data_wait_seconds"] <= line["step_seconds"] for line in lines)
    status, _, err = run("mixed", "--resume", training_steps=13, **mixture | {"data_mixture": "web=0.4, books=0.6"})
    assert (status, "the shares of 65,536 sequences were" in err) == (2, True)
    victim = sorted(Path("books").glob("*train*"))[1]
    content = bytearray(victim.read_bytes())
    content[1500] ^= 1
    victim.write_bytes(content)
    status, _, err = run("mixed", "--resume", training_steps=13, **mixture)
    assert status == 2
    assert f"source 2: the file {victim.name}: it differs between the byte offsets 0 and 4096" in err
    victim.write_bytes(content[:1500])
    status, _, err = run("mixed", "--resume", training_steps=13, **mixture)
    assert (status, f"{victim} is damaged" in err) == (2, True)
