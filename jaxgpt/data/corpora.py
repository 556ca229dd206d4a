"""Texts that a model can be trained on, by name.

- embedded: prose that ships with CPython, the language reference and the standard library's docstrings
- tinyshakespeare: 40,000 lines of Shakespeare (Karpathy 2015, github.com/karpathy/char-rnn)
- any other name: the path of a UTF-8 text file, which may be packed: .gz, .bz2, .xz, .zst
"""

import ast
import contextlib
import functools
import hashlib
import http.client
import inspect
import itertools
import os
import random
import re
import shlex
import stat
import sys
import sysconfig
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.filesize import decimal

from jaxgpt import files, foreign_text, writing
from jaxgpt.data import documents, unpacking
from jaxgpt.environment import cache_folder
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.options.command_line import nearest
from jaxgpt.terminal import command

NAMES = ("embedded", "tinyshakespeare")

SHAKESPEARE_ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394

# Tests, applications that happen to lie in the library, tables without prose, and packages that are not Python's own.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "encodings", "pydoc_data"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages"}
PIECE_CHARACTERS = 4000
LARGEST_UNPACKED = 4 << 30  # bytes, unpacked, of a packed text that is trained on without `prepare`
SMALL_UNPACKED = 64 << 20  # bytes; a packed text of this size may have any ratio
LARGEST_RATIO = 100  # of a larger text's unpacked size to its file's size: text isn't packed better
MOST_COMPARED = 1000  # entries of a folder that an unknown name is compared with
# Control characters but for newlines, and the byte order mark, which a docstring of Python 3.13's library has.
CONTROL_CHARACTERS = {code: None for code in (*range(32), *range(127, 160), 0xFEFF) if chr(code) != "\n"}


def load(name: str) -> str:
    """Returns the whole text called `name`: "embedded", "tinyshakespeare", or the path of a UTF-8 file.

    A file's text is returned unchanged, but for a leading byte order mark, which is dropped.

    UserError where there is no such text, or it is empty, damaged, not UTF-8, of a kind that only `run.py prepare`
    reads, or can't be downloaded.
    """
    if name == "embedded":
        return _embedded()
    if name == "tinyshakespeare":
        return tinyshakespeare()[1].decode("utf-8")
    return _decode(_read(name), name)


def describe(name: str) -> str:
    """Returns one phrase on what the text called `name` is, with its size. UserError where there is no such text.

    Nothing is downloaded, and no file is read.
    """
    if name == "embedded":
        parts = "the language reference" + (" and the standard library's docstrings" if _library_files() else "")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"text that ships with Python {version}: {parts} ({decimal(len(_embedded().encode()))})"
    if name == "tinyshakespeare":
        return f"tiny Shakespeare, 40,000 lines from his plays ({decimal(SHAKESPEARE_BYTES)})"
    return f"the file {shown(name)} ({decimal(files.size(_file(name)))})"


# A user's file


def _file(name: str) -> Path:
    """Returns the path of the file `name`. UserError where it isn't a regular file, or has rows, not plain text."""
    path, called = Path(name), shown(name)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the path
        raise _unknown(name) from None
    except OSError as error:
        raise UserError(f"cannot read {called}: {error.strerror}; name a UTF-8 text file that can be read") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{called} is a folder, and a text is one file: name a UTF-8 text file in it")
    if not stat.S_ISREG(mode):
        raise UserError(
            f"{called} is a pipe or a device, which can be read once at most, and a run that goes on after an "
            "interruption reads its text again: write it to a file first, and name that"
        )
    if documents.kind_of(path) in ("json", "jsonl", "parquet"):
        output = shown(f"data/{path.name.partition('.')[0]}")
        raise UserError(
            f"{called} has rows with fields, and is no plain text. Make token files of it by: "
            f"{command('prepare', called, '--output', output)}, and train on them: --data.text {shlex.quote(output)}"
        )
    return path


def _read(name: str) -> bytes:
    """Returns the unpacked bytes of the file `name`. UserError where it can't be read, or they are too many."""
    path = _file(name)
    if path.suffix.lower() not in documents.PACKED:
        return files.read_bytes(path, files.LARGEST_TEXT)
    most = min(LARGEST_UNPACKED, max(SMALL_UNPACKED, LARGEST_RATIO * files.size(path)))
    with unpacking.opened(path) as reader:
        data = reader.read(most + 1)
    if len(data) > most:
        raise UserError(
            f"{shown(name)}: more than {decimal(most)} are packed in it, which is too much to be kept in memory, or "
            f"packed better than text is. Make token files of it by: {command('prepare', shown(name))}"
        )
    return data


def _unknown(name: str) -> UserError:
    """Returns the error for a name that is neither a text's nor a file's; it suggests the nearest existing name."""
    folder = Path(name).parent
    exists = os.path.isdir(folder)
    beside: list[str] = []
    with contextlib.suppress(OSError):  # a folder that can't be read
        entries = itertools.islice(folder.iterdir() if exists else (), MOST_COMPARED)
        beside = [str(path) for path in entries if path.is_file() or any(path.glob("*.bin"))]
    hint = shown(nearest(name, [*NAMES, *beside]).removesuffix("."))
    where = f"no such file in {shown(folder.resolve())}" if exists else f"there is no folder {shown(folder)}"
    names = ", ".join(NAMES)
    return UserError(
        f"there is no text {quoted(name)} ({where}): name one of {names}, a data set that run.py prepare --help lists, "
        f"a UTF-8 text file's path, or a folder of token files{hint}"
    )


