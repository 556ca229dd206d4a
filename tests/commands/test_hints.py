"""The commands that the program prints as next steps work when they are typed, and runs get names of their own."""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from jaxgpt import terminal
from jaxgpt.commands import cli, train
from jaxgpt.options import settings
from jaxgpt.options.config import Config
from jaxgpt.options.objective import Objective
from jaxgpt.runs.metrics_file import read_metrics
from tests import small_run

ROOT = Path(cli.__file__).resolve().parents[2]
OPTIONS = {"training.steps": 3, "training.evaluate-every": 0, "sampling.tokens": 4, "run.report": None}
UNNAMED = [
    word
    for name, value in {**small_run.OPTIONS, **OPTIONS}.items()
    for word in ([f"--{name}", str(value)] if value is not None else ["--run.no-report"])
]


@pytest.fixture
def work(tmp_path):
    with small_run.in_folder(tmp_path) as folder:
        yield folder


def typed(line: str) -> list[str]:
    """Returns the words of a printed command behind `python run.py`."""
    assert terminal.program() == "python run.py"
    return shlex.split(line[line.index(terminal.program()) :])[2:]


def printed(capsys, *words: str) -> str:
    assert cli.main(words) == 0
    return capsys.readouterr().out


def last_command(text: str) -> list[str]:
    return typed([line for line in text.splitlines() if terminal.program() in line][-1])


@pytest.mark.slow
def test_a_run_is_named_after_its_text_and_then_numbered(work, capsys):
    Path("my book.txt").write_text(Path("text.txt").read_text())
    for name in ("quickstart-text", "quickstart-text-2", "quickstart-text-3"):
        out = printed(capsys, *UNNAMED)
        assert f"run       runs/{name}\n" in out
        assert last_command(out)[:2] == ["generate", f"runs/{name}"]
    out = printed(capsys, *UNNAMED, "--data.text", "my book.txt")
    assert "run       runs/quickstart-my_book\n" in out
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "quickstart-my_book",
        "quickstart-text",
        "quickstart-text-2",
        "quickstart-text-3",
    ]
    assert len({(Path("runs") / name / "config.toml").stat().st_ino for name in os.listdir("runs")}) == 4


def test_resume_takes_a_runs_folder_and_what_is_typed_lies_over_its_options(work, capsys):
    first = small_run.run(small_run.words(OPTIONS | {"run.report": "x"}, optimizer_learning_rate=0.01)[:-2], "a b")
    assert first.status == 0, first.errors
    assert read_metrics(first.folder / "metrics.jsonl")[-1]["step"] == 3
    printed(capsys, "--resume", "runs/a b", "--training.steps", "5", "--optimizer.schedule", "cosine")
    assert read_metrics(first.folder / "metrics.jsonl")[-1]["step"] == 5
    assert "nothing to train: its 5 steps are done, and --training.steps" in printed(capsys, "--resume", "runs/a b")
    config = settings.read(first.folder / "config.toml")
    assert (config.optimizer.learning_rate, config.model.width, config.training.steps) == (0.01, 16, 5)
    assert (config.run.name, config.run.resume, config.data.text) == ("a b", "always", "text.txt")


def test_resume_passes_over_what_a_config_says_of_programs_and_trackers(work):
    folder = Path("runs/theirs")
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        '[run]\nname = "x"\nfolder = "/etc"\ntrackers = "wandb"\ncompilation_cache = "/tmp/evil"\noverwrite = true\n'
        '[parallel]\nprocesses = 2\nprocess = 1\ncoordinator = "evil:1"\n[model]\nwidth = 64\n'
    )
    found = settings.read_resumed(folder)
    assert found.run == type(found.run)(name="theirs", folder="runs", resume="always")
    assert found.parallel == type(found.parallel)()
    assert found.model.width == 64


@pytest.mark.parametrize(
    ("reward", "kept"),
    [("evil.py:f", ""), ("/tmp/evil.py:f", ""), ("program:sh -c evil", ""), ("exact:Answer: ", "exact:Answer: ")],
)
def test_a_run_that_goes_on_names_no_program_that_rewards_it(tmp_path, reward, kept):
    (tmp_path / "config.toml").write_text(f'[objective]\nname = "policy"\nreward = "{reward}"\n')
    assert settings.read_resumed(tmp_path).objective.reward == kept
    asked = Config(objective=Objective(name="policy", reward=reward))
    assert train._typed_anew(asked) == ([] if kept else ["--objective.reward", reward])


