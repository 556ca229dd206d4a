"""Suggestions for an option that doesn't exist: mistyped, without its section, or as another program calls it."""

import difflib
import re
from collections.abc import Iterable, Sequence

# Names that nanoGPT, llm.c and papers use, each with our option's name or the last part of it.
OTHERS = {
    "lr": "learning-rate",
    "min-lr": "final-fraction",
    "learning-rate-decay-frac": "final-fraction",
    "wd": "weight-decay",
    "eps": "epsilon",
    "grad-clip": "clip-norm",
    "n-layer": "model.layers",
    "n-head": "heads",
    "n-embd": "width",
    "d-model": "width",
    "block-size": "context",
    "seq-len": "sequence-length",
    "max-iters": "training.steps",
    "max-steps": "training.steps",
    "num-iterations": "training.steps",
    "gradient-accumulation-steps": "micro-batches",
    "eval-interval": "evaluate-every",
    "val-loss-every": "evaluate-every",
    "eval-iters": "evaluation-batches",
    "dataset": "data.text",
    "input-bin": "data.text",
    "out-dir": "folder",
    "output-dir": "folder",
    "zero-stage": "zero",
    "max-new-tokens": "tokens",
    "num-samples": "samples",
    "start": "prompt",
}
ABSENT = {
    "dropout": "the model has no dropout",
    "device": "JAX takes the accelerator that it finds, and with JAX_PLATFORMS=cpu before the command the CPU",
    "compile": "everything is compiled",
}
MOST = 3  # options in a suggestion
ALIKE, BEGINNING, SHORTEST = 0.6, 0.9, 3  # of 1: the least likeness; that of the same first letters; how many of them


def nearest(word: str, names: Iterable[str]) -> str:
    """Returns '; did you mean X?' where one of the names is close to the word, and otherwise '.'"""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "."


def no_such_option(word: str, known: Sequence[str], command: str) -> str:
    """Returns the message about an option that doesn't exist, with those that may have been meant."""
    said = f"{word}: there is no such option"
    if why := ABSENT.get(_plain(word)):
        return f"{said}: {why}"
    if found := meant(word, known):
        return f"{said}; did you mean {' or '.join(f'--{name}' for name in found)}?"
    return f"{said}; python {command} --help lists all"


def meant(word: str, known: Sequence[str]) -> list[str]:
    """Returns the known options ("section.key", or "key") that `word` may stand for."""
    section, _, key = (name := _plain(word)).rpartition(".")
    found = []
    if other := OTHERS.get(key):
        found = [option for option in known if other in (option, _last(option))]
    found = found or [option for option in known if _last(option) == key]
    if not found:
        score = {option: _likeness(name, key, option) for option in known}
        best = max(score.values(), default=0.0)
        found = [option for option in known if score[option] == best >= ALIKE]
    same = [option for option in found if section and option.startswith(f"{section}.")]
    return (same or found)[:MOST]


def _plain(word: str) -> str:
    """Returns an option without the dashes before it, in the form of our names: run.no-report for no-run.report."""
    return re.sub(r"^no-(\w+)\.", r"\1.no-", word.lstrip("-").replace("_", "-").lower())


def _last(option: str) -> str:
    return option.rpartition(".")[2]


def _likeness(name: str, key: str, option: str) -> float:
    """Returns how alike the last parts or the whole names are, from 0 to 1; a dash may have been typed for the dot."""
    last = _last(option)
    pairs = [(key, last), (name.replace(".", "-"), option.replace(".", "-"))]
    ratios = [difflib.SequenceMatcher(None, typed, ours).ratio() for typed, ours in pairs]
    return max(*ratios, BEGINNING if len(key) >= SHORTEST and last.startswith(key) else 0.0)
