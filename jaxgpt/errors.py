"""The ways a command ends badly.

All carry one message for a person: what is wrong, where (file, option, byte offset), and what to do. `cli.main` prints
the message without a traceback and exits with the status.
"""


class JaxgptError(Exception):
    """An error that is reported by its message alone."""

    status = 1


class UserError(JaxgptError):
    """A mistake of the user's: a bad option, a missing or damaged file. Exit status 2."""

    status = 2


class RunError(JaxgptError):
    """A run that failed on its own: NaN in the loss, a full disk. Exit status 1."""

    status = 1


class AllFailed(RunError):
    """A run that failed on its own, at the same step in all of its processes: none need tell the others."""


class Interrupted(JaxgptError):
    """Stopped with Ctrl-C. Exit status 130, as shells have it."""

    status = 130


class Terminated(Interrupted):
    """Stopped by SIGTERM, or before the end of a Slurm allocation. Exit status 143, as shells have it."""

    status = 143


class HungUp(Terminated):
    """Stopped by SIGHUP, as when the terminal is closed. Exit status 129, as shells have it."""

    status = 129
