"""A folder in which every line of README and docs/ can be run: texts, runs that were trained, weights, a hub."""

import hashlib
import io
import json
import re
import shutil
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.commands import cli
from jaxgpt.data import corpora
from jaxgpt.evaluation.tasks import TASKS
from jaxgpt.interop import detect_format, llmc
from jaxgpt.options.config import Compute, Model
from tests import whole
from tests.data.test_hub import Hub, jsonl, token_file
from tests.docs.commands import ROOT
from tests.evaluation.task_folders import INSTRUCTED, SUMS, write_core, write_described, write_lines
from tests.evaluation.test_multiple_choice import ROWS
from tests.evaluation.test_tasks import ARC_OF_THE_HUB
from tests.interop import gguf_files

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer.\n" * 30
RUNS = ["NAME", "A", "B", "sft", "dpo", "grpo", "book", "notes", "gpt2_124m", "gpt2_124m_fineweb", "miniature"]

# After a line's own options, so that it takes seconds. GPT-2's vocabulary stays, since the lines' weights have it.
SMALL = ["--model.layers=1", "--model.heads=2", "--model.width=8", "--model.context=128", "--training.steps=2"]
SMALL += ["--training.sequence-length=16", "--training.batch-size=8", "--training.micro-batches=1"]
SMALL += ["--training.evaluate-every=0", "--training.evaluation-batches=1", "--sampling.tokens=1"]
SMALL += ["--evaluation.limit=2", "--evaluation.every=0", "--compute.classifier-chunk=16", "--parallel.devices=1"]

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
PIQA = {"goal": "To open a door,", "sol1": "turn the handle.", "sol2": "eat it.", "label": 0}
MMLU = "What is a cat?,an animal,a plant,a stone,a number,A\n"


