"""Readers of texts that are fuzzed, as in `fuzz_readers`: texts, `prepare`, a run's files, and requests."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet

from benchmarks import mutations
from benchmarks.fuzz_readers import Input, Reader, written
from jaxgpt.commands.generate import prompts_in
from jaxgpt.data import (
    chat_templates,
    conversations,
    corpus,
    manifest,
    packing,
    prepare,
    prepare_conversations,
    tokenizers,
)
from jaxgpt.data import corpora as texts
from jaxgpt.data.documents import Rows, TextLayout
from jaxgpt.errors import Interrupted, UserError
from jaxgpt.generation import api, chat_api
from jaxgpt.interop import huggingface_chat
from jaxgpt.runs import checksums, metrics_file

TEXT = "To be, or nöt to be:\n\n\tthat is 1 question — 是不是.\r\n\r\n- «x»\n" * 4
ROWS = [{"text": "to be, or nöt"}, {"text": None, "id": 3}, {"id": 4, "text": 'a "b"\n\\ 是'}, {"text": ""}]
LIMITS = api.Limits(context=4096, max_tokens=32, texts=8)
GRAMMAR = 'start: item ("," item)*\nitem: /[a-z]+/ | "(" start ")"\n'
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 3}, "of": {"type": "array", "items": {"$ref": "#/$defs/s"}}},
    "required": ["n"],
    "$defs": {"s": {"anyOf": [{"enum": ["a", None]}, {"type": "string", "pattern": "^[a-z]{1,5}$"}]}},
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "adds", "parameters": SCHEMA}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"n": 3}'}}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hello <|im_end|>"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "call_1"},
]
MADE = "made"  # the folder that `prepare` makes


def plain() -> list[Input]:
    texts = (TEXT, "\ufeff" + TEXT, "x" * 500)
    return [{"in.txt": text.encode()} for text in texts]


def json_rows() -> list[Input]:
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in ROWS).encode()
    listed = [json.dumps(ROWS, indent=indent).encode() for indent in (None, 1)]
    return [{"in.jsonl": lines}, {"in.json": lines}, *({"in.json": content} for content in listed)]


def parquets() -> list[Input]:
    table = pyarrow.Table.from_pylist([row | {"number": [1, 2]} for row in ROWS * 5])
    more = table.set_column(0, "text", table["text"].dictionary_encode()) if table.column_names[0] == "text" else table
    made = []
    for rows, options in ((table, {}), (table, {"compression": "zstd", "row_group_size": 7}), (more, {})):
        sink = io.BytesIO()
        pyarrow.parquet.write_table(rows, sink, **options)
        made.append({"in.parquet": sink.getvalue()})
    return made


def packed() -> list[Input]:
    lines = json_rows()[0]["in.jsonl"]
    return [
        {"in.txt.gz": gzip.compress(TEXT.encode(), mtime=0)},
        {"in.jsonl.gz": gzip.compress(lines, mtime=0)},
        {"in.txt.bz2": bz2.compress(TEXT.encode())},
        {"in.txt.xz": lzma.compress(TEXT.encode())},
        {"in.jsonl.zst": mutations.PACKING["zst"][1](lines)},
    ]


def settings(names: list[str], tokenizer: str, shard_tokens: int) -> prepare.PrepareSettings:
    return prepare.PrepareSettings("x", tuple(names), (), 0, shard_tokens, tokenizer, 0, TextLayout("text", "\n\n"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        yield


def inputs(folder: Path) -> list[Path]:
    return sorted(folder.glob("in.*")) or [folder / "in.txt"]  # or a file that is missing


def make(folder: Path, tokenizer: str = "bytes", shard_tokens: int = 1 << 20) -> None:
    """Prepares the files in a folder whose names begin with "in". Their times are always the same."""
    with contextlib.chdir(folder), quiet():
        names = [path.name for path in inputs(Path())]
        for name in names:
            if Path(name).is_file() and not Path(name).is_symlink():
                os.utime(name, (0, 0))
        prepare.prepare(settings(names, tokenizer, shard_tokens), Path(MADE), processes=1)


def read_text(folder: Path) -> None:
    """Reads a text as training does, and as `prepare` does when it makes a tokenizer of it."""
    with contextlib.suppress(UserError):
        texts.load(str(inputs(folder)[0]))
    make(folder, "characters")


def read_rows(folder: Path) -> None:
    make(folder, "bytes", shard_tokens=1000)
    manifest.verify(folder / MADE)


def unfinished() -> list[Input]:
    """Returns a folder that a stopped `prepare` leaves near its end, and a text."""

    def begin(folder: Path) -> None:
        (folder / "in.txt").write_text(TEXT)
        stop = mock.patch.object(prepare._Shards, "_conclude", side_effect=KeyboardInterrupt)
        with stop, contextlib.suppress(Interrupted):
            make(folder, "bytes", shard_tokens=100)

    return [{name: content for name, content in written(begin).items() if not name.endswith(".lock")}]


def prompts() -> list[Input]:
    return [{"prompts.txt": b"to be\r\nor n\xc3\xb6t\n"}]


def requests() -> list[Input]:
    """Returns bodies of requests to the server."""
    bodies = [
        {"model": "m", "prompt": "to be", "max_tokens": 3, "stop": ["a", "b"], "seed": -1, "temperature": 0.5},
        {"model": "m", "prompt": [[1, 2], [3]], "n": 2, "stream": True, "stream_options": {"include_usage": True}},
        {"model": "m", "prompt": ["a", "<|endoftext|>"], "echo": True, "top_k": 3, "logit_bias": {}, "user": "x"},
        {"model": "m", "prompt": "a", "response_format": {"type": "regex", "regex": "(a|b){2,9}"}, "logprobs": 2},
        {"model": "m", "prompt": "a", "response_format": {"type": "grammar", "grammar": GRAMMAR}},
        {
            "model": "m",
            "messages": MESSAGES,
            "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        },
        {
            "model": "m",
            "messages": MESSAGES,
            "tools": TOOLS,
            "tool_choice": "auto",
            "logprobs": True,
            "top_logprobs": 3,
        },
    ]
    return [{"body.json": json.dumps(body).encode()} for body in bodies]


def read_request(folder: Path) -> None:
    """Reads a request; an answer of status 4xx, which can be sent, counts as a refusal."""
    tokenizer = tokenizers.make("bytes", "")
    path = folder / "body.json"
    if not path.is_file() or path.is_symlink():
        raise UserError("a client can send bytes only")
    try:
        body, served = api.read(path.read_bytes(), LIMITS), api.Served("m", tokenizer, 256, LIMITS)
        if isinstance(body, dict) and "messages" in body:
            chat_api.chat_completion(body, served, chat_templates.built_in("chatml"))
        else:
            api.completion(body, served)
    except api.ApiError as error:
        api.rendered(error.body())
        if error.status < 500:
            raise UserError(str(error)) from None
        raise


def sums() -> list[Input]:
    """Returns checksum files of made-up files."""

    def save(folder: Path) -> None:
        for name in ("params/0", "params/1", "about/metadata"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"what is in {name}")
        checksums.write(folder)

    return [written(save)]


def metrics() -> list[Input]:
    lines = [
        {"step": 1, "loss": 5.5, "learning_rate": 0.1},
        {"step": 2, "val_loss": 5.25},
        {"step": 2, "loss": None, "skipped": 1},
        {"step": 3, "loss": 5.0},
        {"step": 1, "task": "hellaswag", "accuracy": 0.25, "by": "evaluate"},
    ]
    content = b"".join(map(metrics_file.line, lines))
    return [{"metrics.jsonl": content, "samples.txt": "--- step 0\nto be, or nöt".encode()}]


def go_on(folder: Path) -> None:
    """Cuts a run's files back as resuming after step 2 does; then every line of metrics.jsonl can be read."""
    path = folder / metrics_file.NAME
    metrics_file.is_untrained(path)
    metrics_file.cut_back(path, 110, 2)
    if path.exists():
        kept = path.read_bytes().splitlines(keepends=True)
        assert len(metrics_file.read_metrics(path)) == len(kept)
        metrics_file.add_evaluation(folder, {"step": 2, "accuracy": 0.5})
    metrics_file.cut_text(folder / "samples.txt", 12)


