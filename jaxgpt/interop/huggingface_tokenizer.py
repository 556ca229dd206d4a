"""Hugging Face's tokenizer files: tokenizer.json, tokenizer_config.json, and for GPT-2 vocab.json and merges.txt.

- gpt2, and a BPE of one's own: byte-level BPE. The merges follow from the ranks, which are the ids: the merge that
  makes a token joins the two parts that its bytes are in when all merges before it are done.
- bytes: byte-level BPE with 256 tokens and no merge.
- characters: one word for each character; another character is an error there, as it is here.

Byte-level files write a byte as a printable character, the others as those from U+0100 on.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt import files
from jaxgpt.config import Model
from jaxgpt.data.tokenizers import GPT2, Bytes, Characters, Tokenizer, Trained

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unknown>"  # of characters; no token has this name, so that nothing is read as it
FILE = "tokenizer.json"


def _characters_of_bytes() -> list[str]:
    printable = {byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


CHARACTER_OF = _characters_of_bytes()
BYTE_OF = {character: byte for byte, character in enumerate(CHARACTER_OF)}


def written(token: bytes) -> str:
    """A token's bytes as byte-level files write them."""
    return "".join(CHARACTER_OF[byte] for byte in token)


def merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pairs that make the tokens, in the order of their ids; of single bytes there is none."""
    ranks: dict[bytes, int] = {}
    pairs = []
    for rank, token in enumerate(tokens):
        if len(token) > 1:
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                joined = [ranks.get(left + right, len(tokens)) for left, right in itertools.pairwise(parts)]
                first = min(range(len(joined)), key=joined.__getitem__)
                parts[first : first + 2] = [parts[first] + parts[first + 1]]
            pairs.append((parts[0], parts[1]))
        ranks[token] = rank
    return pairs


# Writing


def can_express(tokenizer: Tokenizer) -> bool:
    """Whether there are files for it. Of cl100k, o200k and Llama 3 the makers publish their own."""
    return isinstance(tokenizer, GPT2 | Trained | Bytes | Characters)


def files_of(tokenizer: Tokenizer, model: Model) -> dict[str, str]:
    """The files' contents by their names; none for a tokenizer that can't be expressed."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.context,
        "clean_up_tokenization_spaces": False,
    }
    result = {}
    if isinstance(tokenizer, GPT2 | Trained):
        plain = tokenizer.tokens[: tokenizer.end_of_text]
        vocabulary = {written(token): number for number, token in enumerate(plain)}
        pairs = [(written(left), written(right)) for left, right in merges(plain)]
        settings |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        content = _byte_level(vocabulary | {END_OF_TEXT: len(plain)}, pairs, cut_words=True)
        content["added_tokens"] = [_special(END_OF_TEXT, len(plain))]
        result["vocab.json"] = json.dumps(vocabulary | {END_OF_TEXT: len(plain)}, ensure_ascii=False)
        result["merges.txt"] = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in pairs)
    elif isinstance(tokenizer, Bytes):
        vocabulary = {written(token): number for number, token in enumerate(tokenizer.tokens)}
        content = _byte_level(vocabulary, [], cut_words=False)
    elif isinstance(tokenizer, Characters):
        content = _words({token.decode(): number for number, token in enumerate(tokenizer.tokens)})
    else:
        return {}
    result[FILE] = json.dumps(content, ensure_ascii=False)
    result["tokenizer_config.json"] = json.dumps(settings, indent=2) + "\n"
    return result


def _byte_level(vocabulary: Mapping[str, int], pairs: list[tuple[str, str]], *, cut_words: bool) -> dict[str, Any]:
    """With `cut_words` the text is first cut by GPT-2's pattern."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cut_words}
    model = {"type": "BPE", "vocab": vocabulary, "merges": pairs}
    return _empty() | {"pre_tokenizer": level, "post_processor": level, "decoder": level, "model": model}


def _words(vocabulary: Mapping[str, int]) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN}
    return _empty() | {"pre_tokenizer": split, "decoder": {"type": "Fuse"}, "model": model}


def _empty() -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": None,
    }


def _special(content: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True}


# Reading


def read(folder: Path, model: Model) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """The tokenizer of a folder, where it is one of ours, and else None; and what is to be said of it."""
    content: dict[str, Any] = {}
    if (folder / FILE).exists():
        content = files.read_json(folder / FILE)
        part = content.get("model")
        vocabulary = part.get("vocab") if isinstance(part, dict) else None
        words = isinstance(part, dict) and part.get("type") == "WordLevel"
    elif (folder / "vocab.json").exists():
        vocabulary, words = files.read_json(folder / "vocab.json"), False
    else:
        return None, ()
    tokenizer = (
        _known(vocabulary, words=words) or _trained(vocabulary, content) if isinstance(vocabulary, dict) else None
    )
    if tokenizer is None:
        return None, ("its tokenizer is none of this project's",)
    if tokenizer.vocabulary_size > model.vocabulary_size:
        return None, (f"its tokenizer has {tokenizer.vocabulary_size} tokens, more than the model",)
    return tokenizer, ()


def _known(vocabulary: dict[str, Any], *, words: bool) -> Tokenizer | None:
    if words:
        characters = "".join(sorted(vocabulary))
        is_ours = all(len(word) == 1 for word in vocabulary) and not any("\ud800" <= c <= "\udfff" for c in characters)
        ids = {character: number for number, character in enumerate(characters)}
        return Characters(characters) if characters and is_ours and vocabulary == ids else None
    if vocabulary == {character: byte for byte, character in enumerate(CHARACTER_OF)}:
        return Bytes()
    if vocabulary.keys() > BYTE_OF.keys() and len(vocabulary) >= 50256:
        gpt2 = GPT2()
        theirs = {written(token): number for number, token in enumerate(gpt2.tokens) if number != gpt2.end_of_text}
        if theirs | {END_OF_TEXT: gpt2.end_of_text} == vocabulary | {END_OF_TEXT: gpt2.end_of_text}:
            return gpt2
    return None


def _trained(vocabulary: dict[str, Any], content: dict[str, Any]) -> Tokenizer | None:
    """A BPE of one's own, where its file is the very one that we would write of it."""
    words = [word for word in vocabulary if word != END_OF_TEXT]
    if list(vocabulary.values()) != list(range(len(words) + 1)) or not vocabulary.keys() > BYTE_OF.keys():
        return None
    if words == list(vocabulary) or not all(character in BYTE_OF for word in words for character in word):
        return None
    tokenizer = Trained([bytes(BYTE_OF[character] for character in word) for word in words])
    return tokenizer if json.loads(files_of(tokenizer, Model())[FILE]) == content else None
