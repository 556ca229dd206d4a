"""Readers of files from outside that are fuzzed: the valid inputs of each, and how they are read.

A reader of another format is one more entry in READERS. An input is a folder's files by name, those in folders within
it too; a reader may raise UserError and nothing else, whatever they contain.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxgpt.data import encodings, fingerprint, manifest, token_files, tokenizers
from jaxgpt.evaluation import task_files
from jaxgpt.interop import gpt2_tables, huggingface, huggingface_tokenizer, llmc, peft, tensors
from jaxgpt.models import family, lora
from jaxgpt.options import checks, settings
from jaxgpt.options.config import Config, Lora, Model
from jaxgpt.reports import page
from jaxgpt.reports.history import History
from jaxgpt.runs import about

Input = dict[str, bytes]
MODEL = Model(layers=2, heads=2, width=8, context=6, vocabulary_size=130)


@dataclass(frozen=True)
class Reader:
    name: str
    seeds: Callable[[], list[Input]]  # valid ones
    read: Callable[[Path], object]  # all of what is in this folder


def written(write: Callable[[Path], object]) -> Input:
    """Returns the files that `write` leaves in a folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def params(dtype: str = "float32"):
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda tensor: generator.normal(size=gpt2_tables.shape(tensor, MODEL)).astype(tensors.DTYPES[dtype]),
        gpt2_tables.LAYOUT,
    )


def models() -> list[Input]:
    return [
        written(lambda folder: llmc.write_model(folder / "m.bin", params(), MODEL, "float32")),
        written(lambda folder: llmc.write_model(folder / "m.bin", params("bfloat16"), MODEL, "bfloat16")),
    ]


def states() -> list[Input]:
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
    state = llmc.State(tokens, tokens, np.zeros((2, 5, 130), np.float32), 1.0, params())
    return [written(lambda folder: llmc.write_state(folder / "s.bin", state))]


def token_lists() -> list[Input]:
    tokens = [bytes([byte]) for byte in range(256)] + [b"the", b" and", b"<|endoftext|>"]
    many = [b"x"] * 50257
    few = written(lambda folder: llmc.write_tokenizer(folder / "t.bin", tokens, 258))
    return [*[few] * 60, written(lambda folder: llmc.write_tokenizer(folder / "t.bin", many, 50256))]


def folders() -> list[Input]:
    def export(dtype: str, shard_bytes: int) -> Input:
        made = written(lambda folder: huggingface.write_folder(folder, params(dtype), MODEL, dtype, None, shard_bytes))
        return {name: content for name, content in made.items() if not name.startswith("generation")}  # never read

    return [export("float32", 1 << 30), export("bfloat16", 1 << 30), export("float16", 2000)]


def relatives() -> list[Input]:
    """Returns folders of Llama, Mistral, Qwen3 and Mixtral, with the keys that transformers 4 and 5 write."""
    base = dataclasses.replace(MODEL, family="llama", heads=4, kv_heads=2, feed_forward=12)
    models = [
        dataclasses.replace(base, rope_scaling="llama3", rope_original_context=4),
        dataclasses.replace(base, window=3, kv_heads=1),
        dataclasses.replace(base, query_key_norm=True, tied=True, window=3),
        dataclasses.replace(base, family="mixtral", experts=2),
    ]
    of_transformers_5 = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    more = [{}, of_transformers_5, of_transformers_5 | {"layer_types": ["sliding_attention"] * 2}, {}]
    return [relative(model, keys) for model, keys in zip(models, more, strict=True)]


def relative(model: Model, keys: dict[str, object]) -> Input:
    """Returns one folder, with further keys in its config.json."""
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: family(model).init(model, jax.random.key(0)))
    drawn = jax.tree.map(lambda like: generator.normal(size=like.shape).astype(np.float32), shapes)
    made = written(lambda folder: huggingface.write_folder(folder, drawn, model, "float32", None, 1 << 30))
    content = json.loads(made["config.json"]) | keys
    return {"config.json": json.dumps(content).encode(), "model.safetensors": made["model.safetensors"]}


def adapter_folders() -> list[Input]:
    generator = np.random.default_rng(0)

    def export(folder: Path, targets: tuple[str, ...], dtype: str) -> None:
        options = Lora(rank=2, targets=targets, base="float32")
        shapes = jax.eval_shape(lambda: lora.init(MODEL, options, jax.random.key(0)))
        adapters = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes)
        source = tensors.AdapterSource(options, "base", lambda: adapters, "0" * 64)
        peft.write_folder(folder, adapters, MODEL, source, dtype)

    return [
        written(lambda folder: export(folder, ("all-linear",), "float32")),
        written(lambda folder: export(folder, ("c_attn",), "bfloat16")),
    ]


