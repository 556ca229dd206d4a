"""The cache of compiled programs on the disk: stored, loaded, and done without."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src import compilation_cache as jax_cache

from jaxgpt import compilation_cache
from jaxgpt.commands import cli
from jaxgpt.compilation_cache import CheckedCache
from jaxgpt.errors import UserError

ROOT = Path(cli.__file__).resolve().parents[2]
OPTIONS = ["jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_compilation_cache_max_size"]
OPTIONS += ["jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes"]

COMPILE = """
import logging, sys
import jax
from jaxgpt import compilation_cache
logging.basicConfig(level=logging.DEBUG)
compilation_cache.SHORTEST_SECONDS = 0.0
compilation_cache.use(sys.argv[1])
jax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()
print("hit" if "cache hit for 'jit__lambda'" in open(sys.argv[2]).read() else "compiled")
"""


@pytest.fixture
def enabled():
    """Enables the cache as in a user's process, and restores the tests' settings afterwards."""
    before, opened = {name: jax.config.values[name] for name in OPTIONS}, jax_cache.get_file_cache
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.get_file_cache = opened


@pytest.fixture
def user(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxgpt" / "compiled"


def start(choice: str, tmp_path: Path) -> tuple[str, str]:
    """Starts a process that compiles one program, and returns its stdout and its stderr."""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_ENABLE_COMPILATION_CACHE"}
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, choice, str(tmp_path / "log")],
            env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=True,
        )
    return done.stdout.strip(), (tmp_path / "log").read_text()


def test_the_second_start_takes_what_the_first_compiled(user, tmp_path):
    """No warning or error is printed. A damaged program is replaced, with one line."""
    assert start("", tmp_path)[0] == "compiled"
    assert list(user.glob("jit__lambda*-cache"))
    assert user.stat().st_mode & 0o077 == 0  # nobody else's: what is in it is run
    said, log = start("", tmp_path)
    assert said == "hit"
    assert not [line for line in log.splitlines() if line.startswith(("WARNING", "ERROR", "E0", "W0"))]
    (file,) = user.glob("jit__lambda*-cache")
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    said, log = start("", tmp_path)
    assert said == "compiled"
    lines = [line for line in log.splitlines() if "is damaged" in line or "Error reading" in line]
    assert lines == [f"{file}: this compiled program is damaged, so it is compiled anew and replaced"]
    assert start("", tmp_path)[0] == "hit"


def test_another_folder(enabled, user, tmp_path):
    compilation_cache.use(str(tmp_path / "mine"))
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
    assert not user.exists()


def test_off(enabled, user):
    compilation_cache.use("off")
    assert not jax.config.values["jax_enable_compilation_cache"]
    assert not user.exists()


def test_what_jaxs_own_variables_choose_holds(enabled, user, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
    compilation_cache.use("")
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "chosen")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.use("")
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert not user.exists()


@pytest.mark.parametrize("folder", ["file/below", "a\0b", "/proc/compiled"])
def test_a_folder_that_cannot_be_written_is_said_once(enabled, tmp_path, capsys, monkeypatch, folder):
    """The run goes on without a cache."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    compilation_cache.use(folder)
    assert not jax.config.values["jax_enable_compilation_cache"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "compiled programs can't be kept there" in line
    assert "--run.compilation-cache" in line


# Folders that others can write to


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_to_is_not_used(enabled, user, capsys, mode):
    user.mkdir(parents=True)
    user.chmod(mode)
    compilation_cache.use("")
    assert not jax.config.values["jax_enable_compilation_cache"]
    (line,) = capsys.readouterr().err.splitlines()
    assert f"others can write to it (mode {mode:04o}), and could have code run here" in line
    with pytest.raises(UserError, match=r"others can write to it .* Delete it, and it is made anew, or name another"):
        compilation_cache.use(str(user))


def test_the_folders_above_count_too(enabled, tmp_path):
    """Folders like /tmp are allowed, where nobody can rename what is another's."""
    (tmp_path / "open").mkdir()
    folder = tmp_path / "open" / "mine" / "compiled"
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UserError, match=rf"others can write to {tmp_path / 'open'} \(user number \d+'s, mode 0777\)"):
        compilation_cache.use(str(folder))
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(UserError, match="others can write to"):
        compilation_cache.use(str(tmp_path / "link" / "mine" / "compiled"))
    (tmp_path / "open").chmod(0o1777)
    compilation_cache.use(str(folder))
    assert jax.config.values["jax_compilation_cache_dir"] == str(folder)


