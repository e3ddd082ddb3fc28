"""The cache of results on disk: whole files, the least recently used ones removed, safe for several runs at a time."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lowrank.cache.codec import Damaged, decode, encode
from onnx_lowrank.files import PART, write_whole
from onnx_lowrank.types import LowRankError

logger = logging.getLogger(__name__)

FOLDER = "ONNX_LOWRANK_CACHE"
"""Environment variable that names the folder of the cache; empty for none."""

LIMIT = "ONNX_LOWRANK_CACHE_BYTES"
"""Environment variable: most bytes of results of layers; 0 keeps none."""

BOUND = 8 << 30
"""Most bytes where nothing is said."""

LOOKS = 16
"""The folder is looked through each time that so large a part of the bound was written."""

ABANDONED_SECONDS = 3600.0
"""A file that has been in the making for longer was left by a run that was killed."""

RESULTS = "layers"
"""Folder of the results within that of the cache."""


def cache_folder() -> Path | None:
    """Where everything is kept: ``$ONNX_LOWRANK_CACHE``, or ``onnx-lowrank`` in the user's cache; None for nowhere."""
    named = os.environ.get(FOLDER)
    if named is not None:
        return Path(named) if named else None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "onnx-lowrank"


def open_store() -> Store | None:
    """The cache of results as the environment says; None where nothing is to be kept."""
    folder, bound = cache_folder(), bound_of_results()
    return Store(folder / RESULTS, bound) if folder and bound else None


def bound_of_results() -> int:
    """Most bytes that results of layers may take.

    Raises
    ------
    LowRankError
        Where the environment says something else than a number.
    """
    said = os.environ.get(LIMIT) or str(BOUND)
    if not said.isdecimal():
        raise LowRankError(f"{LIMIT}={said} was given: a number of bytes was expected")
    return int(said)


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    used: float


class Store:
    """Results by key, in files of a folder.

    Files are read and written whole, so that runs share a folder without locks. What cannot be read or written is
    computed again; nothing is ever raised for it.

    Parameters
    ----------
    folder
        Made where it is missing.
    bound
        Most bytes. Several runs at a time may exceed it by a sixteenth each.
    """

    def __init__(self, folder: Path, bound: int = BOUND) -> None:
        self._folder, self._bound = folder, bound
        self._unseen: int | None = None  # bytes written since the folder was looked through

    def get(self, key: str) -> Any:
        """What was put under `key`; None where there is nothing, or nothing whole."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            value = decode(key, data)
            os.utime(path)
        except FileNotFoundError:
            return None
        except Damaged as error:
            logger.warning("%s is damaged (%s): it is made again", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        except OSError as error:
            logger.warning("%s cannot be read (%s): it is made again", path, error)
            return None
        return value

    def put(self, key: str, value: Any) -> None:
        """Keep `value`, where it is made of what :func:`onnx_lowrank.cache.codec.encode` takes."""
        try:
            parts = list(encode(key, value))
        except TypeError as error:
            logger.info("a result is not kept: %s", error)
            return
        size = sum(map(len, parts))
        if size > self._bound:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(path, parts)
        except OSError as error:
            logger.warning("results cannot be kept in %s: %s", self._folder, error)
            return
        if self._unseen is None or self._unseen + size > self._bound // LOOKS:
            self._prune()
            self._unseen = 0
        else:
            self._unseen += size

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    def _files(self) -> Iterator[_File]:
        """Results, and files that are being made."""
        for path in self._folder.glob("??/*"):
            if path.name.startswith(path.parent.name) or path.suffix == PART:
                with suppress(OSError):  # another run may remove it at any moment
                    state = path.stat()
                    yield _File(path, state.st_size, state.st_mtime)

    def _prune(self) -> None:
        """Remove what runs that were killed left, then the least recently used until the rest is within the bound."""
        kept = []
        for file in self._files():
            if file.path.suffix != PART:
                kept.append(file)
            elif file.used < time.time() - ABANDONED_SECONDS:
                _remove(file.path)
        total = sum(file.size for file in kept)
        for file in sorted(kept, key=lambda file: file.used):
            if total <= self._bound:
                break
            _remove(file.path)
            total -= file.size


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
