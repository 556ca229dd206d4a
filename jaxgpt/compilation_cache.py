"""Persistent compilation cache: compiled programs on the disk, so that a second start compiles nothing.

Programs are stored in compiled/ in the user's cache folder. Their key covers what they were compiled from and for:
another option, another version of JAX or another device has programs of its own. Whoever can write to the folder can
have code run, so it must belong to the user, and nobody else may write to it. Beyond LARGEST_BYTES in all, the least
recently used programs are deleted.

JAX itself leaves a damaged program where it is and compiles anew at every start. Here a checksum stands before each
program, and a program that doesn't match its checksum is replaced.
"""

import contextlib
import hashlib
import os
import shutil
import stat
from pathlib import Path

import jax
from jax._src import compilation_cache, lru_cache  # JAX has no public API for another cache

from jaxgpt.environment import cache_folder
from jaxgpt.errors import UserError, reason
from jaxgpt.foreign_text import shown
from jaxgpt.terminal import say

OFF = "off"
LARGEST_BYTES = 4 * 2**30
SHORTEST_SECONDS = 0.1  # a program that was compiled faster isn't kept: there are many of those
CHECKSUM_BYTES = hashlib.sha256().digest_size


def use(choice: str) -> None:
    """Has JAX keep what it compiles from now on. Call it before anything is compiled.

    A folder that can't be written is no reason to stop: stderr says so, and programs are compiled anew. The same holds
    for the user's cache folder where others can write to it. UserError where others can write to a folder that was
    named.

    Args:
        choice: The folder, as in `run.compilation_cache`: from the user's command line alone, never from a file that
            may come from others. OFF keeps nothing. Where it is empty, JAX's own variables apply
            (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE), and else compiled/ in the user's cache folder.
    """
    if choice == OFF or not (choice or jax.config.values["jax_enable_compilation_cache"]):
        jax.config.update("jax_enable_compilation_cache", False)
        return
    of_jax = "" if choice else jax.config.values["jax_compilation_cache_dir"] or ""
    if "://" in of_jax:  # a bucket, which JAX reads itself
        return
    named = choice or of_jax or cache_folder() / "compiled"
    try:
        folder = Path(named).absolute()
        _make(folder)
        others = _written_by_others(folder)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        _do_without(named, f"can't be kept there ({reason(error)})")
        return
    if others:
        cause, remedy = others
        why = f"aren't kept there, since {cause}, and could have code run here"
        remedy = f". {remedy}, or name another folder, or off: --run.compilation-cache"
        if choice or of_jax:
            raise UserError(f"{shown(folder)}: compiled programs {why}{remedy}")
        _do_without(folder, why, remedy)
        return
    compilation_cache.get_file_cache = lambda path: (
        CheckedCache(path, max_size=jax.config.values["jax_compilation_cache_max_size"]),
        path,
    )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if not of_jax:
        jax.config.update("jax_compilation_cache_max_size", LARGEST_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_SECONDS)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _do_without(folder: object, why: str, more: str = "; --run.compilation-cache takes another folder") -> None:
    """Reports on stderr why no programs are kept, and switches JAX's cache off."""
    say(f"{shown(str(folder))}: compiled programs {why}, so each start compiles them anew{more}", error=True)
    jax.config.update("jax_enable_compilation_cache", False)


def _make(folder: Path) -> None:
    """Makes the folder and its missing parents, writable by this user alone. OSError where it can't be written."""
    for level in [*reversed(folder.parents), folder]:
        if not level.exists():
            level.mkdir(mode=0o700, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(None, "no permission to write")
    probe = folder / f".probe-{os.getpid()}"
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o600))
    probe.unlink()


