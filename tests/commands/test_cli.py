"""The commands on run folders: files they leave alone, text that generate prints, and exit statuses."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.commands import cli, train
from jaxgpt.data import tokenizers
from jaxgpt.generation.batching import Piece
from jaxgpt.options import settings
from jaxgpt.options.config import Checkpoint, Config, Data, Model, Run, Training
from jaxgpt.runs import checksums
from jaxgpt.runs.saving import Writer
from jaxgpt.training.state import TrainState, init_state
from tests.small_run import TINY

pytestmark = pytest.mark.usefixtures("work")

MODEL = Model(layers=1, heads=2, width=8, context=16, vocabulary_size=256)
ESCAPE = 27


def zeros(configuration: Config) -> TrainState:
    """A train state of zeros, which needs no program to be compiled."""
    shapes = jax.eval_shape(lambda: init_state(configuration))
    state = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes._replace(key=None))
    return state._replace(key=jax.random.key(0))


def save(run: Path, configuration: Config, state: TrainState, tokenizer: dict[str, Any]) -> None:
    """A run's folder with this one checkpoint."""
    run.mkdir()
    settings.write(configuration, run / "config.toml")
    with Writer(run / "checkpoints", Checkpoint()) as writer:
        writer.save_and_wait(state, {"configuration": dataclasses.asdict(configuration), "tokenizer": tokenizer})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved run without training: a model of bytes whose likeliest next token is always an ESC."""
    run = tmp_path_factory.mktemp("saved") / "escapes"
    configuration = Config(
        model=MODEL, data=Data(tokenizer="bytes"), training=Training(sequence_length=16), run=Run(name="escapes")
    )
    state = zeros(configuration)
    params = state.params._replace(
        embedding=state.params.embedding._replace(token=state.params.embedding.token.at[ESCAPE].set(1.0)),
        final_norm=state.params.final_norm._replace(bias=jnp.ones(MODEL.width)),
    )
    save(run, configuration, state._replace(params=params), {"name": "bytes"})
    return run


@pytest.fixture
def run(saved, work):
    """A copy of the saved run, runs/escapes."""
    return Path(shutil.copytree(saved, work / "runs" / "escapes")).relative_to(work)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Run folders


def test_a_run_that_exists_is_left_as_it_is(fails, run):
    before = contents(run)
    message = fails(*TINY, "--run.name", "escapes")
    assert message.startswith("error: runs/escapes exists and is left as it is.")
    assert "--run.name" in message
    assert "--run.overwrite" in message
    assert contents(run) == before


def test_resume_and_overwrite_exclude_each_other(fails, run):
    before = contents(run)
    message = fails(*TINY, "--run.name", "escapes", "--run.overwrite", "--resume")
    assert message.startswith("error: --run.overwrite is True, and must be left away with --resume")
    assert contents(run) == before


@pytest.mark.parametrize(
    ("words", "resume"),
    [
        ([], "never"),
        (["--resume"], "always"),
        (["--resume", "--run.note", "x"], "always"),
        (["--run.note", "x", "--resume"], "always"),
        (["--resume", "auto"], "auto"),
        (["--resume=auto"], "auto"),
        (["--run.resume", "auto"], "auto"),
        (["--resume", "never"], "never"),
    ],
)
def test_resume_as_it_is_typed(monkeypatch, words, resume):
    configs = []
    monkeypatch.setattr(train, "train", configs.append)
    assert cli.main(words) == 0
    assert configs[0].run.resume == resume


def test_resume_with_another_word(fails):
    assert "invalid choice 'x' for argument '--run.resume'" in fails("--run.resume", "x")


@pytest.mark.parametrize("words", [["--run.name", "gone"], ["--run.name", "empty"]])
def test_resume_without_anything_to_resume(fails, work, words):
    (work / "runs" / "empty").mkdir(parents=True)
    message = fails(*TINY, *words, "--resume")
    assert "there is no checkpoint to resume from. --resume auto begins anew where there is none" in message
    assert not (work / "runs" / "gone").exists()


def test_overwrite_replaces_it(run, monkeypatch):
    """Its checkpoint is gone when training starts."""
    monkeypatch.setattr(train, "_run", lambda *_: None)
    assert cli.main([*TINY, "--run.name", "escapes", "--run.overwrite"]) == 0
    assert {path.name for path in run.iterdir()} == {
        "config.toml", "start.txt", "metrics.jsonl", "memory_plan.json", "machine.json", "report.html"
    }  # fmt: skip


def test_overwrite_with_another_mistake_leaves_it_as_it_is(fails, run):
    before = contents(run)
    for mistake in ("--data.text=gone.txt", "--model.width=7", "--run.prompt=é", "--data.validation-fraction=0.001"):
        fails(*TINY, "--data.tokenizer=characters", "--run.name", "escapes", "--run.overwrite", mistake)
    assert contents(run) == before


def test_overwrite_spares_a_folder_that_is_no_run(fails, work):
    (work / "runs" / "thesis").mkdir(parents=True)
    (work / "runs" / "thesis" / "chapter1.tex").write_text("precious")
    before = contents(work)
    assert "runs/thesis is not a run's folder" in fails(*TINY, "--run.name", "thesis", "--run.overwrite")
    assert contents(work) == before


@pytest.mark.parametrize("folder", ["text.txt", "text.txt/below", "/proc"])
def test_a_folder_that_cannot_be_written(fails, folder):
    message = fails(*TINY, "--run.folder", folder)
    assert message.startswith(f"error: {folder}/quickstart-text: can't write there (")
    assert message.endswith("Choose another folder with --run.folder")


# generate


def test_generate_prints_the_prompt_and_what_follows(run, capsys):
    """An ESC, which could command the terminal, is escaped, in the prompt too."""
    assert cli.main(["generate", "--run", str(run), "--prompt", "a\x1b[1mb\n\tc", "--tokens=3", "--temperature=0"]) == 0
    assert capsys.readouterr().out == "a\\x1b[1mb\n\tc\\x1b\\x1b\\x1b\n"


def test_generate_prints_each_token_as_it_comes(run, capsys, monkeypatch):
    seen = []

    def pieces(*args):
        for letter in "xyz":
            seen.append(capsys.readouterr().out)
            yield Piece(0, letter, letter == "z")

    monkeypatch.setattr("jaxgpt.commands.search.pieces", pieces)
    assert cli.main(["generate", "--run", str(run), "--prompt", "a"]) == 0
    assert seen == ["a", "x", "y"]
    assert capsys.readouterr().out == "z\n"


def test_samples_differ_and_the_seed_repeats_them(run, capsys):
    def draw(*words: str) -> list[str]:
        command = ["generate", "--run", str(run), "--prompt", "a", "--tokens=20", "--temperature=100", *words]
        assert cli.main(command) == 0
        return re.split(r"^--- sample \d\n", capsys.readouterr().out, flags=re.MULTILINE)

    _, one, two, three = draw("--samples=3", "--seed=5")
    assert len({one, two, three}) == 3
    assert draw("--seed=5") == [one]
    assert draw("--seed=6") == [two]


def test_texts_drawn_side_by_side_are_printed_one_after_another(run, capsys, monkeypatch):
    """Pieces of the first text that is not complete are printed as they come; pieces of later texts wait."""
    drawn = [Piece(2, "c", True), Piece(0, "a", False), Piece(1, "b", False), Piece(0, "A", True), Piece(1, "B", True)]
    monkeypatch.setattr("jaxgpt.commands.search.pieces", lambda *args: iter(drawn))
    (run / "prompts").write_text("two\nthree\n")
    assert cli.main(["generate", "--run", str(run), "--prompt", "one", "--prompts", str(run / "prompts")]) == 0
    assert capsys.readouterr().out == "--- prompt 1\noneaA\n--- prompt 2\ntwobB\n--- prompt 3\nthreec\n"


def test_generate_stops_before_a_stop_text(run, capsys):
    command = ["generate", "--run", str(run), "--prompt", "a", "--prompt", "b", "--tokens=9", "--temperature=0"]
    assert cli.main([*command, "--stop", "x", "\x1b\x1b"]) == 0
    assert capsys.readouterr().out == "--- prompt 1\na\n--- prompt 2\nb\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "--temperature is -1.0, and must be 0 or more"),
        (["--temperature", "nan"], "--temperature is nan, and must be 0 or more"),
        (["--temperature", "inf"], "--temperature is inf, and must be finite"),
        (["--top-p", "0"], "--top-p is 0.0, and must be above 0 and at most 1"),
        (["--top-p", "1.5"], "--top-p is 1.5, and must be above 0 and at most 1"),
        (["--top-k", "-1"], "--top-k is -1, and must be 0 or more"),
        (["--tokens", "-1"], "--tokens is -1, and must be 0 or more"),
        (["--samples", "0"], "--samples is 0, and must be greater than 0"),
        (["--seed", "-1"], "--seed is -1, and must be 0 or more"),
        (["--seed", "2147483648"], "--seed is 2147483648, and must be at most 2147483647"),
        (["--prompt", ""], "--prompt is empty"),
        (["--min-p", "2"], "--min-p is 2.0, and must be at least 0 and at most 1"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0.0, and must be greater than 0"),
        (["--stop", ""], "--stop is an empty text, and must be text of at least one character"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: can't be read (No such file or directory)"),
        (["--samples", "2", "--seed", "2147483647"], "--seed is 2147483648, and must be at most 2147483647"),
    ],
)
def test_generate_with_an_option_out_of_range(fails, run, words, message):
    assert fails("generate", "--run", str(run), *words).startswith(f"error: {message}")


def test_special_tokens_and_empty_prompts_begin_a_document(work, monkeypatch):
    """The tokenizer has an end of text as token 256, behind the 256 bytes."""
    configuration = Config(model=dataclasses.replace(MODEL, vocabulary_size=257), run=Run(name="special"))
    state = tokenizers.TrainedBytePairs([bytes([i]) for i in range(256)]).state()
    save(work / "special", configuration, zeros(configuration), state)
    asked = []
    monkeypatch.setattr(
        "jaxgpt.commands.search.pieces", lambda model, requests, *rest: asked.extend(requests) or iter(())
    )
    words = ["generate", "--run", "special", "--prompt", "<|endoftext|>a", "--prompt", ""]
    assert cli.main([*words, "--special"]) == 0
    assert cli.main(words) == 0
    prompts = [request.prompt.tolist() for request in asked]
    assert prompts == [[256, ord("a")], [256], list(b"<|endoftext|>a"), [256]]


def test_generate_on_what_is_no_run(fails, run):
    """The runs that there are beside it are named."""
    message = fails("generate", "--run", "runs/escape")
    assert message == (
        "error: --run runs/escape: not a run's folder (it has no config.toml). In runs there are: escapes"
    )
    assert "--run runs/gone/x: not a run's folder" in fails("generate", "--run", "runs/gone/x")


def test_generate_with_a_character_that_the_model_does_not_know(fails, work):
    configuration = Config(model=dataclasses.replace(MODEL, vocabulary_size=3), run=Run(name="letters"))
    save(work / "letters", configuration, zeros(configuration), {"name": "characters", "characters": "abc"})
    message = fails("generate", "--run", "letters", "--prompt", "abcd")
    assert message.startswith("error: the character 'd' (U+0064) at position 3 is unknown to this tokenizer")


def test_generate_from_a_checkpoint_of_another_model(fails, run):
    path = run / "config.toml"
    path.write_text(path.read_text().replace("width = 8", "width = 16"))
    message = fails("generate", "--run", str(run))
    assert "runs/escapes/checkpoints/0: a checkpoint of another model than the run's config.toml describes" in message
    assert message.endswith(": width is 8 there and 16 here")


def test_generate_from_a_config_that_somebody_broke(fails, run):
    path = run / "config.toml"
    path.write_text(path.read_text().replace("attention_block = 256", "attention_block = 0"))
    assert "--compute.attention-block is 0, and must be greater than 0" in fails("generate", "--run", str(run))
    path.write_text("[model]\nwidth = ")
    assert "runs/escapes/config.toml: not a TOML file" in fails("generate", "--run", str(run))


def test_generate_without_a_checkpoint(fails, run):
    shutil.rmtree(run / "checkpoints")
    message = fails("generate", "--run", str(run))
    assert message.startswith("error: runs/escapes/checkpoints: there is no whole checkpoint (has the run")


def test_generate_from_a_damaged_checkpoint(fails, run):
    parameters = [path for path in (run / "checkpoints" / "0" / "params").rglob("*") if path.is_file()]
    os.truncate(max(parameters, key=lambda path: path.stat().st_size), 10)
    message = fails("generate", "--run", str(run))
    assert message.startswith("error: runs/escapes/checkpoints/0: this checkpoint is not whole (params/")


def test_generate_uses_the_checkpoint_before_a_damaged_one_and_says_so(run, capsys):
    shutil.copytree(run / "checkpoints" / "0", run / "checkpoints" / "7")
    (run / "checkpoints" / "7" / "params" / "_METADATA").unlink()
    assert cli.main(["generate", "--run", str(run), "--prompt", "a", "--tokens=1", "--temperature=0"]) == 0
    out, err = capsys.readouterr()
    assert out == "a\\x1b\n"
    assert err == (
        "runs/escapes/checkpoints/7: this checkpoint is not whole (params/_METADATA is missing); the one before it is "
        "used\n"
    )


@pytest.mark.parametrize("about", ["{}", "[]", '{"configuration": 3}', "{"])
def test_generate_from_a_checkpoint_that_says_nothing_of_itself(fails, run, about):
    """The checksums are right, as they would be if another program had written the checkpoint."""
    (run / "checkpoints" / "0" / "about" / "metadata").write_text(about)
    checksums.write(run / "checkpoints" / "0")
    assert fails("generate", "--run", str(run)).startswith("error: runs/escapes/checkpoints/0/about/metadata: ")


def test_generate_without_a_tokenizer_in_the_checkpoint(fails, run):
    path = run / "checkpoints" / "0" / "about" / "metadata"
    about = json.loads(path.read_text())
    about["tokenizer"] = {"nome": about["tokenizer"]["name"]}
    path.write_text(json.dumps(about))
    checksums.write(run / "checkpoints" / "0")
    assert "the saved tokenizer is damaged" in fails("generate", "--run", str(run))


# Ends that are no mistakes


def test_ctrl_c_is_an_interrupt_and_no_error(capsys, run, monkeypatch):
    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        yield Piece(0, "", True)

    monkeypatch.setattr("jaxgpt.commands.search.pieces", interrupted)
    assert cli.main(["generate", "--run", str(run), "--prompt", "a"]) == 130
    assert capsys.readouterr().err == "\nstopped with Ctrl-C\n"


def entry(*words: str, **options) -> subprocess.Popen:
    command = [sys.executable, Path(cli.__file__).resolve().parents[2] / "run.py", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)


def test_a_reader_that_leaves_is_no_error():
    """The reader leaves as in `python run.py --help | head -1`."""
    with entry("--help", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_entry_has_the_status_of_the_command():
    with entry("trian") as process:
        assert process.stderr is not None
        assert process.stderr.read().startswith(b"error: trian: there is no such command")
    assert process.returncode == 2


def test_a_terminal_without_unicode_is_no_error(run, monkeypatch, capsysbinary):
    """Characters that it can't show are printed as escapes."""
    monkeypatch.setattr("jaxgpt.commands.search.pieces", lambda *args: iter([Piece(0, "é", True)]))
    terminal: Any = sys.stdout
    terminal.reconfigure(encoding="ascii")
    assert cli.main(["generate", "--run", str(run), "--prompt", "a"]) == 0
    assert capsysbinary.readouterr().out == b"a\\xe9\n"
