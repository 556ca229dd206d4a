"""`run.py prepare --chat`: token files with marks, what they are checked for, and the corpus that they are."""

import itertools
import json

import numpy as np
import pytest

from jaxgpt.commands import cli, configuration
from jaxgpt.data import chat_templates, corpus, manifest, token_files, tokenizers
from jaxgpt.data.chat_templates import Template
from jaxgpt.data.packing import BEGINS, TRAINED, Conversations
from jaxgpt.errors import UserError
from jaxgpt.options.config import IN_DATA, Config, Data, Model, Training
from tests.data import templates


def turns(number):
    return [{"role": "user", "content": f"{number} + 1?"}, {"role": "assistant", "content": f"{number + 1}"}]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with 40 conversations in chat.jsonl, which is the current one."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"messages": turns(number)}) for number in range(40)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def prepare(*words):
    assert cli.main(["prepare", "--chat", "chat.jsonl", "--tokenizer", "bytes", "--output", "out", *words]) == 0


@pytest.fixture
def fails(capsys):
    """A function that runs a command that ends with status 2, and returns its message."""

    def run(*words):
        assert cli.main(words) == 2
        return capsys.readouterr().err

    return run


def test_the_files_are_the_conversations_with_their_masks(work, capsys):
    prepare("--shard-tokens", "500")
    assert "of 40 conversations" in capsys.readouterr().out
    made = manifest.verify(work / "out")
    assert len(made.shards) == len(made.marks) > 3
    assert made.template == {"name": "chatml"}
    found = {"train": [], "val": []}
    for shard, marks_file in zip(made.shards, made.marks, strict=True):
        tokens = token_files.tokens_of(work / "out" / shard.file)
        marks = token_files.tokens_of(work / "out" / marks_file.file, marks=True)
        assert len(tokens) == len(marks) <= 500
        begins = [*np.flatnonzero(marks & BEGINS), len(marks)]
        for begin, end in itertools.pairwise(begins):
            found[shard.split].append((tokens[begin:end].tolist(), (marks[begin:end] & TRAINED != 0).tolist()))
    tokenizer = tokenizers.make("bytes", "")
    for split, numbers in (("val", range(9, 40, 10)), ("train", (n for n in range(40) if n % 10 != 9))):
        wanted = [chat_templates.encode(turns(number), Template("chatml"), tokenizer) for number in numbers]
        assert found[split] == [(one.ids.tolist(), one.mask.tolist()) for one in wanted]


def test_files_of_their_own_for_validation(work):
    (work / "val.jsonl").write_text(json.dumps({"prompt": "9 + 9?", "response": "18"}))
    prepare("--validation", "val.jsonl")
    made = manifest.read(work / "out")
    assert made.documents == 41
    assert [shard.split for shard in made.shards] == ["train", "val"]


def test_the_same_bytes_from_the_same_files(work):
    prepare()
    cli.main(["prepare", "--chat", "chat.jsonl", "--tokenizer", "bytes", "--output", "again"])
    names = {path.name for path in (work / "out").iterdir()}
    assert names == {path.name for path in (work / "again").iterdir()}
    assert all((work / "out" / name).read_bytes() == (work / "again" / name).read_bytes() for name in names)


def test_bad_lines_are_named_or_counted(work, fails, capsys):
    (work / "chat.jsonl").write_text((work / "chat.jsonl").read_text() + '{"messages": []}\n{\n')
    options = ("prepare", "--chat", "chat.jsonl", "--tokenizer", "bytes", "--output", "out")
    assert "chat.jsonl, line 41: no messages. Mend it, or have up to N bad rows left out" in fails(*options)
    assert not list((work / "out").glob("*.part"))
    assert "more than --skip-bad 1 rows are bad" in fails(*options, "--skip-bad", "1")
    prepare("--skip-bad", "2")
    assert "left out: 0 rows without text, and 2 bad ones" in capsys.readouterr().out
    assert manifest.read(work / "out").bad_rows == 2


def test_what_a_template_refuses_is_a_bad_line(work, fails):
    row = {"messages": [{"role": "user", "content": "a"}, *turns(3)]}
    (work / "chat.jsonl").write_text((work / "chat.jsonl").read_text() + json.dumps(row))
    words = ("prepare", "--chat", "chat.jsonl", "--tokenizer", "bytes", "--template", "mistral", "--output", "out")
    assert "chat.jsonl, line 41: the chat template mistral takes questions and answers in turn" in fails(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--template", "alpaca"], "--template alpaca: name one of chatml, llama3, mistral, a Hugging Face folder"),
        (["--tokenizer", "characters"], "--tokenizer characters is made of a text"),
        (["--validation-tokens", "10"], "--validation-tokens is of plain text: leave it away with --chat"),
        (["--separator", "x"], "--separator is of plain text"),
    ],
)
def test_options_that_conversations_do_not_have(work, fails, words, message):
    assert message in fails("prepare", "--chat", "chat.jsonl", "--tokenizer", "bytes", "--output", "out", *words)
    assert "--template is of conversations" in fails("prepare", "chat.jsonl", "--template", "chatml")


def test_too_few_conversations(work, fails):
    (work / "chat.jsonl").write_text(json.dumps({"messages": turns(1)}))
    message = fails("prepare", "--chat", "chat.jsonl", "--tokenizer", "bytes", "--output", "out")
    assert "1 conversations, and none of them to validate on: give at least 10" in message


