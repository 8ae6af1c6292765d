"""Worker processes: how all of them are started, and how they end."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext


def end_with_parent() -> None:
    """A worker waits for work for ever; where its parent was killed none comes, and it must end by itself."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def fork_server(module: str) -> BaseContext:
    """Workers forked from a small server process: a plain fork would inherit the locks of CUDA and of thread pools.

    The server imports `module` once, so that workers start without importing torch again. Ctrl-C on a terminal reaches every
    process of a command; SIGINT is blocked in these, so that none of them prints a stack: the command itself ends them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    resource_tracker.ensure_running()  # starting it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _await_server(context)
    return context


@functools.cache
def _await_server(context: BaseContext) -> None:
    """Waits for the server's imports, where Ctrl-C is harmless: a worker asked for later would find its pool gone."""
    first = context.Process(target=os.getpid)
    first.start()
    first.join()


def _begin(also: Callable[[], None] | None) -> None:
    end_with_parent()
    # What a pool's worker has under way is worth nothing without its parent: Ctrl-C ends it at once, and silently, unless
    # the command itself ignores it, as a script's background commands do.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if also is not None:
        also()


@contextmanager
def worker_pool(workers: int, module: str, begin: Callable[[], None] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool for the block, waited for at its end; where the block raises, what has not begun is dropped.

    Args:
        workers: processes.
        module: what they work with, see fork_server.
        begin: what each does first.
    """
    pool = ProcessPoolExecutor(workers, fork_server(module), _begin, (begin,))
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
