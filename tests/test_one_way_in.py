"""Files from outside are opened, parsed and shown in one way, by `files.py`, `foreign_text.py` and `terminal.py`.

Every module's syntax tree is read for other ways. What is allowed is listed with the reason why it can't be a file
that somebody sent.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import jaxgpt

PACKAGE = Path(jaxgpt.__file__).parent

METHODS = {"open", "fdopen", "read_text", "read_bytes"}
CALLS = {
    "open",
    "safe_open",
    "load_file",
    "ParquetFile",
    *(f"np.{name}" for name in ("memmap", "fromfile", "load", "loadtxt", "genfromtxt")),
    *(f"json.{name}" for name in ("load", "loads", "JSONDecoder")),
    *(f"tomllib.{name}" for name in ("load", "loads")),
    *(f"{module}.{name}" for module in ("pickle", "marshal", "shelve", "yaml") for name in ("load", "loads", "open")),
    *(f"{module}.{name}" for module in ("csv", "zipfile", "tarfile") for name in ("reader", "ZipFile", "TarFile")),
    *("gzip.GzipFile", "bz2.BZ2File", "lzma.LZMAFile", "linecache.getlines", "fileinput.input", "os.fdopen"),
    "ast.literal_eval",
    "eval",
    "exec",
}
WRITING = {"w", "wb", "a", "ab", "x", "xb"}

ALLOWED = {
    ("files.py", "os.open"): "the one way",
    ("files.py", "os.fdopen"): "the one way",
    ("foreign_text.py", "json.loads"): "the one way",
    ("foreign_text.py", "tomllib.loads"): "the one way",
    ("foreign_text.py", "yaml.load"): "the one way",
    ("terminal.py", "open"): "/dev/null",
    ("terminal.py", "os.open"): "/dev/null",
    ("compilation_cache.py", "os.open"): "a file of its own, to see that it can be written",
    ("compilation_cache.py", "read_bytes"): "a time in the user's own folder, in which nobody else can write",
    ("commands/display.py", "os.open"): "/dev/null, to write to",
    ("data/parquet.py", "library.ParquetFile"): "a file that `files.py` has opened",
    ("data/jinja_process.py", "json.loads"): "what its parent process has just written",
    ("data/progress.py", "json.loads"): "what this process has just written itself",
    ("data/corpora.py", "read_bytes"): "Python's own library and this file",
    ("data/token_files.py", "np.memmap"): "a file that `files.py` has opened",
    ("data/unpacking.py", "gzip.GzipFile"): "a file that `files.py` has opened",
    ("evaluation/sandbox.py", "os.open"): "/dev/null, to write to",
    ("evaluation/sandbox.py", "json.loads"): "what its parent process has just written",
    ("evaluation/task_files.py", "csv.reader"): "a text that `files.py` has read",
    (
        "interop/safetensors_files.py",
        "safe_open",
    ): "a file that `files.py` has found to be one, whose header was checked",
    ("interop/llmc.py", "np.memmap"): "a file that `files.py` has opened",
    ("layers/numerics.py", "read_text"): "the system's /proc/cpuinfo",
    ("training/device_memory.py", "read_text"): "the system's /proc and /sys",
    ("commands/configuration.py", "read_bytes"): "the package's own sources",
    ("data/fingerprint.py", "np.memmap"): "a file that `files.py` has opened",
    ("commands/configuration.py", "json.loads"): "what this process has just written itself",
    ("parallel/processes.py", "json.loads"): "what the run's other processes say, which are its own",
    ("reports/page.py", "read_text"): "the package's own page",
    ("generation/page.py", "read_bytes"): "the package's own page",
    ("reports/page.py", "read_bytes"): "the script in plotly's package",
    ("writing.py", "os.open"): "to flush to the disk what was just written",
}
PRINTS = {("terminal.py", "print"): "the one way"}


def test_every_file_from_outside_is_opened_and_parsed_in_one_way():
    found = {(name, call) for name, tree in modules() for call in openings(tree)}
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set(), "no longer needed"


def test_everything_is_printed_in_one_way():
    found = {(name, "print") for name, tree in modules() if "print" in set(calls(tree))}
    assert found == PRINTS.keys()


def test_other_ways_are_found():
    source = """
import numpy as np, gzip
from jaxgpt.data import token_files
def f(path):
    open(path); path.open("rb"); path.read_text(); np.memmap(path); gzip.open(path); token_files.tokens_of(path)
    path.open("w"); open(path, mode="w")
"""
    assert sorted(openings(ast.parse(source))) == ["gzip.open", "np.memmap", "open", "open", "read_text"]


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.AST) -> Iterator[str]:
    """Yields the names of called functions: "open", "np.memmap", and "path.read_text" as well as "read_text"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def openings(tree: ast.Module) -> Iterator[str]:
    """The calls that open or parse something, but for those of the package's own functions and for writing."""
    ours, theirs = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxgpt"):
            ours |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            theirs |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or is_writing(node):
            continue
        name = ast.unparse(node.func)
        base, _, last = name.rpartition(".")
        if base in ours:
            continue
        if name in CALLS or last in CALLS - {"open"}:
            yield name
        elif base and last in METHODS:
            yield name if base in theirs else last


def is_writing(node: ast.Call) -> bool:
    words = [*node.args[:2], *(word.value for word in node.keywords if word.arg == "mode")]
    return any(isinstance(word, ast.Constant) and word.value in WRITING for word in words)
