"""The small trained model of notebooks 1 and 5. Notebook 1 trains it; this module loads it, or trains it too."""

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.models import gpt2
from jaxgpt.options import settings
from jaxgpt.options.config import Config
from jaxgpt.runs import checkpoints

RUN = Path("../runs/notebooks")
COMMAND = (
    "run.py --config quickstart --model.family gpt2 --model.context 96 --training.batch-size 8 "
    "--training.steps 1200 --training.evaluate-every 400 "
    "--training.evaluation-batches 20 --run.prompt 'Return the' --sampling.tokens 80 "
    f"--run.folder {RUN.parent.name} --run.name {RUN.name} --run.overwrite"
)


def train() -> None:
    """Runs the command at the top of the repository, and prints its lines as they come."""
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}  # as Jupyter sets it
    command = [sys.executable, *shlex.split(COMMAND)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, cwd=RUN.parents[1], **streams) as run:  # ..: the repository
        for line in run.stdout or ():
            print(line, end="")
    if run.returncode:
        raise RuntimeError(f"training ended with status {run.returncode}; its words are above")


def load() -> tuple[gpt2.Params, Config, tokenizers.Tokenizer]:
    """Returns parameters, configuration and tokenizer of the run, which is first trained if missing or outdated."""
    try:
        params, found = checkpoints.load_params(RUN, settings.read(RUN / "config.toml").model)
    except (OSError, UserError):
        train()
        params, found = checkpoints.load_params(RUN, settings.read(RUN / "config.toml").model)
    config = settings.read(RUN / "config.toml")
    tokenizer = tokenizers.from_state(found.about["tokenizer"])
    model = dataclasses.replace(config.model, vocabulary_size=tokenizer.vocabulary_size)
    return params, dataclasses.replace(config, model=model), tokenizer
