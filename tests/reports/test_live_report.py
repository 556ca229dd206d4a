"""The live report: files that are written beside metrics.jsonl while a run trains."""

import json
import time

import pytest

from jaxgpt.errors import UserError
from jaxgpt.options.config import Config, Run
from jaxgpt.reports import live_report, trackers
from jaxgpt.reports.live_report import Following
from jaxgpt.runs.folder import RunFolder


@pytest.fixture
def config(tmp_path):
    def make(**options) -> Config:
        return Config(run=Run(name="one", folder=str(tmp_path / "runs"), **options))

    return make


def shown(folder):
    """The data in a report.html."""
    text = (folder.path / "report.html").read_text()
    return json.loads(text.split('id="data">')[1].split("</script>")[0])["runs"][0]


def metric(run, **values):
    """A line of metrics.jsonl, as the trainer writes and shows it."""
    run.folder.metric(**values)
    run.observe(values)


def step(run, number, **values):
    metric(run, step=number, loss=2.5, learning_rate=1e-3, grad_norm=1.0, skipped=0, step_seconds=0.5, **values)


def test_the_page_is_there_while_the_run_goes_on_and_says_at_the_end_that_it_ended(config, monkeypatch):
    monkeypatch.setattr(live_report, "SECONDS", 0.05)
    monkeypatch.setattr(live_report, "SHARE", 1e9)
    said, folder = [], RunFolder(config())
    with Following(folder, config(), said.append) as run:
        step(run, 1)
        until = time.monotonic() + 60
        while not (folder.path / "report.html").exists() or shown(folder)["step"] < 1:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert shown(folder)["state"] == "training"
        step(run, 2)
    folder.close()
    assert shown(folder)["state"] == "finished"
    assert shown(folder)["curves"]["learning_rate"] == [[1, 2], [1e-3, 1e-3]]
    assert shown(folder)["seconds_left"] == 998 * 0.5
    assert said == [f"report           {folder.path / 'report.html'}"]
    assert not (folder.path / "report.html.tmp").exists()


def test_a_run_that_failed_has_a_report_that_says_why(config):
    folder = RunFolder(config())
    run = Following(folder, config(), print).__enter__()
    step(run, 1)
    run.__exit__(RuntimeError, RuntimeError("the loss is nan"), None)
    folder.close()
    assert shown(folder)["state"] == "stopped: the loss is nan"


def test_it_takes_a_two_hundredth_of_the_time_and_no_more(config, monkeypatch):
    """The thread is woken at every step, by evaluations, and still sleeps what it owes."""
    work = []

    def write(self, state, *, read=True):
        before = time.thread_time()
        while time.thread_time() - before < 0.005:
            pass
        work.append(state)

    monkeypatch.setattr(live_report.Report, "write", write)
    folder = RunFolder(config())
    with Following(folder, config(), print) as run:
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            metric(run, step=1, val_loss=2.0)
            time.sleep(0.01)
    folder.close()
    assert work[-1] == "finished"
    assert 1 <= len(work) - 1 <= 3  # one a second


def test_nothing_that_goes_wrong_with_it_ends_the_run(config, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(live_report.page, "render", fail)
    said, folder = [], RunFolder(config())
    with Following(folder, config(), said.append) as run:
        step(run, 1)
    folder.close()
    assert said == ["report.html: not written (No space left on device)"]


def test_off_it_writes_none(config):
    folder = RunFolder(config(report=False))
    with Following(folder, config(report=False), print) as run:
        step(run, 1)
    folder.close()
    assert not (folder.path / "report.html").exists()


def test_trackers_that_there_are_not_are_refused_before_anything_is_made(work, fails):
    assert "There are: tensorboard, wandb" in fails("--run.trackers", "mlflow", "--run.name", "x")
    assert not (work / "runs").exists()


def test_a_tracker_that_is_not_installed_is_named_with_what_installs_it(config, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="EXTRAS=trackers"):
        trackers.check(config(trackers="wandb"))


def test_a_tracker_that_fails_is_left_and_training_goes_on(config, monkeypatch):
    class Failing:
        name = "tensorboard"

        def write(self, values):
            raise ConnectionError("no network")

        def close(self):
            raise AssertionError

    monkeypatch.setattr(trackers, "start", lambda config, folder: [Failing()])
    said, folder = [], RunFolder(config(report=False))
    with Following(folder, config(report=False), said.append) as run:
        step(run, 1)
        step(run, 2)
    folder.close()
    assert said == ["tensorboard: no network; nothing more is written there"]


def test_tensorboard_reads_what_was_written(config):
    pytest.importorskip("tensorboardX", reason="the trackers extra is not installed")
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_file_loader", reason="TensorBoard, the reader, is not installed"
    )
    made = config(trackers="tensorboard", report=False)
    folder = RunFolder(made)
    with Following(folder, made, print) as run:
        step(run, 1, mfu=None)
        step(run, 2)
        metric(run, step=2, task="hellaswag", accuracy=0.25, examples=4)
    folder.close()
    (path,) = (folder.path / "tensorboard").iterdir()
    read = [
        (event.step, value.tag, pytest.approx(value.tensor.float_val[0]))
        for event in reader.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]
    assert (1, "loss", 2.5) in read
    assert (2, "learning_rate", 1e-3) in read
    assert (2, "hellaswag/accuracy", 0.25) in read
    assert len(read) == 2 * 5 + 2
