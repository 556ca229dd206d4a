"""Checks that all processes train the same run.

Otherwise they would wait for each other for ever, or compute wrong numbers.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import jaxgpt
from jaxgpt.data import fingerprint
from jaxgpt.data.corpus import Corpus
from jaxgpt.errors import UserError
from jaxgpt.options import settings
from jaxgpt.options.config import Config
from jaxgpt.parallel import processes

NAMED = 3  # files, at most, in the message about other code


def check(config: Config, data: Corpus) -> None:
    """Raises a UserError that names the difference, where process 0 has other options, text, versions or code."""
    if processes.count() == 1:
        return
    own = {
        "options": dataclasses.asdict(config),
        "text": data.fingerprint,
        "versions": settings.versions(),
        "code": sources(Path(jaxgpt.__file__).parent),
    }
    own = json.loads(json.dumps(own))  # tuples become lists, as they do on the way
    first = processes.talk.broadcast(lambda: own)
    different = [
        f"{found.option} is {found.saved} there and {found.asked} here"
        for found in settings.differences(first["options"], config)
    ]
    different += [
        f"{name} is {first['versions'].get(name)} there and {version} here"
        for name, version in own["versions"].items()
        if first["versions"].get(name) != version
    ]
    other = sorted({name for name, _ in first["code"].items() ^ own["code"].items()})
    if other:
        names = ", ".join(other[:NAMED]) + (" and more" if len(other) > NAMED else "")
        different.append(f"the code is not the same in {names}")
    change = fingerprint.difference(first["text"], own["text"])
    if change:
        different.append(f"--data.text {config.data.text} is another text: {change}")
    if different:
        raise UserError(f"process {processes.index()} is to train other than process 0: {'; '.join(different)}")


def sources(package: Path) -> dict[str, str]:
    """Returns a hash of each of the package's Python files, an editor's hidden ones excepted."""
    names = [path.relative_to(package.parent) for path in sorted(package.rglob("*.py")) if path.is_file()]
    return {
        name.as_posix(): hashlib.sha256((package.parent / name).read_bytes()).hexdigest()[:16]
        for name in names
        if not any(part.startswith(".") for part in name.parts)
    }
