"""The calibration samples of a run: what layers are fitted to, what they see of it, and what is held apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from onnx_lowrank.calibration.calibrate import Batch, collect, held_apart
from onnx_lowrank.calibration.moments import together
from onnx_lowrank.candidates import Group
from onnx_lowrank.data.feeds import count
from onnx_lowrank.planning.run import Run
from onnx_lowrank.rewriting.refit import fits
from onnx_lowrank.subject import calibration_batches
from onnx_lowrank.types import Layer, LayerStatistics

FITTING_BYTES = 4 << 30
"""Most bytes of activations kept for fitting layers one after the other: of large pictures, fewer samples are used."""


class Fitting:
    """Samples of a run, read once.

    Parameters
    ----------
    run
        Whose ``calibrate`` they are.
    plain
        True where kernels are those of the weights alone: samples only measure.
    """

    def __init__(self, run: Run, plain: bool) -> None:
        self._run = run
        self.wanted = run.config.calibrate is not None and not plain
        """Whether kernels are fitted to samples."""
        self.used = 0, 0
        """Samples that layers were fitted on one after the other, of how many."""

    @cached_property
    def feeds(self) -> list[Batch] | None:
        """All samples, batch by batch; None where the user gave none."""
        subject, config = self._run.subject, self._run.config
        read = calibration_batches(config, subject.inputs, subject.sample_shapes)
        if read is None:
            return None
        feeds = [feeds for feeds, _ in read]
        return mixed(feeds, config.seed) if in_order([labels for _, labels in read]) else feeds

    def fits(self, decomposition: str, names: Sequence[str]) -> bool:
        """Whether layers' kernels of this form can be fitted to samples: none of them sees too much for that."""
        layers = {layer.name: layer for layer in self._run.subject.found.layers}
        return fits(decomposition, [layers[name] for name in names])

    def apart(self) -> list[Batch]:
        """Samples that nothing was fitted to."""
        feeds = self.feeds or []
        return held_apart(feeds)[1] if self.wanted else feeds

    @cached_property
    def statistics(self) -> dict[str, LayerStatistics]:
        """What the layers see, where there are samples to fit to; those that read one kernel, what they see together."""
        run, feeds = self._run, self.feeds
        if feeds is None or not self.wanted:
            return {}
        with run.stage("calibrate"):
            seen = collect(
                run.subject.model,
                run.subject.found,
                [name for group in run.subject.groups if self._looked_at(group) for name in group.names],
                held_apart(feeds)[0],
                seed=run.config.seed,
                kept=run.kept,
                progress=run.progress,
            )
        for names in self.tied:
            seen |= dict.fromkeys(names, together([seen[name] for name in names])) if names[0] in seen else {}
        return seen

    def _looked_at(self, group: Group) -> bool:
        """Whether some method asked for can be fitted to what a group sees."""
        return any(fits(name, group.layers) for name in self._run.config.methods)

    @property
    def tied(self) -> list[tuple[str, ...]]:
        """Names of the layers of each group that reads one kernel several times."""
        return [group.names for group in self._run.subject.groups if len(group.layers) > 1]

    def with_room(self) -> list[Batch] | None:
        """Samples that the layers are fitted on: as many as have room with all that is alive in both networks."""
        feeds = self.feeds
        if feeds is None:
            return None
        alive = max((_alive(layer) for layer in self._run.subject.found.layers), default=0)
        few = feeds[:: max(1, -(-alive * count(feeds) // FITTING_BYTES))]  # from all over, as `feeds` are
        self.used = count(few), count(feeds)
        return few


def in_order(labels: Sequence[np.ndarray | None]) -> bool:
    """Whether samples are known to stand class by class, as those of a folder for each class do."""
    known = [part.ravel() for part in labels if part is not None and part.ndim <= 1 and part.dtype.kind in "iu"]
    if not known or len(known) < len(labels):
        return False
    classes = np.concatenate(known)
    changes = np.count_nonzero(np.diff(classes))  # one for each class but the first, in whatever order the classes are
    return bool(0 < changes == len(np.unique(classes)) - 1)


def mixed(feeds: Sequence[Batch], seed: int) -> list[Batch]:
    """The same samples in an order of chance, in batches of the same sizes: some steps look at the first of them only.

    Where samples have not all the same shape, as they are.
    """
    if len({tuple((name, value.shape[1:]) for name, value in batch.items()) for batch in feeds}) > 1:
        return list(feeds)
    sizes = [count([batch]) for batch in feeds]
    if any(value.shape[:1] != (size,) for batch, size in zip(feeds, sizes, strict=True) for value in batch.values()):
        return list(feeds)
    places = [(batch, row) for batch, size in enumerate(sizes) for row in range(size)]
    order = iter(np.random.default_rng(seed).permutation(len(places)))
    taken = [[places[next(order)] for _ in range(size)] for size in sizes]
    return [{name: np.stack([feeds[b][name][r] for b, r in some]) for name in feeds[0]} for some in taken]


def _alive(layer: Layer) -> int:
    """Bytes of a sample at a layer: its input, output and one more of that size, in two networks."""
    spec = layer.spec
    after = spec.output_size(layer.input_size)
    into, out = spec.in_channels * math.prod(layer.input_size), spec.out_channels * math.prod(after)
    return 8 * layer.batch * (into + 2 * out)
