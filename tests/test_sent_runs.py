"""A run that somebody else sent is read as data: it has no code run, no other file read and none written."""

import dataclasses
import json
import os
import re
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import tomli_w

from jaxgpt import compilation_cache
from jaxgpt.commands import cli, configuration
from jaxgpt.data import fingerprint
from jaxgpt.errors import UserError
from jaxgpt.options import settings
from jaxgpt.options.config import Config, Training
from jaxgpt.reports import page, trackers
from jaxgpt.reports.history import History
from jaxgpt.reports.live_report import Report
from jaxgpt.runs import checkpoints, checksums
from tests import sent
from tests.nightly import nightly
from tests.reports import runs
from tests.sent import CHECKPOINT, MODEL, RUN

HOSTILE = {
    "run": {
        "compilation_cache": "programs",
        "folder": "elsewhere",
        "name": "../../elsewhere",
        "trackers": "wandb",
        "prompt": "x",
    },
    "parallel": {"devices": 1, "processes": 2, "process": 1, "coordinator": "203.0.113.1:1"},
    "training": {"init_from": "elsewhere", "sequence_length": 4, "steps": 10**9, "seed": 3},
    "evaluation": {"tasks": "hellaswag=/etc/passwd"},
    "checkpoint": {"every_minutes": 0.0},
    "of a newer version": {"x": 1},
}


@pytest.fixture
def run(monkeypatch, tmp_path) -> Path:
    """A run's folder, runs/sent in the current one."""
    monkeypatch.chdir(tmp_path)
    sent.lay_out(tmp_path)
    return RUN


def configure(**tables) -> None:
    """Replaces the run's config.toml."""
    whole = {"model": dataclasses.asdict(MODEL), "data": {"tokenizer": "bytes"}} | tables
    (RUN / "config.toml").write_text(tomli_w.dumps(whole))


def test_a_reader_takes_the_model_and_the_text_and_nothing_else(run):
    configure(**HOSTILE)
    config = settings.read_trained(run)
    default = Config()
    assert config.model == MODEL
    assert config.data.tokenizer == "bytes"
    assert config.training.sequence_length == 4
    for name in ("parallel", "evaluation", "optimizer", "sampling", "checkpoint", "run"):
        assert getattr(config, name) == getattr(default, name), name
    assert (config.training.init_from, config.training.seed) == ("", 0)


def test_no_folder_of_programs_is_taken_from_a_run(run, monkeypatch):
    configure(**HOSTILE)
    asked = []
    monkeypatch.setattr(compilation_cache, "use", asked.append)
    for words in (["generate", "--run", str(run), "--tokens", "1"], ["convert", str(run), "out"]):
        assert cli.main(words) == 0
    assert cli.main(["evaluate", "--run", str(run), "--data", str(run / "config.toml"), "--limit", "1"]) == 0
    assert asked == ["", ""]
    assert not Path("programs").exists()
    assert not Path("elsewhere").exists()


def test_a_config_that_was_sent_names_no_folder_of_programs_either(run, fails):
    configure(run={"compilation_cache": "programs"})
    message = fails("--config", str(run / "config.toml"))
    assert "compilation_cache in [run] is taken from the command line alone" in message
    configure(run={"compilation_cache": "off"})
    assert settings.read_defaults(run / "config.toml").run.compilation_cache == "off"


def test_evaluate_reads_the_text_of_the_run_only_where_it_is_the_same(run, fails, capsys):
    """A different file is not described, not even by its length."""
    Path("secret").write_text("my password is 1234, my password is 1234")
    configure(data={"text": "secret", "tokenizer": "bytes"}, training={"sequence_length": 2})
    assert "doesn't say on which text it was trained" in fails("evaluate", "--run", str(run))
    sent.change(text=fingerprint.of(b"my password is 0000, my password is 0000"))
    assert "not the text that the run was trained on" in fails("evaluate", "--run", str(run))
    sent.change(text=fingerprint.of(Path("secret").read_bytes()))
    assert cli.main(["evaluate", "--run", str(run)]) == 0
    assert capsys.readouterr().out.startswith("text      secret, as the run's config.toml names it\n")


