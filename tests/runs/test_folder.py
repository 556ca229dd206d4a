"""A run's folder: what is in it, and when it is not touched."""

import errno
import json
import math
import os
import resource
import shutil
import sys
from typing import Any

import pytest

from jaxgpt import writing
from jaxgpt.errors import RunError, UserError
from jaxgpt.options import settings
from jaxgpt.options.config import Config, Run
from jaxgpt.runs import folder as folder_module
from jaxgpt.runs import metrics_file, saving
from jaxgpt.runs.folder import RunFolder
from jaxgpt.runs.metrics_file import read_metrics


@pytest.fixture
def config(tmp_path):
    """A function that makes a configuration whose runs are in tmp_path/runs."""

    def make(name: str = "one", *, folder: str = "", **options: Any) -> Config:
        return Config(run=Run(name=name, folder=folder or str(tmp_path / "runs"), **options))

    return make


def files(folder):
    """All that is in a folder, with its contents."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_has_the_configuration_and_no_metrics(config):
    folder = RunFolder(config())
    folder.close()
    assert settings.read(folder.path / "config.toml") == config()
    assert (folder.path / "metrics.jsonl").read_text() == ""


def test_metrics_are_on_disk_at_once_one_json_object_a_line(config):
    """So that others can read them while the run goes on."""
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


def test_auto_replaces_a_run_that_has_no_checkpoint(config):
    """What a job leaves that was killed before its first checkpoint must not keep it from starting again."""
    first = RunFolder(config())
    first.metric(step=1, loss=3.0)
    first.close()
    second = RunFolder(config(resume="auto"))
    second.close()
    assert not second.resumes
    assert read_metrics(second.path / "metrics.jsonl") == []


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("name", ["notes.md", "checkpoints/best", "checkpoints/2024.tar", ".hidden"])
def test_what_no_run_writes_is_kept_aside(config, tmp_path, name, resume):
    """In a run that is replaced because nothing would be lost of it."""
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
    for name in folder_module.WRITTEN - {"checkpoints", "config.toml", "metrics.jsonl"}:
        (folder.path / name).write_text("x")
    (folder.path / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder.path / ".loss.png.new-0123abcd").write_text("x")
    folder.close()
    again = RunFolder(config())
    again.close()
    assert again.notes == []
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]


def test_two_processes_do_not_train_one_run(config):
    """As when a job is started again before the old one has ended."""
    first = RunFolder(config())
    for options in ({}, {"overwrite": True}, {"resume": "auto"}):
        with pytest.raises(UserError, match="another process is training this run"):
            RunFolder(config(**options))
    first.metric(step=1, loss=1.0)
    first.close()
    RunFolder(config(overwrite=True)).close()


def files_of_step_two(config):
    """A run whose step 2 was saved, and what it has written since."""
    folder = RunFolder(config())
    folder.metric(step=1, loss=3.0)
    folder.metric(step=2, loss=2.0)
    folder.metric(step=2, val_loss=2.0)
    folder.sample(2, "é")
    lengths = folder.lengths()
    (folder.checkpoints / "2").mkdir(parents=True)
    before = files(folder.path)
    folder.metric(step=2, val_loss=2.5)  # as a run that was stopped evaluates at its end
    folder.metric(step=3, loss=1.0)
    folder.sample(4, "later")
    folder.close()
    return before, lengths


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
    """After a power failure: what is left is kept, to the last whole line."""
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
    """What it points to is another run's folder, under another name."""
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


