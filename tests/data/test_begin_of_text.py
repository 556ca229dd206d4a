"""Tokenizers of the Llama kind beside transformers: ids and text of awkward pages, and the token before a text."""

import json

import numpy as np
import pytest

from jaxgpt.data import tokenizers, workers
from jaxgpt.data.documents import Chunk, Position, TextLayout
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.data.tokenizers import Tokenizer
from jaxgpt.evaluation import multiple_choice
from jaxgpt.generation import api, batching
from jaxgpt.interop import huggingface_tokenizer
from jaxgpt.options.config import Model
from tests.data import foreign_tokenizers as foreign
from tests.data.foreign_tokenizers import AWKWARD, each, file_of

MODEL = Model(layers=1, heads=2, width=8, context=32, vocabulary_size=60000)
WITH_BEGIN = (foreign.of_llama3, foreign.of_llama2_with_begin, foreign.of_mistral)
kinds = pytest.mark.parametrize("make", WITH_BEGIN, ids=lambda make: make.__name__)


def read(folder, make) -> Tokenizer:
    (folder / "tokenizer.json").write_text(file_of(make), encoding="utf-8")
    tokenizer, _ = huggingface_tokenizer.read(folder, MODEL)
    assert tokenizer is not None
    return tokenizer


@each
def test_an_awkward_page_has_the_tokens_and_the_text_of_transformers(tmp_path, make):
    transformers = pytest.importorskip("transformers", reason="is compared with; the parity extra installs it")
    ours = read(tmp_path, make)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in ("", " ", AWKWARD, AWKWARD[::-1], *AWKWARD.split("\n")):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True).tolist() == ids
        assert ours.decode(ids) == theirs.decode(ids)
    if make in (*WITH_BEGIN, foreign.of_llama2, foreign.of_qwen):
        assert ours.begin(ours.encode("a cat")).tolist() == theirs.encode("a cat")


@kinds
def test_the_token_stands_before_what_a_model_is_given(tmp_path, make):
    ours = read(tmp_path, make)
    begin = ours.begin_of_text
    assert begin is not None
    assert batching.prompt_tokens("the", ours, False, "it").tolist() == [begin, *ours.encode("the")]
    assert batching.prompt_tokens("", ours, False, "it").tolist() == [begin]
    assert ours.begin(ours.begin(ours.encode("the"))).tolist() == [begin, *ours.encode("the")]  # once
    request = multiple_choice.split("the dog", " is", ours)
    assert [*request.context, *request.completion] == [begin, *ours.encode("the dog is")]
    assert ours.prompt_text(batching.prompt_tokens("the", ours, False, "it")) == "the"


@kinds
def test_a_document_begins_with_it_and_ends_with_the_end_of_text(tmp_path, make):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    ours = read(tmp_path, make)
    text = "the dog\n---\nthe"
    piece = Chunk("a.txt", "text", TextLayout(separator="\n---\n", whole=True), Position(), text.encode(), len(text))
    tokens = workers.tokenize_with(ours, piece).tokens.tolist()
    between = [ours.end_of_text, ours.begin_of_text]
    assert ours.id_of("</s>") == between[0]  # type: ignore[attr-defined]
    assert tokens == [*between, *ours.encode("the dog"), *between, *ours.encode("the")]
    assert ours.document_start == ours.begin_of_text


@kinds
def test_a_run_keeps_it_and_one_of_an_earlier_version_has_none(tmp_path, make):
    ours = read(tmp_path, make)
    state = json.loads(json.dumps(ours.state()))
    assert tokenizers.from_state(state).begin_of_text == ours.begin_of_text
    del state["begin_of_text"]
    assert tokenizers.from_state(state).begin_of_text is None


@kinds
def test_it_is_written_for_transformers(tmp_path, make):
    transformers = pytest.importorskip("transformers", reason="is compared with; the parity extra installs it")
    ours = read(tmp_path, make)
    folder = tmp_path / "written"
    folder.mkdir()
    for name, text in huggingface_tokenizer.files_of(ours, MODEL).items():
        (folder / name).write_text(text, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.bos_token_id == ours.begin_of_text
    assert theirs.encode("the dog") == ours.begin(ours.encode("the dog")).tolist()


@pytest.mark.parametrize("make", [foreign.byte_level, foreign.of_qwen, foreign.of_llama2, foreign.unigram])
def test_others_have_none(tmp_path, make):
    ours = read(tmp_path, make)
    ids = np.array([3, 4], np.int32)
    assert ours.begin_of_text is None
    assert ours.begin(ids) is ids
    assert "begin_of_text" not in HuggingFace(file_of(make)).state()


@kinds
def test_the_server_counts_it_and_does_not_echo_it(tmp_path, make):
    ours = read(tmp_path, make)
    body = {"model": "m", "prompt": "the", "echo": True, "max_tokens": 1}
    served = api.Served("m", ours, ours.vocabulary_size, api.Limits(64, 60, 8))
    asked = api.completion(body, served)
    assert asked.requests[0].prompt.tolist() == [ours.begin_of_text, *ours.encode("the")]
    assert asked.answers.whole(0, "y", (), "length")["text"] == "they"
    assert asked.prompt_tokens == 1 + len(ours.encode("the"))
    given = api.completion(body | {"prompt": [3, 4]}, served)
    assert given.requests[0].prompt.tolist() == [3, 4]  # a client's own tokens stay as they are
