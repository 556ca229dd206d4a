"""The repository's address, which this project names nowhere: a fork's site then leads to the fork.

JAXGPT_REPOSITORY says it ("none" for none), or else the clone's origin, where that is an address at a hosting site.
"""

import functools
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "JAXGPT_REPOSITORY"

_HOST = r"(?P<host>(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,})"
_PATH = r"(?P<path>\w[\w.-]*(?:/\w[\w.-]*)+)"  # owner and name; GitLab has groups in groups
_USER = r"(?:[^@/\s]*@)?"
# ssh's port is none of the page's. In git@HOST:OWNER/NAME, as scp writes it, no port can stand.
_FORMS = (
    rf"https://{_USER}{_HOST}(?P<port>:\d+)?/{_PATH}",
    rf"http://{_USER}{_HOST}/{_PATH}",
    rf"ssh://{_USER}(?:ssh\.)?{_HOST}(?::\d+)?/{_PATH}",
    rf"{_USER}{_HOST}:{_PATH}",
)
# How a host names the page of a file, where it isn't GitHub's way.
_FILES = {"gitlab.com": "-/blob/main", "bitbucket.org": "src/main", "codeberg.org": "src/branch/main"}


def page_of(remote: str) -> str | None:
    """Returns https://HOST/OWNER/NAME of a remote's address, without user and password, or None where it is no such."""
    for form in _FORMS:
        if found := re.fullmatch(form, remote.strip().rstrip("/"), re.ASCII | re.IGNORECASE):
            port = found.groupdict().get("port") or ""
            return f"https://{found['host'].lower()}{port}/{found['path'].removesuffix('.git')}"
    return None


@functools.cache
def address() -> str | None:
    said = os.environ.get(VARIABLE, "")
    if said == "none":
        return None
    if said:
        if page := page_of(said):
            return page
        raise SystemExit(f"{VARIABLE} must be https://HOST/OWNER/NAME, or none, and is no such address")
    if not (ROOT / ".git").exists():
        return None  # an archive; a clone that it was unpacked in isn't its own
    command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    try:
        return page_of(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    except OSError:
        return None  # no git


def file_page(repository: str, name: str) -> str:
    """Returns the address of a file of the repository, as its host shows it."""
    host = repository.split("/")[2]
    return f"{repository}/{_FILES.get(host, 'blob/main')}/{name}"


def colab(repository: str, name: str) -> str:
    """Returns Markdown that opens a notebook in Colab, with what it needs there; empty where Colab can't read it."""
    host, _, path = repository.removeprefix("https://").partition("/")
    if host != "github.com" or path.count("/") != 1:
        return ""
    folder = path.partition("/")[2]
    return (
        f"[Open in Colab](https://colab.research.google.com/github/{path}/blob/main/{name}), and run there first, in a "
        f"cell of its own:\n\n```text\n!git clone --depth 1 {repository} && pip install -q ./{folder}\n"
        f"%cd {folder}/notebooks\n```\n"
    )