def test_the_template_of_the_tokenizers_folder(work):
    pytest.importorskip("tokenizers", reason="reads a tokenizer.json")
    from tests.data import foreign_tokenizers

    folder = work / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(foreign_tokenizers.file_of(foreign_tokenizers.of_qwen))
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": templates.TRIMMED}))
    assert cli.main(["prepare", "--chat", "chat.jsonl", "--tokenizer", "model", "--output", "out"]) == 0
    wanted = {"name": "jinja", "source": templates.TRIMMED, "variables": {"eos_token": "<|im_end|>"}}
    assert manifest.read(work / "out").template == wanted
    several = [{"name": "tool", "template": "x"}, {"name": "default", "template": templates.CHATML}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    assert cli.main(["prepare", "--chat", "chat.jsonl", "--tokenizer", "model", "--output", "of_several"]) == 0
    assert manifest.read(work / "of_several").template["source"] == templates.CHATML
    (folder / "chat_template.jinja").write_text(templates.TRIMMED)  # as transformers 5 writes it
    for number, words in enumerate((["--tokenizer", "model"], ["--tokenizer", "bytes", "--template", "model"])):
        assert cli.main(["prepare", "--chat", "chat.jsonl", *words, "--output", f"of_file_{number}"]) == 0
        assert manifest.read(work / f"of_file_{number}").template == wanted
    words = ["--tokenizer", "bytes", "--template", "model/chat_template.jinja"]
    assert cli.main(["prepare", "--chat", "chat.jsonl", *words, "--output", "of_file"]) == 0
    assert manifest.read(work / "of_file").template == wanted


def options(text, **more):
    return Config(
        model=Model(layers=1, heads=2, width=8, context=160),
        data=Data(text=text, tokenizer="bytes", **more),
        training=Training(batch_size=2, sequence_length=0),
    )


def test_the_corpus_of_conversations(work):
    prepare()
    data, config = configuration.complete(options("out"))
    assert isinstance(data.train, Conversations)
    assert isinstance(data.validation, Conversations)
    assert config.model.document_start == IN_DATA
    assert data.template == {"name": "chatml"}
    assert data.tokenizer.decode(data.prompt) == "<|im_start|>user\n9 + 1?<|im_end|>\n<|im_start|>assistant\n"
    assert data.description == "36 conversations of out"
    assert [path.suffix for path in data.train.paths] == [".bin", ".marks"]
    assert len(data.fingerprint["files"]) == 4


def test_conversations_that_are_too_long_are_told(work):
    prepare()
    data, _ = configuration.complete(options("out", validation_fraction=0.1))
    assert data.notes == ()
    (work / "chat.jsonl").write_text(
        (work / "chat.jsonl").read_text() + json.dumps({"messages": turns(1) + turns(2) + turns(3)}) + "\n"
    )
    cli.main(["prepare", "--chat", "chat.jsonl", "--tokenizer", "bytes", "--output", "more"])
    data, _ = configuration.complete(options("more"))
    assert data.notes == (
        "more: 1 of 37 conversations are too long for 160 tokens and end behind their last whole answer that fits: "
        "number 37",
    )


def test_a_mixture_of_conversations_and_text(work):
    prepare()
    (work / "text.txt").write_text("to be or not to be\n" * 200)
    data, config = configuration.complete(options("", mixture="out=0.5,text.txt=0.5"))
    assert config.model.document_start == IN_DATA
    assert isinstance(data.validation, Conversations)
    with corpus.feed(data, config, 0, range(2)) as batches:
        assert batches.next().starts.shape == (1, 2, 160)
    again, config = configuration.complete(Config(model=config.model, data=Data(text="text.txt", tokenizer="bytes")))
    assert config.model.document_start == -1  # of a model that was trained on conversations, and now isn't
    assert again.template == {}
    with pytest.raises(UserError, match=r"--data.document-mask: leave it away"):
        configuration.complete(options("out", document_mask=True))


def test_a_mixture_of_two_templates(work):
    prepare()
    cli.main(["prepare", "--chat", "chat.jsonl", "--tokenizer", "bytes", "--output", "b", "--template", "llama3"])
    with pytest.raises(UserError, match="the conversations of b are in another chat template than those of out"):
        configuration.complete(options("", mixture="out=0.5,b=0.5"))


@pytest.mark.parametrize("damage", ["bytes", "length", "magic", "missing", "no marks", "swapped"])
def test_damaged_files_are_told(work, damage):
    prepare()
    made = manifest.read(work / "out")
    path = work / "out" / made.marks[0].file
    content = path.read_bytes()
    if damage == "bytes":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "length":
        path.write_bytes(content[:-10])
    elif damage == "magic":
        path.write_bytes((work / "out" / made.shards[0].file).read_bytes())
    elif damage == "missing":
        path.unlink()
    elif damage == "no marks":
        fields = json.loads((work / "out" / "manifest.json").read_text())
        (work / "out" / "manifest.json").write_text(json.dumps(fields | {"marks": fields["marks"][:1]}))
    else:
        fields = json.loads((work / "out" / "manifest.json").read_text())
        (work / "out" / "manifest.json").write_text(json.dumps(fields | {"marks": fields["shards"]}))
    with pytest.raises(UserError):
        manifest.verify(work / "out")
    if damage != "bytes":  # which --verify alone finds
        with pytest.raises(UserError):
            configuration.complete(options("out"))
