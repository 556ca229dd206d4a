"""That processes which would not train the same are refused."""

import copy

import pytest

from jaxgpt.commands import process_consistency
from jaxgpt.data.corpus import Corpus
from jaxgpt.errors import UserError
from jaxgpt.options import settings
from jaxgpt.options.config import Config
from jaxgpt.parallel import processes


@pytest.fixture
def package(tmp_path):
    package = tmp_path / "package"
    (package / "layers").mkdir(parents=True)
    for name in ("a.py", "layers/b.py", "layers/c.py"):
        (package / name).write_text("x = 1\n")
    return package


def test_sources_are_the_code_alone(package):
    before = process_consistency.sources(package)
    assert list(before) == ["package/a.py", "package/layers/b.py", "package/layers/c.py"]
    (package / "layers" / "b.pyc").write_text("compiled")
    (package / ".#a.py").symlink_to("user@machine.123:456")  # what Emacs leaves beside a file that is edited
    (package / ".ipynb_checkpoints").mkdir()
    (package / ".ipynb_checkpoints" / "a-checkpoint.py").write_text("x = 1\n")
    assert process_consistency.sources(package) == before
    (package / "layers" / "b.py").write_text("x = 2\n")
    after = process_consistency.sources(package)
    assert {name for name in before if before[name] != after[name]} == {"package/layers/b.py"}


def difference(monkeypatch, change):
    """The message of process 1, where process 0 has said something else."""

    def broadcast(make):
        first = copy.deepcopy(make())
        change(first)
        return first

    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "index", lambda: 1)
    monkeypatch.setattr(processes.talk, "broadcast", broadcast)
    data = Corpus.__new__(Corpus, *[{} if name == "fingerprint" else None for name in Corpus._fields])
    try:
        process_consistency.check(Config(), data)
    except UserError as error:
        return str(error)
    return ""


def test_the_same_is_allowed(monkeypatch):
    assert difference(monkeypatch, lambda first: None) == ""


@pytest.mark.parametrize("hash_there", ["0123456789abcdef", None])
def test_other_code_of_the_same_version_is_named(monkeypatch, hash_there):
    """A file that was changed, and one that is only here."""

    def change(first):
        if hash_there:
            first["code"]["jaxgpt/layers/gelu.py"] = hash_there
        else:
            del first["code"]["jaxgpt/layers/gelu.py"]

    message = difference(monkeypatch, change)
    assert message == ("process 1 is to train other than process 0: the code is not the same in jaxgpt/layers/gelu.py")


def test_another_version_is_named(monkeypatch):
    message = difference(monkeypatch, lambda first: first["versions"].update(jax="0.0.1"))
    assert message.endswith(f"process 0: jax is 0.0.1 there and {settings.versions()['jax']} here")
