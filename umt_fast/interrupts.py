"""Ctrl-C in a command: one line and status 130, never a stack, however often it is pressed.

While a command starts, Ctrl-C ends the process: modules take seconds to import, hold nothing yet that is to be cleaned up,
and cannot all pass an exception on: some of their C++ aborts. Once it works, the first one is a KeyboardInterrupt as usual.
Another one a second later ends the process, whatever is still being cleaned up; until then it changes nothing, as one that
meets a destructor or the end of Python is printed with its stack. Imports nothing that takes long itself.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

LINE = "umt_fast: interrupted"
# Seconds in which a second Ctrl-C belongs to the first.
_PATIENCE = 1.0
_first = 0.0
_said = False


def _end(number: int, frame: FrameType | None) -> None:
    if not _said:
        os.write(2, f"{LINE}\n".encode())
    os._exit(130)


def _end_later(number: int, frame: FrameType | None) -> None:
    if time.monotonic() - _first > _PATIENCE:
        _end(number, frame)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _wait()
    raise KeyboardInterrupt


def _wait() -> None:
    global _first
    _first = time.monotonic()
    signal.signal(signal.SIGINT, _end_later)


def end_at_once() -> None:
    """Lets Ctrl-C end the process until `raise_again`, unless it is ignored or somebody else's business."""
    if _may_change() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Takes `end_at_once` back: the next Ctrl-C raises KeyboardInterrupt."""
    if _may_change() and signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, _interrupt)


def say() -> None:
    """Writes the line, which a later Ctrl-C does not repeat."""
    global _said
    _said = True
    if _may_change() and signal.getsignal(signal.SIGINT) is _interrupt:  # the interrupt was raised by another's handler
        _wait()
    print(LINE, file=sys.stderr, flush=True)


def restore(handler: Any) -> None:
    """At the end of a command, what was in force before it; a Ctrl-C that came in a program of its own stays the first."""
    global _said
    own = signal.getsignal(signal.SIGINT)
    if not _may_change() or own not in (_end, _end_later, _interrupt) or (own, handler) == (_end_later, _end):
        return
    signal.signal(signal.SIGINT, handler)
    _said = False  # another command of this process speaks for itself


def _may_change() -> bool:
    """Signals are the main thread's."""
    return threading.current_thread() is threading.main_thread()
