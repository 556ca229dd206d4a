"""`run.py evaluate`, and the tasks that a run is scored on while it trains."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt import writing
from jaxgpt.commands import cli, configuration
from jaxgpt.data import tokenizers
from jaxgpt.evaluation import multiple_choice
from jaxgpt.evaluation.scoring import bits_per_byte_of_one_nat, make_scorer
from jaxgpt.options import settings
from jaxgpt.parallel import mesh
from jaxgpt.runs import checkpoints, metrics_file
from jaxgpt.runs.metrics_file import read_metrics
from tests.evaluation.test_multiple_choice import ROWS, written

OPTIONS = {
    "--model.layers": "1",
    "--model.heads": "2",
    "--model.width": "8",
    "--model.context": "128",
    "--training.sequence-length": "32",
    "--data.text": "text.txt",
    "--data.tokenizer": "bytes",
    "--training.steps": "2",
    "--training.batch-size": "4",
    "--sampling.tokens": "1",
    "--run.name": "a",
    "--evaluation.tasks": "hellaswag=tasks.jsonl",
    "--evaluation.every": "1",
    "--evaluation.limit": "2",
}


def words(**more: str) -> list[str]:
    return [word for pair in (OPTIONS | more).items() for word in pair]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a trained run, runs/a, which is the current folder of these tests."""
    path = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        Path("text.txt").write_text("To be, or not to be: 谁知道 🙂.\n" * 30, encoding="utf-8")
        written(Path("tasks.jsonl"), ROWS)
        assert cli.main(words()) == 0
        yield path


def metrics() -> list[dict]:
    return read_metrics(Path("runs/a/metrics.jsonl"))


def test_a_run_is_scored_while_it_trains(work):
    lines = [line for line in metrics() if "task" in line and "by" not in line]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["task"] == "hellaswag" and line["examples"] == 2 for line in lines)
    assert all(0 <= line[key] <= 1 for line in lines for key in ("accuracy", "accuracy_norm", "accuracy_per_token"))


def test_bits_per_byte_are_the_losses_in_bits_by_the_texts_bytes(work):
    """A byte is a token here, so the bits per byte are the loss in bits."""
    lines = [line for line in metrics() if "val_loss" in line]
    assert len(lines) >= 2
    for line in lines:
        assert line["val_bits_per_byte"] == pytest.approx(line["val_loss"] / math.log(2), rel=1e-12)


def test_bytes_of_tokens_that_are_parts_of_characters():
    """All bytes of the text are counted but the first token's, and none for the end of a text."""
    tokenizer = tokenizers.GPT2()
    text = "naïve 🙂🧬 谁知道"
    tokens = tokenizer.encode(text)
    lengths = [len(tokenizer.tokens[token]) for token in tokens]
    assert sum(lengths) == len(text.encode()) > len(text)
    config = settings.read(settings.find_config("gpt2_124m"))
    nat = bits_per_byte_of_one_nat(config, np.append(tokens, tokenizer.end_of_text).astype(np.uint16), 8, tokenizer)
    assert nat == pytest.approx(len(tokens) / math.log(2) / sum(lengths[1:]))
    few = dataclasses.replace(config.training, batch_size=2, evaluation_batches=1)
    nat = bits_per_byte_of_one_nat(dataclasses.replace(config, training=few), tokens, 3, tokenizer)
    assert nat == pytest.approx(6 / math.log(2) / sum(lengths[1:7]))
    assert math.isnan(bits_per_byte_of_one_nat(config, np.array([0, tokenizer.end_of_text]), 8, tokenizer))


