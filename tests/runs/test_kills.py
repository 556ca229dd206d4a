"""A process that is killed at each of its operations on files, while a run folder is made, replaced or gone on with."""

import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest

from benchmarks import kill_at
from jaxgpt.options import settings
from jaxgpt.options.config import Config, Run
from jaxgpt.runs import metrics_file
from jaxgpt.runs.folder import RunFolder
from jaxgpt.runs.metrics_file import read_metrics


def config(folder: Path, **options) -> Config:
    return Config(run=Run(name="one", folder=str(folder), **options))


def begin(folder: Path) -> None:
    RunFolder(config(folder)).close()


def overwrite(folder: Path) -> None:
    RunFolder(config(folder, overwrite=True)).close()


def go_on(folder: Path) -> None:
    run = RunFolder(config(folder, resume="always"))
    run.go_on(run.config, 1, {"metrics.jsonl": len(metrics_file.line({"step": 1, "loss": 1.0})), "samples.txt": 3})
    run.close()


def start_over(folder: Path) -> None:
    run = RunFolder(config(folder, resume="auto"))
    if run.resumes:
        run.start_over("damaged")
    run.close()


@pytest.fixture(scope="module")
def processes():
    """Each is forked from one that has imported what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs.test_kills"])
    return context


@pytest.fixture
def saved(tmp_path):
    """A run of which step 1 was saved, and step 2 not."""
    folder = RunFolder(config(tmp_path / "saved"))
    folder.metric(step=1, loss=1.0)
    folder.metric(step=2, loss=1.0)
    (folder.path / "samples.txt").write_text("onetwo")
    (folder.checkpoints / "1").mkdir(parents=True)
    folder.close()
    return tmp_path / "saved"


def summary(run: Path) -> tuple[bool, str, list[int], bool]:
    """Returns whether it replaced another, how it was to begin, its steps, and whether it has a checkpoint."""
    options = settings.read(run / "config.toml").run
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    return options.overwrite, options.resume, steps, (run / "checkpoints" / "1").is_dir()


OLD = (False, "never", [1, 2], True)


@pytest.mark.parametrize(
    ("work", "names", "expected"),
    [
        (begin, {"one"}, (False, "never", [], False)),
        (overwrite, {"one"}, (True, "never", [], False)),
        (go_on, {"one"}, (False, "always", [1], True)),
        (start_over, {"one", "one.damaged-1"}, (False, "auto", [], False)),
    ],
)
def test_killed_at_each_operation_the_next_start_ends_as_if_it_had_not_been(
    processes, saved, tmp_path, work, names, expected
):
    """No run is lost that was not to be replaced, and nothing is left beside it or in it."""
    for number in range(1, 100):
        folder = tmp_path / str(number)
        if work is begin:
            folder.mkdir()
        else:
            shutil.copytree(saved, folder)
        process = processes.Process(target=kill_at.run, args=(number, folder, work, folder))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if work is overwrite:
            assert any((path / "config.toml").exists() for path in folder.iterdir())
        work(folder)
        assert {path.name for path in folder.iterdir()} == names
        assert summary(folder / "one") == expected
        assert not list((folder / "one").glob(".*"))
        if work is start_over:
            assert summary(folder / "one.damaged-1") == OLD
    assert process.exitcode == 0
    assert number > 10
