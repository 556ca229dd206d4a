"""`run.py evaluate` and training on tasks of every kind: GSM8K, described ones, IFEval, CORE."""

import json
from pathlib import Path

import pytest

from jaxgpt.commands import cli
from jaxgpt.data.tokenizers import Bytes
from jaxgpt.errors import UserError
from jaxgpt.evaluation import registry
from jaxgpt.options.config import Config, Evaluation, Model
from jaxgpt.parallel import processes
from tests import small_run
from tests.evaluation.task_folders import INSTRUCTED, SUMS, write_core, write_described, write_lines

TASKS = "gsm8k=gsm8k.jsonl,core=bundle,ifeval=ifeval.jsonl"
CORE = ["core/arc_easy", "core/copa", "core/winograd", "core/squad", "core/lambada_openai", "core"]
OPTIONS = {
    "model.context": 96,
    "training.sequence-length": 16,
    "data.tokenizer": "bytes",
    "training.steps": 2,
    "sampling.tokens": 1,
    "evaluation.tasks": TASKS,
    "evaluation.limit": 4,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was scored while it trained, in the current folder of these tests."""
    with small_run.in_folder(tmp_path_factory.mktemp("work")) as folder:
        write_core(folder / "bundle", examples=6)
        write_lines(folder / "gsm8k.jsonl", SUMS)
        write_lines(folder / "train.jsonl", SUMS[:5])
        write_lines(folder / "ifeval.jsonl", INSTRUCTED)
        write_described(folder)
        finished = small_run.run(small_run.words(OPTIONS), "a")
        assert finished.status == 0, finished.errors
        yield finished


def evaluated(*words: str) -> list[dict]:
    """Returns the figures that `--output` has."""
    assert cli.main(["evaluate", "--run", "runs/a", "--output", "out.json", *words]) == 0
    found = json.loads(Path("out.json").read_text())
    return found.get("results", [found])


def test_a_run_is_scored_on_all_kinds_while_it_trains(trained):
    lines = [line for line in trained.metrics if "task" in line]
    assert [(line["step"], line["task"]) for line in lines] == [
        (step, task) for step in (0, 2) for task in ("gsm8k", *CORE, "ifeval")
    ]
    assert all(line["standard_error"] >= 0 for line in lines)
    assert all(f"step 2: {task}: " in trained.printed for task in ("gsm8k", *CORE, "ifeval"))


def test_evaluate_finds_what_training_found(trained, capsys):
    last = [line for line in trained.metrics if "task" in line and line["step"] == 2 and "by" not in line]
    found = evaluated("--tasks", TASKS, "--limit", "4")
    assert found == last
    out, err = capsys.readouterr()
    assert err == ""
    assert "ifeval: accuracy " in out
    assert "1 left out, whose instructions are not checked here: language:response_language (" in out
    added = [line for line in trained.metrics if line.get("by") == "evaluate"]
    assert [{key: line[key] for key in line if key != "by"} for line in added[-len(found) :]] == found


def test_one_task_by_either_spelling(trained):
    (first,) = evaluated("--task", "gsm8k", "--data", "gsm8k.jsonl", "--limit", "3")
    (again,) = evaluated("--tasks", "gsm8k=gsm8k.jsonl", "--limit", "3")
    assert first | {"data": ""} == again
    assert (again["task"], again["examples"], again["run"]) == ("gsm8k", 3, "runs/a")


def test_shots_and_samples(trained, capsys):
    words = ["--shots", "2", "--examples", "train.jsonl", "--shots-seed", "3", "--temperature", "1", "--samples", "2"]
    (found,) = evaluated("--tasks", "gsm8k=gsm8k.jsonl", "--limit", "2", "--tokens", "4", *words)
    assert (found["shots"], found["samples"], found["shortened"]) == (2, 2, 2)
    assert "2 examples, 2 shown, 2 answers each, prompts shortened: 2" in capsys.readouterr().out


def test_a_described_task(trained):
    (found,) = evaluated("--tasks", "capitals.toml")
    assert (found["task"], found["examples"], found["accuracy_last"]) == ("capitals", 3, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "gsm8k"], "task gsm8k: no file is named. Name one of JSON lines: gsm8k=FILE"),
        (["--tasks", "core=none"], "task core: none is no folder. Name one with core.yaml in it: core=FOLDER"),
        (
            ["--tasks", "core=bundle", "--shots", "2"],
            "--shots 2: how many examples core shows is said in its core.yaml",
        ),
        (["--tasks", "gsm8k=none.jsonl"], "none.jsonl: can't be read (No such file"),
        (["--tasks", "gsm8k=capitals.jsonl"], "capitals.jsonl: line 1: question is missing. Is it a file of the task"),
        (["--tasks", "none.toml"], "none.toml: can't be read (No such file"),
        (["--tasks", "gsm7k=x"], "there is no task gsm7k; did you mean gsm8k? There are: hellaswag,"),
        (["--tasks", "gsm8k=gsm8k.jsonl,ifeval", "--data", "x"], "--data x: name each task's file behind its name"),
        (["--tasks", "gsm8k=gsm8k.jsonl", "--data", "x"], "--data x: name each task's file behind its name"),
        (["--tasks", "gsm8k=gsm8k.jsonl", "--samples", "2"], "--samples 2: of temperature 0 all would be the same"),
        (["--tasks", "gsm8k=gsm8k.jsonl", "--top-p", "0"], "--top-p is 0.0, and must be above 0"),
        (["--tasks", "gsm8k=gsm8k.jsonl", "--tokens", "-1"], "--tokens is -1, and must be 0 or more"),
        (
            ["--tasks", "core=bundle", "--temperature", "1"],
            "--temperature: for tasks whose answers are drawn, and there is none",
        ),
        (["--temperature", "1"], "--temperature: for tasks whose answers are drawn"),
    ],
)
def test_mistakes(trained, fails, words, message):
    assert message in fails("evaluate", "--run", "runs/a", *words)


def test_several_processes_draw_no_answers(trained, monkeypatch):
    """The others would wait for the one that draws. They score tasks without drawing together."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    model = Model(context=96, vocabulary_size=256)
    registry.Tasks(Config(model=model, evaluation=Evaluation(tasks="core=bundle", limit=4)), Bytes(), {})
    with pytest.raises(
        UserError, match=r"--evaluation.tasks gsm8k=gsm8k.jsonl: the answers of gsm8k are drawn, which a"
    ):
        registry.Tasks(Config(model=model, evaluation=Evaluation(tasks="gsm8k=gsm8k.jsonl")), Bytes(), {})
