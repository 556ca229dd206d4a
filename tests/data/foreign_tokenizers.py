"""Tokenizers of other makers, small ones of each kind, as the texts of their tokenizer.json."""

import functools

import pytest

tokenizers = pytest.importorskip("tokenizers", reason="makes tokenizer.json files, with the package of the extra data")

TEXT = "The quick brown Fox isn't over 12345 lazy dogs.\r\n\n  Naïve café 日本 🎭 <tool> x</s>y  "
# What tokenizers get wrong: line ends, scripts, combining marks and signs, spaces of many kinds, tokens' names.
AWKWARD = (
    " one leading space\r\n  two\tand a tab\r\n\r\n\n   \n中文字符，日本語テキスト 한국어 ไทย हिन्दी עברית العربية\n"
    "e\u0301 a\u0308\u0323 \ufb01 \u1e9b\u0323 Z\u0351\u036b\u0343 x\u200dy\u200bz\u00a0w\u3000v\ufeff\n"
    "🎭👩\u200d👩\u200d👧\u200d👦🇫🇷👍🏽\n"
    "don't WE'LL it'S 1234567 3.14 1,000 ½ ٣٤ x²  <s>inside</s> a<|endoftext|>b <|begin_of_text|> <|im_start|>user\n"
    "[INST] hi [/INST] <tool><think> ▁under ĠG ĊC <0x0A> <unk> [CLS]\u0000\u0007 trailing   "
)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(**options):
    """GPT-2's kind, with some merges."""
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [
        ("t", "h"),
        ("th", "e"),
        ("h", "e"),
        ("Ġ", "t"),
        ("Ġt", "he"),
        ("1", "2"),
        ("12", "3"),
        ("Ġ", "d"),
        ("o", "g"),
    ]
    words = [*alphabet, *("".join(pair) for pair in pairs), "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made


def with_added_tokens():
    """Added tokens: an ordinary one, one that strips the space before it, a special one, and one of no byte."""
    made = byte_level()
    made.add_tokens(["<tool>", tokenizers.AddedToken(" café", lstrip=True), "日本"])
    made.add_special_tokens(["</s>"])
    return made


def with_prefix_space():
    return byte_level(add_prefix_space=True)


def lower_cased():
    from tokenizers import normalizers

    made = byte_level()
    made.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
    return made


def of_llama3():
    """Llama 3's pattern, whose words are looked up whole before they are merged."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*alphabet, "th", "the", "12", "Ġlazy"])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e"), ("1", "2")], ignore_merges=True))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), level])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|begin_of_text|>", "</s>"])
    number = made.token_to_id("<|begin_of_text|>")
    made.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", None, [("<|begin_of_text|>", number)])
    return made


def of_llama2():
    """SentencePiece's BPE: a space before the text, spaces as ▁, unknown characters as bytes."""
    from tokenizers import decoders, models, normalizers

    pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "l"), ("o", "g")]
    characters = sorted(set("▁abcdefghijklmnopqrstuvwxyzTF.'12"))
    words = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *characters, *("".join(pair) for pair in pairs)]
    made = tokenizers.Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens(["<tool>"])
    return made


def of_llama2_with_begin():
    """Llama 2's as its makers publish it: its post-processor puts <s> before a text."""
    from tokenizers import processors

    made = of_llama2()
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B:1", [("<s>", made.token_to_id("<s>"))])
    return made


def of_mistral():
    """Mistral's, as transformers writes it today: Metaspace in the place of the normaliser, merges as texts."""
    from tokenizers import pre_tokenizers

    made = of_llama2_with_begin()
    made.normalizer = None
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    made.add_special_tokens(["[INST]", "[/INST]"])
    return made


def of_qwen():
    """Qwen's: NFC, one digit at a time, no token before a text, and marks of turns that are no characters."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*alphabet, "th", "the", "Ġlazy"])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    made.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens(["<think>", "</think>"])
    return made


def unigram():
    """SentencePiece's Unigram, with Metaspace."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    letters = [(letter, -5.0) for letter in sorted(set(TEXT) - {" ", "\r", "\n"})]
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁the", -1.5), ("qu", -2.5), ("▁dog", -1.0), *letters]
    made = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    return made


def bert():
    """WordPiece in lower case, with a post-processor that would put [CLS] and [SEP] around a text."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    letters = sorted(set(TEXT.lower()) | set("abcdefghijklmnopqrstuvwxyz"))
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "quick", "##ick", *letters, *(f"##{letter}" for letter in letters)]
    made = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder, made.post_processor = decoders.WordPiece(), processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    made.add_special_tokens(["[CLS]", "[SEP]"])
    return made


def truncating():
    """A file that was saved while it cut texts off and filled them up."""
    made = byte_level()
    made.enable_truncation(3)
    made.enable_padding(length=100, pad_id=0, pad_token="!")
    return made


MAKERS = (
    byte_level, with_added_tokens, with_prefix_space, lower_cased, of_llama3, of_llama2, of_llama2_with_begin,
    of_mistral, of_qwen, unigram, bert, truncating,
)  # fmt: skip
each = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


@functools.cache
def file_of(make) -> str:
    return make().to_str()


def theirs(make):
    """The package's own, from the file, without cutting and filling."""
    made = tokenizers.Tokenizer.from_str(file_of(make))
    made.no_truncation()
    made.no_padding()
    return made