@pytest.fixture
def small_files():
    """A function that limits the size of files, which stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_while_the_folder_is_made_leaves_nothing(config, small_files, tmp_path):
    small_files(100)
    with pytest.raises(UserError, match=r"can't write there \(File too large"):
        RunFolder(config())
    assert list((tmp_path / "runs").iterdir()) == []


# A folder that changes while the run trains


@pytest.mark.parametrize("action", [shutil.rmtree, lambda path: path.rename(path.with_name("moved"))])
@pytest.mark.parametrize(
    "write", [lambda f: f.metric(step=1, loss=1.0), lambda f: f.sample(0, "text"), RunFolder.lengths]
)
def test_a_folder_that_is_gone_is_told_at_once(config, action, write):
    folder = RunFolder(config())
    action(folder.path)
    with pytest.raises(RunError, match="one was deleted or moved while the run trains, so the run stops here"):
        write(folder)
    assert not folder.path.exists()
    folder.close()


def test_metrics_that_are_deleted_are_told(config):
    folder = RunFolder(config())
    (folder.path / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"metrics\.jsonl was deleted or moved"):
        folder.metric(step=1, loss=1.0)
    folder.close()


def test_metrics_that_an_editor_has_written_go_on(config):
    """Many editors write a new file and rename it."""
    folder = RunFolder(config())
    folder.metric(step=1, loss=1.0)
    new = folder.path / "new"
    new.write_bytes((folder.path / "metrics.jsonl").read_bytes())
    new.replace(folder.path / "metrics.jsonl")
    folder.metric(step=2, loss=2.0)
    folder.close()
    assert [line["step"] for line in read_metrics(folder.path / "metrics.jsonl")] == [1, 2]


# Links in the folder, which somebody may have sent


@pytest.fixture
def precious(tmp_path):
    (tmp_path / "precious.txt").write_text("precious\n" * 30)
    return tmp_path / "precious.txt"


def everything_written(folder, config, lengths):
    """Goes on with a run and writes each of its files."""
    folder.go_on(config, 2, lengths)
    folder.metric(step=3, loss=1.0)
    folder.sample(3, "text")
    folder.write_json("machine.json", {})
    folder.write_json("memory_plan.json", {})
    with folder.replacing("loss.png") as path:
        path.write_bytes(b"PNG")
    folder.lengths()


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", folder_module.OURS)
def test_no_link_in_the_folder_is_written_through(config, precious, name, link):
    """It is refused, or a file takes its place."""
    _, lengths = files_of_step_two(config)
    resume = config(resume="auto")
    folder = RunFolder(resume)
    (folder.path / name).unlink(missing_ok=True)
    link(precious, folder.path / name)
    try:
        everything_written(folder, resume, lengths)
    except UserError as error:
        assert "leads out of" in str(error)  # noqa: PT017
    folder.close()
    assert precious.read_text() == "precious\n" * 30


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_evaluation_is_not_added_through_a_link(config, precious, link):
    folder = RunFolder(config())
    folder.close()
    (folder.path / "metrics.jsonl").unlink()
    link(precious, folder.path / "metrics.jsonl")
    assert "not added there (it is a link" in metrics_file.add_evaluation(folder.path, {"step": 1})
    assert precious.read_text() == "precious\n" * 30


def test_checkpoints_that_are_a_link_are_refused(config, tmp_path):
    _, _ = files_of_step_two(config)
    path = tmp_path / "runs" / "one"
    (path / "checkpoints").rename(tmp_path / "elsewhere")
    (path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="it is a link, and is not followed"):
        RunFolder(config(resume="always"))
    assert (tmp_path / "elsewhere" / "2").is_dir()


@pytest.mark.parametrize("name", ["{tmp}/precious.txt", "../../precious.txt", "config.toml", "checkpoints/2/x"])
def test_a_checkpoint_does_not_say_which_files_are_cut(config, precious, tmp_path, name):
    _, lengths = files_of_step_two(config)
    (tmp_path / "runs" / "one" / "checkpoints" / "2" / "x").write_text("x")
    resume = config(resume="always")
    folder = RunFolder(resume)
    folder.go_on(resume, 2, lengths | {name.format(tmp=tmp_path): 0})
    folder.close()
    assert precious.read_text() == "precious\n" * 30
    assert (folder.checkpoints / "2" / "x").read_text() == "x"
    assert settings.read(folder.path / "config.toml") == resume


@pytest.mark.parametrize("length", [None, -1, "1", 1.5, True, [1]])
def test_a_length_that_is_none_is_refused(config, length):
    _, lengths = files_of_step_two(config)
    folder = RunFolder(config(resume="always"))
    before = files(folder.path)
    with pytest.raises(UserError, match=r"the checkpoint says that samples\.txt had .* bytes"):
        folder.go_on(config(resume="always"), 2, lengths | {"samples.txt": length})
    assert files(folder.path) == before
    folder.close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(config, name):
    _, lengths = files_of_step_two(config)
    folder = RunFolder(config(resume="always"))
    (folder.path / name).unlink()
    os.mkfifo(folder.path / name)
    with pytest.raises(UserError, match=f"{name}: a pipe, where a file is expected"):
        folder.go_on(config(resume="always"), 2, lengths)
    folder.close()


# Damaged lines


@pytest.mark.parametrize("damage", [b"{", b"\0" * 50, b"[1, 2]", b'{"loss": 1.0}', b'{"step": "1"}', b"\xff\xfe"])
def test_a_damaged_line_is_put_aside_and_said(config, damage):
    _, lengths = files_of_step_two(config)
    folder = RunFolder(config(resume="always"))
    path = folder.path / "metrics.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n" + damage + b"\n" + rest)
    lengths["metrics.jsonl"] += len(damage) + 1
    (said,) = folder.go_on(config(resume="always"), 2, lengths)
    folder.close()
    assert said == f"{path}: line 2 can't be read; it is put aside into metrics.damaged"
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 2]
    assert (folder.path / "metrics.damaged").read_bytes() == damage + b"\n"


# Several processes, and what killed ones leave


def test_two_that_begin_at_once_do_not_replace_each_other(config, monkeypatch):
    """The second finds the folder that the first has made since it looked."""
    firsts = []

    def another(path):
        monkeypatch.undo()
        firsts.append(RunFolder(config()))
        return reserved(path)

    reserved = writing.reserved
    monkeypatch.setattr(writing, "reserved", another)
    with pytest.raises(UserError, match="another process is training this run"):
        RunFolder(config(overwrite=True))
    firsts[0].metric(step=1, loss=1.0)
    firsts[0].close()


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_run_that_has_ended_meanwhile_is_looked_at_again(config, monkeypatch, resume):
    def another(path):
        monkeypatch.undo()
        folder = RunFolder(config())
        (folder.checkpoints / "1").mkdir(parents=True)
        folder.close()
        return reserved(path)

    reserved = writing.reserved
    monkeypatch.setattr(writing, "reserved", another)
    if resume == "never":
        with pytest.raises(UserError, match="exists and is left as it is"):
            RunFolder(config())
    else:
        folder = RunFolder(config(resume="auto"))
        assert folder.resumes
        folder.close()


@pytest.mark.parametrize("name", [".one.new-1", ".one.old-16188", ".one.new-0f3c9a12"])
def test_what_a_killed_process_has_left_is_removed(config, tmp_path, name):
    """In a container each start has the same process number."""
    left = tmp_path / "runs" / name
    left.mkdir(parents=True)
    (left / "config.toml").write_text("")
    for _ in range(2):
        RunFolder(config()).close()
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]


def test_what_another_process_writes_is_left(config, tmp_path):
    """It has it locked. Other names are others' too."""
    (tmp_path / "runs").mkdir()
    for name in (".one.new-1", ".one.new-x", ".two.new-1", "one.old-1"):
        (tmp_path / "runs" / name).mkdir()
    with writing.lock(tmp_path / "runs" / ".one.new-1", "is writing it"):
        RunFolder(config()).close()
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {"one", ".one.new-1", ".one.new-x", ".two.new-1", "one.old-1"}


