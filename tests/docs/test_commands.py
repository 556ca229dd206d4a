"""Every shell line in README and docs/ is run, in a folder that has what it names, with options that make it small.

What trains runs in the slow tests; here its options are checked by the command's own code, up to the first step. A line
of no known kind fails, and says what to add.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro

from jaxgpt.commands import cli, configuration, train
from jaxgpt.options import command_line, settings
from jaxgpt.options.config import Config
from tests.docs import world
from tests.docs.commands import ROOT, Command, Line, commands, lines, trains

# Programs of others, which need what isn't here; what of the line is ours is checked where there is any.
ELSEWHERE = {
    "ssh": "needs another machine",
    "wandb": "sends to a service",
    "sha256sum": "tests/runs/test_checkpoints.py runs it in a checkpoint",
    "source": "of the shell: .venv is made by make",
    "pre-commit": "needs a package that nothing else does",
    "curl": "the slow test sends it to a server",
    **dict.fromkeys(("uv", "docker", "python3"), "installs, or makes an environment"),
}
# Where a line needs more than it says to end in seconds.
MORE = {
    "prepare": ["--validation-tokens", "20", "--processes", "1"],
    "generate": ["--tokens", "2"],
    "evaluate": ["--limit", "2"],
    "convert": ["--overwrite"],
    "report": ["--port", "0"],
    "serve": ["--port", "0"],
}
QUICK = {"generate", "serve", "prepare"}  # on the README, run with the quick tests
APART = {"gradcheck"}  # test_whole_commands.py runs it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        world.build(patch, path)
        yield path


@pytest.fixture(scope="module")
def weights(folder):
    """The folder with weights in others' formats in it."""
    world.weights()
    return folder


@pytest.fixture
def no_server(monkeypatch):
    """Has servers end as soon as they could begin to answer."""
    uvicorn = pytest.importorskip("uvicorn", reason="serves with uvicorn, of the serve extra")
    from jaxgpt.reports import live_report

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    # It closes all handlers, and Abseil's then closes what pytest captures with.
    monkeypatch.setattr(uvicorn.Config, "configure_logging", lambda self: None)
    monkeypatch.setattr(live_report.Server, "serve_forever", lambda self: None)


def failures(chosen: list[Line], check: Callable[[Command], None], capsys: pytest.CaptureFixture) -> list[str]:
    """The lines whose check fails, each with what was said."""
    found = []
    for line in chosen:
        for command in commands(line):
            try:
                check(command)
            except (AssertionError, SystemExit, OSError, ValueError, ImportError) as error:
                found.append(f"{line}\n    {error}\n    {capsys.readouterr().err[-600:]}")
            capsys.readouterr()
    return found


def ends_well(words: list[str]) -> None:
    try:
        status = cli.main(words)
    except SystemExit as ended:  # as --help ends
        status = ended.code
    assert status == 0, f"status {status} of run.py {shlex.join(words)}"


# Every line: its program, its options, its files


class Understood(Exception):
    """The command's own parser took the options."""


def check_options(command: Command) -> None:
    """Checks that the command takes these options, without running it."""
    match command.kind:
        case "run":
            run_no_further(command)
        case "module":
            check_module(command.words)
        case "script":
            check_script(command.words)
        case "make":
            check_make(command.words)
        case "kubectl":
            check_job(command.words)
        case "tensorboard":
            assert command.words == ["--logdir", "runs"]  # where runs are
        case "pip":
            for extra in re.findall(r"\.\[(.+?)\]", " ".join(command.words)):
                assert extra in extras()
        case program:
            assert program in ELSEWHERE, (
                f"{program} is of no kind that tests/docs/test_commands.py knows: add how it is checked to "
                "check_options, or to ELSEWHERE with the reason why it can't be"
            )


def run_no_further(command: Command) -> None:
    """The command up to its options' being read, or for a run up to the loop."""
    read = tyro.cli

    def stop(*arguments, **options):
        result = read(*arguments, **options)
        if not trains(command):
            raise Understood
        return result

    def done(config):
        raise Understood

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", stop)
        patch.setattr(train, "train", done)
        # It would ask the hub, where models have a longer context than the default configuration's.
        patch.setattr(configuration, "with_weights", lambda config, named: with_context(config, 2048))
        words = command.words
        if "--parallel.processes" in words:  # checked as options, as the others aren't there
            words = [*words, "--help"]
        with contextlib.suppress(Understood):
            ends_well(words)


def with_context(config: Config, context: int) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, context=context))


