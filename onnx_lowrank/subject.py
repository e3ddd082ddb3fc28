"""A model opened for work: its layers, their sizes, and the groups that are decided together."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_lowrank.candidates import Group, group_layers
from onnx_lowrank.channels import without_dead_channels
from onnx_lowrank.config import Config
from onnx_lowrank.data import Dataset, open_data
from onnx_lowrank.data.feeds import count, first_feeds, random_feeds
from onnx_lowrank.graph.constants import lists_all
from onnx_lowrank.graph.datafile import is_large
from onnx_lowrank.graph.dequantize import dequantized
from onnx_lowrank.graph.find import SUPPORTED, Found, find_layers, model_cost, sized_tensors
from onnx_lowrank.graph.limits import check_shapes
from onnx_lowrank.graph.model import Model, all_graphs, load, serialize
from onnx_lowrank.graph.sections import Section, sections
from onnx_lowrank.graph.shapes import Shapes, infer, model_inputs, sample_shapes, with_outputs
from onnx_lowrank.interop import to_proto
from onnx_lowrank.runtime import RunSettings, Session, tensor_shapes
from onnx_lowrank.shortcuts import with_folded_shortcuts
from onnx_lowrank.types import Cost, InputSpec, Layer, LowRankError, Progress, Skip, no_progress
from onnx_lowrank.verification.parts import PartSession
from onnx_lowrank.verification.verify import Feeds

CALIBRATION_SAMPLES = 2048
"""Samples that layers are fitted on at most, from all over; a few hundred do nearly as well."""

BATCH, BATCH_BYTES = 64, 1 << 23
"""Samples run at a time, and bytes of their inputs: a few times as much is alive inside the network."""

FOLDED = "a shortcut, folded: it copies its input"
"""Why a convolution that stands for a shortcut is left alone."""


@dataclass(frozen=True)
class Subject:
    """A model and all that is read off it before anything is decided.

    Parameters
    ----------
    given
        The model that the work is beside, as it was given.
    model
        What is worked on, never changed: `given`, brought back to floating point, with its shortcuts folded and without its dead
        channels, where that was asked for.
    inputs
        What it is fed.
    sample_shapes
        Sizes of its inputs for one sample.
    found
        Layers and skips.
    groups
        Layers that may be changed, in groups.
    sections
        Layers of those that repeat, and may come to share a factor.
    skips
        Those of `found`, and the layers that the user excludes.
    cost
        Of the whole of `given`, in floating point.
    added
        What the cost of `model` is above that; below it where channels were dropped.
    dropped
        Dead channels that `model` is without.
    notes
        What had to be assumed.
    """

    given: Model
    model: Model
    inputs: tuple[InputSpec, ...]
    sample_shapes: Shapes
    found: Found
    groups: tuple[Group, ...]
    sections: tuple[Section, ...]
    skips: tuple[Skip, ...]
    cost: Cost
    added: Cost
    dropped: int
    notes: tuple[str, ...]

    @property
    def foldable(self) -> tuple[str, ...]:
        """Shortcuts that slice and pad, and would be convolutions if that were asked for."""
        return with_folded_shortcuts(self.model, self.sample_shapes)[1]

    def settings(self, config: Config) -> RunSettings:
        """What the model is measured on. Providers beside the CPU compile models: every axis that has a name gets a size."""
        sizes: dict[str, int] = {}
        if config.accelerated:
            for spec, fixed in zip(self.inputs, self.measured_inputs(config), strict=True):
                sizes |= {s: int(f or 1) for s, f in zip(spec.shape, fixed.shape, strict=True) if isinstance(s, str)}
        options, libraries = config.provider_option.items(), config.provider_library.items()
        return RunSettings(
            config.provider,
            config.threads,
            options=tuple(options),
            libraries=tuple(libraries),
            sizes=tuple(sizes.items()),
        )

    def measured_inputs(self, config: Config) -> tuple[InputSpec, ...]:
        """What the model is fed where it is measured: of the sizes that :meth:`settings` lays down."""
        if not config.accelerated:
            return self.inputs
        made = []
        for spec in self.inputs:
            sizes = self.sample_shapes[spec.name]
            named = [(config.batch_size if axis == 0 else size) for axis, size in enumerate(sizes)]
            shape = tuple(
                size if s is None or isinstance(s, str) else s for s, size in zip(spec.shape, named, strict=True)
            )
            made.append(replace(spec, shape=shape))
        return tuple(made)

    def feeds(self, batch: int = 1, *, seed: int = 0) -> Feeds:
        """Random feeds of `batch` samples, or of as many as the model insists on."""
        shapes = {spec.name: self.sample_shapes[spec.name] for spec in self.inputs}
        fixed = {spec.name for spec in self.inputs if not spec.shape or isinstance(spec.shape[0], int)}
        sized = {name: shape if name in fixed else (batch, *shape[1:]) for name, shape in shapes.items()}
        return random_feeds(((spec.name, sized[spec.name], spec.dtype) for spec in self.inputs), seed)


def open_model(source: Any) -> Model:
    """A model of any kind that is accepted, loaded.

    Raises
    ------
    LowRankError
        Where it is of no such kind, or cannot be loaded; see :func:`onnx_lowrank.graph.model.load`.
    """
    try:
        return source if isinstance(source, Model) else load(to_proto(source))
    except TypeError as error:
        raise LowRankError(
            f"a model of type {type(source).__name__} was given: a path, a ModelProto, a graphsurgeon Graph or an onnx-ir "
            f"Model was expected"
        ) from error


def open_subject(
    source: Any, config: Config, *, dead_block: int | None = None, progress: Progress = no_progress
) -> Subject:
    """Load a model and find what is in it.

    Parameters
    ----------
    source
        A path, a ModelProto, a graphsurgeon Graph or an onnx-ir Model; or a model that is loaded already.
    dead_block
        Where given, channels that carry nothing on any calibration sample are left out, and what is left is kept to this
        multiple.

    Raises
    ------
    LowRankError
        Where it cannot be used; see :func:`onnx_lowrank.graph.model.load` and the data it is given.
    """
    given = open_model(source)
    floating = dequantized(given) if config.dequantize else given
    inputs = model_inputs(given)
    sizes, notes = sample_shapes(inputs, dict(config.input_shape) or _shapes_of_data(inputs, config))
    model, shortcuts = with_folded_shortcuts(floating, sizes) if config.fold_shortcuts else (floating, ())
    if config.fold_shortcuts and not shortcuts:
        notes += ("no shortcut that slices and pads was found to be folded",)
    elif shortcuts:
        notes += (
            f"{len(shortcuts)} shortcut(s) that slice and pad are 1x1 convolutions now: {', '.join(shortcuts[:3])}",
        )
    if config.dequantize:
        notes += (
            "the model was brought back to floating point first: MACs and parameters of the original are those of that form, "
            "bytes, times and accuracy those of the model as it was given",
        )
    if model.proto.ir_version >= 4 and lists_all(model):
        notes += (
            "its weights are listed among its inputs, as older exporters do: those of the layers that are replaced cannot be "
            "fed any more",
        )
    shapes = shapes_of(model, inputs, sizes)
    cost, unknown = model_cost(floating, shapes)
    dropped = 0
    if dead_block:
        model, dropped, note = _without_dead_channels(model, inputs, sizes, shapes, config, dead_block, progress)
        shapes = shapes_of(model, inputs, sizes) if dropped else shapes
        notes += (note,)
    found = find_layers(model, shapes)
    spared = [layer for layer in found.layers if layer.name in shortcuts or not config.selects(layer.name)]
    left = tuple(
        Skip(x.name, x.op_type, FOLDED if x.name in shortcuts else "left out by --include or --exclude") for x in spared
    )
    kept = {layer.weight_name for layer in spared}
    chosen = [
        replace(layer, weight_kept=layer.weight_kept or layer.weight_name in kept)
        for layer in found.layers
        if layer not in spared
    ]
    added = model_cost(model, shapes)[0] - cost if model is not floating else Cost(0, 0)
    if unknown:
        notes += (
            f"the MACs of {len(unknown)} node(s) are not counted, their sizes are unknown: {', '.join(unknown[:3])}",
        )
    groups = group_layers(chosen)
    alone = [group.layers[0] for group in groups if len(group.layers) == 1 and not group.layers[0].weight_kept]
    repeated = _named_sections(alone, config) if config.group else sections(model, found, alone)
    skips = found.skips + left
    return Subject(given, model, inputs, sizes, found, groups, tuple(repeated), skips, cost, added, dropped, notes)


def _without_dead_channels(
    model: Model,
    inputs: tuple[InputSpec, ...],
    sizes: Shapes,
    shapes: Shapes,
    config: Config,
    block: int,
    progress: Progress,
) -> tuple[Model, int, str]:
    """`model` without dead channels, how many there were, and what is to be said of it."""
    if is_large(model):
        raise LowRankError("drop_dead_channels takes models of less than 2 GB: leave it out")
    feeds = [feeds for feeds, _ in calibration_batches(config, inputs, sizes) or ()]
    layers = {place.position: name for name, place in find_layers(model, shapes).places.items()}
    nodes = enumerate(model.graph.node)
    names = {position: layers.get(position, node.name) for position, node in nodes if node.op_type in SUPPORTED}
    spared = {position for position, name in names.items() if not config.selects(name)}
    lean, dropped = without_dead_channels(model, shapes, feeds, block, progress, spared)
    seen = f"on any of {count(feeds)} calibration samples"
    blocks = f", in blocks of {block}" if block > 1 else ""
    if not dropped.channels:
        return model, 0, f"no channel was dropped: there is none that carries nothing {seen}{blocks}"
    made_by = ", ".join(names[position] for position in dropped.makers[:3])
    more = f" and {len(dropped.makers) - 3} other layer(s)" if len(dropped.makers) > 3 else ""
    note = f"{dropped.channels} channel(s) that carry nothing {seen} were dropped{blocks}: of {made_by}{more}"
    return lean, dropped.channels, note


def check_patterns(subject: Subject, config: Config) -> None:
    """See that each pattern of layers' names is one of some node, in a body too: a mistake in it would go unnoticed.

    Raises
    ------
    LowRankError
        Where one matches nothing.
    """
    names = [node.name for graph in all_graphs(subject.model.graph) for node in graph.node]
    names += [layer.name for layer in subject.found.layers]
    for option, patterns in (("include", config.include), ("exclude", config.exclude)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                like = difflib.get_close_matches(pattern, names, 1, 0.3) or names[:1]
                raise LowRankError(f"{option} {pattern} matches no node: names are like {', '.join(like)}, see inspect")


def _named_sections(layers: Sequence[Layer], config: Config) -> list[Section]:
    """The sections that the user names, each by a pattern of its layers' names."""
    named = []
    for name, pattern in config.group.items():
        members = tuple(layer for layer in layers if fnmatch.fnmatchcase(layer.name, pattern))
        if len(members) < 2:
            raise LowRankError(
                f"group {name}={pattern} names {len(members)} layer(s) with a kernel of its own: two and more were expected, "
                f"see inspect"
            )
        named.append(Section(members, shortcut=False))
    return named