def read_adapter(folder: Path) -> None:
    """Reads an adapter beside a base that is there under any name."""
    base = tensors.WeightSource("base", "made up", MODEL, "float32", None, params)
    source = peft.open_folder(folder, lambda name: base)
    assert source.adapters
    source.adapters.load()


def tokenizer_files() -> list[Input]:
    ours = [tokenizers.make("bytes", ""), tokenizers.make("characters", "to be, or nöt\n")]
    made = [
        {name: text.encode() for name, text in huggingface_tokenizer.files_of(tokenizer, MODEL).items()}
        for tokenizer in ours
    ]
    return [*made, *([{"tokenizer.json": text.encode()} for text in foreign_tokenizers()]), two_files()]


def two_files() -> Input:
    """vocab.json and merges.txt, as older versions of transformers wrote them."""
    words = [*encodings.CHARACTER_OF, "th", "the"]
    vocabulary = json.dumps({word: number for number, word in enumerate(words)})
    merges = "#version: 0.2\nt h\nth e\n"
    config = json.dumps({"add_prefix_space": True, "eos_token": "the"})
    texts = {"vocab.json": vocabulary, "merges.txt": merges, "tokenizer_config.json": config}
    return {name: text.encode() for name, text in texts.items()}


def foreign_tokenizers() -> list[str]:
    """Returns a small tokenizer for each model and most parts that the package tokenizers has."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    byte_tokens = {f"<0x{byte:02X}>": byte for byte in range(256)}
    pairs = Tokenizer(models.BPE(byte_tokens | {"▁": 256, "a": 257, "▁a": 258}, [("▁", "a")], byte_fallback=True))
    pairs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    pairs.decoder = decoders.Sequence(parts)
    pairs.add_tokens(["<tool>"])
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.decoder, words.post_processor = decoders.WordPiece(), processors.BertProcessing(("a", 1), ("[UNK]", 0))
    likely = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("a", -2.0)], 0, False))
    likely.pre_tokenizer, likely.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    likely.add_special_tokens(["</s>"])
    split = Tokenizer(models.BPE({character: byte for byte, character in enumerate(encodings.CHARACTER_OF)}, []))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    split.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), level])
    split.decoder = decoders.ByteLevel()
    return [tokenizer.to_str() for tokenizer in (pairs, words, likely, split)]


def read_tokenizer(folder: Path) -> None:
    """Reads a tokenizer and, if it is there, encodes a text and decodes tokens."""
    tokenizer, _ = huggingface_tokenizer.read(folder, Model(vocabulary_size=1 << 16))
    if tokenizer:
        tokenizer.decode(tokenizer.encode("to be, or nöt: 123 <tool></s>\n" * 10))
        tokenizer.join(range(min(300, tokenizer.vocabulary_size)))


def token_shards() -> list[Input]:
    tokens = np.arange(500, dtype=np.uint32)
    forms = (token_files.GPT2, token_files.LLAMA3)
    return [written(lambda folder, form=form: token_files.write(folder / "t.bin", tokens, form)) for form in forms]


def manifests() -> list[Input]:
    def prepared(folder: Path) -> None:
        for name in ("train_000000.bin", "val_000000.bin"):
            token_files.write(folder / name, np.arange(300, dtype=np.uint16), token_files.GPT2)
        shards = (
            manifest.describe(folder / "train_000000.bin", "train"),
            manifest.describe(folder / "val_000000.bin", "val"),
        )
        manifest.write(
            folder, manifest.Manifest("made up", {"name": "bytes"}, 300, None, 2, 0, 0, {"a": 1}, {}, shards)
        )

    return [written(prepared)]


def choices() -> list[Input]:
    ids = [np.arange(1, 1 + length) for length in (3, 1, 5, 2)]
    examples = [task_files.TokenExample(ids[i % 4], tuple(ids), i % 4) for i in range(8)]
    return [written(lambda folder: task_files.write_llmc(folder / "c.bin", examples))]


def task_lines() -> list[Input]:
    row = {"ctx": "A man sits down. He", "activity_label": "Sitting", "endings": ["sits", "stands", "sleeps", "sings"]}
    lines = [json.dumps({**row, "label": label, "ind": label}) for label in range(4)]
    return [{"hellaswag.jsonl": ("\n".join(lines) + "\n").encode()}]


def configurations() -> list[Input]:
    """Returns a config.toml as a run has it, and a short one as people write it."""
    short = b'# mine\n[model]\nlayers = 2\n[data]\ntext = "a.txt"\n[sampling]\nstop = ["a", \'b\']\n'
    return [written(lambda folder: settings.write(Config(model=MODEL), folder / "config.toml")), {"config.toml": short}]


def read_configuration(folder: Path) -> None:
    """Reads a configuration as readers of a run do, and as training does that is given the file."""
    checks.check_model(settings.read_trained(folder).model)
    checks.check(settings.read(folder / "config.toml"))


def abouts() -> list[Input]:
    """Returns descriptions of checkpoints: of a text, of token files in shares, and of an older version."""
    text = fingerprint.of(b"to be")
    tokens = {"files": {"a_train_0.bin": text | {"sha256": ""}, "a_val_0.bin": {"bytes": 9, "samples": ["ab"]}}}
    common = {"configuration": dataclasses.asdict(Config(model=MODEL)), "versions": settings.versions(), "step": 3}
    more = [
        {"tokenizer": {"name": "characters", "characters": " beot"}, "text": text, "lengths": {"samples.txt": 3}},
        {"tokenizer": {"name": "bytes"}, "text": {"quotas": [3, 5], "sources": [tokens, text]}, "converted_from": "x"},
        {"configuration": {"model": dataclasses.asdict(MODEL)}, "tokenizer": {"name": "bytes"}},
    ]
    return [{about.FILE.as_posix(): json.dumps(common | fields).encode()} for fields in more]


def read_about(folder: Path) -> None:
    """Reads a description, and does all that is done with it before anything is loaded."""
    found = about.read_about(folder)
    about.check_size(folder, found)
    tokenizers.from_state(found["tokenizer"])
    if found["text"]:
        fingerprint.difference(found["text"], fingerprint.of(b"to be or"))


def runs() -> list[Input]:
    """Returns the files that a report shows."""
    step = {"step": 1, "loss": 5.5, "learning_rate": 0.1, "grad_norm": 1.5, "skipped": 0, "tokens": 8, "mfu": None}
    lines = [
        step,
        step | {"step": 2, "loss": None, "skipped": 1},
        {"step": 2, "val_loss": 5.25, "val_bits_per_byte": 7},
    ]
    lines += [{"step": 2, "task": "hellaswag", "accuracy": 0.25, "accuracy_norm": None, "examples": 4}]
    plan = {"parts": {"parameters": 800, "gradients": 800}, "total": 1600, "capacity": None, "source": "x"}
    return [
        configurations()[0]
        | {
            "metrics.jsonl": "".join(f"{json.dumps(line)}\n" for line in lines).encode(),
            "samples.txt": "--- step 0\nto be\n\n--- step 2\nor nöt\n\n".encode(),
            "memory_plan.json": json.dumps(plan).encode(),
            "machine.json": json.dumps({"devices": "1 × cpu", "parameters": 800}).encode(),
        }
    ]


def read_run(folder: Path) -> None:
    """Reads a run as the report page does."""
    page.render([page.of_run(folder, History(folder / "metrics.jsonl").read_all())])


READERS = [
    Reader("config.toml", configurations, read_configuration),
    Reader("what a checkpoint says", abouts, read_about),
    Reader("a run's files", runs, read_run),
    Reader("token file", token_shards, lambda folder: int(token_files.tokens_of(folder / "t.bin").sum())),
    Reader("manifest", manifests, manifest.verify),
    Reader("multiple-choice file", choices, lambda folder: task_files.read_llmc(folder / "c.bin")),
    Reader(
        "multiple-choice lines",
        task_lines,
        lambda folder: task_files.questions("hellaswag", str(folder / "hellaswag.jsonl")),
    ),
    Reader("llm.c model", models, lambda folder: llmc.open_model(folder / "m.bin").load()),
    Reader("llm.c state", states, lambda folder: llmc.read_state(folder / "s.bin", MODEL)),
    Reader("llm.c tokenizer", token_lists, lambda folder: llmc.read_tokenizer(folder / "t.bin")),
    Reader("Hugging Face folder", folders, lambda folder: huggingface.open_folder(folder).load()),
    Reader("folder of Llama's kind", relatives, lambda folder: huggingface.open_folder(folder).load()),
    Reader("PEFT folder", adapter_folders, read_adapter),
    Reader("Hugging Face tokenizer", tokenizer_files, read_tokenizer),
]