def check_module(words: list[str]) -> None:
    """Checks that there is such a module, and that it takes these options."""
    name, *rest = words
    if name == "pytest":
        for word in rest:
            assert (ROOT / word).exists(), f"there is no {word}"
        return
    if name == "jaxgpt.evaluation.lm_eval_adapter":  # its parser is lm_eval's
        assert importlib.util.find_spec(name)
        assert rest[:3] == ["run", "--model", "jaxgpt"]
        return
    found = importlib.util.find_spec(name)
    assert found is not None, f"there is no module {name}"
    assert found.origin
    own = Path(found.origin)
    paths = [own, own.with_name("measure.py")] if name.startswith("benchmarks.assistant.") else [own]
    source = "".join(path.read_text(encoding="utf-8") for path in paths)  # not imported: some bring PyTorch with them
    for word in rest:
        key = word.removeprefix("--")
        field = rf"^    {key.replace('-', '_')}: "  # as tyro makes an option of it
        known = any(f'"{option}"' in source for option in (word, key)) or re.search(field, source, re.MULTILINE)
        assert known or not word.startswith("--"), f"{name} has no option {word}"


def check_script(words: list[str]) -> None:
    script, *rest = words
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    if path.parent.name == "examples":
        return  # tests/generation/test_examples.py runs it
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", path], check=True)
        if path.name == "gpu_check.sh":
            return
        assert 'run.py "$@" --resume auto' in path.read_text()
        run_no_further(Command("run", [*rest, "--resume", "auto"]))


def check_make(words: list[str]) -> None:
    """`make -n` says what it would do; the packages that are asked for are known."""
    for word in words:
        if word.startswith("EXTRAS="):
            assert set(word.removeprefix("EXTRAS=").split()) <= extras(), word
    # `make test ARGS=...` hands its own words to every make below it.
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "ARGS")}
    command = ["make", "-n", "VENV=/nowhere/.venv", *words]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for started in re.findall(r"^/nowhere/\.venv/bin/python run\.py (.*)$", done.stdout, re.MULTILINE):
        run_no_further(Command("run", shlex.split(started)))


