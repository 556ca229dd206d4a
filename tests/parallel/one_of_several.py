"""`run.py`, and at its end the windows of the training text that were read, in reads.PROCESS.json.

Run as a script by `test_processes.py`.
"""

import json
import sys
from pathlib import Path

import numpy as np

from jaxgpt.commands import cli, configuration
from jaxgpt.parallel import processes


class Recorded:
    """A text's tokens, and where they were read."""

    def __init__(self, tokens: np.ndarray):
        self.tokens, self.reads = tokens, []

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> np.ndarray:
        self.reads.append((part.start, part.stop))
        return self.tokens[part]


def main() -> int:
    load, recorded = configuration.complete, []

    def recording(config, own=None):
        data, config = load(config, own)
        recorded.append(Recorded(data.train))
        return data._replace(train=recorded[0]), config

    configuration.complete = recording
    status = cli.main(sys.argv[1:])
    Path(f"reads.{processes.index()}.json").write_text(json.dumps(recorded[0].reads))
    return status


if __name__ == "__main__":
    sys.exit(main())