def test_init_from_takes_no_paths_from_a_run(run):
    configure(**HOSTILE)
    config = configuration.with_weights(Config(training=Training(init_from=str(run))), set())
    assert config.model == MODEL
    assert config.run == Config().run


@pytest.mark.parametrize("to", ["runs/sent", "runs/sent/checkpoints", "runs/../runs/sent/x", "runs"])
def test_what_is_converted_is_not_replaced(run, fails, to):
    (Path("runs") / "config.toml").write_text("")
    before = sorted(path for path in Path("runs").rglob("*"))
    message = fails("convert", str(run), to, "--overwrite")
    assert "what is to be read" in message or "is not replaced" in message
    assert sorted(path for path in Path("runs").rglob("*")) == before


def test_files_of_any_size_may_be_asked_for(run):
    assert cli.main(["convert", str(run), "out", "--to", "huggingface", "--shard-gib", "1e300"]) == 0


# Links


def test_what_a_report_writes_is_never_written_through_a_link(run, tmp_path, monkeypatch):
    runs.write(tmp_path / "runs" / "one", steps=3)
    outside = tmp_path / "precious"
    folder = tmp_path / "runs" / "one"

    def linked(*names: str) -> None:
        outside.write_text("precious")
        for name in names:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(outside)

    linked("report.html", "report.html.tmp")
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes().startswith(b"<!doctype html>")
    assert not (folder / "report.html").is_symlink()
    linked("report.html")
    report = Report(folder)
    report.write("training")
    assert report.problem == ""
    assert outside.read_text() == "precious"


@pytest.mark.parametrize("words", [["generate", "--run", "runs/sent"], ["convert", "runs/sent", "out"]])
@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/0"])
def test_a_checkpoint_that_lies_elsewhere_is_not_read(run, fails, words, name):
    (run / name).rename("elsewhere")
    (run / name).symlink_to(Path("elsewhere").absolute())
    assert "not followed" in fails(*words)


def test_a_checkpoint_of_another_step_than_its_name_is_refused(run, fails):
    """Resuming it would delete what is newer than the step that it states, itself as well."""
    sent.change(step=5)
    assert "says that it is of step 5" in fails("generate", "--run", str(run))


def test_a_checkpoint_whose_tokenizer_is_none_is_named(run, fails):
    sent.change(tokenizer={"name": "x"})
    assert f"{sent.CHECKPOINT}: its tokenizer can't be read" in fails("generate", "--run", str(run))


@pytest.mark.parametrize(
    ("sums", "said"),
    [(b"precious\n", "line 1 of SHA256SUMS"), (b"\x0c\n", "line 1 of SHA256SUMS"), (b"\xff\n", "is not UTF-8")],
)
def test_checksums_that_are_none_are_told(run, fails, sums, said):
    (sent.CHECKPOINT / "SHA256SUMS").write_bytes(sums)
    assert said in fails("generate", "--run", str(run))


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_config_that_is_no_file_is_not_called_missing(run, fails, kind):
    (run / "config.toml").unlink()
    if kind == "pipe":
        os.mkfifo(run / "config.toml")
    else:
        (run / "config.toml").symlink_to("/dev/zero")
    assert "config.toml: a pipe" in (message := fails("generate", "--run", str(run))) or "leads out" in message


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_trackers_write_through_no_link(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link, and is not written through"):
        trackers._check_own(tmp_path / name)


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "samples.txt", "memory_plan.json", "machine.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device", "folder"])
def test_a_report_shows_nothing_from_outside_of_a_run(tmp_path, name, kind):
    folder = runs.write(tmp_path / "one", steps=3)
    (tmp_path / "secret").write_text("--- step 1\nsecret\n")
    (folder / name).unlink(missing_ok=True)
    match kind:
        case "link":
            (folder / name).symlink_to(tmp_path / "secret")
        case "pipe":
            os.mkfifo(folder / name)
        case "device":
            (folder / name).symlink_to("/dev/zero")
        case _:
            (folder / name).mkdir()
    with pytest.raises(UserError, match=re.escape(str(folder / name))):
        page.of_run(folder, History(folder / "metrics.jsonl").read_all())


