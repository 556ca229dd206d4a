"""A checkpoint's description of itself: whole, older than this version, newer, and damaged in every way."""

import json
import os
import random
from pathlib import Path

import pytest

from jaxgpt.data import tokenizers
from jaxgpt.errors import UserError
from jaxgpt.options.config import Model
from jaxgpt.runs.about import check_size, model_of, read_about
from tests import sent
from tests.sent import CHECKPOINT, METADATA, MODEL, change, options, write

TEXT = {"bytes": 10, "hashes": ["ab"]}


@pytest.fixture
def metadata(monkeypatch, tmp_path) -> Path:
    """The file in which a run's only checkpoint says what it is; runs/sent is in the current folder."""
    monkeypatch.chdir(tmp_path)
    sent.lay_out(tmp_path)
    return METADATA


def test_what_an_older_version_did_not_write_has_its_default(metadata):
    write(json.dumps({"configuration": {"model": {"layers": 1, "heads": 2, "width": 8, "vocabulary_size": 9}}}))
    about = read_about(CHECKPOINT)
    assert model_of(about) == Model(layers=1, heads=2, width=8, vocabulary_size=9)
    assert about == {
        "step": 0,
        "configuration": {"model": {"layers": 1, "heads": 2, "width": 8, "vocabulary_size": 9}},
        "tokenizer": {},
        "template": {},
        "versions": {},
        "sequences_per_step": 8,
        "text": {},
        "lengths": {},
        "base": {},
        "best": {},
        "kept": {},
        "converted_from": "",
    }


def test_what_this_version_wrote_comes_back(metadata):
    about = read_about(CHECKPOINT)
    assert model_of(about) == MODEL
    assert about["converted_from"] == "elsewhere"
    assert about["tokenizer"] == {"name": "bytes"}
    assert about["configuration"]["optimizer"]["beta2"] == 0.95


def test_an_option_of_a_newer_version_is_named_with_the_version(metadata):
    change(configuration=options(model={"branches": 8}), versions={"jaxgpt": "9.8"})
    with pytest.raises(
        UserError, match=r"unknown key branches in \[model\].* It was written by jaxgpt 9\.8, and this is"
    ):
        read_about(CHECKPOINT)


def test_an_option_that_changed_nothing_of_what_was_trained_is_passed_over(metadata):
    change(configuration=options(run={"colour": "red"}, sampling={"tokens": 7, "min_q": 0.5}))
    configuration = read_about(CHECKPOINT)["configuration"]
    assert configuration["sampling"]["tokens"] == 7
    assert "min_q" not in configuration["sampling"]
    assert "colour" not in configuration["run"]


WRONG = [
    ({"configuration": None}, "configuration"),
    ({"configuration": {"model": []}}, "configuration"),
    ({"configuration": {"training": {}}}, "model"),
    ({"configuration": {"modle": {}, "model": {}}}, "modle"),
    ({"configuration": {"model": {"layers": "many"}}}, "layers in [model] is 'many'"),
    ({"configuration": {"model": {"layers": True}}}, "layers in [model] is True"),
    ({"configuration": {"model": {"layers": 10**19}}}, "layers"),
    ({"configuration": {"model": {"heads": 0}}}, "heads is 0"),
    ({"configuration": {"model": {"heads": 5, "vocabulary_size": 9}}}, "divisible"),
    ({"configuration": {"model": {}}}, "vocabulary-size is 0"),
    ({"configuration": {"model": {"layers": [[1]]}}}, "layers"),
    ({"step": "5"}, "step"),
    ({"step": -1}, "step"),
    ({"step": 1e9}, "step"),
    ({"tokenizer": "bytes"}, "tokenizer"),
    ({"versions": {"jax": 3}}, "versions"),
    ({"versions": []}, "versions"),
    ({"sequences_per_step": 2**40}, "sequences_per_step"),
    ({"text": []}, "text"),
    ({"text": {"bytes": 1}}, "text"),
    ({"text": {"files": {"a": 3}}}, "text"),
    ({"text": {"files": {"a": TEXT | {"hashes": [1]}}}}, "text"),
    ({"text": {"quotas": [1, 2], "sources": [TEXT]}}, "text"),
    ({"text": {"quotas": [1], "sources": [{"quotas": [], "sources": []}]}}, "text"),
    ({"lengths": {"metrics.jsonl": -3}}, "lengths"),
    ({"lengths": {"metrics.jsonl": "all"}}, "lengths"),
    ({"lengths": {"metrics.jsonl": 2**64 - 1}}, "lengths"),
    ({"best": []}, "best"),
    ({"best": {"step": 3, "loss": 2.0, "since": 1}}, "best"),
    ({"best": {"step": 3, "loss": "low", "since": 1, "evaluated": 4}}, "best"),
    ({"best": {"step": -3, "loss": 2.0, "since": 1, "evaluated": 4}}, "best"),
    ({"converted_from": 7}, "converted_from"),
]


