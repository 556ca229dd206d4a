"""Sources of text: files, folders, patterns, data sets by name, and any data set of the Hugging Face hub.

notes.txt   notes/   'notes/*.jsonl.zst'   tinystories   hf:owner/name   hf:owner/name/configuration:split
"""

import collections
import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from jaxgpt.data import corpora, hub
from jaxgpt.data.documents import kind_of, unpacked_name
from jaxgpt.data.manifest import Split
from jaxgpt.errors import UserError, reason
from jaxgpt.files import open_file
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.options.command_line import nearest
from jaxgpt.terminal import say

HUB = "hf:"
SHARD_TOKENS = 100_000_000
# What files of other kinds are, by their suffixes, and what makes text of them.
OTHER_KINDS: dict[str, str] = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".gif", ".svg", ".webp", ".tif", ".tiff", ".bmp"), "pictures"),
    **dict.fromkeys((".mp3", ".wav", ".flac", ".ogg", ".mp4", ".mov", ".mkv"), "sound or film"),
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx", ".ods"), "tables: write each row as a line of JSON"),
    **dict.fromkeys(
        (".htm", ".html", ".xml", ".tex", ".rst"), "markup, which would be learned too: name them to take it"
    ),
    **dict.fromkeys((".doc", ".docx", ".odt", ".rtf", ".epub", ".pptx"), "not plain text: save them as .txt"),
    ".pdf": "not plain text: pdftotext makes it of them",
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "archives: unpack them"),
    **dict.fromkeys(
        (".py", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs", ".sh"), "code: name them to take it"
    ),
}


def data_folder() -> Path:
    """Returns the folder of the data sets: $JAXGPT_DATA, or data/ in the current folder."""
    return Path(os.environ.get("JAXGPT_DATA") or "data")


class DataSet(NamedTuple):
    """A data set that is known by name."""

    about: str
    source: str
    separator: str = ""  # between documents, in a text file
    validation: str = ""  # a source; empty: the first tokens of `source` are for validation
    validation_tokens: int = 0  # how many of them; 0: as many as `prepare` chooses
    ready_made: str = ""  # a repository on the hub that has these data as token files of GPT-2's tokenizer


def _fineweb(about: str, which: str, ready_made: str = "") -> DataSet:
    source = f"hf:HuggingFaceFW/fineweb{which}"
    return DataSet(about, source, validation_tokens=SHARD_TOKENS, ready_made=ready_made)


DATA_SETS = {
    "tinyshakespeare": DataSet("1 MB of plays", "tinyshakespeare", separator="\n\n", validation_tokens=32_768),
    "tinystories": DataSet(
        "2 GB of children's stories",
        "hf:roneneldan/TinyStories:train",
        validation="hf:roneneldan/TinyStories:validation",
    ),
    "openwebtext": DataSet("40 GB of web pages", "hf:Skylion007/openwebtext"),
    "fineweb-10B": _fineweb("10 billion tokens of web pages", "/sample/10BT", "kjj0/fineweb10B-gpt2"),
    "fineweb-100B": _fineweb("100 billion tokens of web pages", "/sample/100BT"),
    "fineweb-edu-10B": _fineweb("10 billion tokens of educational pages", "-edu/sample/10BT"),
    "fineweb-edu-100B": _fineweb(
        "100 billion tokens of educational pages", "-edu/sample/100BT", "karpathy/fineweb-edu-100B-gpt2-token-shards"
    ),
}


def split_of(path: Path) -> Split:
    """Returns the split that a token file is for by its name, as llm.c and its users name them."""
    return "val" if re.search(r"(^|[_.-])val(id|idation)?([_.-]|$)", path.name) else "train"


class File(NamedTuple):
    name: str  # for people, and to recognise the file on the next start
    size: int  # bytes
    modified: int  # nanoseconds since 1970; 0 on the hub, where a commit never changes
    place: Path | hub.Remote

    def here(self) -> Path:
        """Returns the file's path; a file on the hub is downloaded first."""
        return self.place if isinstance(self.place, Path) else hub.fetch(self.place)


def find(sources: tuple[str, ...]) -> list[File]:
    """Returns the sorted files of each source, in the order of the sources. UserError for a source without files."""
    return [file for source in sources for file in _files(source)]


