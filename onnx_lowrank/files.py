"""Files that are written whole or not at all, and folders that do not outlive their run."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a system with locks of this kind: what a killed run leaves stays
    fcntl = None  # type: ignore[assignment]

PART = ".part"
"""What the name of a file that is being written ends in."""

LOCK = ".lock"
"""File in a scratch folder that its run holds a lock on, as long as it lives."""


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `parts` to `path`: whoever reads it, at any moment, finds what was there before or all that is new.

    Raises
    ------
    OSError
        Where that is not possible; nothing is left behind then.
    """
    part = path.with_name(f".{path.name}-{secrets.token_hex(6)}{PART}")
    try:
        with open(part, "xb") as file:  # with the permissions of any new file: it is there for others, too
            for data in parts:
                file.write(data)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent` whose name begins with `prefix`; it goes in the end, and so do those of runs that were killed."""
    _remove_abandoned(parent, prefix)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".new{prefix}"))
    try:
        with open(folder / LOCK, "wb") as lock:
            with suppress(OSError):  # a file system without locks: nobody takes it away then
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    # under its name only now that it is locked: no other run may take it for abandoned
                    folder = folder.rename(parent / folder.name.removeprefix(".new"))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove folders of runs that are no more."""
    for lock in parent.glob(f"{glob.escape(prefix)}*/{LOCK}"):
        with suppress(OSError), open(lock, "rb") as file:
            if fcntl is not None and lock.stat().st_uid == os.getuid():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
