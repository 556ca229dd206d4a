"""Errors that end a command, each with its exit status.

Each carries one message for the user: what is wrong, where (file, option, byte offset), and what to do. `cli.main`
prints the message without a traceback and exits with the status.
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
    """A RunError that all processes of a run raise at the same step, so that none need tell the others."""


class Interrupted(JaxgptError):
    """A stop by Ctrl-C. Exit status 130, the shells' convention."""

    status = 130


class Terminated(Interrupted):
    """A stop by SIGTERM, or before the end of a Slurm allocation. Exit status 143, the shells' convention."""

    status = 143


class HungUp(Terminated):
    """A stop by SIGHUP, as when the terminal is closed. Exit status 129, the shells' convention."""

    status = 129
