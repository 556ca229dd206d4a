"""Reads and writes Hugging Face's tokenizer files: tokenizer.json, tokenizer_config.json, vocab.json and merges.txt.

- gpt2, and a trained BPE: byte-level BPE. The merges follow from the ranks, which are the ids.
- bytes: byte-level BPE with 256 tokens and no merge.
- characters: one word for each character. An unknown character is an error there, as it is here.
- any other: the tokenizer.json itself, as the package `tokenizers` runs it. It is written again unchanged.
- tokenizer.model as Meta publishes it for Llama 3, where there is no tokenizer.json: as transformers converts it.

A file is read as one of our own tokenizers only where everything in it that a text's ids depend on is what we would
write.
"""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxgpt import files
from jaxgpt.data import encodings, llama3, tokenizer_json
from jaxgpt.data.encodings import BYTE_OF, END_OF_TEXT
from jaxgpt.data.tokenizer_json import HuggingFace
from jaxgpt.data.tokenizers import GPT2, Bytes, Characters, Tokenizer, TrainedBytePairs
from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown
from jaxgpt.interop import huggingface_config
from jaxgpt.options.config import Model

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
VOCABULARY, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"  # files of older versions
MODEL = "config.json"
SPECIAL = "special_tokens_map.json"
FILES = (FILE, CONFIG, SPECIAL, VOCABULARY, MERGES, ADDED)
LLAMA3 = "tokenizer.model"  # of Llama 3; others' files of this name are SentencePiece's
OTHERS = (LLAMA3, "spiece.model", VOCABULARY)  # one of these alone doesn't give the ids of a text
LARGEST_CONFIG = 1 << 24  # bytes
UNKNOWN = "<unknown>"  # for characters; no token has this name, so an unknown character is an error
LARGEST_COMPARED = 1 << 20  # bytes of all tokens together, up to which a file is compared with one of ours
EMPTY: dict[str, Any] = {  # a tokenizer.json
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    **dict.fromkeys(("pre_tokenizer", "post_processor", "decoder", "model")),
}
GPT2_WORDS = 50256  # tokens of GPT-2, without the end of text


# Writing


def can_express(tokenizer: Tokenizer) -> bool:
    """Returns whether a tokenizer's files can be written; the makers of cl100k and o200k publish their own."""
    own = GPT2 | TrainedBytePairs | Bytes | Characters | HuggingFace
    return isinstance(tokenizer, own) or tokenizer.name == "llama3"


def files_of(tokenizer: Tokenizer, model: Model) -> dict[str, str]:
    """Returns the contents of a tokenizer's files by name; empty for a tokenizer whose files can't be written."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.context,
        "clean_up_tokenization_spaces": False,
    }
    result = {}
    if isinstance(tokenizer, HuggingFace):
        result[FILE] = tokenizer.text
        if tokenizer.end_of_text is not None:
            settings |= dict.fromkeys(("bos_token", "eos_token"), tokenizer.token(tokenizer.end_of_text))
        if tokenizer.begin_of_text is not None:
            settings["bos_token"] = tokenizer.token(tokenizer.begin_of_text)
    elif can_express(tokenizer):
        content = _content(tokenizer)
        result[FILE] = json.dumps(content, ensure_ascii=False)
        if isinstance(tokenizer, GPT2 | TrainedBytePairs):
            settings |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
            settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
            result[VOCABULARY] = json.dumps(content["model"]["vocab"], ensure_ascii=False)
            pairs = "".join(f"{left} {right}\n" for left, right in content["model"]["merges"])
            result[MERGES] = f"#version: 0.2\n{pairs}"
        elif tokenizer.name == "llama3":
            settings |= dict.fromkeys(("bos_token", "eos_token"), llama3.SPECIAL[0])  # as this project trains with it
    else:
        return {}
    result[CONFIG] = json.dumps(settings, indent=2) + "\n"
    return result


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the tokenizer.json of one of our own tokenizers."""
    if isinstance(tokenizer, GPT2 | TrainedBytePairs):
        plain = tokenizer.tokens[: tokenizer.end_of_text]
        vocabulary = {encodings.written(token): number for number, token in enumerate(plain)}
        pairs = encodings.merges(plain)
        content = _byte_level(vocabulary | {END_OF_TEXT: len(plain)}, pairs, [_special(END_OF_TEXT, len(plain))])
        if 256 + len(pairs) < len(plain):  # no merges make some tokens, which are whole words
            content["model"]["ignore_merges"] = True
        return content
    if tokenizer.name == "llama3":
        return llama3.tokenizer_json(tokenizer.tokens[: llama3.RANKS])
    vocabulary = {token: number for number, token in enumerate(tokenizer.tokens)}
    if isinstance(tokenizer, Bytes):
        return _byte_level({encodings.written(token): number for token, number in vocabulary.items()}, [], cut=False)
    words = {token.decode(): number for token, number in vocabulary.items()}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": words, "unk_token": UNKNOWN}
    return EMPTY | {"pre_tokenizer": split, "decoder": {"type": "Fuse"}, "model": model}


