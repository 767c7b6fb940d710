"""The command line. It may import every package; a command's implementation is imported when the command runs."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from click import Group

__all__ = ["main"]


def _load() -> Group:
    """Import the commands. Importing takes some tenths of a second, in which Ctrl+C ends the process silently.

    Later the commands handle it. Python's own handler would print a traceback. A signal that is ignored stays ignored.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handled:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from afterword.cli.commands import main
    finally:
        if handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return main


main = _load()
