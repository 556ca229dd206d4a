"""`run.py generate`: text from a run's newest whole checkpoint, streamed to the terminal as `printable` has it."""

import sys
from pathlib import Path

from jaxgpt import compilation_cache, settings
from jaxgpt.config import Sampling
from jaxgpt.data import loader, tokenizers
from jaxgpt.errors import UserError
from jaxgpt.generation import sampling
from jaxgpt.training import checkpoints
from jaxgpt.training.display import printable


def generate(run: Path, prompt: str, samples: int, seed: int, options: Sampling) -> None:
    """Prints `samples` texts that begin with `prompt`. UserError for options, run or checkpoint."""
    settings.check_number(samples, "", "samples", positive=True)
    settings.check_number(seed, "", "seed")
    settings.check_sampling(options, "")
    if not (run / "config.toml").is_file():
        raise UserError(f"--run {run}: not a run's folder (it has no config.toml){_known_runs(run)}")
    config = settings.read(run / "config.toml")
    settings.check(config)
    compilation_cache.use(config.run.compilation_cache)
    params, found = checkpoints.load_params(run, config.model)
    for message in found.damaged:
        print(message, file=sys.stderr)
    tokenizer = tokenizers.from_state(found.about.get("tokenizer", {}))
    tokens = tokenizer.encode(prompt)
    if not len(tokens):
        raise UserError("--prompt is empty: give the text at least one character to begin with")
    loader.check_vocabulary(tokens, config.model.vocabulary_size, "--prompt")
    model = sampling.only_known_tokens(config.model, tokenizer)
    for number in range(samples):
        if samples > 1:
            print(f"--- sample {number + 1}")
        sys.stdout.write(printable(prompt))
        decode = tokenizer.stream_decoder()
        for token in sampling.generate(params, tokens, options, seed + number, model, config.compute):
            sys.stdout.write(printable(decode(token)))
            sys.stdout.flush()
        print(decode.finish())


def _known_runs(run: Path) -> str:
    names = sorted(path.parent.name for path in run.parent.glob("*/config.toml"))
    return f". In {run.parent} there are: {', '.join(names)}" if names else ""