def _byte_level(
    vocabulary: dict[str, int],
    pairs: list[tuple[str, str]],
    added: Iterable[dict[str, Any]] = (),
    *,
    cut: bool = True,
    space: bool = False,
) -> dict[str, Any]:
    """Returns the tokenizer.json of a byte-level BPE, with entries of added tokens.

    With `cut` GPT-2's pattern cuts the text into words first; with `space` a space is put before the text.
    """
    level = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True, "use_regex": cut}
    model = {"type": "BPE", "vocab": vocabulary, "merges": pairs}
    parts = {"added_tokens": list(added), "pre_tokenizer": level, "post_processor": level, "decoder": level}
    return EMPTY | parts | {"model": model}


def _special(content: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True}


# Reading


def read(folder: Path, model: Model, end_of_text: int | None = None) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """Returns the tokenizer of a Hugging Face folder, and notes for the user.

    The tokenizer is None where the folder has no files of one, where it has more tokens than the model, and where the
    package `tokenizers` is needed and missing. The notes say which. `end_of_text` is the end of text's id by the
    model's config.json, for tokenizers that don't name it. UserError where a file is damaged or can't be read.
    """
    try:
        tokenizer = _of_folder(folder, end_of_text)
    except tokenizer_json.MissingPackage as error:
        return None, (str(error),)
    if tokenizer is None:
        other = [name for name in OTHERS if (folder / name).exists()]
        return None, tuple(f"its tokenizer is {name} alone: save it with transformers as {FILE}" for name in other[:1])
    if tokenizer.vocabulary_size > model.vocabulary_size:
        return None, (f"its tokenizer has {tokenizer.vocabulary_size} tokens, more than the model",)
    return tokenizer, _disagreements(folder, tokenizer)


def read_file(path: Path) -> Tokenizer:
    """Reads a tokenizer.json, Llama 3's tokenizer.model, or a folder's. UserError for none, or a damaged one.

    The files beside it say which token is the end of text, as they do for the weights of the same folder.
    """
    folder = path if path.is_dir() else path.parent
    end_of_text = huggingface_config.end_of_text(read_config(folder, MODEL))
    if path.is_dir():
        tokenizer = _of_folder(path, end_of_text)
        if tokenizer is None:
            raise UserError(f"{shown(path)}: a folder without {FILE}, and without {VOCABULARY} and {MERGES}")
        return tokenizer
    if is_llama3(path):
        return _of_llama3(path, end_of_text)
    return _of_text(path, files.read_text(path, files.LARGEST_JSON), end_of_text)


def is_llama3(path: Path, within: Path | None = None) -> bool:
    """Returns whether a file begins as Llama 3's tokenizer.model does: "!" in base64, and its rank 0."""
    if not files.is_file(path, within):
        return False
    with files.open_file(path, within) as file:
        return file.read(7) == b"IQ== 0\n"


