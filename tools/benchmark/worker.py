"""One way in a process of its own: reads shares of the MACs, a line for each, and says what it made of the model.

    PYTHON -m tools.benchmark.worker WAY MODEL SAMPLES.npz FOLDER

A line is a share, or `-` for a way that has none. The answer is a line of JSON: the file that was made, the CPU seconds of
this process and of those it started, and the most memory that one of them held (all since the beginning, so only those
of the first answer belong to one model). What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from tools.benchmark.ways import WAYS

Make = Callable[["float | None", Path], None]


def spent() -> dict[str, float]:
    """CPU seconds and the largest process in bytes, so far."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "cpu_seconds": sum(use.ru_utime + use.ru_stime for use in both),
        "peak_bytes": 1024 * max(use.ru_maxrss for use in both),
    }


def main(name: str, model: str, samples: str, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = {}
    try:
        make = WAYS[name].load()(Path(model), Path(samples))
        for line in sys.stdin:
            share = None if line.strip() == "-" else float(line)
            out = Path(folder) / f"{line.strip()}.onnx"
            make(share, out)
            answer = {"file": out.name, **spent()}
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:
        traceback.print_exc()
        print(
            json.dumps({"failed": f"{type(error).__name__}: {str(error).strip() or 'no message'}", **spent()}),
            file=answers,
        )
    answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
