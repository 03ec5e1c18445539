"""The few errors a user can meet. Each message says what is wrong, where, and what to do.

The command line prints the message as one line and exits with status 2; from Python they are
ordinary exceptions. Anything else that escapes is a bug of ours.
"""


class SelfteachError(Exception):
    """Base of every error that a user can cause and can mend."""


class RecipeError(SelfteachError):
    """A recipe holds an unknown key, an impossible value, or a combination that makes no sense."""


class DataError(SelfteachError):
    """A problem set is missing, empty, malformed, or holds problems that cannot be asked."""


class AlignmentError(SelfteachError):
    """Student and teacher would not score the same answer tokens."""


class CriticError(SelfteachError):
    """A critic cannot be reached, or cannot judge this kind of answer."""


class EngineError(SelfteachError):
    """A model or tokenizer cannot be loaded, or cannot sample what is asked."""


class CheckpointError(SelfteachError):
    """A run folder is incomplete, belongs to another run, or cannot be written."""


class LossError(SelfteachError):
    """A loss is not a number: there is nothing to learn from it, and nothing has been changed."""


class Terminated(BaseException):
    """SIGTERM: the process is to end. No error: what was learned is saved, and a resume goes on."""
