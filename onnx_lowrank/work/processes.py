"""Processes that work for another one."""

from __future__ import annotations

import os
import threading
import time

WATCH_SECONDS = 1.0
"""How often a process looks whether the one that started it is still there."""


def end_with(parent: int) -> None:
    """End this process when its parent does, which may be killed: nobody else would."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    if os.getppid() == 1 != parent:  # it is gone already
        os._exit(1)
    if os.getppid() == parent:
        threading.Thread(target=watch, daemon=True).start()
