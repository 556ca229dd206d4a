"""Supervised fine-tuning from the command line: it learns, resumes, trains adapters, and answers in a chat."""

import io
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.generation import batching
from jaxgpt.interop import loading
from jaxgpt.runs import checkpoints
from tests import small_run

BASE = {"model.width": 64, "model.context": 96, "data.tokenizer": "bytes", "training.steps": 2,
        "training.evaluate-every": 0, "sampling.tokens": 4}  # fmt: skip
STEPS, SAVED = 60, 30
TUNED = {
    "config": "sft_quickstart",
    "data.text": "chats",
    "training.batch-size": 4,
    "training.steps": STEPS,
    "training.evaluate-every": 30,
    "optimizer.learning-rate": 0.02,
    "optimizer.warmup-steps": 5,
    "sampling.tokens": 24,
    "training.init-from": "runs/base",
}


def tune(name: str, *more: str, **changes) -> small_run.Finished:
    """Trains in runs/NAME; `lora_rank=4` changes an option."""
    return small_run.run([*small_run.words_of(TUNED, **changes), *more], name)


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """A base model, and 45 conversations in each of which the answer is the same."""
    with small_run.in_folder(tmp_path_factory.mktemp("work")) as folder:
        assert small_run.run(small_run.words(BASE), "base").status == 0
        rows = [{"prompt": word, "response": "Answer: yes"} for word in small_run.WORDS[:9] * 5]
        (folder / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        words = ["--tokenizer", "runs/base", "--output", "chats"]
        assert cli.main(["prepare", "--chat", "chat.jsonl", *words]) == 0
        yield folder


@pytest.fixture(scope="module")
def tuned(work) -> small_run.Finished:
    return small_run.saved_at(SAVED, tune, "tuned")


def test_the_loss_is_of_the_answers_alone_and_falls(tuned):
    """All answers are the same, so they become certain; the questions never could."""
    assert "41 conversations of chats" in tuned.printed
    assert tuned.validation[STEPS] < 0.05 < 1 < tuned.validation[0]
    assert "--- sample after training ---" in tuned.printed
    assert tuned.printed.split("--- sample after training ---")[1].strip().splitlines()[3] == "Answer: yes"
    assert "generate runs/tuned --chat" in tuned.printed.replace(f"{Path.cwd()}/", "")


def params(run: str):
    found = checkpoints.find(Path("runs", run, "checkpoints"))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints.params_of(found))]


def test_a_resumed_run_has_the_same_bits(tuned):
    shutil.copytree(tuned.folder, "runs/again")
    shutil.rmtree(f"runs/again/checkpoints/{STEPS}")
    finished = tune("again", "--resume")
    assert finished.status == 0, finished.errors
    assert f"resuming after step {SAVED}" in finished.printed
    assert all((one == other).all() for one, other in zip(params("tuned"), params("again"), strict=True))
    assert [line["loss"] for line in finished.steps] == [line["loss"] for line in tuned.steps]


def test_other_conversations_are_another_run(tuned):
    shutil.copytree(tuned.folder, "runs/other")
    shutil.copytree("chats", "changed")
    path = next(Path("changed").glob("*_train_*.marks"))
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    finished = tune("other", "--resume", data_text="changed")
    assert finished.status == 2
    assert f"the file {path.name}" in finished.errors


@pytest.mark.slow
def test_on_several_devices_it_is_the_same_up_to_rounding(tuned, monkeypatch):
    from jaxgpt.parallel import mesh

    monkeypatch.setattr(mesh, "available", lambda: 2)
    finished = tune("two", parallel_devices=2, parallel_zero=1, training_steps=3)
    assert finished.status == 0, finished.errors
    for one, other in zip(finished.steps, tuned.steps, strict=False):
        # The learning rate's schedule ends earlier; at the first steps, in its warm-up, it is the same.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_adapters_learn_it_too(tuned):
    """They learn as much as they can on a base that knows nothing: its token table is frozen."""
    finished = tune("adapters", lora_rank=4, optimizer_learning_rate=0.05, training_steps=20)
    assert finished.status == 0, finished.errors
    assert finished.validation[20] < finished.validation[0] - 0.1
    assert loading.load("runs/adapters").about["template"] == {"name": "chatml"}


def test_the_chat_answers_in_the_template(tuned, monkeypatch, capsys):
    lines = iter(["cat", "mat", "the"])
    monkeypatch.setattr(sys, "stdin", _Lines(lines))
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, None) or _end())
    capsys.readouterr()
    assert cli.main(["generate", "--run", "runs/tuned", "--chat", "--tokens", "24", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == ["Answer: yes"] * 3  # the third has no room for what was said before


class _Lines:
    def __init__(self, lines):
        self.lines = lines

    def isatty(self):
        return False


def _end():
    raise EOFError


def test_a_reset_chat_asks_as_at_the_beginning(tuned, monkeypatch, capsys):
    asked = []

    class Noted(batching.ContinuousBatch):
        def add(self, request):
            asked.append(bytes(request.prompt.tolist()).decode())
            return super().add(request)

    monkeypatch.setattr(batching, "ContinuousBatch", Noted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("at\nit\n/reset\nat\n"))
    words = ["--system", "X", "--tokens", "1", "--temperature", "0"]
    assert cli.main(["generate", "--run", "runs/tuned", "--chat", *words]) == 0
    system, assistant = "<|im_start|>system\nX<|im_end|>\n", "<|im_start|>assistant\n"
    assert asked[0] == asked[2] == f"{system}<|im_start|>user\nat<|im_end|>\n{assistant}"
    assert asked[1].endswith(f"<|im_start|>user\nit<|im_end|>\n{assistant}")


def test_evaluate_scores_the_answers_as_training_did(tuned, capsys):
    assert cli.main(["evaluate", "--run", "runs/tuned"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("validation loss"))
    loss, count = float(line.split()[2].strip(",")), int(line.split(", ")[2].split()[0])
    assert loss == pytest.approx(tuned.validation[STEPS], abs=1e-4)
    assert count == 4 * len("Answer: yes<|im_end|>")  # of four conversations


def test_a_task_is_asked_in_the_template(tuned):
    """The model answers as it was trained to; without the template it would not."""
    rows = [{"word": word, "said": "answer: YES!"} for word in small_run.WORDS[:4]]
    Path("words.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    described = 'data = "words.jsonl"\nprompt = "{word}"\nanswer = "{said}"\nmatch = "normalised"\ntokens = 24\n'
    Path("words.toml").write_text(described)
    words = ["--tasks", "words.toml", "--output", "words.out"]
    assert cli.main(["evaluate", "--run", str(tuned.folder), *words]) == 0
    found = json.loads(Path("words.out").read_text())
    assert (found["accuracy"], found["standard_error"], found["examples"]) == (1, 0, 4)


def test_a_system_message_is_for_a_chat_in_a_template(tuned, capsys):
    assert cli.main(["generate", "--run", "runs/base", "--chat", "--system", "Be brief."]) == 2
    assert "was not trained on conversations" in capsys.readouterr().err
    assert cli.main(["generate", "--run", "runs/tuned", "--system", "Be brief."]) == 2
    assert "--system begins a chat" in capsys.readouterr().err