def test_a_run_whose_replacement_was_killed_is_put_back(config, tmp_path):
    """Killed between the two renamings that it takes."""
    _, _ = files_of_step_two(config)
    path = tmp_path / "runs" / "one"
    before = files(path)
    path.rename(path.with_name(".one.old-0a1b2c3d"))
    with pytest.raises(UserError, match="exists and is left as it is"):
        RunFolder(config())
    assert files(path) == before
    assert [path.name for path in path.parent.iterdir()] == ["one"]


def test_starting_over_keeps_what_is_there(config, tmp_path):
    for number in (1, 2):
        before, _ = files_of_step_two(config)
        folder = RunFolder(config(resume="auto"))
        folder.start_over("there is no whole checkpoint")
        kept = tmp_path / "runs" / f"one.damaged-{number}"
        assert folder.notes == [f"there is no whole checkpoint. This run is kept as {kept}, and begins anew"]
        assert not folder.resumes
        folder.metric(step=1, loss=1.0)
        with pytest.raises(UserError, match="another process is training this run"):
            RunFolder(config(overwrite=True))
        folder.close()
        assert before.keys() <= files(kept).keys()
        assert [line["step"] for line in read_metrics(kept / "metrics.jsonl")] == [1, 2, 2, 2, 3]
        shutil.rmtree(folder.path)
