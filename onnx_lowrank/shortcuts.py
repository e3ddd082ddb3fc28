"""Shortcuts that slice and pad as convolutions, and constants stored on the way: the function stays, the layout is not left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx_lowrank.graph.model import Model, serialize
from onnx_lowrank.graph.shapes import element_types, infer
from onnx_lowrank.graph.simplify import (
    computed_constants,
    convolve_shortcuts,
    making,
    shortcut_arguments,
    store_constants,
)
from onnx_lowrank.runtime import RunSettings, Session
from onnx_lowrank.types import LowRankError


def with_folded_shortcuts(model: Model, sizes: Mapping[str, tuple[int, ...]]) -> tuple[Model, tuple[str, ...]]:
    """`model` with shortcuts that slice and pad as 1x1 convolutions, and the names of those; itself where it has none.

    Parameters
    ----------
    sizes
        Of the inputs, for one sample.
    """
    wanted = set(shortcut_arguments(model))
    if not wanted:
        return model, ()
    copy = model.copy()
    try:
        store_computed(copy, [name for name in computed_constants(copy) if name in wanted])
    except LowRankError:  # of what cannot be computed nothing is made
        return model, ()
    made = fold_shortcuts(copy, sizes)
    return (copy, made) if made else (model, ())


def fold_shortcuts(model: Model, sizes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Make convolutions of what slices and pads, in the graph of `model`, which is changed; the names of their nodes.

    Where the kernels of its convolutions are of several types, or the shortcut is of another, it stays.
    """
    read = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    types = {tensor.data_type for tensor in model.graph.initializer if tensor.name in read}
    if len(types) != 1:
        return ()
    (kernels,), known = types, element_types(model)
    shapes = infer(model, dict(sizes)).items()
    channels = {name: shape[1] for name, shape in shapes if len(shape) == 4 and known.get(name) == kernels}
    return convolve_shortcuts(model, channels, kernels)


def store_computed(model: Model, names: Sequence[str]) -> None:
    """Compute the tensors called `names`, which depend on stored ones alone, and store them in `model`, which is changed."""
    if names:
        session = Session(serialize(making(model, names)), RunSettings(optimize=False), folder=model.folder)
        store_constants(model, dict(zip(names, session.run({}, names), strict=True)))
