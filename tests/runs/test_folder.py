"""A run's folder: its content, and the cases in which it is not touched."""

import errno
import json
import math
import os
import shutil
import sys

import pytest

from jaxgpt.errors import RunError, UserError
from jaxgpt.options import settings
from jaxgpt.runs import folder as folder_module
from jaxgpt.runs import saving
from jaxgpt.runs.folder import RunFolder
from jaxgpt.runs.metrics_file import read_metrics
from tests.runs.folders import files, files_of_step_two


def test_a_new_folder_has_the_configuration_and_no_metrics(config):
    folder = RunFolder(config())
    folder.close()
    assert settings.read(folder.path / "config.toml") == config()
    assert (folder.path / "metrics.jsonl").read_text() == ""


def test_metrics_are_on_disk_at_once_one_json_object_a_line(config):
    """Others can read them while the run goes on."""
    folder = RunFolder(config())
    folder.metric(step=1, loss=0.1 + 0.2, mfu=None)
    folder.metric(step=1, val_loss=2.5)
    assert read_metrics(folder.path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.1 + 0.2, "mfu": None},
        {"step": 1, "val_loss": 2.5},
    ]
    folder.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_becomes_null(config, value):
    """JSON has no NaN: a strict reader would refuse the file."""

    def refuse(constant):
        raise AssertionError(constant)

    folder = RunFolder(config())
    folder.metric(step=3, loss=value)
    folder.close()
    line = (folder.path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 3, "loss": None}


def test_samples_are_added_to_one_file(config):
    folder = RunFolder(config())
    folder.sample(0, "first\ntwo lines")
    folder.sample(20, "sécond")
    folder.close()
    text = (folder.path / "samples.txt").read_text(encoding="utf-8")
    assert text == "--- step 0\nfirst\ntwo lines\n\n--- step 20\nsécond\n\n"


def test_a_run_that_exists_is_left_as_it_is(config):
    first = RunFolder(config())
    first.metric(step=1, loss=1.0)
    first.close()
    before = files(first.path)
    with pytest.raises(UserError, match=r"exists and is left as it is.* --run\.name.* --run\.overwrite"):
        RunFolder(config())
    assert files(first.path) == before


def test_a_run_of_which_no_step_was_taken_is_replaced(config):
    """It was interrupted before the first step: nothing is lost."""
    first = RunFolder(config())
    first.metric(step=0, val_loss=3.0)
    first.close()
    second = RunFolder(config())
    second.close()
    assert read_metrics(second.path / "metrics.jsonl") == []


def leave_metrics(folder: RunFolder) -> None:
    folder.metric(step=1, loss=3.0)


def leave_a_sample(folder: RunFolder) -> None:
    folder.sample(0, "before")
    folder.sample(20, "text")
    (folder.path / "metrics.jsonl").unlink()


def leave_a_curve(folder: RunFolder) -> None:
    (folder.path / "loss.png").write_bytes(b"a picture")
    (folder.path / "checkpoints").mkdir()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
