"""What was computed for a layer, kept on disk under the hash of all that it depends on."""

from __future__ import annotations

from onnx_lowrank.cache.folder import CacheFolder, open_cache
from onnx_lowrank.cache.kept import UNKEPT, Kept
from onnx_lowrank.cache.keys import environment, fingerprint
from onnx_lowrank.cache.store import FOLDER, LIMIT, Store, cache_folder, open_store

__all__ = [
    "FOLDER",
    "UNKEPT",
    "LIMIT",
    "CacheFolder",
    "Kept",
    "Store",
    "cache_folder",
    "environment",
    "fingerprint",
    "open_cache",
    "open_store",
]
