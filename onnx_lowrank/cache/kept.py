"""Results of steps that follow one another or run the model itself, kept one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from onnx_lowrank.cache.keys import fingerprint
from onnx_lowrank.cache.store import Store

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Kept:
    """Part of the cache, of results that have something in common.

    Parameters
    ----------
    store
        None keeps nothing.
    base
        Hash of what they have in common.
    """

    store: Store | None = None
    base: str = ""

    def under(self, *parts: Any) -> Kept:
        """The part of it whose results depend on `parts` too; nothing where those cannot be told apart."""
        if self.store is None:
            return self
        try:
            return Kept(self.store, fingerprint(self.base, *parts))
        except TypeError:
            return Kept()

    def get(self, *parts: Any) -> Any:
        """What was put for `parts`; None where there is nothing."""
        place = self.under(*parts)
        return place.store.get(place.base) if place.store else None

    def put(self, value: Any, *parts: Any) -> None:
        """Keep a result."""
        place = self.under(*parts)
        if place.store:
            place.store.put(place.base, value)

    def result(self, make: Callable[[], Outcome], *parts: Any) -> Outcome:
        """What was put for `parts`, or what `make` returns, which is put then; it is never None."""
        place = self.under(*parts)
        found = place.get()
        if found is None:
            found = make()
            place.put(found)
        made: Outcome = found
        return made


UNKEPT = Kept()
"""What keeps nothing."""