@pytest.mark.parametrize("leave", [leave_metrics, leave_a_sample, leave_a_curve])
def test_a_trained_run_without_a_checkpoint_is_kept(config, tmp_path, leave):
    """Somebody has deleted them, or the job was killed before the first: with auto it begins anew, keeping all."""
    first = RunFolder(config())
    leave(first)
    first.close()
    before = files(first.path)
    with pytest.raises(UserError, match="exists and is left as it is"):
        RunFolder(config())
    second = RunFolder(config(resume="auto"))
    second.close()
    assert not second.resumes
    assert read_metrics(second.path / "metrics.jsonl") == []
    assert files(tmp_path / "runs" / "one.damaged-1") == before
    assert "was trained, and has no checkpoint" in second.notes[0]
    third = RunFolder(config(overwrite=True))
    third.close()
    assert sorted(os.listdir(tmp_path / "runs")) == ["one", "one.damaged-1"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("name", ["notes.md", "checkpoints/best", "checkpoints/2024.tar", ".hidden"])
def test_what_no_run_writes_is_kept_aside(config, tmp_path, name, resume):
    """The run is one that may be replaced, because nothing of it would be lost."""
    RunFolder(config()).close()
    path = tmp_path / "runs" / "one" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    folder = RunFolder(config(resume=resume))
    folder.close()
    assert (tmp_path / "runs" / "one.damaged-1" / name).read_text() == "mine"
    assert name in folder.notes[0]
    assert "kept as" in folder.notes[0]
    assert sorted(file.name for file in folder.path.iterdir()) == ["config.toml", "metrics.jsonl"]


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("unseen", ["checkpoints", "metrics.jsonl"])
def test_what_can_not_be_seen_is_not_gone(config, monkeypatch, resume, unseen):
    """A disk elsewhere doesn't answer for a moment: the run isn't one without checkpoints, to be begun anew."""
    folder = RunFolder(config())
    (folder.checkpoints / "20").mkdir(parents=True)
    (folder.checkpoints / "20" / "SHA256SUMS").write_text("x")
    folder.metric(step=1, loss=1.0)
    folder.close()
    if unseen == "metrics.jsonl":
        shutil.rmtree(folder.checkpoints)
        if resume == "auto":
            pytest.skip("not asked for")
    before = files(folder.path)

    def failing(of):
        def call(path, *arguments, **options):
            if os.fspath(path).endswith(unseen):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return of(path, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", failing(os.listdir))
        patch.setattr(os, "lstat", failing(os.lstat))
        with pytest.raises(UserError, match=r"can't be read \(Input/output error|exists and is left as it is"):
            RunFolder(config(resume=resume))
    assert files(folder.path) == before


def test_a_checkpoint_that_can_not_be_seen_is_not_called_half_written(config, monkeypatch):
    folder = RunFolder(config())
    folder.close()
    for name in ("20", "40"):
        (folder.checkpoints / name).mkdir(parents=True)
    real = os.lstat

    def failing(path, *arguments, **options):
        if "/40/" in os.fspath(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "lstat", failing)
    with pytest.raises(UserError, match="40/SHA256SUMS: can't be read"):
        saving.delete_unfinished(folder.checkpoints)
    assert [path.name for path in sorted(folder.checkpoints.iterdir())] == ["20", "40"]


def test_what_a_run_writes_is_replaced(config, tmp_path):
    folder = RunFolder(config())
    for name in folder_module.WRITTEN - {"checkpoints", "config.toml", "metrics.jsonl", "loss.png"}:
        (folder.path / name).write_text("x")
    (folder.path / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder.path / ".loss.png.new-0123abcd").write_text("x")
    folder.close()
    again = RunFolder(config())
    again.close()
    assert again.notes == []
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]


def test_two_processes_do_not_train_one_run(config):
    """This happens when a job is started again before the old one has ended."""
    first = RunFolder(config())
    for options in ({}, {"overwrite": True}, {"resume": "auto"}):
        with pytest.raises(UserError, match="another process is training this run"):
            RunFolder(config(**options))
    first.metric(step=1, loss=1.0)
    first.close()
    RunFolder(config(overwrite=True)).close()


def test_going_on_cuts_the_files_back(config):
    before, lengths = files_of_step_two(config)
    folder = RunFolder(config(resume="auto"))
    assert folder.resumes
    folder.go_on(config(resume="auto"), 2, lengths)
    after = files(folder.path)
    assert settings.read(folder.path / "config.toml") == config(resume="auto")
    assert {name: after[name] for name in after if name.name != "config.toml"} == {
        name: before[name] for name in before if name.name != "config.toml"
    }
    folder.metric(step=3, loss=1.5)
    folder.close()
    assert [line["step"] for line in read_metrics(folder.path / "metrics.jsonl")] == [1, 2, 2, 3]


def test_going_on_drops_the_steps_for_which_a_run_stopped(config):
    """Steps that were not finite are in the metrics when the state before them is saved."""
    folder = RunFolder(config())
    folder.metric(step=1, loss=3.0)
    folder.metric(step=2, loss=math.nan)
    folder.metric(step=3, loss=math.nan)
    lengths = folder.lengths()
    (folder.checkpoints / "1").mkdir(parents=True)
    folder.close()
    again = RunFolder(config(resume="always"))
    again.go_on(config(resume="always"), 1, lengths)
    again.close()
    assert read_metrics(again.path / "metrics.jsonl") == [{"step": 1, "loss": 3.0}]


@pytest.mark.parametrize("left", [0, 1, 30, 41])
def test_going_on_with_files_that_are_shorter_than_they_were(config, left):
    """A power failure may shorten files: what is left is kept, to the last whole line."""
    _, lengths = files_of_step_two(config)
    folder = RunFolder(config(resume="auto"))
    os.truncate(folder.path / "metrics.jsonl", left)
    (folder.path / "samples.txt").unlink()
    folder.go_on(config(resume="auto"), 2, lengths)
    folder.close()
    assert len(read_metrics(folder.path / "metrics.jsonl")) == left // len('{"step": 1, "loss": 3.0}\n')


def test_overwrite_leaves_nothing_of_the_old_run(config):
    first = RunFolder(config())
    first.sample(0, "old")
    first.checkpoints.mkdir()
    (first.checkpoints / "old").write_text("old")
    first.close()
    second = RunFolder(config(overwrite=True))
    second.close()
    assert set(files(second.path)) == {
        second.path.joinpath(name).relative_to(second.path)
        for name in (
            "config.toml",
            "metrics.jsonl",
        )
    }
    assert settings.read(second.path / "config.toml").run.overwrite


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_is_no_run_is_never_overwritten(config, tmp_path, kind):
    """Somebody's documents, whose name was given by mistake."""
    target = tmp_path / "runs" / "one"
    if kind == "file":
        target.parent.mkdir()
        target.write_text("precious")
    else:
        target.mkdir(parents=True)
    if kind == "folder":
        (target / "precious").write_text("precious")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"is not a run's folder"):
        RunFolder(config(overwrite=True))
    assert files(tmp_path) == before
    assert target.exists()


