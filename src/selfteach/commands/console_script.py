"""Run the command line: settings of the process, one-line errors and exit statuses."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import NoReturn

import typer

from selfteach.analysis.terminal.sanitize import sanitized
from selfteach.commands.notes import notes_on_stderr
from selfteach.errors import RecipeError, SelfteachError, Terminated
from selfteach.runtime import gc_pause, torchrun
from selfteach.runtime.signals import INTERRUPTED_STATUS, handle_interrupts

MULTI_RANK_COMMANDS = ("train", "resume")
"""Commands that torchrun may start on several ranks."""
RANK_0_GRACE_S = 5.0
"""Seconds that another rank waits before it reports an error that rank 0 may be about to report."""


def run_console_script(app: typer.Typer) -> None:
    """Run a command; exit with 2 and one line on stderr for an error of the user."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_libraries()
    gc_pause.pause()
    handle_interrupts()
    with notes_on_stderr():
        _run_command(app)


def _run_command(app: typer.Typer) -> None:
    try:
        _require_one_process()
        # Typer turns KeyboardInterrupt and Exit into a return value, the exit status.
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if status == INTERRUPTED_STATUS:
            _exit_at_once(Terminated(INTERRUPTED_STATUS))
        if isinstance(status, int) and status:
            sys.exit(status)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _exit_at_once(Terminated(INTERRUPTED_STATUS))
    except Terminated as end:
        _exit_at_once(end)
    except SelfteachError as error:
        if not torchrun.is_main():
            # Rank 0 reports errors common to all ranks; its exit ends this rank while it waits.
            time.sleep(RANK_0_GRACE_S)
            _fail(f"rank {torchrun.rank()}: {error}")
        _fail(str(error))
    except Exception as error:
        # Usage errors come from Typer's click, whose module moved between releases.
        format_message = getattr(error, "format_message", None)
        if isinstance(error, OSError) and error.errno is not None:  # a disk, a permission, a limit
            _fail(f"{error.filename or 'the system'}: {error.strerror}")
        if format_message is None:
            raise
        _fail(format_message())


def _require_one_process() -> None:
    """Raise `RecipeError` under torchrun for a command that runs in one process."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if torchrun.is_torchrun() and command not in MULTI_RANK_COMMANDS:
        raise RecipeError(
            f"selfteach {command} runs in one process: call it without torchrun, which is for "
            + " and ".join(MULTI_RANK_COMMANDS)
        )


def _fail(message: str) -> None:
    # Escape control characters: a message may quote a server.
    sys.stderr.write("selfteach: " + " ".join(sanitized(message).split()) + "\n")
    sys.exit(2)


def _exit_at_once(end: Terminated) -> NoReturn:
    """Exit without waiting for other threads: everything needed to resume is on disk."""
    how = "interrupted" if end.status == INTERRUPTED_STATUS else "terminated"
    progress = (
        end.progress or "no run folder was in use; replies of a critic are in its reply cache"
    )
    sys.stderr.write(f"selfteach: {how}; {sanitized(progress)}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.status)


def _quiet_libraries() -> None:
    """Silence progress bars and advice of the libraries, which would mix with ours."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
