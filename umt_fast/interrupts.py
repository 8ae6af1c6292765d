"""Ctrl-C while a command starts: the end of the process, in one line; once it works, KeyboardInterrupt as usual.

Modules take seconds to import, hold nothing yet that is to be cleaned up, and cannot all pass an exception on: some of
their C++ aborts. Imports nothing that takes long itself.
"""

import os
import signal
import threading


def _end(number: int, frame: object) -> None:
    os.write(2, b"umt_fast: interrupted\n")
    os._exit(130)


def end_at_once() -> None:
    """Lets Ctrl-C end the process until `raise_again`, unless it is ignored or somebody else's business."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Takes `end_at_once` back."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
