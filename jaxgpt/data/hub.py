"""Lists and downloads the files of data sets on the Hugging Face hub.

Downloads are kept in huggingface_hub's cache ($HF_HOME), and an unfinished one goes on where it stopped. A file is
accepted only with the size and the SHA-256 that the hub states for it.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.data.unpacking import extra
from jaxgpt.errors import UserError
from jaxgpt.files import open_file
from jaxgpt.foreign_text import shown

CONVERTED = "refs/convert/parquet"  # the branch on which the hub keeps a Parquet copy of data in other formats


class Remote(NamedTuple):
    repository: str
    revision: str  # a commit
    name: str
    size: int
    sha256: str  # empty where the hub doesn't state it, as for small files


def files(repository: str, revision: str = "main") -> list[Remote]:
    """Returns all files of a data set, sorted by name. UserError where the hub fails, or has no such data set."""
    library = extra("huggingface_hub")
    interface = library.HfApi()
    try:
        commit = interface.dataset_info(repository, revision=revision).sha
        entries = interface.list_repo_tree(repository, repo_type="dataset", revision=commit, recursive=True)
        found = [entry for entry in entries if hasattr(entry, "size")]  # others are folders
    except _errors(library) as error:
        raise UserError(f"cannot read the data set {repository} on the Hugging Face hub: {first_line(error)}") from None
    found.sort(key=lambda entry: entry.path)
    about = [(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else "") for entry in found]
    return [Remote(repository, commit, *fields) for fields in about]


def download(repository: str, name: str, revision: str = "main", *, kind: str = "dataset", folder: str = "") -> Path:
    """Downloads a file, unless it is here already, and returns its path: in `folder`, or else in the hub's cache.

    UserError where it can't be downloaded.
    """
    library = extra("huggingface_hub")
    put = {"repo_type": kind, "revision": revision, "local_dir": folder or None}
    try:
        return Path(library.hf_hub_download(repository, name, **put))
    except _errors(library) as error:
        raise UserError(
            f"cannot download {name} of {repository} from the Hugging Face hub: {first_line(error)}; the same command "
            "goes on where it stopped"
        ) from None


def fetch(remote: Remote, folder: str = "") -> Path:
    """Downloads a file and checks its size and SHA-256. Deletes it and raises a UserError where they are wrong."""
    path = download(remote.repository, remote.name, remote.revision, folder=folder)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.file_digest(file, "sha256").hexdigest() if remote.sha256 else ""  # type: ignore[arg-type]
    if size != remote.size or digest != remote.sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)  # in the cache, the path is a link to the file deleted above
        raise UserError(
            f"{path} was damaged on its way: it has {size:,} bytes and SHA-256 {digest or 'unknown'}, and the hub says "
            f"{remote.size:,} and {remote.sha256 or 'nothing'}. It is deleted; the same command downloads it again"
        )
    return path


def _errors(library: Any) -> tuple[type[Exception], ...]:
    """Returns the exceptions that a request to the hub can raise."""
    of_http = library.errors.HfHubHTTPError.__bases__  # the base of its HTTP library's errors, whichever that is
    return (*of_http, library.errors.HFValidationError, OSError, ValueError)


def first_line(error: Exception) -> str:
    """Returns the first line of a message that may have many."""
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0])
