"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PART = ".part"
"""What the name of a file that is being written ends in."""


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `parts` to `path`: whoever reads it, at any moment, finds what was there before or all that is new.

    Raises
    ------
    OSError
        Where that is not possible; nothing is left behind then.
    """
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as file:
            for data in parts:
                file.write(data)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
