r"""Places at which a text can be cut without changing its tokens.

GPT-2's tokenizer and similar ones cut a text into words by a pattern, and each word into tokens. A place is safe where,
for each of these patterns (GPT-2's, cl100k's, o200k's, Llama 3's), two conditions hold:

- A word of the whole text ends there. Then the text behind begins with a word whether or not it is cut, since no
  pattern looks back.
- The words before the place are the same without the text behind it. The patterns look ahead in white space alone. So
  this holds where the text before doesn't end in white space, or ends in one line break behind a character that isn't
  white space.

Of the places that satisfy both conditions these are used, which lie close together in text of any kind:

    word| word          before a space or tab that stands behind anything but white space
    word|\n             before a line break that stands behind a letter or digit
    end.\n|Next         behind one line break, where neither white space nor a slash follows (o200k joins ".\n/")
    word|,  文|。       between a letter or digit and a punctuation mark, but the apostrophe, which joins "don't"
    abc|123|abc         between letters and digits

The tokenizers of bytes and of characters can be cut anywhere.
"""

import re

CUT = re.compile(
    r"(?<=\S)(?=[ \t\u3000])"
    r"|(?<=[^\W_])(?=[\r\n!-&(-/:-@\[-`{-~、。「」『』【】（），．！？：；…—“”])"
    r"|(?<=\S\n)(?=[^\s/])"
    r"|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
)
WINDOW_BYTES = 1 << 12  # before the end, which are searched first
GROWTH = 16  # factor by which the window grows where it has no safe place


def last(data: bytes, end: int) -> int:
    """Returns the last safe place before byte `end` of UTF-8 text; 0 where there is none.

    Bytes that aren't UTF-8 are passed over: whoever tokenizes the text reports them. Most often a few kilobytes are
    scanned, and at most about the whole text once.
    """
    end = character_start(data, end - 1)  # the character that begins there may be incomplete
    width = WINDOW_BYTES
    while end:
        start = character_start(data, max(0, end - width))
        if place := _last_in(data[start:end]):
            return start + place
        if not start:
            break
        width *= GROWTH
    return 0


def _last_in(data: bytes) -> int:
    text = data.decode("utf-8", "surrogateescape")
    place = 0
    for match in CUT.finditer(text):
        place = match.start()
    return len(text[:place].encode("utf-8", "surrogateescape"))


def character_start(data: bytes, place: int) -> int:
    """Returns the place of the first byte of the UTF-8 character that the byte at `place` belongs to."""
    for start in range(place, max(place - 4, -1), -1):
        if not 0x80 <= data[start] < 0xC0:
            return start
    return max(place, 0)