def test_what_training_preparing_and_converting_print_next(work, capsys):
    out = printed(capsys, *UNNAMED, "--run.name", "it's a run")
    generate = last_command(out)
    assert printed(capsys, *generate, "--tokens", "3").startswith(generate[-1])
    assert 1 <= len(generate[-1].split()) <= 3
    converted = printed(capsys, "convert", "runs/it's a run", "hf folder")
    assert printed(capsys, *last_command(converted), *UNNAMED, "--run.name", "from_hf")
    back = printed(capsys, "convert", "hf folder", "runs/back again")
    begin, also = back[back.index(terminal.program()) :].split(", or ")
    assert printed(capsys, *typed(begin), "--tokens", "3", "--prompt", "the")
    assert printed(capsys, *typed(also), *UNNAMED, "--run.name", "from_run")
    prepared = printed(capsys, "prepare", "text.txt", "--tokenizer", "bytes", "--output", "some data")
    of_bytes = [word for word in UNNAMED if word != "characters"]
    of_bytes.remove("--data.tokenizer")
    at = of_bytes.index("--data.text")
    assert printed(capsys, *last_command(prepared), *of_bytes[:at], *of_bytes[at + 2 :], "--run.name", "prepared")


@pytest.mark.slow
def test_a_stopped_run_says_last_how_it_goes_on(work, capsys):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(ROOT / "run.py"), *UNNAMED, "--training.steps", "1000000"]
    metrics = Path("runs/quickstart-text/metrics.jsonl")
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environment, "text": True}
    with subprocess.Popen(command, **options) as run:
        deadline = time.monotonic() + 300
        while run.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and '"step": 3,' in metrics.read_text():
                break
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=300)
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    line = errors.splitlines()[-1]
    going_on = line[line.index("To go on: ") + len("To go on: ") :]
    assert going_on.endswith("run.py --resume runs/quickstart-text")
    again = subprocess.run(
        f"{going_on} --training.steps {step + 2}",
        shell=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0, again.stderr
    assert read_metrics(metrics)[-1]["step"] == step + 2


@pytest.mark.parametrize("folder", ["plain", "with space's"])
def test_printed_commands_begin_as_this_one_was_typed(tmp_path, folder):
    """The command names the Python and the run.py of a clone in another folder, and works in a shell."""
    there = tmp_path / folder
    there.mkdir()
    (there / "run.py").symlink_to(ROOT / "run.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"env": environment, "capture_output": True, "text": True, "cwd": tmp_path}
    failed = subprocess.run([sys.executable, f"{folder}/run.py", "trian"], **options)
    assert failed.returncode == 2
    command = failed.stderr[failed.stderr.index("see ") + len("see ") :]
    helped = subprocess.run(command, shell=True, **options)
    assert helped.returncode == 0, helped.stderr
    assert helped.stdout.startswith(f"usage: {command.removesuffix(' --help').strip().removesuffix(' --help')}")


@pytest.mark.parametrize(
    ("argv0", "begin"), [("/somewhere/bin/jaxgpt", "/somewhere/bin/jaxgpt"), ("pytest", "python run.py")]
)
def test_the_program_of_other_entries(monkeypatch, argv0, begin):
    monkeypatch.setattr(sys, "argv", [argv0])
    assert terminal.program() == begin
    assert terminal.command("generate", "a b", Path("c")) == f"{begin} generate 'a b' c"


def test_a_python_without_the_packages_is_told_what_to_type(tmp_path):
    """Outside of the environment the program prints one line and no traceback."""
    (tmp_path / "run.py").write_bytes((ROOT / "run.py").read_bytes())
    command = [sys.executable, "-S", "-E", "run.py", "--data.text", "my book.txt"]
    bare = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert bare.returncode == 2
    assert bare.stdout == ""
    (line,) = bare.stderr.splitlines()
    assert line.startswith("error: this Python (")
    assert line.endswith("Type: make -C . env && .venv/bin/python run.py --data.text 'my book.txt'")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    bare = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert bare.stderr.endswith("Type: .venv/bin/python run.py --data.text 'my book.txt'\n")


def test_a_python_with_a_package_that_is_too_old_is_told_so(tmp_path):
    (tmp_path / "jax-0.4.30.dist-info").mkdir()
    (tmp_path / "jax-0.4.30.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.4.30\n")
    command, environment = [sys.executable, str(ROOT / "run.py"), "--help"], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "has jax 0.4.30, older than 0.10.2. Type: " in line


def test_what_is_needed_is_what_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = [re.split(">=|,", requirement) for requirement in project["dependencies"]]
    assert {name: least for name, least, _ in ranges} == runpy.run_path(str(ROOT / "run.py"))["NEEDED"]


def test_a_run_is_named_by_a_word_or_by_an_option(work, capsys):
    assert small_run.run(small_run.words(OPTIONS | {"run.report": "x"})[:-2], "a").status == 0
    drawn = [printed(capsys, "generate", *words, "--tokens", "5") for words in (["runs/a"], ["--run", "runs/a"])]
    assert drawn[0] == drawn[1]
    losses = [
        printed(capsys, "evaluate", *words, "--limit", "1").split("(")[0] for words in (["runs/a"], ["--run", "runs/a"])
    ]
    assert losses[0] == losses[1]
    for words in (["runs/a"], ["--run", "runs/a"]):
        assert "report  runs/a/report.html" in printed(capsys, "report", *words)
