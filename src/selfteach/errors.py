"""Defines the errors that a user can cause. Each message states the problem, where, and the fix.

The command line prints the message as one line and exits with status 2; from Python they are
ordinary exceptions. Anything else that escapes is a bug of ours.
"""


class SelfteachError(Exception):
    """Is the base of every error that a user can cause and fix."""


class RecipeError(SelfteachError):
    """A recipe has an unknown key, an invalid value, or an invalid combination of values."""


class DataError(SelfteachError):
    """A problem set is missing, empty, malformed, or has problems that do not fit the recipe."""


class AlignmentError(SelfteachError):
    """Student and teacher would not score the same rollout tokens."""


class CriticError(SelfteachError):
    """A critic is unreachable, misconfigured, or does not support these problems."""


class PartError(SelfteachError):
    """A part of the user's own cannot be imported or built, raised an error, or breaks its contract."""


class EngineError(SelfteachError):
    """A model or tokenizer cannot be loaded, or an engine is unreachable or stale."""


class CheckpointError(SelfteachError):
    """A run folder is incomplete, belongs to another run, or cannot be written."""


class LossError(SelfteachError):
    """A loss is NaN or infinite; no update was made."""


class RunStopped(SelfteachError):
    """A run's guard has stopped it: nothing was learned, or a metric is beyond the recipe's bounds."""


class Terminated(BaseException):
    """Is raised on SIGTERM and Ctrl-C, which are no errors: `selfteach resume` continues a run."""

    def __init__(self, status: int = 143) -> None:
        super().__init__(status)
        self.status = status
        """Exit status of the process: 143 after SIGTERM, 130 after Ctrl-C."""
        self.progress = ""
        """What is on disk and how to continue; empty if no run folder was in use."""