# Control characters


@pytest.mark.parametrize(
    "toml",
    [
        '"\\u001b]0;owned\\u0007" = 1',
        '[model]\n"\\u001b[31m" = 1',
        '[data]\ntext = 1\n"\\u009b31m" = 2',
        '[data]\ntokenizer = "\\u001b[2J"',
    ],
)
def test_a_message_shows_control_characters_and_sends_none(run, fails, toml):
    for words in (["generate", "--run", str(run)], ["--config", str(run / "config.toml")]):
        (run / "config.toml").write_text(toml)
        message = fails(*words)
        assert not re.search("[\x00-\x1f\x7f-\x9f]", message)


def test_the_name_of_a_file_is_shown_too(run, fails, tmp_path):
    name = "\x1b[31mred\x9b"
    assert "\\x1b[31mred\\x9b" in fails("generate", "--run", name)
    assert "\\x1b[31mred\\x9b" in fails("report", name)
    assert "\\x1b[31mred\\x9b" in fails("convert", name, "out")


def test_numbers_that_no_computer_counts_to(run, fails):
    digits = "9" * 5000
    (run / "config.toml").write_text(f"[training]\nsteps = {digits}")
    together = ["--parallel.processes", "2", "--parallel.process", "0", "--parallel.coordinator", f"node1:{digits}"]
    options = [["--training.steps", digits], ["--training.steps", "9" * 30], together]
    for words in (["generate", "--run", str(run)], ["bench", "--sizes", f"{digits}x1"], *options):
        assert len(fails(*words)) < 3000
    (run / "config.toml").write_text("a = " + "[" * 10_000)
    assert "within one another" in fails("generate", "--run", str(run))
    (run / "config.toml").write_text("[" + "a." * 200 + "a]\nx = 1")
    assert "within one another" in fails("generate", "--run", str(run))


def _rewrite(form: str, key: str, change) -> None:
    """Changes one value of what the parameters' arrays are in.

    That is a folder of files in a run of converted weights, and a key-value store in one that was trained.
    """
    folder = (CHECKPOINT / "params").absolute()
    if form == "ocdbt":
        params, _ = checkpoints.load_params(RUN, MODEL)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(folder, args=ocp.args.StandardSave(params), force=True)
    place = {"base": f"file://{folder}/"} if form == "ocdbt" else {"path": f"{folder}/"}
    store = ts.KvStore.open({"driver": form} | place).result()
    store.write(key, change(store.read(key).result().value)).result()
    checksums.write(CHECKPOINT)


def _of_another(**fields):
    return lambda value: json.dumps(json.loads(value) | fields).encode()


@pytest.mark.parametrize(
    "change",
    [
        _of_another(chunks=[1 << 26, 8]),
        _of_another(chunks=[1 << 40, 8]),
        _of_another(shape=[1 << 40, 8]),
        _of_another(dtype="|S100000"),
        _of_another(dtype="<c8"),
        lambda _: b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("form", nightly(["file", "ocdbt"], every_time=["ocdbt"]))
def test_the_arrays_of_a_checkpoint_may_lie_about_themselves(run, form, change):
    """A piece of 2 GiB that kilobytes would be unpacked to isn't read, and the message is no page."""
    _rewrite(form, "embedding.token/.zarray", change)
    with pytest.raises(UserError, match="this checkpoint can't be read") as raised:
        checkpoints.load_params(RUN, MODEL)
    assert len(str(raised.value)) < 1000
