"""That all processes train the same: otherwise they would wait for each other for ever, or give wrong numbers."""

import dataclasses
import json

from jaxgpt import settings
from jaxgpt.config import Config
from jaxgpt.errors import UserError
from jaxgpt.parallel import processes
from jaxgpt.training import fingerprint
from jaxgpt.training.corpus import Corpus


def check(config: Config, data: Corpus) -> None:
    """UserError, naming it, where process 0 has another option, another text or another version than this one."""
    own = {"options": dataclasses.asdict(config), "text": data.fingerprint, "versions": settings.versions()}
    own = json.loads(json.dumps(own))  # tuples become lists, as they do on the way
    first = processes.talk.from_first(lambda: own)
    different = [
        f"{found.option} is {found.saved} there and {found.asked} here"
        for found in settings.differences(first["options"], config)
    ]
    different += [
        f"{name} is {first['versions'].get(name)} there and {version} here"
        for name, version in own["versions"].items()
        if first["versions"].get(name) != version
    ]
    change = fingerprint.difference(first["text"], own["text"])
    if change:
        different.append(f"--data.text {config.data.text} is another text: {change}")
    if different:
        raise UserError(f"process {processes.index()} is to train other than process 0: {'; '.join(different)}")
