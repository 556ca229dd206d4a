"""A run's folder that others change, send or leave behind."""

import os
import shutil

import pytest

from jaxgpt import writing
from jaxgpt.errors import RunError, UserError
from jaxgpt.options import settings
from jaxgpt.runs import folder as folder_module
from jaxgpt.runs import metrics_file
from jaxgpt.runs.folder import RunFolder
from jaxgpt.runs.metrics_file import read_metrics
from tests.runs.folders import files, files_of_step_two

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
    """Resumes a run and writes each of its files."""
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
    """Each start in a container has the same process number."""
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
    """The kill came between the two renamings that a replacement takes."""
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