def _decode(data: bytes, name: str) -> str:
    """Decodes UTF-8, without a byte order mark. UserError for bytes that are not text, and for an empty text."""
    unpacking.check_text(Path(name), data[: unpacking.HEAD_BYTES])
    try:
        text = foreign_text.decode(data)
    except ValueError as error:
        raise UserError(f"{shown(name)} is {error}; convert it to UTF-8, or name another file") from None
    if not text:
        raise UserError(f"{shown(name)} is empty; name a file with text in it")
    return text


# Tiny Shakespeare


def tinyshakespeare() -> tuple[Path, bytes]:
    """Returns tiny Shakespeare's path and bytes: in the JAXGPT_DATA folder, else in the cache, else downloaded there.

    UserError as `load`.
    """
    cached = cache_folder() / "tinyshakespeare.txt"
    own_folder = os.environ.get("JAXGPT_DATA")
    for path in ([Path(own_folder) / cached.name] if own_folder else []) + [cached]:
        if path.exists():
            data = _read(str(path))
            if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
                raise UserError(
                    f"{path} is damaged: its SHA-256 is not tiny Shakespeare's ({len(data):,} bytes, and "
                    f"{SHAKESPEARE_BYTES:,} are expected); delete it, and it is downloaded again"
                )
            return path, data
    data = _download()
    _keep(cached, data)
    return cached, data


def _download() -> bytes:
    """Downloads tiny Shakespeare. UserError where the network fails or something else was sent."""
    by_hand = "download it by hand as tinyshakespeare.txt into a folder, and name that folder with JAXGPT_DATA"
    try:
        with urllib.request.urlopen(SHAKESPEARE_ADDRESS, timeout=30) as response:
            data = response.read(SHAKESPEARE_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {SHAKESPEARE_ADDRESS}: {error}; {by_hand}") from None
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f"what {SHAKESPEARE_ADDRESS} sent is not tiny Shakespeare (its SHA-256 differs); {by_hand}")
    return data


def _keep(path: Path, data: bytes) -> None:
    """Writes a file of the cache, which several processes may do at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing.replacing(path) as new:
            new.write_bytes(data)
    except OSError as error:
        advice = "free some space, or name another folder with XDG_CACHE_HOME"
        raise UserError(f"cannot write {path}: {error.strerror}; {advice}") from None


# The embedded text


@functools.cache
def _embedded() -> str:
    """Returns the text of `_read_embedded`, which is kept in the cache folder until a file of the library changes.

    Parsing the library takes seconds.
    """
    cached = cache_folder() / f"embedded-{_library_state()}.txt"
    with contextlib.suppress(UserError, ValueError):  # absent, not UTF-8, or without the first line
        checksum, text = files.read_bytes(cached, files.LARGEST_JSON).split(b"\n", 1)
        if checksum.decode() == hashlib.sha256(text).hexdigest():
            return text.decode("utf-8")
    text = _read_embedded()
    data = text.encode("utf-8")
    with contextlib.suppress(UserError):  # it can't be kept, and is read anew the next time
        _keep(cached, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
    return text


def _library_state() -> str:
    """Returns a hash of everything the text depends on: the Python release, its library's files, and this module."""
    found = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _library_files()]
    made_from = repr((sys.version, sum(map(len, _reference())), found)).encode() + Path(__file__).read_bytes()
    return hashlib.sha256(made_from).hexdigest()[:16]


def _read_embedded() -> str:
    """Returns the reference and the docstrings, in pieces of about 4,000 characters that a fixed seed shuffles.

    The pieces are shuffled so that a validation split at the end is of the same kind as the rest. They are short
    because a few chapters of the reference are so long that one of them could be most of the split. A paragraph is kept
    once: the reference repeats whole sections, and a text in both splits would be learnt by heart.
    """
    seen: set[str] = set()
    pieces = []
    for document in (*_reference(), *_library_docstrings()):
        pieces += _pieces(_new_paragraphs(document, seen))
    if not pieces:
        raise UserError("this Python has neither pydoc_data nor its standard library's sources; choose another text")
    random.Random(0).shuffle(pieces)
    return "\n\n".join(pieces) + "\n"


def _reference() -> list[str]:
    """Returns the chapters of the language reference that `help()` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a distribution may leave it out
        return []
    return [topics[name] for name in sorted(topics)]


def _library_files() -> list[Path]:
    """Returns the standard library's source files, sorted; none where the library is zipped."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _library_docstrings() -> Iterator[str]:
    """Yields one document per source file: its docstrings in order. Files that don't parse are passed over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parsing reports invalid escapes in others' sources
        for path in _library_files():
            try:
                tree = ast.parse(path.read_bytes())
            except (OSError, SyntaxError, ValueError):
                continue
            yield "\n\n".join(_docstrings(tree))


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yields the docstrings of a module, class or function and of the definitions within it, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):  # expressions hold no definitions, and are most of the tree
            yield from _docstrings(child)


def _new_paragraphs(document: str, seen: set[str]) -> Iterator[str]:
    """Yields the document's cleaned paragraphs that are not in `seen`, and adds them to it."""
    text = inspect.cleandoc(document).translate(CONTROL_CHARACTERS).encode("utf-8", "ignore").decode()
    for paragraph in re.split(r"\n\s*\n", re.sub(r"[^\S\n]+$", "", text, flags=re.MULTILINE).strip()):
        if paragraph and paragraph not in seen:
            seen.add(paragraph)
            yield paragraph


def _pieces(paragraphs: Iterable[str]) -> Iterator[str]:
    """Joins consecutive paragraphs by blank lines into pieces of at least PIECE_CHARACTERS; the last may be shorter."""
    piece = ""
    for paragraph in paragraphs:
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
        if len(piece) >= PIECE_CHARACTERS:
            yield piece
            piece = ""
    if piece:
        yield piece
