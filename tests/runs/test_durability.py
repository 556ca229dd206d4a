"""The disk's content if the power fails at any moment, found from a record of what was flushed to it.

Only a flush makes a promise: a file's content is on the disk after fsync of the file, a name after fsync of its
folder. What was done since the last flush may be there or not. So at each operation the disk is made up as it may be
then, in the ways that hurt most, and searched for what the program had said to be there.
"""

import hashlib
import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from jaxgpt import writing
from jaxgpt.options.config import Checkpoint, Config, Model, Run
from jaxgpt.runs import saving
from jaxgpt.runs.folder import RunFolder
from jaxgpt.training.state import init_state

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the record follows descriptors there")

MODEL = Model(layers=1, heads=1, width=8, context=8, vocabulary_size=50)
OPERATIONS = ("fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir")
Tree = dict[str, "bytes | Tree"]  # a folder's files and folders by name


class Disk:
    """The known content of the disk under `root`. `check` is called with each content that there may be.

    Without `deletions` a renaming is one thing to the disk: it never has the old name gone and not the new one.
    """

    def __init__(self, root: Path, check: Callable[[Tree], None], patch: pytest.MonkeyPatch, *, deletions: bool):
        self.root, self.check, self.deletions = root, lambda _: None, deletions
        self.seen = 0  # different disks
        self.failures: list[str] = []
        self._content: dict[int, bytes] = {}  # of files by their inode, as they were flushed
        self._names: dict[int, dict[str, int]] = {}  # of folders
        self._open: list[int] = []  # descriptors that keep inodes from being given to other files
        self._last: list[Tree] = []
        for name in OPERATIONS:
            patch.setattr(os, name, self._recorded(name, getattr(os, name)))
        writing.sync_tree(root)
        self.check = check

    def _recorded(self, name, operation):
        def call(*arguments, **options):
            self._look(f"before {name} {arguments}")
            result = operation(*arguments, **options)
            if name == "fsync":
                self._flushed(arguments[0])
            return result

        return call

    def _flushed(self, descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        self._open.append(os.dup(descriptor))
        path = Path(f"/proc/self/fd/{descriptor}")
        if path.is_dir():
            self._names[inode] = _names(path)
        else:
            self._content[inode] = path.read_bytes()

    def look(self, when: str) -> None:
        """Checks the disks when something has been announced, which each of them must have."""
        self._last = []
        self._look(when)

    def _look(self, when: str) -> None:
        for tree in self.trees():
            if tree not in self._last:
                self.seen += 1
                try:
                    self.check(tree)
                except (AssertionError, KeyError, ValueError) as error:
                    self.failures.append(f"{when}: {error!r}")
            self._last = [*self._last[-3:], tree]

    def trees(self) -> list[Tree]:
        """Returns the trees that may be on the disk now.

        Nothing but what was flushed; all names, with the content that was flushed; all new names and no deletion; all
        deletions and no new name.
        """
        now = {Path(path).stat().st_ino: _names(Path(path)) for path, _, _ in os.walk(self.root)}
        flushed = self._names

        def tree(inode: int, names: Callable[[dict[str, int], dict[str, int]], dict[str, int]]) -> Tree:
            return {
                name: tree(at, names) if at in now or at in flushed else self._content.get(at, b"")
                for name, at in names(flushed.get(inode, {}), now.get(inode, {})).items()
            }

        choices = (
            lambda old, _: old,
            lambda _, new: new,
            lambda old, new: old | new,
            lambda old, new: {name: at for name, at in old.items() if name in new},
        )
        return [tree(self.root.stat().st_ino, choice) for choice in choices[: None if self.deletions else 3]]

    def close(self) -> None:
        for descriptor in self._open:
            os.close(descriptor)


def _names(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.inode() for entry in entries}


@pytest.fixture
def watch(monkeypatch):
    """A function that begins a record of a folder."""
    disks = []

    def begin(root: Path, check: Callable[[Tree], None], *, deletions: bool = True) -> Disk:
        disks.append(Disk(root, check, monkeypatch, deletions=deletions))
        return disks[-1]

    yield begin
    monkeypatch.undo()
    for disk in disks:
        disk.close()


def whole(checkpoint: Tree) -> bool:
    """Returns whether `sha256sum --check` would accept it, and there is no file too many."""
    files = {}

    def collect(tree: Tree, prefix: str) -> None:
        for name, content in tree.items():
            if isinstance(content, dict):
                collect(content, f"{prefix}{name}/")
            else:
                files[prefix + name] = hashlib.sha256(content).hexdigest()

    collect(checkpoint, "")
    sums = checkpoint.get("SHA256SUMS", b"")
    assert isinstance(sums, bytes)
    files.pop("SHA256SUMS", None)
    return bool(sums) and files == {line[66:]: line[:64] for line in sums.decode().splitlines()}


def test_a_checkpoint_that_was_announced_is_on_the_disk(tmp_path, watch):
    """One checkpoint at least is there from then on, whichever later saves and deletions reach the disk."""
    initial = jax.jit(lambda: init_state(Config(model=MODEL)))()
    announced = -1

    def check(tree):
        folder = tree.get("checkpoints", {})
        steps = [int(name) for name, checkpoint in folder.items() if name.isdecimal() and whole(checkpoint)]
        assert max(steps, default=-1) >= announced

    disk = watch(tmp_path, check)
    with saving.Writer(tmp_path / "checkpoints", Checkpoint(keep_last=1)) as writer:
        for step in range(3):
            writer.save_and_wait(initial._replace(step=jax.numpy.int32(step)), {})
            announced = step
            disk.look(f"after step {step} was saved")
    assert disk.failures == []
    assert disk.seen > 100


def config(folder: Path, **options) -> Config:
    return Config(run=Run(name="one", folder=str(folder), **options))


def test_replacing_a_run_leaves_the_old_one_or_the_new_one(tmp_path, watch):
    """The old one may have the name from which the next start puts it back."""
    RunFolder(config(tmp_path)).close()
    made = False

    def check(tree):
        named = [tree[name] for name in tree if name == "one" or (name.startswith(".one.old-") and "one" not in tree)]
        overwrites = [tomllib.loads(run["config.toml"].decode())["run"]["overwrite"] for run in named]
        assert overwrites == [True] if made else overwrites

    disk = watch(tmp_path, check, deletions=False)
    folder = RunFolder(config(tmp_path, overwrite=True))
    made = True
    disk.look("after it was made")
    folder.close()
    assert disk.failures == []
    assert disk.seen > 5


def test_the_lengths_that_a_checkpoint_has_are_on_the_disk(tmp_path, watch):
    """This holds for a file that was just begun, too."""
    said = {}

    def check(tree):
        assert all(len(tree["one"].get(name, b"")) >= length for name, length in said.items())

    disk = watch(tmp_path, check)
    folder = RunFolder(config(tmp_path))
    for step in range(3):
        folder.metric(step=step, loss=1.0)
        if step:
            folder.sample(step, "text")
        said = folder.lengths()
        disk.look("after they were said")
    assert said["samples.txt"] > 0
    folder.close()
    assert disk.failures == []


def test_going_on_leaves_the_files_as_they_were_or_as_they_are_to_be(tmp_path, watch):
    folder = RunFolder(config(tmp_path))
    folder.metric(step=1, loss=1.0)
    folder.sample(1, "text")
    lengths = folder.lengths()
    (folder.checkpoints / "1").mkdir(parents=True)
    after = {name: (folder.path / name).read_bytes() for name in lengths}
    folder.metric(step=2, loss=1.0)
    folder.sample(2, "text")
    folder.close()
    before = {name: (folder.path / name).read_bytes() for name in lengths}

    def check(tree):
        for name in lengths:
            assert tree["one"][name] in (before[name], after[name])
        assert tomllib.loads(tree["one"]["config.toml"].decode())["run"]["name"] == "one"

    again = RunFolder(config(tmp_path, resume="always"))
    disk = watch(tmp_path, check)
    again.go_on(config(tmp_path, resume="always"), 1, lengths)
    disk.look("after going on")
    again.close()
    assert disk.failures == []
    assert {name: (folder.path / name).read_bytes() for name in lengths} == after