def chats() -> list[Input]:
    """Returns each form of conversations, comparisons and problems, a line each."""
    said = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "nöt 3"}]
    call = {"function": {"name": "add", "arguments": "{}"}}
    rows = [
        {"messages": said, "tools": [{"type": "function"}]},
        {"messages": [*said, {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}], "system": "a"},
        {"instruction": "a", "input": "b", "output": "c"},
        {"prompt": said[:1], "completion": said[1:]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": said, "rejected": [said[0], said[1] | {"content": "2"}]},
        {"prompt": "a", "ranked": ["b", "c", "d"]},
        {"question": "1 + 1?", "answer": 2},
    ]
    return [{"in.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows).encode()}]


def read_chats(folder: Path) -> None:
    """Reads chats as each kind that they may be, and writes them in each built-in template."""
    path, tokenizer = folder / "in.jsonl", tokenizers.make("bytes", "")
    for _, found in conversations.read([path], Rows(), skip_bad=100):
        for name in chat_templates.NAMES:
            with contextlib.suppress(UserError):
                chat_templates.encode(found.messages, chat_templates.built_in(name), tokenizer)
    for read in (conversations.read_rankings, conversations.read_problems):
        list(read([path], Rows(), skip_bad=100))


def templates() -> list[Input]:
    """Returns a tokenizer's chat template, in each of the places that it may be in."""
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    several = [{"name": "default", "template": source}, {"name": "tools", "template": "x"}]
    configs = [names | {"chat_template": source}, names | {"chat_template": several}]
    made = [{"tokenizer_config.json": json.dumps(config).encode()} for config in configs]
    return [*made, {"chat_template.jinja": source.encode(), "special_tokens_map.json": json.dumps(names).encode()}]


def read_template(folder: Path) -> None:
    """Reads a template and renders it."""
    if template := huggingface_chat.template_of(folder):
        said = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
        chat_templates.encode(said, template, tokenizers.make("bytes", ""))


def prepared_chats() -> list[Input]:
    """Returns token files of conversations, their marks and their manifest."""

    def made(folder: Path) -> None:
        (folder / "in.jsonl").write_bytes(b'{"prompt": "a", "response": "b"}\n' * 20)
        asked = prepare_conversations.ChatSettings("a", (str(folder / "in.jsonl"),), (), 1000)
        prepare_conversations.prepare(
            asked, folder / MADE, tokenizers.make("bytes", ""), chat_templates.built_in("chatml")
        )
        (folder / "in.jsonl").unlink()

    return [written(made)]


def read_prepared_chats(folder: Path) -> None:
    """Reads prepared chats as a run does that trains on them."""
    found = corpus.find_token_files(str(folder / MADE))
    assert found is not None
    for source in (found.train, found.validation):
        if isinstance(source, packing.Conversations):
            list(source.rows(range(source.packed(100).rows), 100))
    if found.manifest and found.manifest.template:
        chat_templates.from_state(found.manifest.template)


READERS = [
    Reader("conversations", chats, read_chats),
    Reader("a chat template", templates, read_template),
    Reader("prepared conversations", prepared_chats, read_prepared_chats),
    Reader("text", plain, read_text),
    Reader("text, packed", packed, read_text),
    Reader("prepare: JSON", json_rows, read_rows),
    Reader("prepare: Parquet", parquets, read_rows),
    Reader("prepare: packed", packed, read_rows),
    Reader("prepare, which goes on", unfinished, lambda folder: make(folder, "bytes", shard_tokens=100)),
    Reader("prompts", prompts, lambda folder: prompts_in(folder / "prompts.txt")),
    Reader("a client's request", requests, read_request),
    Reader("a checkpoint's SHA256SUMS", sums, checksums.damage),
    Reader("a resumed run's metrics", metrics, go_on),
]
