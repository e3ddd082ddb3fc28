"""Everything that is kept between runs, of every kind: how much there is, and away with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from onnx_lowrank.cache.store import RESULTS, bound_of_results, cache_folder

KINDS = {
    "results of layers": (f"{RESULTS}/??/*",),
    "tables of times": ("latency-*.json", ".latency-*.part"),
    "checkpoints of training": ("training/*.pt", "training/.*.part"),
}
"""Files that this package makes in the folder of the cache; it may hold others."""


@dataclass(frozen=True)
class CacheFolder:
    """The folder of the cache, and the most bytes that results of layers may take in it."""

    folder: Path
    bound: int

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Files of each kind, and their bytes."""
        found = {}
        for kind in KINDS:
            sizes = []
            for path in self._files(kind):
                with suppress(OSError):  # a run may remove it at any moment
                    sizes.append(path.stat().st_size)
            found[kind] = len(sizes), sum(sizes)
        return found

    def clear(self) -> None:
        """Remove all of them, and nothing else. A run that is under way makes what it misses again."""
        for kind in KINDS:
            for path in self._files(kind):
                with suppress(OSError):
                    path.unlink()

    def _files(self, kind: str) -> Iterator[Path]:
        for pattern in KINDS[kind]:
            yield from (path for path in self.folder.glob(pattern) if path.is_file())


def open_cache() -> CacheFolder | None:
    """The cache as the environment says; None where nothing is kept."""
    folder = cache_folder()
    return CacheFolder(folder, bound_of_results()) if folder else None
