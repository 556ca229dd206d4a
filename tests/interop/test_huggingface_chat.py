"""Chat templates into a Hugging Face folder and back: transformers writes a conversation as this project does."""

import json
from pathlib import Path

import pytest

from jaxgpt import writing
from jaxgpt.commands import cli
from jaxgpt.data import chat_templates, tokenizers
from jaxgpt.data.chat_templates import Template
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.errors import UserError
from jaxgpt.interop import detect_format, huggingface_chat, huggingface_tokenizer, loading, runs
from jaxgpt.options.config import Model
from tests.data import foreign_tokenizers, templates
from tests.data.test_chat_templates import CALL, CONVERSATIONS, TOOL
from tests.interop.weights import random_params

CALLED = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "So:", "tool_calls": [CALL["function"]]},
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": '<"pad\\n🎭">'}


def foreign() -> HuggingFace:
    """A tokenizer that has ChatML's markers as special tokens."""
    made = foreign_tokenizers.of_qwen()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = HuggingFace(made.to_str())
    tokenizer.end_of_text = tokenizer.id_of("<|endoftext|>")
    return tokenizer


def export(template: Template, tokenizer: tokenizers.Tokenizer) -> None:
    """Converts a run with this template, runs/chat, to the Hugging Face folder `exported`, and that to runs/back."""
    model = Model(layers=1, heads=1, width=8, context=8, vocabulary_size=tokenizer.vocabulary_size)
    with writing.new_folder(Path("runs/chat")) as folder:
        where = {"run": Path("runs/chat"), "origin": "a test", "template": template}
        runs.write(folder, random_params(model), model, "float32", tokenizer, **where)
    assert cli.main(["convert", "runs/chat", "exported"]) == 0
    assert cli.main(["convert", "exported", "runs/back"]) == 0


@pytest.fixture(scope="module", params=["bytes", "gpt2", "qwen"])
def tokenizer(request):
    return foreign() if request.param == "qwen" else tokenizers.make(request.param, "")


@pytest.fixture(scope="module")
def pair(tokenizer, tmp_path_factory):
    """The tokenizer, its files, and transformers' of them in a folder."""
    transformers = pytest.importorskip("transformers", reason="compares with Hugging Face's implementation")
    folder = tmp_path_factory.mktemp("exported")
    contents = huggingface_tokenizer.files_of(tokenizer, Model())
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return tokenizer, contents, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "template",
    [*map(Template, chat_templates.NAMES),
     *(Template("jinja", source, NAMES) for source in (templates.MISTRAL, templates.TOOLS, templates.MARKED,
                                                       "\n{{ pad_token }}" + templates.TRIMMED))],
    ids=[*chat_templates.NAMES, "jinja mistral", "tools", "marked", "trimmed"],
)  # fmt: skip
def test_transformers_writes_what_the_model_was_trained_with(pair, template):
    tokenizer, contents, theirs = pair
    theirs.chat_template = huggingface_chat.source_of(template, contents)
    called = {"chatml": [CALLED], templates.TOOLS: [CALLED[:3]]}.get(template.source or template.name, [])
    for messages in [*CONVERSATIONS, *called]:
        for prompt in (False, True):
            asked = {"add_generation_prompt": prompt, "tools": [TOOL] if template.source == templates.TOOLS else None}
            text = chat_templates.render(messages, template, **asked)
            assert theirs.apply_chat_template(messages, tokenize=False, **asked) == text
            if not prompt:
                ids = theirs.apply_chat_template(messages, return_dict=False, **asked)
                assert ids == chat_templates.encode(messages, template, tokenizer, **asked).ids.tolist()


@pytest.mark.parametrize("name", chat_templates.NAMES)
def test_a_built_in_template_is_trained_alike_when_it_comes_back(name):
    """Written as Jinja and read back, it marks the same parts as the assistant's."""
    back = Template("jinja", huggingface_chat.source_of(Template(name), {}))
    for messages in [*CONVERSATIONS, *([CALLED] if name == "chatml" else [])]:
        assert chat_templates.with_spans(messages, back) == chat_templates.with_spans(messages, Template(name))
    if name != "chatml":
        with pytest.raises(UserError, match="this chat template"):
            chat_templates.render(CALLED, back)


def test_an_answer_ends_where_transformers_ends_it(tmp_path, monkeypatch):
    """It ends at the special token that ends a turn, where there is one, and at the end of text."""
    monkeypatch.chdir(tmp_path)
    tokenizer = foreign()
    export(Template("jinja", "{{ pad_token }}" + templates.CHATML, NAMES), tokenizer)
    template = chat_templates.from_state(loading.load("runs/back", devices=1).about["template"])
    assert chat_templates.render(CONVERSATIONS[0], template).startswith(NAMES["pad_token"] + "<|im_start|>user\n2 + 2?")
    ends = json.loads(Path("exported/generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.end_of_text, tokenizer.id_of("<|im_end|>")]
    assert json.loads(Path("exported/config.json").read_text())["eos_token_id"] == tokenizer.end_of_text
    back = detect_format.open_weights("exported").tokenizer
    assert back
    assert back.end_of_text == tokenizer.end_of_text


def test_a_model_of_no_conversations_has_no_template(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Model(layers=1, heads=1, width=8, context=8, vocabulary_size=256)
    with writing.new_folder(Path("runs/base")) as folder:
        where = {"run": Path("runs/base"), "origin": "a test"}
        runs.write(folder, random_params(model), model, "float32", tokenizers.make("bytes", ""), **where)
    assert cli.main(["convert", "runs/base", "exported"]) == 0
    assert not Path("exported/chat_template.jinja").exists()
    assert detect_format.open_weights("exported").template is None
