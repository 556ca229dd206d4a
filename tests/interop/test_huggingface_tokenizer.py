"""Tokenizer files of folders: which are taken for ours, and that others keep their ids through a run and back."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxgpt import writing
from jaxgpt.commands import cli, configuration
from jaxgpt.data import encodings, loader, tokenizers
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.errors import UserError
from jaxgpt.interop import detect_format, huggingface, huggingface_tokenizer
from jaxgpt.options.config import Config, Data, Model, Training
from tests.data.foreign_tokenizers import MAKERS, TEXT, each, file_of, theirs, with_prefix_space
from tests.interop.weights import random_params

MODEL = Model(layers=1, heads=2, width=8, context=32, vocabulary_size=60000)


@pytest.fixture(scope="module")
def gpt2() -> dict:
    """The tokenizer.json of GPT-2 as its makers' is: merges as texts, and options that change nothing."""
    content = json.loads(huggingface_tokenizer.files_of(tokenizers.make("gpt2", ""), MODEL)["tokenizer.json"])
    content["added_tokens"][0]["normalized"] = True
    for part in ("pre_tokenizer", "post_processor", "decoder"):
        content[part].pop("use_regex")
    content["post_processor"]["trim_offsets"] = False
    content["decoder"]["add_prefix_space"] = True
    model = content["model"]
    model.update(
        dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False,
        merges=[" ".join(pair) for pair in model["merges"]],
    )  # fmt: skip
    return content


def read(folder: Path, content: dict | str, **others: object):
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    for name, value in others.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    tokenizer, notes = huggingface_tokenizer.read(folder, MODEL)
    assert notes == ()
    assert tokenizer is not None
    return tokenizer


def test_gpt2s_file_is_gpt2(tmp_path, gpt2):
    assert isinstance(read(tmp_path, gpt2), tokenizers.GPT2)


LOWER = {"type": "Lowercase"}
NUMBERS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["added_tokens"].append(dict(c["added_tokens"][0], id=50257, content="<tool>", special=False)),
        lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
        lambda c: c.update(normalizer=LOWER),
        lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [NUMBERS, c["pre_tokenizer"]]}),
        lambda c: c["model"].update(merges=c["model"]["merges"][:20000]),
    ],
    ids=["added token", "prefix space", "lower case", "other words", "fewer merges"],
)
def test_gpt2s_vocabulary_with_anything_else_is_not_gpt2(tmp_path, gpt2, change):
    """It has the ids that the package gives, most of which differ from GPT-2's."""
    import tokenizers as package

    content = json.loads(json.dumps(gpt2))
    change(content)
    ours = read(tmp_path, content)
    assert isinstance(ours, HuggingFace)
    assert ours.end_of_text == 50256
    expected = package.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.encode(TEXT, special=True).tolist() == expected.encode(TEXT, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["bytes", "characters", "bpe"])
def test_ours_are_read_as_ours_and_changed_ones_are_not(tmp_path, name):
    own = [bytes([byte]) for byte in range(256)] + [b"th", b" th", b"the", b" t", b"xyz"]  # no merges make the last
    ours = tokenizers.TrainedBytePairs(own) if name == "bpe" else tokenizers.make(name, TEXT)
    content = json.loads(huggingface_tokenizer.files_of(ours, MODEL)["tokenizer.json"])
    again = read(tmp_path, content)
    assert again.state() == ours.state()
    there = HuggingFace(json.dumps(content))
    assert there.encode(TEXT + " xyz the").tolist() == ours.encode(TEXT + " xyz the").tolist()
    content["normalizer"] = LOWER
    changed = read(tmp_path, content)
    assert isinstance(changed, HuggingFace)
    assert changed.encode("THE").tolist() == ours.encode("the").tolist()