def root(folder: Path) -> Path:
    """Returns the folder that no link may lead out of: the hub's cache links from a snapshot to blobs beside it."""
    absolute = folder.absolute()
    return absolute.parent.parent if absolute.parent.name == "snapshots" else folder


def _of_folder(folder: Path, end_of_text: int | None) -> Tokenizer | None:
    path, within = folder / FILE, root(folder)
    if path.exists():
        text = files.read_text(path, files.LARGEST_JSON, within)
    elif (folder / VOCABULARY).exists() and (folder / MERGES).exists():
        text = json.dumps(_of_two_files(folder, within), ensure_ascii=False)
    elif is_llama3(folder / LLAMA3, within):
        return _of_llama3(folder / LLAMA3, end_of_text, within)
    else:
        return None
    return _of_text(path, text, end_of_text)


def _of_llama3(path: Path, end_of_text: int | None, within: Path | None = None) -> Tokenizer:
    text = json.dumps(llama3.tokenizer_json(llama3.read(path, within)), ensure_ascii=False)
    return _of_text(path, text, llama3.END_OF_TEXT if end_of_text is None else end_of_text)


def _of_text(path: Path, text: str, end_of_text: int | None) -> Tokenizer:
    """Returns one of our own tokenizers where it is the same, and else the one that `tokenizers` makes of the text."""
    names = _names(path.parent)
    try:
        asked = _essential(tokenizer_json.parse(text))
        ours = _candidate(asked["model"]) if asked else None
        if ours and _essential(_content(ours)) == asked:
            return ours
        tokenizer = HuggingFace(text)
        ids = [tokenizer.id_of(name) for name in names]
        if end_of_text is not None and not 0 <= end_of_text < tokenizer.vocabulary_size:
            end_of_text = None
        found = [number for number in (*ids, end_of_text, tokenizer.id_of(END_OF_TEXT)) if number is not None]
        tokenizer.end_of_text = found[0] if found else None
        tokenizer.begin_of_text = tokenizer.stated_beginning()
        return tokenizer
    except tokenizer_json.MissingPackage:
        raise
    except UserError as error:
        raise UserError(f"{shown(path)}: {error}. Get it again from where it came") from None


def _candidate(model: dict[str, Any]) -> Tokenizer | None:
    """Returns our own tokenizer with this vocabulary, or None."""
    vocabulary = model["vocab"]
    if list(vocabulary.values()) != list(range(len(vocabulary))):
        vocabulary = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    words = [word for word in vocabulary if word != END_OF_TEXT]
    if model.get("type") == "WordLevel":
        characters = "".join(words)
        plain = all(len(word) == 1 and not "\ud800" <= word <= "\udfff" for word in words)
        return Characters(characters) if plain and words and words == sorted(words) else None
    if not (vocabulary.keys() >= BYTE_OF.keys() and all(BYTE_OF.keys() >= set(word) for word in words)):
        return None
    tokens = [bytes(map(BYTE_OF.__getitem__, word)) for word in words]
    if len(words) == len(vocabulary):
        return Bytes() if len(words) == 256 else None
    with contextlib.suppress(UserError):  # where GPT-2's file can't be had
        if len(words) == GPT2_WORDS and tokens == list((gpt2 := GPT2()).tokens[:-1]):
            return gpt2
    if sum(map(len, tokens)) > LARGEST_COMPARED or b"" in tokens or list(vocabulary)[-1] != END_OF_TEXT:
        return None
    return TrainedBytePairs(tokens)


