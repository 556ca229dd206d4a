"""What the commands print: lines in which anything from outside is shown as text, never obeyed by the terminal."""

import sys

from jaxgpt.foreign_text import printable


def say(text: object = "", *, error: bool = False, end: str = "\n", flush: bool = False) -> None:
    """Prints a text, with control characters written out, to stdout or where `error` says so to stderr.

    File names, fields of files, tokens and drawn text are others' words, so the package prints by this function alone,
    or by rich's Console with `printable` and without markup.
    """
    print(printable(str(text)), file=sys.stderr if error else sys.stdout, end=end, flush=flush)
