"""The display of a run, on a terminal and through a pipe."""

import io
import re
import string
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jaxgpt.commands import display
from jaxgpt.commands.display import Display
from jaxgpt.foreign_text import printable

ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def console(*, terminal: bool, width: int = 80) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=width,
        highlight=False,
        _environ={"TERM": "xterm", "COLUMNS": str(width)},
    )


def written(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def lines(screen: Console) -> list[str]:
    """Returns the lines that were written; each redrawing of the live line counts as one."""
    text = ESCAPE_SEQUENCE.sub("", written(screen)).replace("\r", "\n")
    return [line.rstrip() for line in text.split("\n") if line.strip()]


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def steps(monkeypatch):
    """A function that runs a display through some steps, two seconds each, and returns what was written."""

    def run(screen: Console, count: int, *, total: int = 100, utilisation: float | None = None, after=None) -> Console:
        clock = Clock()
        monkeypatch.setattr(display.time, "monotonic", clock)
        shown = Display(total, screen)
        shown._progress.get_time = clock
        shown._progress.live.auto_refresh = False  # no thread: it is drawn when the test says so
        with shown:
            for step in range(1, count + 1):
                clock.now += 2
                shown.step(step, 3.25, 1000.0, 2.5e11, utilisation)
                shown._progress.refresh()
                if after is not None:
                    after(shown, step)
        return screen

    return run


# On a terminal


def test_a_terminal_shows_a_live_line(steps):
    """Step of steps, loss, tokens/s, and the time left: 90 steps of 2 s."""
    last = lines(steps(console(terminal=True), 10))[-1]
    assert last.startswith("step 10/100  loss 3.2500  1,000 tokens/s")
    assert "3:00 left" in last
    assert "0.25 TFLOP/s" in last  # where the device's peak isn't known
    assert "MFU" not in last


def test_hours_are_told_from_minutes(steps):
    assert "2:46:20 left" in lines(steps(console(terminal=True), 10, total=5000))[-1]


def test_utilisation_is_shown_where_it_is_known(steps):
    last = lines(steps(console(terminal=True), 3, utilisation=0.412))[-1]
    assert "MFU 41.2%" in last
    assert "TFLOP/s" not in last


def test_speed_and_time_left_are_not_guessed_from_the_compilers_time(steps):
    """Neither is shown before the first step, nor after it, as its time is mostly the compiler's."""
    before, first, second, *_ = lines(steps(console(terminal=True), 2))
    assert before.startswith("compiling")
    assert first.startswith("step 1/100  loss 3.2500")
    assert not re.search("tokens/s|left|-:--", before + first)
    assert "tokens/s" in second


def test_the_speed_is_smoothed(monkeypatch):
    """One slow step among fast ones moves the shown speed by a tenth of the difference."""
    screen = console(terminal=True)
    with Display(10, screen) as shown:
        for step, rate in enumerate((1.0, 1000.0, 1000.0, 500.0), 1):
            shown.step(step, 1.0, rate, 1e9, None)
    assert "950 tokens/s" in lines(screen)[-1]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_live_line_is_one_line(steps, width):
    """The terminal may be narrow: a line that wraps can't be redrawn in its place."""
    screen = steps(console(terminal=True, width=width), 10, utilisation=0.412)
    assert all(len(line) <= width for line in lines(screen))
    assert "\x1b[1A" not in written(screen)  # the cursor going up, to a second line


def test_notes_stay_above_the_live_line(steps):
    """A note is written once, on a line of its own, and the live line goes on below it."""

    def note(shown: Display, step: int) -> None:
        if step == 2:
            shown.note("step 2: validation loss 3.1000 (0.1 s)")

    shown = lines(steps(console(terminal=True), 4, after=note))
    place = shown.index("step 2: validation loss 3.1000 (0.1 s)")
    assert shown.count(shown[place]) == 1
    assert shown[place + 1].startswith("step 2/100")
    assert shown[-1].startswith("step 4/100")


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_cursor_comes_back_whatever_ends_the_run(error):
    screen = console(terminal=True)
    try:
        with Display(10, screen):
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    hidden, shown = written(screen).rfind("\x1b[?25l"), written(screen).rfind("\x1b[?25h")
    assert -1 < hidden < shown


def test_after_stop_notes_are_plain_lines():
    screen = console(terminal=True)
    with Display(10, screen) as shown:
        shown.stop()
        start = len(written(screen))
        shown.note("saved")
    assert written(screen)[start:] == "saved\n"


# Into a pipe, a file, or a terminal that can't redraw a line


def test_a_pipe_gets_plain_lines(steps):
    """No control characters, one line each ten seconds (five steps), and the notes."""

    def note(shown: Display, step: int) -> None:
        if step == 7:
            shown.note("step 7: validation loss 3.1000 (0.1 s)")

    screen = steps(console(terminal=False), 20, after=note)
    text = written(screen)
    assert all(character.isprintable() or character == "\n" for character in text)
    progress = [line for line in text.splitlines() if "/100" in line]
    assert [line.split()[1] for line in progress] == ["5/100", "10/100", "15/100", "20/100"]
    assert progress[-1] == "step 20/100  loss 3.2500  1,000 tokens/s  0.25 TFLOP/s"
    assert text.splitlines()[1] == "step 7: validation loss 3.1000 (0.1 s)"


def test_a_long_line_into_a_pipe_is_not_broken():
    screen = console(terminal=False, width=20)
    with Display(10, screen) as shown:
        shown.note("words " * 30)
    assert len(written(screen).splitlines()) == 1


def test_a_long_line_on_a_terminal_is_broken_between_words():
    screen = console(terminal=True, width=20)
    with Display(10, screen) as shown:
        shown.stop()
        start = len(written(screen))
        shown.note("words " * 30)
    assert set(written(screen)[start:].split()) == {"words"}
    assert max(map(len, written(screen)[start:].splitlines())) <= 20


def test_a_dumb_terminal_gets_plain_lines():
    """An editor's shell, for instance, sets TERM=dumb."""
    screen = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with Display(10, screen) as shown:
        shown.note("a note")
    assert written(screen) == "a note\n"


# Text from elsewhere


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("text", ["[red]x[/red]", "[/]", "a :smile: b", "[x", "1.5 'a' http://x.y", "привет 你好"])
def test_notes_are_shown_to_the_letter(terminal, text):
    """The text is shown as it is: no markup, no emoji names, no colours for what looks like a number."""
    screen = console(terminal=terminal)
    with Display(10, screen) as shown:
        shown.stop()
        start = len(written(screen))
        shown.note(text)
    assert written(screen)[start:] == f"{text}\n"


def test_control_characters_in_a_note_do_not_reach_the_terminal():
    screen = console(terminal=True)
    with Display(10, screen) as shown:
        shown.stop()
        start = len(written(screen))
        shown.note("\x1b]0;title\x07 \x9b31m \x7f \r \0 .\n.")
    assert written(screen)[start:] == "\\x1b]0;title\\x07 \\x9b31m \\x7f \\x0d \\x00 .\n.\n"


@settings(max_examples=100)
@given(st.text())
def test_printable_text_has_no_control_characters(text):
    """Marks that turn the direction of reading are removed too; line breaks, tabs and harmless text stay."""
    result = printable(text)
    hidden = {letter for letter in text + result if letter not in "\n\t" and turns_or_moves(letter)}
    assert not hidden & set(result)
    if not hidden:
        assert result == text


def turns_or_moves(letter):
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    kind = unicodedata.category(letter)
    return (
        kind in {"Cc", "Zl", "Zp"}
        or unicodedata.bidirectional(letter) in directions
        or unicodedata.name(letter, "") in {"ARABIC LETTER MARK", "LEFT-TO-RIGHT MARK", "RIGHT-TO-LEFT MARK"}
    )


def test_printable_text_keeps_letters_line_breaks_and_tabs():
    assert printable(string.printable.rstrip("\r\x0b\x0c")) == string.printable.rstrip("\r\x0b\x0c")
    assert printable("é漢😀\u200d") == "é漢😀\u200d"


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_output_that_cannot_be_written_is_remembered_and_no_error(error):
    """The run has to end by itself, and to save before that."""

    class Gone(io.StringIO):
        writes = 0

        def write(self, text):
            self.writes += 1
            raise error

    file = Gone()
    shown = display.Display(10, display._Console(file=file))
    assert shown.lost == ""
    shown.note("a line")
    assert shown.lost == error.strerror
    tried = file.writes
    shown.note("another")
    shown.step(1, 2.0, 3.0, 4.0, None)
    assert file.writes == tried


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_terminal_without_room_for_a_letter(monkeypatch, capsys, columns):
    """Some containers set COLUMNS=0: the lines are printed all the same."""
    monkeypatch.setenv("COLUMNS", columns)
    with Display(3) as shown:
        shown.note("a line that stays")
    assert capsys.readouterr().out == "a line that stays\n"