def test_a_group_that_is_the_users_own_is_nobody_else(enabled, tmp_path, monkeypatch):
    """Debian and Fedora give each user a group, which can write to the user's folders as a rule."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o775)
    monkeypatch.setattr(compilation_cache, "_own_group", lambda number: False)
    with pytest.raises(UserError, match="others can write to"):
        compilation_cache.use(str(tmp_path / "shared" / "compiled"))
    monkeypatch.setattr(compilation_cache, "_own_group", lambda number: True)
    compilation_cache.use(str(tmp_path / "shared" / "compiled"))


def test_a_link_and_another_users_folder_are_not_used(enabled, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="it is a link"):
        compilation_cache.use(str(tmp_path / "link"))
    number = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: number + 1)
    with pytest.raises(UserError, match=rf"another user's \(number {number}\)"):
        compilation_cache.use(str(tmp_path / "theirs"))


def test_the_folder_of_jaxs_own_variable_has_to_be_the_users_too(enabled, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "open"))
    with pytest.raises(UserError, match="others can write to it"):
        compilation_cache.use("")
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/folder")
    compilation_cache.use("")
    assert jax.config.values["jax_compilation_cache_dir"] == "gs://bucket/folder"


def test_missing_folders_are_made_for_the_user_alone(enabled, user):
    before = os.umask(0)
    try:
        compilation_cache.use("")
    finally:
        os.umask(before)
    made = [user, *user.parents[:2]]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700] * 3


# Damaged files


@pytest.fixture
def cache(tmp_path):
    return CheckedCache(str(tmp_path / "cache"), max_size=10_000)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    (file / "within").mkdir(parents=True)


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGE = {
    "truncated": lambda file: os.truncate(file, 40),
    "shorter than its checksum": lambda file: os.truncate(file, 10),
    "empty": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "another's": lambda file: file.write_bytes(file.with_name("other-checked-cache").read_bytes()),
    "a folder": replace_by_folder,
    "a pipe": replace_by_pipe,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_no_program_and_makes_room_for_one(cache, capsys, damage):
    """It is said once. `another's`: a whole program in the place of another one."""
    cache.put("one", b"the program" * 9)
    cache.put("other", b"another" * 9)
    assert cache.get("one") == b"the program" * 9
    DAMAGE[damage](Path(cache.path, "one-checked-cache"))
    assert capsys.readouterr().err == ""
    assert cache.get("one") is None
    assert len(capsys.readouterr().err.splitlines()) == 1
    cache.put("one", b"the program again")
    assert cache.get("one") == b"the program again"
    assert cache.get("other") == b"another" * 9
    assert capsys.readouterr().err == ""


def test_a_program_that_jax_has_kept_by_itself_is_let_be(cache, capsys):
    """It has no checksum, and may be from an earlier version of ours."""
    Path(cache.path, "one-cache").write_bytes(b"JAX's")
    assert cache.get("one") is None
    cache.put("one", b"ours")
    assert cache.get("one") == b"ours"
    assert Path(cache.path, "one-cache").read_bytes() == b"JAX's"
    assert capsys.readouterr().err == ""


def test_the_least_recently_used_make_room(cache):
    """A program that a kill has left without the time of its use goes first."""
    for key in "abc":
        cache.put(key, key.encode() * 3000)
    cache.get("a")
    Path(cache.path, "c-checked-atime").unlink()
    cache.put("d", b"d" * 3000)
    assert [key for key in "abcd" if cache.get(key)] == ["a", "b", "d"]
    cache.put("e", b"e" * 3000)
    assert [key for key in "abcde" if cache.get(key)] == ["b", "d", "e"]


def test_a_full_disk_is_said_once_and_stops_nothing(cache, capsys, monkeypatch):
    def full(self, data):
        Path(self).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(type(cache.path), "write_bytes", full)
        cache.put("one", b"1")
        cache.put("two", b"2")
    (line,) = capsys.readouterr().err.splitlines()
    assert "can't be kept there (No space left on device)" in line
    assert not list(Path(cache.path).glob("*-cache"))


def test_a_lock_that_nobody_opens_is_waited_for_once(cache, capsys):
    cache.lock_timeout_secs = 0.01
    other = CheckedCache(str(cache.path), max_size=10_000)
    other.put("one", b"1")
    with other.lock:
        assert cache.get("one") is None
        cache.put("two", b"2")
    assert len(capsys.readouterr().err.splitlines()) == 1
