"""Decisions of all processes, at the same step: when a run ends early, and when it is saved."""

from collections.abc import Callable, Sequence

from jaxgpt.commands.display import Display
from jaxgpt.commands.signals import ENDINGS, Ending, Stop
from jaxgpt.parallel import processes
from jaxgpt.parallel.agreement import Agreement
from jaxgpt.runs.saving import Writer


class Decisions:
    """Decisions that all processes make together: all have to call the methods in the same order."""

    def __init__(self, agreement: Agreement, stop: Stop, writer: Writer, display: Display):
        self._agreement, self._stop, self._writer, self._display = agreement, stop, writer, display
        self.ending: Ending | None = None  # why the run is to end
        self.lost = ""  # why nothing can be printed any more, which ends it as well
        self._late, self._idle = False, True

    def ends(self) -> bool:
        """Returns whether the run ends here: one step after a process wished it, or at once where it is alone."""
        self._agree(self._agreement.exchange)
        return bool(self.ending or self.lost)

    def settle(self) -> None:
        """Waits for all processes and takes over what any of them wishes now."""
        self._agree(self._agreement.now)

    def save_is_due(self, step: int) -> bool:
        """Returns whether to save the state after this step now."""
        alone = processes.count() == 1
        return self._writer.due(step) if alone else self._writer.due(step, late=self._late, idle=self._idle)

    def _agree(self, put_together: Callable[[Sequence[bool]], list[bool]]) -> None:
        wishes = [bool(self._display.lost), self._writer.late, not self._writer.idle]
        *endings, lost, self._late, busy = put_together([*self._stop.wishes(), *wishes])
        self._idle = not busy
        self.ending = next((ending for ending, wished in zip(ENDINGS, endings, strict=True) if wished), None)
        self.lost = (self._display.lost or "process 0 says why") if lost else ""