def test_evaluate_finds_what_training_found(work, capsys):
    """It finds the last loss and accuracy, on the whole of both, adds them to metrics.jsonl and writes them."""
    last = {key: value for line in metrics() for key, value in line.items() if "by" not in line}
    assert cli.main(["evaluate", "--run", "runs/a"]) == 0
    words = ["--task", "hellaswag", "--data", "tasks.jsonl", "--limit", "2", "--output", "out.json"]
    assert cli.main(["evaluate", "--run", "runs/a", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    loss, task = metrics()[-2:]
    assert loss["by"] == task["by"] == "evaluate"
    assert loss["step"] == task["step"] == 2
    assert loss["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert {key: task[key] for key in ("accuracy", "accuracy_norm", "accuracy_per_token", "examples")} == {
        key: last[key] for key in ("accuracy", "accuracy_norm", "accuracy_per_token", "examples")
    }
    assert f"validation loss {loss['val_loss']:.4f}, {loss['val_bits_per_byte']:.4f} bits per byte, " in out
    assert f"hellaswag: accuracy {task['accuracy']:.4f} ± {task['standard_error']:.4f}, norm " in out
    written = json.loads(Path("out.json").read_text())
    assert written == {**{key: task[key] for key in task if key != "by"}, "run": "runs/a", "data": "tasks.jsonl"}


def test_a_run_of_a_device_with_other_kernels(work, capsys):
    """Its loss, a task and text of it, by the kernels that there are here."""
    path = Path("runs/a/config.toml")
    before = path.read_text()
    changed = re.sub('(attention|kernels) = "(auto|xla)"', r'\1 = "pallas"', before)
    assert changed.count('"pallas"') == 2
    path.write_text(changed)
    try:
        assert cli.main(["evaluate", "--run", "runs/a"]) == 0
        task = ["--task", "hellaswag", "--data", "tasks.jsonl", "--limit", "2"]
        assert cli.main(["evaluate", "--run", "runs/a", *task]) == 0
        assert cli.main(["generate", "--run", "runs/a", "--tokens", "2"]) == 0
        assert cli.main(["--resume", "runs/a", "--training.steps", "3"]) == 2
        assert "pallas can't run here" in capsys.readouterr().err
    finally:
        path.write_text(before)


def test_of_another_text(work, capsys):
    """The text's loss is printed, and not added to the run's metrics."""
    before = metrics()
    Path("other.txt").write_text("be, to not")
    assert cli.main(["evaluate", "--run", "runs/a", "--data", "other.txt"]) == 0
    assert "the loss of other.txt is " in capsys.readouterr().out
    assert metrics() == before


@pytest.mark.slow
def test_several_devices_give_the_same_numbers(work, monkeypatch, capsys):
    def evaluate(devices: int) -> list[str]:
        monkeypatch.setattr(mesh, "available", lambda: devices)
        task = ["--task", "hellaswag", "--data", "tasks.jsonl", "--batch-size", "2"]
        assert cli.main(["evaluate", "--run", "runs/a"]) == 0
        assert cli.main(["evaluate", "--run", "runs/a", *task]) == 0
        return [line.rpartition(" (")[0] for line in capsys.readouterr().out.splitlines()]

    assert evaluate(2) == evaluate(1)


def test_a_run_that_is_being_trained_is_left_alone(work, capsys):
    before = metrics()
    with writing.lock(Path("runs/a"), metrics_file.TRAINING):
        assert metrics_file.add_evaluation(Path("runs/a"), {"step": 2}) == (
            "runs/a/metrics.jsonl: not added there, because the run is being trained"
        )
    assert metrics() == before


def test_resuming_keeps_what_evaluate_added(work):
    """The resumed run still ends with the lines of a run that was never stopped."""
    assert metrics_file.add_evaluation(Path("runs/a"), {"step": 2, "task": "mine", "accuracy": math.nan}) == ""
    added = [line for line in metrics() if "by" in line]
    assert added[-1] == {"step": 2, "task": "mine", "accuracy": None, "by": "evaluate"}
    assert cli.main([*words(**{"--training.steps": "3"}), "--resume"]) == 0
    assert [line for line in metrics() if "by" in line] == added
    assert [line["step"] for line in metrics() if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "runs/b"], "--run runs/b: not a run's folder (it has no config.toml). In runs there are: a"),
        (["--run", "runs/a", "--task", "helaswag"], "there is no task helaswag; did you mean hellaswag? There are:"),
        (["--run", "runs/a", "--task", "piqa", "--data", "none.jsonl"], "none.jsonl: can't be read (No such file"),
        (["--run", "runs/a", "--task", "piqa", "--data", "tasks.jsonl"], "example 1: sol1 is missing. Is it a file of"),
        (["--run", "runs/a", "--shots", "3"], "--shots 3: only a task has examples to show"),
        (["--run", "runs/a", "--task", "piqa", "--shots", "3"], "--shots 3: of the multiple-choice tasks only mmlu"),
        (["--run", "runs/a", "--batch-size", "0"], "--batch-size is 0, and must be greater than 0"),
        (["--run", "runs/a", "--devices", "99"], "and there are 8"),
        (["--run", "runs/a", "--data", "none.txt"], "there is no text 'none.txt'"),
    ],
)
def test_mistakes(work, fails, arguments, message):
    assert message in fails("evaluate", *arguments)


def test_tasks_that_cannot_be_read_leave_no_folder(work, fails):
    tasks = "hellaswag=tasks.jsonl,pika"
    message = fails(*words(**{"--evaluation.tasks": tasks, "--run.name": "b"}))
    assert message.startswith(f"error: --evaluation.tasks {tasks}: there is no task pika; did you mean piqa?")
    assert not Path("runs/b").exists()


def test_a_text_that_changed_is_not_the_validation_split(work, fails):
    text = Path("text.txt").read_text()
    try:
        Path("text.txt").write_text(text.replace("not", "now"))
        assert "not the text that the run was trained on: it differs between the byte" in fails(
            "evaluate", "--run", "runs/a"
        )
    finally:
        Path("text.txt").write_text(text)


def test_the_scores_in_training_are_those_of_the_saved_parameters(work):
    """The score is computed again from the parts that the command is made of, on all examples."""
    config = settings.read(Path("runs/a/config.toml"))
    params, found = checkpoints.load_params(Path("runs/a"), config.model)
    data, config = configuration.complete(config)
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, layers="scanned"))
    examples = multiple_choice.load("hellaswag", "tasks.jsonl", data.tokenizer, config.model, limit=2)
    result = multiple_choice.evaluate(examples, make_scorer(config, 3), jax.device_get(params))
    (line,) = [
        line for line in metrics() if line["step"] == found.about["step"] and "task" in line and "by" not in line
    ]
    assert line == {"step": found.about["step"], **result._asdict()}