@pytest.mark.parametrize(("fields", "named"), WRONG)
def test_a_wrong_field_is_named(metadata, fields, named):
    change(**fields)
    with pytest.raises(UserError) as error:
        read_about(CHECKPOINT)
    assert str(error.value).startswith(f"{metadata}: ")
    assert named in str(error.value)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", "[" * 10**5, '{"a":' * 10**5, '{"step": ' + "9" * 5000 + "}", "\x00"]
)
def test_what_is_no_object_is_named(metadata, content):
    write(content)
    with pytest.raises(UserError, match=f"^{metadata}: "):
        read_about(CHECKPOINT)


def test_only_a_regular_file_within_the_checkpoint_is_read(metadata, tmp_path):
    (tmp_path / "elsewhere").write_bytes(metadata.read_bytes())
    metadata.unlink()
    metadata.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="by a link, and is not followed"):
        read_about(CHECKPOINT)
    metadata.unlink()
    os.mkfifo(metadata)
    with pytest.raises(UserError, match="a pipe, where a file is expected"):
        read_about(CHECKPOINT)


def test_parameters_that_the_files_cannot_hold_are_not_made_room_for(metadata):
    change(configuration=options(model={"layers": 10**6, "width": 2048}))
    with pytest.raises(UserError, match="on the disk, and about/metadata says that they are 201,"):
        check_size(CHECKPOINT, read_about(CHECKPOINT))


VALUES = [None, True, -1, 0, 2**63, 1e400, "", "x\x1b[31m", [], {}, [[[]]], {"a": {"b": 1}}, "../../x"]


def test_whatever_it_says_a_user_error_is_the_only_one(metadata):
    """Fields and fields of fields replaced at random."""
    choose = random.Random(0)
    whole = json.loads(metadata.read_text()) | {"text": {"files": {"a": TEXT}}, "lengths": {"samples.txt": 3}}
    ended = []
    for _ in range(2000):
        values = json.loads(json.dumps(whole))
        for _ in range(choose.randrange(1, 3)):
            table = values
            while isinstance(table, dict) and table and choose.random() < 0.7:
                name = choose.choice(sorted(table))
                if choose.random() < 0.4 or not isinstance(table[name], dict):
                    table[name] = choose.choice(VALUES)
                    break
                table = table[name]
        metadata.write_text(json.dumps(values))
        try:
            about = read_about(CHECKPOINT)
            tokenizers.from_state(about["tokenizer"])
            ended.append(model_of(about).layers > 0)
        except UserError as error:
            ended.append(str(error))
    assert len({*ended}) > 20


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--run", "runs/sent", "--tokens", "1"],
        ["evaluate", "--run", "runs/sent"],
        ["convert", "runs/sent", "out"],
        ["--init-from", "runs/sent", "--run.name", "new"],
        ["--init-from", str(CHECKPOINT), "--run.name", "new"],
        ["--run.name", "sent", "--resume", "--training.steps", "5", "--data.tokenizer", "bytes"],
    ],
)
def test_every_command_says_so_in_one_message(metadata, fails, words):
    change(configuration=options(model={"width": "\x1b[31mwide"}))
    message = fails(*words)
    assert message.startswith(f"error: {metadata}: width in [model] is '\\x1b[31mwide'")