def _files(source: str) -> list[File]:
    if source.startswith(HUB):
        found = _on_the_hub(source)
        return [File(f"{HUB}{file.repository}/{file.name}@{file.revision}", file.size, 0, file) for file in found]
    if source == "tinyshakespeare":
        return [_local(corpora.tinyshakespeare()[0])]
    path = Path(source)
    try:
        if path.is_dir():
            return [_local(p) for p in _in_folder(path)]
        if path.exists() and not path.is_file():
            raise UserError(
                f"{shown(source)} is a pipe or a device, which can be read once at most, and a preparation that goes "
                "on after an interruption reads it again: write it to a file first, and name that"
            )
        found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(source, recursive=True))
        found = [p for p in found if p.is_file()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {quoted(source)}: {reason(error)}") from None
    if not found:
        hint = nearest(source, [name for name in DATA_SETS if name != source])
        raise UserError(
            f"there is no file, folder or data set {quoted(source)}{hint} Data sets: {', '.join(DATA_SETS)}, and "
            f"{HUB}owner/name for any on the Hugging Face hub"
        )
    return [_local(p) for p in found]


def _in_folder(folder: Path) -> list[Path]:
    """Returns the files of text in a folder and its subfolders, sorted; prints what is read, and what isn't and why.

    Hidden files and folders, such as .git, are left out. So are links: their targets may lie in the folder as well, or
    belong to somebody else.

    UserError where a folder can't be read, or there are no files of text.
    """
    found, links, others, hidden = [], [], [], []
    for place, folders, names in os.walk(folder, onerror=_raise):
        here = Path(place)
        links += [here / name for name in folders if not name.startswith(".") and (here / name).is_symlink()]
        hidden += [here / name for name in (*folders, *names) if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # os.walk doesn't follow links
        for path in (here / name for name in names if not name.startswith(".")):
            (links if path.is_symlink() else found if kind_of(path) else others).append(path)
    passed_over = [_some(group, about) for about, group in _by_reason(others).items()]
    passed_over += [_some(links, "links")] if links else []
    passed_over += [_some(hidden, "hidden")] if hidden else []
    if not found:
        raise UserError(
            f"{shown(folder)} has no files that end in .txt, .md, .json, .jsonl or .parquet, or these and .gz, .bz2, "
            f".xz, .zst{'; it has ' + ' and '.join(passed_over) if passed_over else ''}. Files are also named by a "
            "pattern, such as 'notes/*.log'"
        )
    counts = collections.Counter(unpacked_name(path).suffix.lower() for path in found)
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(counts.items()))
    say(f"{shown(folder)}: {len(found):,} file{'s' * (len(found) > 1)} read ({kinds})", error=True)
    for line in passed_over:
        say(f"{shown(folder)}: passed over: {line}", error=True)
    return sorted(found)


def _by_reason(paths: list[Path]) -> dict[str, list[Path]]:
    """Groups files of other kinds by what they are."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        suffix = path.suffix.lower()
        about = (
            f"{suffix} ({OTHER_KINDS[suffix]})"
            if suffix in OTHER_KINDS
            else "of no known kind of text (name them to prepare them)"
        )
        found.setdefault(about, []).append(path)
    return found


def _raise(error: OSError) -> None:
    """Raises a UserError for a folder that `os.walk` can't read, and so stops it."""
    raise UserError(
        f"cannot read {shown(str(error.filename))}: {error.strerror}. Let it be read, or name the files beside it"
    )


def _some(paths: list[Path], what: str) -> str:
    """Describes files by their number and the names of the first three."""
    names = ", ".join(shown(path, 60) for path in sorted(paths)[:3])
    return f"{len(paths):,} {what}: {names}{', ...' if len(paths) > 3 else ''}"


def _local(path: Path) -> File:
    with open_file(path) as file:  # an unreadable file is reported here, and not after an hour
        status = os.fstat(file.fileno())
    return File(str(path), status.st_size, status.st_mtime_ns, path)


def _on_the_hub(source: str) -> list[hub.Remote]:
    """Returns the files of `hf:owner/name[/folder][:split]`: Parquet or JSON lines, else the hub's own Parquet copy."""
    rest, _, split = source.removeprefix(HUB).partition(":")
    owner, _, rest = rest.partition("/")
    name, _, folder = rest.partition("/")
    if not owner or not name:
        raise UserError(f"{shown(source)}: give {HUB}owner/name, {HUB}owner/name/folder or {HUB}owner/name:split")
    repository, split = f"{owner}/{name}", split or "train"
    for revision in ("main", hub.CONVERTED):
        inside = [r for r in hub.files(repository, revision) if not folder or r.name.startswith(f"{folder}/")]
        for pattern in ("*.parquet", "*.jsonl*"):
            found = [r for r in inside if fnmatch.fnmatch(r.name, pattern)]
            of_split = [r for r in found if split in r.name.removeprefix(folder)]
            if of_split or (found and split == "train"):  # no file is named for the split: all are for training
                return of_split or found
    where = f" in {folder}" if folder else ""
    raise UserError(
        f"{shown(source)}: {shown(repository)} has no Parquet or JSON lines files{shown(where)} for the split {split}"
    )


def here(files: Sequence[File]) -> Iterator[Path]:
    """Yields each file's path. Files on the hub are downloaded, each while the one before it is read."""
    with ThreadPoolExecutor(1) as executor:
        following: Future[Path] | None = None
        for i, file in enumerate(files):
            path = following.result() if following else file.here()
            following = executor.submit(files[i + 1].here) if i + 1 < len(files) else None
            yield path