def _written_by_others(folder: Path) -> tuple[str, str] | None:
    """Returns how others can put something into the folder or in its place, and the remedy; None where they can't.

    In a folder with the sticky bit, such as /tmp, nobody can rename or delete what belongs to another user.
    """
    if not hasattr(os, "getuid"):  # Windows, where a user's folder has its own rights
        return None
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode):
        return "it is a link, which others may have made", "Name the folder that it leads to"
    if found.st_uid != os.geteuid():
        return f"it is another user's (number {found.st_uid}), who can write to it", "Delete it"
    if found.st_mode & 0o022:
        return f"others can write to it (mode {stat.S_IMODE(found.st_mode):04o})", "Delete it, and it is made anew"
    trusted = {0, os.geteuid(), os.stat("/").st_uid}
    for above in dict.fromkeys([*folder.parents, *folder.resolve().parents]):  # as named, and with links resolved
        found = above.stat()
        writable = found.st_mode & 0o002 or (found.st_mode & 0o020 and not _own_group(found.st_gid))
        if found.st_uid not in trusted or (writable and not found.st_mode & stat.S_ISVTX):
            mode = f"user number {found.st_uid}'s, mode {stat.S_IMODE(found.st_mode):04o}"
            return f"others can write to {shown(above)} ({mode})", f"`chmod go-w` {shown(above)}"
    return None


def _own_group(number: int) -> bool:
    """Returns whether this user is a group's only member, as in the groups that Debian, Ubuntu and Fedora make.

    Such a group can usually write to the folders that its user makes.
    """
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except KeyError:  # without a name, as in a container
        return False
    return user.pw_gid == number and user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}


class CheckedCache(lru_cache.LRUCache):
    """JAX's cache with a checksum before each program.

    No error in its files stops a run: a program that can't be read is compiled anew.
    """

    off = False  # True after a failure for which every later program would wait, or fail too

    def get(self, key: str) -> bytes | None:
        """Returns the program stored under `key`; None where there is none, or where it is damaged."""
        name = f"{key}-checked"  # which JAX's own caches, whose programs have no checksum, never look for
        path = self._file(name)
        if self.off or not os.path.lexists(path):
            return None
        try:
            # Only a regular file can be ours; reading anything else, such as a pipe, might never end.
            data = super().get(name) or b"" if stat.S_ISREG(path.lstat().st_mode) else b""
        except TimeoutError:
            return self._give_up("another process has had its lock for long")
        except OSError:
            data = b""
        checksum, program = data[:CHECKSUM_BYTES], data[CHECKSUM_BYTES:]
        if checksum == _checksum(name, program):
            return program
        say(f"{shown(path)}: this compiled program is damaged, so it is compiled anew and replaced", error=True)
        _delete(path)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Stores a program, unless it is stored already."""
        if self.off:
            return
        name = f"{key}-checked"
        try:
            super().put(name, _checksum(name, value) + value)
            os.chmod(self._file(name), 0o600)
        except TimeoutError:
            self._give_up("another process has had its lock for long")
        except OSError as error:  # such as a full disk
            _delete(self._file(name))
            self._give_up(reason(error))

    def _evict_if_needed(self, *, additional_size: int = 0) -> None:
        """Deletes the least recently used programs until there is room.

        JAX 0.10's own method fails for a program without its time of use, which a killed process leaves, and for a
        user without a name.
        """
        if not self.eviction_enabled:
            return
        found = []
        for path in Path(self.path).glob(f"*{lru_cache._CACHE_SUFFIX}"):
            time_file = _time_file(path)
            used = int.from_bytes(time_file.read_bytes()[:8], "little") if time_file.is_file() else 0
            found.append((used, path, path.lstat().st_size))
        total = sum(size for _, _, size in found) + additional_size
        for _, path, size in sorted(found):
            if total <= self.max_size:
                return
            _delete(path)
            total -= size

    def _file(self, name: str) -> Path:
        return Path(self.path, f"{name}{lru_cache._CACHE_SUFFIX}")

    def _give_up(self, why: str) -> None:
        self.off = True
        say(
            f"{shown(self.path)}: what is compiled from here on can't be kept there ({why}); "
            "--run.compilation-cache takes another folder",
            error=True,
        )


def _checksum(name: str, program: bytes) -> bytes:
    return hashlib.sha256(name.encode() + program).digest()


def _time_file(path: Path) -> Path:
    """Returns the file in which JAX keeps the time of a program's last use."""
    return path.with_name(path.name.removesuffix(lru_cache._CACHE_SUFFIX) + lru_cache._ATIME_SUFFIX)


def _delete(path: Path) -> None:
    """Deletes a program and its time file, or whatever lies in their place."""
    for file in (path, _time_file(path)):
        with contextlib.suppress(OSError):
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