def check_job(words: list[str]) -> None:
    """The pods' command, in the file."""
    yaml = pytest.importorskip("yaml", reason="reads YAML with PyYAML, which huggingface-hub brings")
    assert words[:2] == ["apply", "-f"]
    (job,) = yaml.safe_load((ROOT / words[2]).read_text())["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    typed = shlex.split(container["args"][0].replace('"$PROCESS"', "0"))
    assert typed[:3] == ["exec", ".venv/bin/python", "run.py"]
    run_no_further(Command("run", typed[3:]))


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_every_line_is_one_that_its_command_takes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world.own_config()
    Path("runs/gpt2_124m").mkdir(parents=True)  # which --resume goes on with
    shutil.copy(settings.find_config("gpt2_124m"), "runs/gpt2_124m/config.toml")
    assert len(to_run()) > 60
    assert failures(to_run(), check_options, capsys) == []


def test_every_command_in_a_sentence_is_there(capsys):
    """It may be a part of one: what is said of it must be known to its --help."""

    def check(command: Command) -> None:
        if command.kind != "run":
            return check_options(command)
        name = "train" if trains(command) else command.words[0]
        assert name in cli.COMMANDS, f"there is no command {name}"
        ends_well([*([] if name == "train" else [name]), command_line.ALL])
        text = capsys.readouterr().out
        for word in command.words:
            assert not word.startswith("-") or re.search(rf"{re.escape(word.partition('=')[0])}\b", text), word

    assert failures([line for line in lines() if line.inline], check, capsys) == []


# What takes little time, run


def test_what_takes_little_time_is_run(folder, no_server, capsys, monkeypatch):
    check = runner(monkeypatch, lambda name: name in QUICK)
    assert failures([line for line in to_run() if line.page == "README.md"], check, capsys) == []


def to_run() -> list[Line]:
    """Returns the lines that stand in blocks, and whole commands within a sentence."""
    whole = re.compile(r"(printf .* \| )?python run\.py ")
    return [line for line in lines() if not line.message and (not line.inline or whole.match(line.text))]


def runner(monkeypatch: pytest.MonkeyPatch, chosen: Callable[[str], bool]) -> Callable[[Command], None]:
    """Runs what trains nothing and has one of these names."""

    def check(command: Command) -> None:
        if command.kind == "run" and not trains(command) and chosen(command.words[0]):
            run(command, monkeypatch)

    return check


def run(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = list(command.words)
    if words and words[0] == "prepare" and "--help" not in words:
        if "--verify" in words:
            return ends_well(words)
        output = words[words.index("--output") + 1] if "--output" in words else f"data/{default_output(words[1])}"
        shutil.rmtree(output, ignore_errors=True)
    if "--chat" in words:
        monkeypatch.setattr(sys, "stdin", io.StringIO(command.stdin or "To be\n"))
    if "convert" in words and "--overwrite" not in words:
        shutil.rmtree("exported", ignore_errors=True)
    name = "" if trains(command) else words[0]
    own = {"--ready-made", "--chat"} if name == "prepare" else set()  # with these it takes other options
    ends_well(words + ([] if own & {*words} else MORE.get(name, [])))


def default_output(source: str) -> str:
    return {"web/*.jsonl.zst": "web", "hf:owner/name/configuration:split": "name-configuration"}.get(source, source)


def test_a_mistake_ends_with_the_message_that_is_shown(folder, capsys, no_server):
    """The messages are those that docs/troubleshooting.md and other pages quote; `...` there stands for anything."""
    wrong = []
    for line in (line for line in lines() if line.message):
        (command,) = commands(line)
        more = ["--run.name=another"] if trains(command) and "runs/" not in line.message else []
        if trains(command) and not {"--data.text", "--config"} & set(command.words):
            more.append("--data.text=book.txt")  # the text that ships with Python takes seconds to gather
        try:
            status = cli.main([*command.words, *more])
        except SystemExit as ended:
            status = ended.code
        said = " ".join(capsys.readouterr().err.split())
        if status not in (1, 2) or not re.search(pattern(line.message), said):
            wrong.append(f"{line}\n    status {status}: {said}")
    assert wrong == []


def pattern(message: str) -> str:
    return ".*".join(re.escape(" ".join(part.split())) for part in message.split("..."))


def test_what_make_says_is_shown_as_it_says_it():
    """The messages without a command above them are the Makefile's."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    blocks = re.findall(r"(?<!^```\n\n)^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    shown = [line for block in blocks if not block.startswith("error:") for line in block.splitlines()]
    assert len(shown) >= 5
    for line in shown:
        for part in line.split("..."):
            assert part.strip(" .") in makefile


# What takes longer


@pytest.mark.slow
def test_what_trains_nothing_is_run(weights, no_server, capsys, monkeypatch):
    assert failures(to_run(), runner(monkeypatch, lambda name: name not in APART), capsys) == []


@pytest.mark.slow
def test_what_trains_is_run(weights, capsys, monkeypatch):
    done = []

    def check(command: Command) -> None:
        if not trains(command) or "--help" in command.words or "--parallel.processes" in command.words:
            return  # processes that meet are in test_whole_commands.py
        words = command.words if "--plan-for" in command.words else small(command.words)  # a plan trains nothing
        # What each option is the last time that it is given.
        same = dict(re.findall(r"(--\S+?)[ =]([^-\s]\S*|)", " ".join(words) + " "))
        if same not in done:
            done.append(same)
            run(command._replace(words=words), monkeypatch)

    pytest.importorskip("tensorboardX", reason="a line has numbers written by the trackers extra")
    pytest.importorskip("wandb", reason="a line has numbers written by the trackers extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert failures(to_run(), check, capsys) == []


def small(words: list[str]) -> list[str]:
    """A line that trains, made small; what it is about stays."""
    own = "--parallel.devices" in words
    result = [*words, *(option for option in world.SMALL if not (own and option.startswith("--parallel.devices")))]
    named = " ".join(words)
    if "--data" not in named and "fineweb" not in named and "mine.toml" not in named:
        result.append("--data.text=book.txt")
    policies = {"grpo_quickstart", "ppo_quickstart"} & {*words}
    if policies or {"sft_quickstart", "reward_quickstart", "dpo_quickstart"} & {*words}:
        result.append("--training.sequence-length=128")  # conversations are longer than 16 tokens
    if policies:
        result += ["--rollouts.tokens=4", "--rollouts.minibatches=1", "--rollouts.epochs=1"]
    if "--resume" not in words:
        result.append("--run.overwrite")
    return result


@pytest.mark.slow
def test_the_server_answers_the_line_that_asks_it(folder):
    (line,) = (line for line in lines() if line.text.startswith("curl"))
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    command = [sys.executable, ROOT / "run.py", "serve", "--run", "runs/quickstart", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
            assert found is not None
            (typed,) = commands(line)
            asked = [word.replace("http://127.0.0.1:8000", found[0]) for word in typed.words]
            done = subprocess.run([curl, "-sS", *asked], capture_output=True, text=True, timeout=120, check=True)
        finally:
            server.terminate()
    events = [event.removeprefix("data: ") for event in done.stdout.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    assert all("choices" in json.loads(event) for event in events[:-1])
