"""Runs on comparisons, for the tests of reward models and of preferences."""

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.commands import cli
from jaxgpt.runs import checkpoints
from tests import small_run

BASE = {"model.width": 32, "model.context": 96, "data.tokenizer": "bytes", "training.evaluate-every": 0,
        "training.steps": 10, "sampling.tokens": 4, "data.text": "chats"}  # fmt: skip
GOOD, BAD = "yes", "no way"


def rows(count: int) -> list[dict[str, Any]]:
    choose = random.Random(0)
    return [{"prompt": choose.choice(small_run.WORDS), "chosen": GOOD, "rejected": BAD} for _ in range(count)]


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[Path]:
    """Makes the folder the current one, with a run of a fine-tuned model and comparisons of two answers."""
    with small_run.in_folder(folder):
        made = rows(40)
        made[7] = {"prompt": "the", "ranked": [GOOD, BAD, "nothing at all"]}
        write("pairs.jsonl", made)
        write(
            "chat.jsonl", [{"prompt": row["prompt"], "response": answer} for row in rows(20) for answer in (GOOD, BAD)]
        )
        assert cli.main(["prepare", "--chat", "chat.jsonl", "--tokenizer", "bytes", "--output", "chats"]) == 0
        finished = small_run.run(small_run.words(BASE), "sft")
        assert finished.status == 0, finished.errors
        yield folder


def train(options: dict[str, Any], name: str, *more: str, **changes: Any) -> small_run.Finished:
    """Trains in runs/NAME from the fine-tuned model; `lora_rank=4` changes an option."""
    every = {"data.text": "pairs.jsonl", "training.batch-size": 4, "training.init-from": "runs/sft"}
    return small_run.run([*small_run.words_of(every | options, **changes), *more], name)


def params(name: str) -> list[np.ndarray]:
    """The parameters of a run's newest checkpoint, a scalar head's among them."""
    found = checkpoints.find(Path("runs", name, "checkpoints"))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints._params_of(found, np.float32))]
