"""A run of the command line that interrupts itself: what tests of interruption start as a process.

    python -m tests.interrupted SIGNAL MOMENT LOG ARGUMENT...

Counts the calls of Python and C functions from when the work begins, and sends SIGNAL at number MOMENT (never, where that is 0). LOG gets a line for each piece of work that begins, and the number of calls in the end.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from onnx_lowrank import cli, pipeline
from onnx_lowrank.types import Candidate
from onnx_lowrank.work import parallel


def main() -> int:
    name, moment, log, *arguments = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
    parallel.WORTH_A_PROCESS = 0
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += 1
        if calls == int(moment):
            number = getattr(signal, name)
            # a terminal tells all processes; whoever ends one names it
            os.killpg(0, number) if number == signal.SIGINT else os.kill(os.getpid(), number)

    def told(line: str) -> None:
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, f"{line}\n".encode())
        os.close(handle)

    work = parallel.on_one_thread

    def on_one_thread(function: Callable[[Any], Any], given: Any) -> Any:
        choice = next((f"{x.decomposition} {x.rank}" for x in given if isinstance(x, Candidate)), "")
        told(f"{function.__name__} {given[0].names} {choice}")
        return work(function, given)

    parallel.on_one_thread = on_one_thread
    compress = pipeline.compress

    def counted(*given: Any, **options: Any) -> Any:
        sys.setprofile(count)
        return compress(*given, **options)

    pipeline.compress = counted
    code = cli.main(arguments)
    sys.setprofile(None)
    told(f"calls {calls}")
    return code


if __name__ == "__main__":
    sys.exit(main())
