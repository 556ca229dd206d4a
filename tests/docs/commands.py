"""The shell lines of README and docs/, and what each of them is: which of our commands with which options.

A line in a ```sh block is one to type; a command within a sentence may be a part of one, and is marked `inline`. Where
a ```text block that begins with "error:" follows a ```sh block, the block's last line is to end with that message.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
READMES = ["README.md", "CONTRIBUTING.md", "notebooks/README.md", "scripts/examples/README.md"]
PAGES = [*map(ROOT.joinpath, READMES), *sorted(ROOT.glob("docs/*.md"))]

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$(?:\n+^```text\n(error:.*?)^```$)?", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
PROGRAMS = {
    *("python", ".venv/bin/python", "run.py", "make", "sbatch", "kubectl", "mpirun", "curl", "tensorboard", "pip"),
    *("ssh", "wandb", "printf", "sha256sum", "source", "pre-commit", "uv", "docker", "python3"),
}
# In the place of what stands for something of the reader's.
EXAMPLES = {"FOLDER": "data/notes", "MODEL": "runs/quickstart", "FROM": "runs/quickstart", "TO": "exported", "N": "2"}


class Line(NamedTuple):
    page: str
    number: int
    text: str
    inline: bool = False
    message: str = ""  # what it is to end with

    def __str__(self) -> str:
        return f"{self.page}:{self.number}: {self.text}"


def lines() -> list[Line]:
    return [line for page in PAGES for line in lines_of(page)]


def lines_of(page: Path) -> Iterator[Line]:
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    for match in BLOCK.finditer(text):
        if match[1] == "sh":
            first = text.count("\n", 0, match.start()) + 2
            typed = list(_joined(match[2], first))
            for number, line in typed:
                message = match[3] if match[3] and number == typed[-1][0] else ""
                yield Line(name, number, line, message=message or "")
    outside = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    for match in QUOTED.finditer(outside):
        quoted = " ".join(match[1].split()).replace("\\|", "|")
        word = quoted.partition(" ")[0]
        if " " in quoted and (word in PROGRAMS or word.startswith("scripts/")):
            yield Line(name, outside.count("\n", 0, match.start()) + 1, quoted, inline=True)


def _joined(block: str, first: int) -> Iterator[tuple[int, str]]:
    """(number, line), a line that ends with a backslash together with the next."""
    waiting, began = "", first
    for number, line in enumerate(block.splitlines(), first):
        began = began if waiting else number
        waiting += line
        if waiting.endswith("\\"):
            waiting = waiting[:-1]
        else:
            if words(waiting):
                yield began, waiting
            waiting = ""


def words(text: str) -> list[str]:
    """Splits a line as a shell does, without the comment."""
    return [EXAMPLES.get(word, word) for word in shlex.split(text, comments=True)]


class Command(NamedTuple):
    kind: str  # "run", "module", "make", "script", or another program's name
    words: list[str]
    stdin: str = ""


def commands(line: Line) -> Iterator[Command]:
    """Yields the commands that a line starts, one after another."""
    for part in re.split(r"\s&&\s", line.text):
        left, bar, right = part.rpartition(" | ")
        written = words(left)
        stdin = written[1].encode().decode("unicode_escape") if written[:1] == ["printf"] else ""
        typed = words(right if bar and stdin else part.partition(" | ")[0])
        while typed and re.fullmatch(r"[A-Z_]+=.*", typed[0]):
            typed.pop(0)
        yield _command(typed, stdin)


def _command(typed: list[str], stdin: str) -> Command:
    match typed:
        case ["python" | ".venv/bin/python", "run.py", *rest] | ["run.py", *rest]:
            return Command("run", rest, stdin)
        case ["python" | ".venv/bin/python", "-m", *rest]:
            return Command("module", rest)
        case ["python" | ".venv/bin/python", script, *rest]:
            return Command("script", [script, *rest])
        case ["sbatch", script, *rest]:
            return Command("script", [script, *rest])
        case ["mpirun", *rest] if ".venv/bin/python" in rest:
            return _command(rest[rest.index(".venv/bin/python") :], stdin)
        case [script, *rest] if script.startswith("scripts/"):
            return Command("script", [script, *rest])
        case [program, *rest]:
            return Command(program, rest)
    raise AssertionError(f"nothing is started by {typed}")


def trains(command: Command) -> bool:
    return command.kind == "run" and (not command.words or command.words[0].startswith("-"))
