"""Names of results: a hash of the weights, the settings, the code and the libraries that they come from."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import scipy.linalg  # its linear algebra is looked for among the libraries that are loaded
from threadpoolctl import threadpool_info

PACKAGE = Path(__file__).parents[1]


def fingerprint(*parts: Any) -> str:
    """SHA-256 of values of the kinds that results depend on, in hexadecimal.

    Parameters
    ----------
    parts
        Numbers, texts, arrays, dtypes, paths; tuples, lists and mappings of those; dataclasses, by their fields. A
        callable counts by its ``digest``, the hash of what it would return.

    Raises
    ------
    TypeError
        For anything else: what cannot be told apart must not be named.

    Examples
    --------
    >>> fingerprint(1, "a") == fingerprint(1, "a"), fingerprint(1, "a") == fingerprint("1", "a")
    (True, False)
    """
    digest = hashlib.sha256()
    _take(digest, parts)
    return digest.hexdigest()


def _take(digest: Any, value: Any) -> None:
    """Add a value to a hash: its kind and length first, so that no two values read the same."""
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        value = value.item()
    if isinstance(value, np.ndarray):
        _open(digest, "array", value.dtype.name, *value.shape, value.flags.f_contiguous)
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif value is None or isinstance(value, (bool, int, float, str, np.dtype, Path)):
        _open(digest, type(value).__name__, value)
    elif isinstance(value, bytes):
        _open(digest, "bytes", len(value))
        digest.update(value)
    elif isinstance(value, (tuple, list)):
        _open(digest, "sequence", len(value))
        for item in value:
            _take(digest, item)
    elif isinstance(value, Mapping):
        _take(digest, sorted(value.items()))
    elif is_dataclass(value) and not isinstance(value, type):
        _open(digest, type(value).__qualname__, len(fields(value)))
        for item in fields(value):
            _take(digest, (item.name, getattr(value, item.name)))
    elif hasattr(value, "digest"):
        _open(digest, "digest", value.digest)
    else:
        raise TypeError(f"a {type(value).__qualname__} cannot be told from another")


def _open(digest: Any, *words: object) -> None:
    text = "\0".join(map(str, words)).encode()
    digest.update(f"{len(text)}:".encode() + text)


@cache
def code() -> str:
    """Hash of the sources of this package: what another version computed is not read."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        _open(digest, path.relative_to(PACKAGE).as_posix())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def source_key(thing: Any) -> Any:
    """What tells a class or a function from another of its name: nothing more within this package, else its source.

    What has no source is returned as it is, which has no fingerprint: nothing is kept that comes of it.
    """
    if thing.__module__.split(".")[0] == PACKAGE.name:
        return ""
    try:
        return Path(inspect.getsourcefile(thing) or "").read_bytes()
    except (OSError, TypeError):
        return thing


def member_key(member: Any) -> tuple[Any, ...]:
    """What tells a member of a table from another of its name: its settings, and its source."""
    kind = type(member)
    return kind.__qualname__, member if is_dataclass(member) else vars(member), source_key(kind)


@cache
def environment() -> dict[str, str]:
    """All that decides about the last bits of a result, beside its inputs: two processes that agree in it compute the same.

    The number of threads is not among it: see :func:`onnx_lowrank.work.parallel.run_all`.
    """
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    # others may be loaded too, by what else the process works with
    own = [pool for pool in pools if {"numpy.libs", "scipy.libs", ".dylibs"} & set(Path(pool["filepath"]).parts)]
    libraries = {f"{p['internal_api']} {p.get('version')} {p.get('architecture', '')}" for p in own or pools}
    found = np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", [])
    return {
        "onnx-lowrank": code()[:16],
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "linear algebra": ", ".join(sorted(libraries)),
        "instructions": ", ".join(found),
    }
