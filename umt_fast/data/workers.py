"""What every worker process does at its start."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """A worker waits for work for ever; where its parent was killed none comes, and it must end by itself."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
