"""What is done for one group of layers, as tasks: processes import this module, and with it numpy and scipy only.

They start in half a second then, and take a third of the memory that ONNX and its runtime would cost each.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_lowrank.cache import fingerprint
from onnx_lowrank.cache.keys import member_key
from onnx_lowrank.candidates import Group, estimated_candidate, group_candidates, show_rank
from onnx_lowrank.decompositions import find_decomposition, lift
from onnx_lowrank.types import (
    Candidate,
    Factorization,
    LowRankError,
    Skip,
)
from onnx_lowrank.work.tasks import Task


@dataclass(frozen=True)
class InMemory:
    """Reads a kernel that is in memory already; unlike a reader of the model, it can be sent to another process."""

    value: np.ndarray

    def __call__(self) -> np.ndarray:
        return self.value

    @property
    def digest(self) -> str:
        """Hash of the kernel."""
        return fingerprint(self.value)


def loaded(group: Group) -> Group:
    """`group` with its kernel in memory."""
    if group.joint:
        return replace(group, layers=tuple(replace(x, read_weight=InMemory(x.read_weight())) for x in group.layers))
    read = InMemory(group.layers[0].read_weight())
    return Group(tuple(replace(layer, read_weight=read) for layer in group.layers))


def group_task(group: Group, *settings: Any, size: int, key: tuple[Any, ...]) -> Task[tuple[Any, ...]]:
    """The task of a function that takes `group` and `settings`, in a tuple.

    Parameters
    ----------
    key
        What the outcome depends on beside the group.
    """
    placed = all(getattr(layer.read_weight, "placed", False) for layer in group.owners)
    return Task((group, *settings), size, (group, *key), placed)


def loaded_task(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a task was given, with the kernels of its group in memory."""
    return loaded(given[0]), *given[1:]


def methods_key(*names: str) -> tuple[Any, ...]:
    """What decompositions are, for the keys of tasks."""
    return tuple((name, member_key(find_decomposition(name))) for name in names)


def candidates_of(given: tuple[Any, ...]) -> tuple[tuple[Candidate, ...], Skip | None]:
    """:func:`group_candidates` of a task."""
    group, methods, seen, block, most, levels, refuses = given
    return group_candidates(group, methods, block, seen, most=most, levels=levels, refuses=refuses)


def estimated_of(given: tuple[Any, ...]) -> Candidate | Skip:
    """:func:`estimated_candidate` of a task."""
    return estimated_candidate(*given)


def factorize_group(given: tuple[Any, ...]) -> Factorization:
    """Kernels of a choice by its weights alone, in the model's precision.

    Raises
    ------
    LowRankError
        Where a layer cannot be factorised; its name, decomposition and rank are in the message.
    """
    group, choice, seed = given
    layer = group.layers[0]
    # a stream of its own for each layer: the result does not depend on the order or on what else is decomposed
    rng = np.random.default_rng([seed, zlib.crc32(layer.name.encode())])
    decomposition = find_decomposition(choice.decomposition)
    try:
        specs, weights = [x.spec for x in group.owners], [x.read_weight() for x in group.owners]
        made = lift.factorize(decomposition, specs, weights, choice.rank, rng=rng)
    except (np.linalg.LinAlgError, ValueError) as error:
        raise LowRankError(
            f"layer '{layer.name}', {choice.decomposition} of rank {show_rank(choice.rank)}: {error}"
        ) from error
    # in the model's precision from here on: a cache of float64 kernels would be as large as the model itself
    return made.stored(layer.dtype)


def draft_of(given: tuple[Any, ...]) -> Factorization:
    """A quick factorization of a task, by what its layer sees where that is known."""
    group, probe, seen, seed = given
    layer = group.layers[0]
    return lift.factorize(
        find_decomposition(probe.decomposition),
        [layer.spec],
        [layer.read_weight()],
        probe.rank,
        None if seen is None else [seen],
        rng=np.random.default_rng(seed),
        draft=True,
    ).stored(layer.dtype)