def open_config_data(which: str, inputs: tuple[InputSpec, ...], config: Config) -> Dataset | None:
    """The data set that `config` names ``calibrate`` or ``evaluate``; None where it names none."""
    source = getattr(config, which)
    return None if source is None else open_data(source, inputs, preprocess=config.preprocess)


def calibration_batches(
    config: Config, inputs: tuple[InputSpec, ...], sizes: Shapes
) -> list[tuple[dict[str, np.ndarray], np.ndarray | None]] | None:
    """Samples of ``calibrate`` from all over, batch by batch, each with its labels; None where `config` names none.

    Parameters
    ----------
    sizes
        Of the inputs, for one sample.
    """
    data = open_config_data("calibrate", inputs, config)
    if data is None:
        return None
    size = sum(item.dtype.itemsize * math.prod(sizes[item.name]) for item in inputs)
    batch = max(1, min(BATCH, BATCH_BYTES // max(size, 1)))
    return list(data.spread(CALIBRATION_SAMPLES).batches(batch))


def _shapes_of_data(inputs: tuple[InputSpec, ...], config: Config) -> Mapping[str, tuple[int, ...]]:
    """Shapes of one sample of the data, where there is any."""
    for which in ("evaluate", "calibrate"):
        data = open_config_data(which, inputs, config)
        if data is not None:
            return {name: np.shape(value) for name, value in first_feeds(data.batches(1)).items()}
    return {}


RANDOM_BYTES = 8
"""Of a number on its way into a random feed."""


def shapes_of(model: Model, inputs: tuple[InputSpec, ...], sizes: Shapes) -> Shapes:
    """Shapes by inference, and where that stops short, by running one sample."""
    check_shapes(sizes, RANDOM_BYTES)
    shapes = infer(model, sizes)
    check_shapes(shapes)
    missing = [name for name in sized_tensors(model) if name not in shapes]
    if missing:
        feeds = random_feeds((spec.name, sizes[spec.name], spec.dtype) for spec in inputs)
        asked, settings = with_outputs(model, missing), RunSettings(optimize=False)
        session = (
            PartSession(asked, settings)
            if is_large(model)
            else Session(serialize(asked), settings, folder=model.folder)
        )
        try:
            shapes |= tensor_shapes(session, feeds, missing)
        except LowRankError as error:
            raise LowRankError(f"{error} (tried to learn the sizes of its layers)") from error
    return shapes
