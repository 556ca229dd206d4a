"""The small trained model that notebooks 1 and 5 look into. Notebook 1 makes it; this loads it, or makes it likewise."""

import dataclasses
import subprocess
import sys
from pathlib import Path

from jaxgpt import settings
from jaxgpt.config import Config
from jaxgpt.data import tokenizers
from jaxgpt.models import gpt2
from jaxgpt.training import checkpoints

RUN = Path("../runs/notebooks")
COMMAND = (
    "../run.py --config quickstart --training.steps 300 --training.evaluate-every 100 --training.evaluation-batches 20 "
    f"--sampling.tokens 120 --run.folder {RUN.parent} --run.name {RUN.name} --run.overwrite"
)


def load() -> tuple[gpt2.Params, Config, tokenizers.Tokenizer]:
    """Parameters, configuration and tokenizer of the run, which is trained first if it isn't there."""
    if not checkpoints.whole_steps(RUN / "checkpoints"):
        subprocess.run([sys.executable, *COMMAND.split()], check=True, stdout=subprocess.DEVNULL)
    config = settings.read(RUN / "config.toml")
    params, found = checkpoints.load_params(RUN, config.model)
    tokenizer = tokenizers.from_state(found.about["tokenizer"])
    model = dataclasses.replace(config.model, vocabulary_size=tokenizer.vocabulary_size)
    return params, dataclasses.replace(config, model=model), tokenizer