def test_vocabulary_and_merges_in_two_files(tmp_path):
    """The files are as older versions of transformers wrote them, with its own tokenizer as the reference."""
    transformers = pytest.importorskip("transformers", reason="reads the files too; the parity extra installs it")
    words = [*encodings.CHARACTER_OF, "th", "the", "Ġthe", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n", encoding="utf-8")
    text = "the cat the THE\nthe"
    for space in (False, True):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": space}))
        tokenizer, notes = huggingface_tokenizer.read(tmp_path, MODEL)
        assert tokenizer is not None
        assert (type(tokenizer), notes) == ((HuggingFace if space else tokenizers.TrainedBytePairs), ())
        expected = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
        assert tokenizer.encode(text).tolist() == expected(text)["input_ids"]
        assert tokenizer.end_of_text == 259
    (tmp_path / "merges.txt").write_text("t h e\n")
    with pytest.raises(UserError, match=r"merges.txt: merge 1 is not two parts"):
        huggingface_tokenizer.read(tmp_path, MODEL)
    (tmp_path / "merges.txt").unlink()
    assert huggingface_tokenizer.read(tmp_path, MODEL) == (
        None, ("its tokenizer is vocab.json alone: save it with transformers as tokenizer.json",)
    )  # fmt: skip


def test_the_end_of_a_text(tmp_path):
    """The token is named by the tokenizer's own files, by the model's config.json, or by its usual name."""
    text = file_of(MAKERS[5])
    assert read(tmp_path, text).end_of_text is None
    for number, expected in ((1, 1), (10**9, None)):
        tokenizer, _ = huggingface_tokenizer.read(tmp_path, MODEL, end_of_text=number)
        assert tokenizer is not None
        assert tokenizer.end_of_text == expected
    assert read(tmp_path, text, tokenizer_config={"eos_token": {"content": "</s>"}}).end_of_text == 2
    assert read(tmp_path, text, tokenizer_config={"eos_token": "<s>"}).end_of_text == 1
    assert (
        read(
            tmp_path, text, tokenizer_config={"eos_token": ["?"]}, special_tokens_map={"eos_token": "</s>"}
        ).end_of_text
        == 2
    )


def test_more_tokens_than_the_model(tmp_path):
    (tmp_path / "tokenizer.json").write_text(file_of(MAKERS[0]), encoding="utf-8")
    tokenizer, notes = huggingface_tokenizer.read(tmp_path, Model(vocabulary_size=200))
    assert tokenizer is None
    assert notes == ("its tokenizer has 266 tokens, more than the model",)


def test_what_the_files_say_otherwise_is_noted(tmp_path, gpt2):
    (tmp_path / "tokenizer.json").write_text(json.dumps(gpt2))
    added = {"50256": {"content": "<|endoftext|>"}, "50257": {"content": "<\x1btool>"}}
    config = {"added_tokens_decoder": added, "add_prefix_space": True, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, notes = huggingface_tokenizer.read(tmp_path, MODEL)
    assert isinstance(tokenizer, tokenizers.GPT2)
    assert notes == (
        r"tokenizer_config.json adds 1 tokens that tokenizer.json hasn't got: '<\x1btool>' first",
        "tokenizer_config.json has add_prefix_space, and tokenizer.json has it not: a text begins without a space",
    )


# Through a run and back


def export(folder: Path, text: str, vocabulary_size: int) -> None:
    model = Model(layers=1, heads=2, width=8, context=64, vocabulary_size=vocabulary_size)
    with writing.new_folder(folder) as new:
        huggingface.write_folder(new, random_params(model), model, "float32", HuggingFace(text, 2), 1 << 30)


def test_tokens_that_an_llmc_file_cannot_hold(tmp_path, monkeypatch, capsys):
    """Its model file is written all the same."""
    monkeypatch.chdir(tmp_path)
    content = json.loads(file_of(MAKERS[0]))
    content["model"]["vocab"]["a" * 300] = 300
    export(Path("hf"), json.dumps(content), 301)
    assert cli.main(["convert", "hf", "m.bin"]) == 0
    assert "the tokenizer has tokens of 0 or over 255 bytes: no llm.c tokenizer file" in capsys.readouterr().out
    assert Path("m.bin").exists()


@each
def test_a_foreign_tokenizer_through_a_run_and_back(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, their = file_of(make), theirs(make)
    export(Path("hf"), text, their.get_vocab_size())
    assert cli.main(["convert", "hf", "runs/a"]) == 0
    ours = detect_format.open_weights("runs/a").tokenizer
    assert ours is not None
    assert ours.encode(TEXT, special=True).tolist() == their.encode(TEXT, add_special_tokens=False).ids
    assert cli.main(["convert", "runs/a", "back"]) == 0
    assert Path("back/tokenizer.json").read_text(encoding="utf-8") == text
    back = detect_format.open_weights("back").tokenizer
    assert back is not None
    assert back.state() == ours.state()


def test_a_text_is_cut_by_the_weights_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make = MAKERS[5]
    export(Path("hf"), file_of(make), theirs(make).get_vocab_size())
    Path("text.txt").write_text(TEXT * 20, encoding="utf-8")
    config = Config(Model(1, 2, 8, 8), training=Training(init_from="hf"), data=Data(text="text.txt"))
    data, resolved = configuration.complete(config, configuration.tokenizer_of_weights(config))
    assert not isinstance(data.train, loader.Mixture)
    assert resolved.model.vocabulary_size == theirs(make).get_vocab_size()
    expected = HuggingFace(file_of(make)).encode(TEXT * 20)
    assert np.array_equal(np.concatenate([data.train[:], data.validation[:]]), expected)
    assert configuration.tokenizer_of_weights(replace(config, training=Training())) is None


@pytest.mark.slow
def test_generating_and_training_with_a_foreign_tokenizer(work, capsys):
    """A run from such weights is trained, resumed without them, evaluated, and its text is drawn."""
    make = MAKERS[5]
    export(Path("hf"), file_of(make), theirs(make).get_vocab_size())
    train = ["--data.text=text.txt", "--sampling.tokens=2", "--init-from=hf", "--run.name=a", "--training.batch-size=2"]
    assert cli.main([*train, "--training.steps=1"]) == 0
    assert "as huggingface tokens" in capsys.readouterr().out
    (work / "hf/tokenizer.json").unlink()
    assert cli.main([*train, "--training.steps=2", "--resume"]) == 0
    assert "resuming after step 1" in capsys.readouterr().out
    assert cli.main(["evaluate", "--run", "runs/a", "--batch-size=2", "--limit=1"]) == 0
    assert cli.main(["generate", "--run", "runs/a", "--prompt", "the dog", "--tokens=3"]) == 0
    assert "the dog" in capsys.readouterr().out


def test_prepared_tokens_and_weights_agree_or_are_told_apart(work):
    export(Path("hf"), file_of(with_prefix_space), 266)
    for tokenizer, output in (("hf", "whole"), ("hf/tokenizer.json", "file"), ("other.json", "alone")):
        Path("other.json").write_bytes(Path("hf/tokenizer.json").read_bytes())
        Path("text.txt").write_text(TEXT * 20)
        words = ["text.txt", "--tokenizer", tokenizer, "--output", output, "--processes", "1"]
        assert cli.main(["prepare", *words]) == 0
    config = Config(Model(1, 2, 8, 64), training=Training(init_from="hf"), data=Data(text="whole"))
    for folder in ("whole", "file"):
        config = replace(config, data=Data(text=folder))
        data, resolved = configuration.complete(config, configuration.tokenizer_of_weights(config))
        assert configuration.weights(resolved, data.tokenizer)
    config = replace(config, data=Data(text="alone"))
    data, resolved = configuration.complete(config, configuration.tokenizer_of_weights(config))
    with pytest.raises(UserError, match=r"token 2 ends a text, and in the token files token 265 does.*--tokenizer hf"):
        configuration.weights(resolved, data.tokenizer)


def test_another_programs_transformers_reads_it(tmp_path):
    transformers = pytest.importorskip("transformers", reason="reads the export; the parity extra installs it")
    for make in MAKERS[1:5]:
        text = file_of(make)
        export(tmp_path / make.__name__, text, theirs(make).get_vocab_size())
        ours, expected = HuggingFace(text), transformers.AutoTokenizer.from_pretrained(tmp_path / make.__name__)
        assert ours.encode(TEXT, special=True).tolist() == expected(TEXT, add_special_tokens=False)["input_ids"]


# What is hostile


def test_one_token_of_many_bytes_is_read_soon(tmp_path):
    words = [*encodings.CHARACTER_OF, *("a" * 2**power for power in range(1, 15)), "a" * 20_000, "<|endoftext|>"]
    pairs = [("a" * 2 ** (power - 1), "a" * 2 ** (power - 1)) for power in range(1, 15)]
    content = huggingface_tokenizer._byte_level({word: i for i, word in enumerate(words)}, pairs)
    content["added_tokens"] = [huggingface_tokenizer._special("<|endoftext|>", len(words) - 1)]
    began = time.process_time()
    tokenizer = read(tmp_path, content)
    tokenizer.encode("a" * 200_000)
    assert time.process_time() - began < 3


def test_merges_are_those_of_the_simple_way():
    """The simple way joins the first pair of lowest rank until none is left."""

    def simply(tokens):
        ranks, pairs = {}, []
        for rank, token in enumerate(tokens):
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 1:
                joined = [(ranks.get(parts[i] + parts[i + 1], np.inf), i) for i in range(len(parts) - 1)]
                lowest, place = min(joined)
                if lowest == np.inf:
                    break
                parts[place : place + 2] = [parts[place] + parts[place + 1]]
            if len(parts) == 2:
                pairs.append((encodings.written(parts[0]), encodings.written(parts[1])))
            ranks[token] = rank
        return pairs

    generator = np.random.default_rng(0)
    for _ in range(30):
        made = {bytes([byte]): None for byte in b"abc"}
        while len(made) < 40:
            left, right = generator.choice(len(made), size=2)
            made[list(made)[left] + list(made)[right]] = None
            made[bytes(generator.choice([97, 98, 99], size=5).tolist())] = None
        assert encodings.merges(list(made)) == simply(list(made))


def test_a_pipe_and_a_link_out(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer.json: a pipe, where a file is expected"):
        huggingface_tokenizer.read(folder, MODEL)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"leads out of .*hf by a link"):
        huggingface_tokenizer.read(folder, MODEL)


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"model": 1}', '{"model": {"vocab": {"a": 1, "a": 2}}}', "\x80"])
def test_a_file_that_is_none(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer.json: .*Get it again from where it came"):
        huggingface_tokenizer.read(tmp_path, MODEL)


def test_the_tokenizer_of_weights_that_name_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make = MAKERS[7]
    export(Path("hf"), file_of(make), theirs(make).get_vocab_size())
    Path("mine.json").write_text(Path("hf/tokenizer.json").read_text(encoding="utf-8"), encoding="utf-8")
    assert cli.main(["convert", "hf", "m.bin"]) == 0
    assert Path("m_tokenizer.bin").exists()
    for name in ("hf", "mine.json", "hf/tokenizer.json"):
        found = detect_format.with_tokenizer(detect_format.open_weights("m.bin"), name).tokenizer
        assert isinstance(found, HuggingFace)
        assert found.text == file_of(make)
