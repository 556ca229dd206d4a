"""Regular expressions from files of others, on texts of a model, within a time.

Python's `re` tries one way after another: of (a+)+b on thirty a's it would take minutes. So each search has a second
of the processor's time. A timer's signal ends it, which `re` looks for as it goes; where there is none (Windows, a
thread beside the main one) there is no limit. A search that was ended has found nothing, and is counted.
"""

import contextlib
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator

from jaxgpt.errors import UserError
from jaxgpt.foreign_text import quoted, shown

LONGEST = 2000  # characters of an expression
SECONDS = 1.0
MOST_ENDED = 10  # searches; further ones are not begun


class _Late(Exception):
    """The time is up."""


def compiled(expression: str, where: str) -> re.Pattern[str]:
    """Returns the expression. UserError, which begins with `where`, for one that is none, or too large."""
    if len(expression) > LONGEST:
        raise UserError(f"{where} has {len(expression):,} characters, and may have {LONGEST:,}")
    try:
        with _limited(), warnings.catch_warnings(action="ignore"):  # of what may mean something else one day
            return re.compile(expression)
    except _Late:
        raise UserError(f"{where} is {quoted(expression)}, which takes too long: write a simpler one") from None
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise UserError(
            f"{where} is {quoted(expression)}, and no regular expression ({shown(str(error) or type(error).__name__)})"
        ) from None


class Searches:
    """Searches of a task, and how many of them were ended."""

    def __init__(self) -> None:
        self.ended = 0

    def first(self, pattern: re.Pattern[str], text: str) -> str | None:
        """Returns the first match, or its first group where there is one."""
        return self._within_time(lambda: _found(pattern.search(text)))

    def last(self, pattern: re.Pattern[str], text: str) -> str | None:
        """Returns the last match, or its first group."""

        def find() -> str | None:
            match = None
            for match in pattern.finditer(text):  # noqa: B007
                pass
            return _found(match)

        return self._within_time(find)

    def _within_time(self, find: Callable[[], str | None]) -> str | None:
        if self.ended >= MOST_ENDED:
            return None
        try:
            with _limited():
                return find()
        except _Late:
            self.ended += 1
            return None


def _found(match: re.Match[str] | None) -> str | None:
    if match is None:
        return None
    return match[1] if match.re.groups and match[1] is not None else match[0]


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raises _Late in the block once it has taken SECONDS."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGVTALRM, late)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    finally:
        signal.signal(signal.SIGVTALRM, signal.SIG_IGN)  # one that comes now is none any more
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