def test_a_link_to_a_run_is_not_overwritten(config, tmp_path):
    """The link leads to another run's folder, under another name."""
    real = RunFolder(config("real"))
    real.close()
    before = files(real.path)
    (tmp_path / "runs" / "one").symlink_to(real.path)
    with pytest.raises(UserError, match="can't write there"):
        RunFolder(config(overwrite=True))
    assert files(real.path) == before


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("{tmp}/file", "Not a directory"),
        ("{tmp}/file/below", "Not a directory"),
        ("/proc", "No such file or directory"),
        ("{tmp}/" + 300 * "x", "File name too long"),
        ("{tmp}/zero\0byte", "null (byte|character)"),
    ],
)
def test_a_folder_that_cannot_be_written(config, tmp_path, folder, reason):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"can't write there \(.*{reason}.*\)\. Choose another .* --run\.folder"):
        RunFolder(config(folder=folder.format(tmp=tmp_path)))


@pytest.mark.parametrize("write", [lambda f: f.metric(step=1, loss=1.0), lambda f: f.sample(0, "text")])
def test_a_full_disk_fails_the_run_with_the_files_name(config, write, small_files):
    folder = RunFolder(config())
    small_files(0)
    with pytest.raises(
        RunError, match=r"one/(metrics\.jsonl|samples\.txt): writing failed \(File too large\)\. Make room"
    ):
        write(folder)
    folder.close()


def test_a_full_disk_while_the_folder_is_made_leaves_nothing(config, small_files, tmp_path):
    small_files(100)
    with pytest.raises(UserError, match=r"can't write there \(File too large"):
        RunFolder(config())
    assert list((tmp_path / "runs").iterdir()) == []