def build(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes it, and it is the current folder."""
    patch.chdir(folder)
    patch.delenv("JAXGPT_DATA", raising=False)
    for name in ("book.txt", "books/one.txt", "notes/a.md", "notes/b.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(TEXT, encoding="utf-8")
    turn = json.dumps({"prompt": "To be?", "response": "To be."})
    Path("chat.jsonl").write_text(20 * f"{turn}\n", encoding="utf-8")
    pair = json.dumps({"prompt": "To be?", "chosen": "To be.", "rejected": "Or not."})
    Path("comparisons.jsonl").write_text(4 * f"{pair}\n", encoding="utf-8")
    problem = json.dumps({"prompt": "To be?", "answer": "To be."})
    Path("problems.jsonl").write_text(4 * f"{problem}\n", encoding="utf-8")
    Path("my_rewards.py").write_text("def short(text, answer):\n    return len(text)\n", encoding="utf-8")
    Path("prompts.txt").write_text("To be\nThe question\n", encoding="utf-8")
    Path("person.json").write_text(json.dumps(PERSON), encoding="utf-8")
    Path("sum.lark").write_text('start: /[0-9]/ ("+" /[0-9]/)~1..3\n', encoding="utf-8")
    own_config()
    Path("docs").mkdir()
    shutil.copy(ROOT / "docs/index.md", "docs/index.md")
    Path("latin1.txt").write_bytes("café".encode("latin-1"))
    Path("photo.bin").write_bytes(b"\xff\xd8" * 100)
    Path("web").mkdir()
    arrow = pytest.importorskip("pyarrow", reason="writes zstd and Parquet with pyarrow, of the data extra")
    with arrow.CompressedOutputStream("web/a.jsonl.zst", "zstd") as stream:
        stream.write((json.dumps({"content": TEXT}) + "\n").encode())
    _tasks()
    _hub(patch, folder)
    _runs()


def own_config() -> None:
    """mine.toml, as the page on configuration shows it."""
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    Path("mine.toml").write_text(shown, encoding="utf-8")


def _tasks() -> None:
    Path("hellaswag_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    write_lines(Path("gsm8k_test.jsonl"), SUMS)
    write_lines(Path("gsm8k_train.jsonl"), SUMS)
    write_lines(Path("ifeval.jsonl"), INSTRUCTED)
    write_described(Path())
    write_core(Path("eval_bundle"), examples=4)
    listed = Path("eval_bundle/core.yaml")
    listed.write_text(re.sub(r"num_fewshot: \[[0-9]\]", "num_fewshot: [1]", listed.read_text()))  # for a limit of 2
    for split in ("test", "dev"):
        Path("data", split).mkdir(parents=True)
        Path("data", split, f"animals_{split}.csv").write_text(5 * MMLU, encoding="utf-8")


def _hub(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """The edge of the network: what the lines ask the Hugging Face hub for is made up, and there."""
    library = pytest.importorskip("huggingface_hub", reason="stands in for huggingface-hub, of the data extra")
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    hub = Hub(folder / "hub")
    split = {"data/train-0.jsonl": jsonl(*20 * [TEXT]), "data/validation-0.jsonl": jsonl(TEXT)}
    hub.put("roneneldan/TinyStories", split)
    hub.put("owner/name", {"configuration/split-0.jsonl": jsonl(TEXT)})
    hub.put("HuggingFaceFW/fineweb", {"sample/10BT/0.jsonl": jsonl(*20 * [TEXT])})
    tokens = np.arange(2000) % 50257
    shards = {name: token_file(folder / "t", tokens) for name in ("x_val_000000.bin", "x_train_000001.bin")}
    hub.put("kjj0/fineweb10B-gpt2", shards)

    def download(repository, name, **options):
        if name.endswith("0000.parquet"):
            asked = (repository, str(Path(name).parent))
            task = next(task for task in TASKS.values() if (task.repository, task.part) == asked)
            row = {"ybisk/piqa": PIQA, "allenai/ai2_arc": ARC_OF_THE_HUB}.get(repository, {"ind": 0, **ROWS[0]})
            path = folder / f"{Path(repository).name}.parquet"
            if not path.exists():
                parquet.write_table(arrow.Table.from_pylist(task.examples * [row]), path)
            return str(path)
        return hub.download(repository, name, **({"local_dir": ""} | options))

    def snapshot(name, **options):
        return str(folder / f"{'llama' if 'LM' in name else 'gpt2'}-of-the-hub")

    patch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    patch.setattr(urllib.request, "urlopen", lambda address, timeout: io.BytesIO(TEXT.encode()))
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setattr(library, "HfApi", lambda: hub)
    patch.setattr(library, "hf_hub_download", download)
    patch.setattr(library, "snapshot_download", snapshot)


def _runs() -> None:
    train = ["--config", "gpt2_124m", *SMALL, "--data.text=book.txt", "--run.name=quickstart"]
    assert cli.main(train) == 0
    for name in RUNS:
        shutil.copytree("runs/quickstart", f"runs/{name}")
    compare = ["--config", "reward_quickstart", "--init-from=runs/sft", "--data.text=comparisons.jsonl"]
    more = ["--training.steps=1", "--training.batch-size=2", "--parallel.devices=1", "--run.no-report"]
    assert cli.main([*compare, *more, "--run.name=reward"]) == 0
    for name in ("books", "notes"):
        assert cli.main(["prepare", name, "--output", f"data/{name}", "--processes", "1"]) == 0
    chats = ["--tokenizer", "runs/quickstart", "--output", "data/chat"]
    assert cli.main(["prepare", "--chat", "chat.jsonl", *chats]) == 0
    for name in ("fineweb-10B", "tinystories", "pages"):
        shutil.copytree("data/notes", f"data/{name}")


def weights() -> None:
    """Writes weights for the hub, in llm.c's formats with a debug state, and in llama.cpp's."""
    llama = Model(
        family="llama", layers=1, heads=2, width=32, feed_forward=32, context=64, vocabulary_size=len(gguf_files.PIECES)
    )
    gguf_files.write(
        Path("llama-3.2-1b-q8_0.gguf"),
        llama,
        gguf_files.state(llama),
        kind="Q8_0",
        tokenizer=gguf_files.sentencepiece(),
    )
    assert cli.main(["convert", "llama-3.2-1b-q8_0.gguf", "Llama-3.2-1B", "--to", "huggingface"]) == 0
    assert cli.main(["convert", "runs/quickstart", "gpt2-of-the-hub"]) == 0
    assert cli.main(["--model.family=llama", *SMALL, "--data.text=book.txt", "--run.name=llama"]) == 0
    assert cli.main(["convert", "runs/llama", "llama-of-the-hub"]) == 0
    assert (
        cli.main([*SMALL, "--data.text=book.txt", "--init-from=gpt2-of-the-hub", "--lora.rank=2", "--run.name=low"])
        == 0
    )
    assert cli.main(["convert", "runs/low", "ADAPTER", "--to", "peft"]) == 0
    assert cli.main(["convert", "runs/quickstart", "gpt2_124M.bin"]) == 0
    (tokenizer,) = Path().glob("*tokenizer*.bin")
    tokenizer.rename("gpt2_tokenizer.bin")
    assert cli.main(["convert", "runs/quickstart", "gpt2_124M_bf16.bin", "--dtype", "bfloat16"]) == 0
    source = detect_format.open_weights("gpt2_124M.bin")
    model, compute, tokens = source.model, Compute(), np.arange(12, dtype=np.int32).reshape(2, 6)

    @jax.jit
    def run(params, tokens, targets):
        logits = whole.logits(params, tokens, model, compute)
        return logits, whole.loss_and_grads(params, tokens, targets, model, compute)

    logits, (loss, grads) = run(source.load(), tokens, tokens + 1)
    arrays = jax.tree.map(np.asarray, grads)
    state = llmc.State(tokens, tokens + 1, np.asarray(logits), float(loss), arrays)
    llmc.write_state(Path("gpt2_124M_debug_state.bin"), state)