def _essential(content: dict[str, Any]) -> dict[str, Any] | None:
    """Returns everything that encoding and decoding depend on, in a canonical form; None where there is none."""
    model, before, after = content.get("model"), content.get("pre_tokenizer"), content.get("decoder")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not (isinstance(model, dict) and isinstance(vocabulary, dict) and isinstance(before, dict)):
        return None
    if not (isinstance(after, dict) and all(type(number) is int for number in vocabulary.values())):
        return None
    if before.get("type") == "ByteLevel":  # offsets are not asked for
        before = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, **before, "trim_offsets": True}
    if after.get("type") == "ByteLevel":  # decoding ignores its options
        after = {"type": "ByteLevel"}
    # Options that are off are dropped, and in a BPE the unknown token, since every byte is known.
    unused = ("unk_token", "fuse_unk") if model.get("type", "BPE") == "BPE" else ()
    options = {key: value for key, value in model.items() if value not in (None, False, "") and key not in unused}
    merges = model.get("merges", [])
    options |= {"type": model.get("type", "BPE"), "merges": _pairs(merges) if isinstance(merges, list) else merges}
    added = content.get("added_tokens") or []
    if isinstance(added, list) and all(isinstance(token, dict) for token in added):  # there is no normaliser
        added = [{key: value for key, value in token.items() if key != "normalized"} for token in added]
    parts = {"added_tokens": added, "pre_tokenizer": before, "decoder": after, "model": options}
    return parts | {"normalizer": content.get("normalizer")}


def _pairs(merges: list[Any]) -> list[Any]:
    """Returns merges as pairs; older files write a merge as one string with a space in it."""
    split = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [tuple(merge) if isinstance(merge, list | tuple) else merge for merge in split]


def _of_two_files(folder: Path, within: Path) -> dict[str, Any]:
    """Returns the tokenizer.json that transformers makes from vocab.json and merges.txt. UserError for a bad merge."""
    vocabulary = files.read_json(folder / VOCABULARY, within=within)
    text = files.read_text(folder / MERGES, files.LARGEST_JSON, within)
    lines = [line for line in files.text_lines(text) if line and not line.startswith("#version")]
    pairs = [tuple(line.split(" ")) for line in lines]
    wrong = next((number for number, pair in enumerate(pairs) if len(pair) != 2), None)
    if wrong is not None:
        raise UserError(f"{shown(folder / MERGES)}: merge {wrong + 1:,} is not two parts with a space between them")
    added = {END_OF_TEXT: vocabulary[END_OF_TEXT]} if END_OF_TEXT in vocabulary else {}
    if (folder / ADDED).exists():
        added |= files.read_json(folder / ADDED, LARGEST_CONFIG, within)
    tokens = [_special(name, number) for name, number in added.items()]
    space = read_config(folder, CONFIG).get("add_prefix_space") is True
    return _byte_level(vocabulary, pairs, tokens, space=space)  # type: ignore[arg-type]


def _names(folder: Path) -> list[str]:
    """Returns the names that the folder's files give the end of text, which may be none."""
    found = []
    for file in (CONFIG, SPECIAL):
        token = read_config(folder, file).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        found += [token] if isinstance(token, str) else []
    return found


def _disagreements(folder: Path, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns notes on where tokenizer_config.json disagrees with tokenizer.json, which is followed."""
    config, notes = read_config(folder, CONFIG), []
    added = config.get("added_tokens_decoder")
    names = (
        [token.get("content") for token in added.values() if isinstance(token, dict)] if isinstance(added, dict) else []
    )
    known = tokenizer.id_of if isinstance(tokenizer, HuggingFace) else {END_OF_TEXT: tokenizer.end_of_text}.get
    missing = [name for name in names if isinstance(name, str) and known(name) is None]
    if missing:
        notes.append(f"{CONFIG} adds {len(missing):,} tokens that {FILE} hasn't got: {quoted(missing[0])} first")
    if config.get("add_prefix_space") is True and isinstance(tokenizer, GPT2 | TrainedBytePairs):
        notes.append(f"{CONFIG} has add_prefix_space, and {FILE} has it not: a text begins without a space")
    return tuple(notes)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Returns a JSON file of a folder, {} where it isn't there. UserError for a damaged one."""
    path = folder / name
    return files.read_json(path, LARGEST_CONFIG, root(folder)) if path.exists() else {}
