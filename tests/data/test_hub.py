"""Data sets of the Hugging Face hub, whose answers are made up here: what is asked for, checked and made of it."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.data import corpus, hub, manifest, sources, token_files
from jaxgpt.errors import UserError

huggingface_hub = pytest.importorskip("huggingface_hub")


class Hub:
    """A Hugging Face hub: its content, {(repository, revision): {name: bytes}}, and the downloads from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.content, self.downloads, self.lies = folder, {}, [], {}

    def put(self, repository: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.content[repository, revision] = files

    def dataset_info(self, repository, revision):
        if (repository, revision) not in self.content:
            raise ValueError(f"there is no {repository}\nand a second line")
        return SimpleNamespace(sha=f"commit-of-{revision}")

    def list_repo_tree(self, repository, *, repo_type, revision, recursive):
        assert (repo_type, recursive) == ("dataset", True)
        yield SimpleNamespace(path="a folder")
        for name, content in self._files(repository, revision).items():
            lfs = SimpleNamespace(sha256=self.lies.get(name, hashlib.sha256(content).hexdigest()))
            yield SimpleNamespace(path=name, size=len(content), lfs=lfs if len(content) > 10 else None)

    def _files(self, repository, commit):
        return self.content[repository, commit.removeprefix("commit-of-")]

    def download(self, repository, name, *, repo_type, revision, local_dir):
        self.downloads.append(name)
        path = Path(local_dir or self.folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._files(repository, revision)[name])
        return str(path)


@pytest.fixture
def there(tmp_path, monkeypatch):
    made = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setenv("JAXGPT_DATA", str(tmp_path / "data"))
    return made


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def names(source: str) -> list[str]:
    return [file.place.name for file in sources.find((source,))]


def test_files_are_chosen_by_split_and_folder(there):
    train, test = jsonl("to train"), jsonl("to test")
    contents = {"train": train, "test": test}
    parts = [(folder, split, i) for folder in ("en", "de") for split in contents for i in (1, 0)]
    files = {f"{folder}/{split}-{i}.jsonl": contents[split] for folder, split, i in parts}
    there.put("o/n", files | {"README.md": b"about it"})
    assert names("hf:o/n/en") == ["en/train-0.jsonl", "en/train-1.jsonl"]
    assert names("hf:o/n/de:test") == ["de/test-0.jsonl", "de/test-1.jsonl"]
    assert there.downloads == []
    with pytest.raises(UserError, match=r"cannot read the data set o/n on the Hugging Face hub: there is no o/n$"):
        sources.find(("hf:o/n:validation",))  # nor is there a Parquet copy


def test_where_no_split_is_named_all_is_for_training(there):
    there.put("o/n", {"b.jsonl": jsonl("b"), "a.jsonl": jsonl("a")})
    assert names("hf:o/n") == ["a.jsonl", "b.jsonl"]


def test_the_hubs_parquet_copy_serves_where_the_data_set_has_another_form(there):
    there.put("o/n", {"script.py": b"print()"})
    there.put("o/n", {"default/train/0000.parquet": b"x" * 20}, revision=hub.CONVERTED)
    (found,) = sources.find(("hf:o/n",))
    assert found.place == hub.Remote("o/n", f"commit-of-{hub.CONVERTED}", "default/train/0000.parquet", 20,
                                     hashlib.sha256(b"x" * 20).hexdigest())  # fmt: skip


def test_a_data_set_is_prepared(there, tmp_path):
    there.put("roneneldan/TinyStories", {
        "data/train-0.jsonl": jsonl("Once upon a time", "there was"),
        "data/train-1.jsonl": jsonl("a cat."),
        "data/validation-0.jsonl": jsonl("The end of the story"),
    })  # fmt: skip
    assert cli.main(["prepare", "tinystories", "--processes", "1"]) == 0
    folder = tmp_path / "data" / "tinystories"
    assert manifest.verify(folder).documents == 4
    found = corpus.find_token_files("tinystories")
    assert found is not None
    end = 50256
    assert found.train[:].tolist() == [end, 7454, 2402, 257, 640, end, 8117, 373, end, 64, 3797, 13]
    assert found.validation[:2].tolist() == [end, 464]
    assert there.downloads == ["data/validation-0.jsonl", "data/train-0.jsonl", "data/train-1.jsonl"]


def test_what_was_damaged_on_its_way_is_deleted_and_named(there, fails):
    there.put("o/n", {"a.jsonl": jsonl("some text")})
    there.lies["a.jsonl"] = "0" * 64
    message = fails("prepare", "hf:o/n", "--processes", "1")
    assert "a.jsonl was damaged on its way: it has 22 bytes and SHA-256" in message
    assert not (there.folder / "a.jsonl").exists()


def token_file(path: Path, tokens) -> bytes:
    token_files.write(path, np.asarray(tokens), token_files.GPT2)
    return path.read_bytes()


def test_ready_made_shards_are_checked_and_get_a_manifest(there, tmp_path, fails):
    repository = sources.DATA_SETS["fineweb-10B"].ready_made
    content = {
        "fineweb_train_000001.bin": token_file(tmp_path / "t", [50256, 1, 2]),
        "fineweb_val_000000.bin": token_file(tmp_path / "v", [50256, 3]),
        "README.md": b"about it",
    }
    there.put(repository, content)
    assert cli.main(["prepare", "fineweb-10B", "--ready-made"]) == 0
    found = corpus.find_token_files("fineweb-10B")
    assert found is not None
    assert (found.train[:].tolist(), found.validation[:].tolist()) == ([50256, 1, 2], [50256, 3])
    made = manifest.verify(tmp_path / "data" / "fineweb-10B")
    assert (made.tokens("train"), made.vocabulary_size, made.end_of_text) == (3, 50257, 50256)
    there.put(repository, content | {"fineweb_train_000001.bin": content["fineweb_train_000001.bin"][:-2]})
    assert "fineweb_train_000001.bin is damaged: its header promises 3 tokens" in fails(
        "prepare", "fineweb-10B", "--ready-made"
    )
    assert "only of fineweb-10B, fineweb-edu-100B" in fails("prepare", "tinystories", "--ready-made")


def test_a_hub_that_does_not_answer_is_a_plain_message(fails, monkeypatch, tmp_path):
    """Its own client, sent to a port where nobody listens."""
    monkeypatch.setenv("JAXGPT_DATA", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: _Api(endpoint="http://127.0.0.1:9"))
    assert "cannot read the data set o/n on the Hugging Face hub: " in fails("prepare", "hf:o/n")


_Api = huggingface_hub.HfApi
