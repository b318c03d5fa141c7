"""Ctrl-C while the command ``transfuse`` still imports torch, which takes seconds, ends it without a traceback.

The package's own import does nothing of this in any other program.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path


def _is_the_command() -> bool:
    """Whether this process is ``transfuse ...`` or ``python -m transfuse ...``."""
    if sys.argv[:1] == ["-m"]:  # so it is while Python looks for the module to run
        at = sys.orig_argv.index("-m") if "-m" in sys.orig_argv else -1
        return sys.orig_argv[at + 1 : at + 2] == ["transfuse"]
    return bool(sys.argv) and Path(sys.argv[0]).stem == "transfuse"


def die_quietly() -> None:
    """Let the system end the command at Ctrl-C; :func:`transfuse.cli.main` takes over once it runs."""
    if (
        _is_the_command()
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


die_quietly()
