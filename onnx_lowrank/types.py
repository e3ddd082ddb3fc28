"""The nouns of the package: frozen dataclasses over numpy, with no graph and no runtime in them.

Kernels are in ONNX order everywhere: ``(out, in / group, spatial...)`` for a convolution and
``(in, out / group, spatial...)`` for a transposed one. A Gemm or a MatMul is a convolution without
spatial axes, so that one vocabulary (and one cost function) serves every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np

Rank = tuple[int, ...]
"""The rank of a decomposition: one number, or one for each mode (Tucker-2: ``(r_out, r_in)``)."""

Metric = str
"""What a budget is counted in: ``macs``, ``params`` or ``latency``, which a plan knows; ``size`` is measured."""


class LowRankError(ValueError):
    """Something given cannot be used. The message says what was given, what was expected and what to do, in one line."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """`text` with a space for what would move a terminal's cursor or worse: names come from models of others.

    Examples
    --------
    >>> printable("a" + chr(27) + "[2Jb" + chr(10) + "c")
    'a [2Jb c'
    """
    return "".join(c if c.isprintable() else " " for c in text)


Member = TypeVar("Member")


def member_of(table: Mapping[str, Member], kind: str, name: str) -> Member:
    """The member of a table of the package that is called `name`.

    Raises
    ------
    LowRankError
        For a name that is not in it; `kind` says what it would have been.
    """
    if name not in table:
        raise LowRankError(f"no {kind} is called '{name}': one of {', '.join(table)} was expected")
    return table[name]


@dataclass(frozen=True)
class ConvSpec:
    """One convolution without its numbers, over any number of spatial axes.

    Parameters
    ----------
    weight_shape
        Kernel shape in ONNX order; ``(out, in)`` for a Gemm or MatMul.
    strides, dilations, output_padding
        One number for each spatial axis (empty: 1, 1 and 0).
    pads
        All begins, then all ends, as in ONNX (empty: 0).
    group
        Number of groups.
    auto_pad
        ``NOTSET``, ``VALID``, ``SAME_UPPER`` or ``SAME_LOWER``; ``SAME`` ignores ``pads``.
    transposed
        True for ConvTranspose, whose kernel is ``(in, out / group, spatial...)``.
    """

    weight_shape: tuple[int, ...]
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    group: int = 1
    auto_pad: str = "NOTSET"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.weight_shape) - 2
        object.__setattr__(self, "strides", tuple(self.strides) or (1,) * n)
        object.__setattr__(self, "pads", tuple(self.pads) or (0,) * (2 * n))
        object.__setattr__(self, "dilations", tuple(self.dilations) or (1,) * n)
        object.__setattr__(self, "output_padding", tuple(self.output_padding) or (0,) * n)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial sizes of the kernel."""
        return self.weight_shape[2:]

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.weight_shape) - 2

    @property
    def out_channels(self) -> int:
        return self.weight_shape[1] * self.group if self.transposed else self.weight_shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight_shape[0] if self.transposed else self.weight_shape[1] * self.group

    @property
    def params(self) -> int:
        """Elements of the kernel."""
        return math.prod(self.weight_shape)

    @property
    def depthwise(self) -> bool:
        """True where no channel is mixed with another, so that there is nothing to factorise."""
        return self.group > 1 and self.group == self.in_channels

    def stage(self, out: int, in_per_group: int, axes: Sequence[int] = (), *, group: int = 1) -> ConvSpec:
        """A convolution that spans only `axes` of this one and is pointwise along the others.

        Strides, pads, dilations and output padding stay on the stage that spans their axis: only there is
        zero padding exact, and every position that a stride skips is skipped as early as it can be.
        """
        keep = set(axes)
        n = self.ndim

        def of(values: tuple[int, ...], default: int) -> tuple[int, ...]:
            return tuple(v if i % n in keep else default for i, v in enumerate(values))

        return ConvSpec(
            (out, in_per_group, *of(self.kernel, 1)),
            of(self.strides, 1),
            of(self.pads, 0),
            of(self.dilations, 1),
            group,
            self.auto_pad if keep else "NOTSET",
            self.transposed,
            of(self.output_padding, 0),
        )

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial sizes of the output for spatial sizes `size` of the input."""
        return tuple(self._output_size(axis, value) for axis, value in enumerate(size))

    def _output_size(self, axis: int, size: int) -> int:
        stride, kernel = self.strides[axis], self.kernel[axis]
        same = self.auto_pad.startswith("SAME")
        pads = 0 if self.auto_pad != "NOTSET" else self.pads[axis] + self.pads[axis + self.ndim]
        extent = (kernel - 1) * self.dilations[axis] + 1
        if self.transposed:
            return size * stride if same else stride * (size - 1) + self.output_padding[axis] + extent - pads
        return -(-size // stride) if same else (size + pads - extent) // stride + 1


@dataclass(frozen=True)
class Layer:
    """A decomposable node of the model, without its graph.

    Parameters
    ----------
    name
        Name of the node, made unique; what ``--include`` and a plan refer to.
    op_type
        ``Conv``, ``ConvTranspose``, ``Gemm`` or ``MatMul``.
    spec
        The convolution that the node computes.
    read_weight
        Reads the kernel, shape ``spec.weight_shape``, in the model's dtype. Called once for each use, so
        that only the layer at work is in memory.
    dtype
        The kernel's.
    input_size
        Spatial sizes of the input for one sample; empty for Gemm and MatMul.
    batch
        Number of independent inputs for one sample: 1 for a convolution, rows of the activation for a MatMul.
    weight_name
        Name of the stored kernel; layers with the same one share it.
    weight_kept
        True when something beside the layers named here reads the stored kernel, so that it stays in the file.
    """

    name: str
    op_type: str
    spec: ConvSpec
    read_weight: Callable[[], np.ndarray] = field(repr=False, compare=False)
    dtype: np.dtype
    input_size: tuple[int, ...] = ()
    batch: int = 1
    weight_name: str = ""
    weight_kept: bool = False
    bias: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        positions = self.input_size if self.spec.transposed else self.spec.output_size(self.input_size)
        return self.batch * math.prod(positions) * self.spec.params


@dataclass(frozen=True)
class Skip:
    """Why a node was left alone: a refusal is data, never silence and never an exception.

    Parameters
    ----------
    layer, op_type
        Name and operator of the node.
    reason
        In words.
    """

    layer: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class LayerStatistics:
    """First and second moments of a layer's input patches, ``x`` of length ``in * prod(kernel)``.

    Parameters
    ----------
    mean
        ``E[x]``, shape ``(in * prod(kernel),)``.
    second_moment
        ``E[x x^T]``, shape ``(in * prod(kernel), in * prod(kernel))``; empty where `patches` stand for it.
    samples
        Number of patches seen.
    patches
        The patches themselves less their mean, ``(samples, in * prod(kernel))``, where that matrix would be too large.
    shrinkage
        With `patches`: the share of their covariance that is replaced by a multiple of the identity, and that multiple.
    """

    mean: np.ndarray
    second_moment: np.ndarray
    samples: int
    patches: np.ndarray | None = None
    shrinkage: tuple[float, float] = (0.0, 0.0)

    @property
    def covariance(self) -> np.ndarray:
        """``E[(x - mean)(x - mean)^T]``: what is left once the bias has taken the mean; not for long `patches`."""
        assert self.patches is None, "of patches this long no covariance is formed"
        return self.second_moment - np.outer(self.mean, self.mean)

    def output_covariance(self, kernel: np.ndarray) -> np.ndarray:
        """Covariance ``W S W^T``, (O, O), of what a `kernel`, (O, in * prod(kernel)), makes of the patches."""
        if self.patches is None:
            return kernel @ self.covariance @ kernel.T
        share, variance = self.shrinkage
        kernel, outputs = self._seen_by(kernel)
        own = (kernel @ kernel.T).astype(np.float64)
        return (1 - share) / self.samples * (outputs @ outputs.T) + share * variance * own

    def output_energy(self, kernel: np.ndarray) -> float:
        """Trace of :meth:`output_covariance`: mean energy of the outputs."""
        if self.patches is None:
            return float(np.sum((kernel @ self.covariance) * kernel))
        share, variance = self.shrinkage
        kernel, outputs = self._seen_by(kernel)
        own = float(np.vdot(kernel, kernel))
        return (1 - share) / self.samples * float(np.vdot(outputs, outputs)) + share * variance * own

    def _seen_by(self, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`kernel` in the precision of the patches, and what it makes of them, (O, samples)."""
        assert self.patches is not None
        kernel = kernel.astype(np.float32, copy=False)
        return kernel, (kernel @ self.patches.T).astype(np.float64)

    def of_group(self, index: int, groups: int) -> LayerStatistics:
        """The part that one group of channels sees."""
        size = len(self.mean) // groups
        part = slice(index * size, (index + 1) * size)
        if self.patches is not None:
            return replace(self, mean=self.mean[part], patches=self.patches[:, part])
        return LayerStatistics(self.mean[part], self.second_moment[part, part], self.samples)


@dataclass(frozen=True)
class Part:
    """So many `ranks` of a kernel along `axis`, stored by themselves; once for several layers where `shared` is a tag."""

    ranks: int
    shared: str | None
    axis: int


@dataclass(frozen=True)
class Stage:
    """One convolution of a chain.

    Parameters
    ----------
    spec
        The convolution.
    shared
        Tags a kernel that is stored once for several layers.
    parts
        What the kernel is joined from, where it is not stored whole.
    """

    spec: ConvSpec
    shared: str | None = None
    parts: tuple[Part, ...] = ()

    @property
    def pieces(self) -> tuple[tuple[str | None, tuple[int, ...]], ...]:
        """Tag and shape of each kernel that is stored."""
        if not self.parts:
            return ((self.shared, self.spec.weight_shape),)
        shapes = []
        for part in self.parts:
            shape = list(self.spec.weight_shape)
            shape[part.axis] = part.ranks
            shapes.append((part.shared, tuple(shape)))
        return tuple(shapes)

    def tagged(self, prefix: str) -> Stage:
        """The same with tags of its own: `prefix` before each."""
        parts = tuple(replace(part, shared=part.shared and f"{prefix}_{part.shared}") for part in self.parts)
        return Stage(self.spec, self.shared and f"{prefix}_{self.shared}", parts)


Chain = tuple[Stage, ...]
"""What a layer becomes: convolutions one after the other, the bias on the last."""


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulate operations for one sample, stored parameters, and where it is known, time.

    Parameters
    ----------
    macs, params
        Counted.
    latency_ms
        Of one run, measured or interpolated between what was measured; 0 where nobody asked.
    """

    macs: int
    params: int
    latency_ms: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.params + other.params, self.latency_ms + other.latency_ms)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.macs - other.macs, self.params - other.params, self.latency_ms - other.latency_ms)

    def of(self, metric: Metric) -> float:
        """The count of `metric`: ``macs``, ``params`` or ``latency``."""
        count: float = getattr(self, {"latency": "latency_ms"}.get(metric, metric))
        return count


DENSE = "dense"
"""The decomposition that leaves a layer as it is."""


@dataclass(frozen=True)
class Candidate:
    """What a group of layers (one, unless they share kernels) could become.

    Parameters
    ----------
    layers
        Names of the layers.
    decomposition
        Key of ``DECOMPOSITIONS``, or ``dense``.
    rank
        Rank of the decomposition; empty for ``dense``.
    chains
        One chain for each layer; empty for ``dense``.
    cost
        Of the whole group.
    error
        Predicted damage, the quantity that a budget solver adds up: by the weights alone the squared relative error of the
        kernels, with samples what that does to the model's outputs; or the metric of `damage`.
    """

    layers: tuple[str, ...]
    decomposition: str
    rank: Rank
    chains: tuple[Chain, ...]
    cost: Cost
    error: float

    @property
    def dense(self) -> bool:
        return self.decomposition == DENSE


@dataclass(frozen=True)
class Budget:
    """At most `ratio` of the original's `metric`."""

    metric: Metric
    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise LowRankError(
                f"budget {self.metric}={self.ratio:g}: a fraction of the original above 0 and at most 1 was expected, "
                f"for example {self.metric}=0.5"
            )


@dataclass(frozen=True)
class Plan:
    """A decision for every layer: printable, editable as JSON, and all that a rewrite needs.

    Parameters
    ----------
    choices
        One candidate for each group of layers, dense ones included, in the order of the graph.
    skips
        The nodes that no candidate was made for.
    rest
        Cost of everything in the model that no choice covers.
    original
        Cost of the whole model before.
    notes
        What the user should know about how the plan came to be: an assumed input size, a budget out of reach.
    candidates
        What each group could have become instead, as the plan saw it; empty where no allocation was made.
    fitted
        Whether it was made for kernels fitted to samples: those of the weights alone do worse.
    dropped
        Dead channels that were left out of the model before it was made.
    """

    choices: tuple[Candidate, ...]
    skips: tuple[Skip, ...] = ()
    rest: Cost = Cost(0, 0)
    original: Cost = Cost(0, 0)
    notes: tuple[str, ...] = ()
    candidates: tuple[tuple[Candidate, ...], ...] = field(default=(), repr=False)
    fitted: bool = False
    dropped: int = 0

    @property
    def cost(self) -> Cost:
        """Cost of the whole model after."""
        return sum((c.cost for c in self.choices), self.rest)

    @property
    def error(self) -> float:
        """Sum of the predicted damages."""
        return math.fsum(c.error for c in self.choices)

    def ratio(self, metric: Metric) -> float:
        """Share of the original's `metric` (``macs``, ``params`` or ``latency``) that is left."""
        before = self.original.of(metric)
        return self.cost.of(metric) / before if before else 1.0

    def with_notes(self, *notes: str) -> Plan:
        """The same plan with `notes` added."""
        return replace(self, notes=self.notes + notes)


@dataclass(frozen=True)
class Factorization:
    """Kernels of the chains of a group of layers.

    Parameters
    ----------
    kernels
        For each layer, one array for each stage of its chain, shaped as the chain declares.
    relative_error
        ``||W - W~||_F / ||W||_F`` over the group, in the norm of the statistics where there are any.
    converged
        False when an iterative algorithm stopped before its tolerance.
    next_step
        What to try where it did not converge; empty otherwise.
    biases
        For each layer, what stands for its bias; None, or nothing at all, leaves it.
    """

    kernels: tuple[tuple[np.ndarray, ...], ...]
    relative_error: float
    converged: bool = True
    next_step: str = ""
    biases: tuple[np.ndarray | None, ...] = ()

    def of(self, index: int) -> tuple[np.ndarray, ...]:
        """Kernels of the layer at `index`; one set may stand for all layers."""
        return self.kernels[index if len(self.kernels) > 1 else 0]

    def stored(self, dtype: np.dtype) -> Factorization:
        """With kernels in the precision that they are written in, row after row as a file has them."""
        with np.errstate(over="ignore"):
            rows = tuple(tuple(k.astype(dtype, order="C") for k in kernels) for kernels in self.kernels)
            return replace(self, kernels=rows)


class Decomposition(Protocol):
    """A way to write layers as chains of smaller ones.

    A member sees plain convolutions only (one group, not transposed): `decompositions.lift` brings groups
    and transposed convolutions to that form once for all members. `specs` and `weights` hold one entry for
    each layer of the group, which has one layer except where kernels are shared.
    """

    name: str

    def refuses(self, specs: Sequence[ConvSpec]) -> str | None:
        """Why the layers cannot be decomposed this way; None where they can."""

    def max_rank(self, specs: Sequence[ConvSpec]) -> Rank:
        """The rank at which the chain can reproduce any kernel."""

    def chain(self, specs: Sequence[ConvSpec], rank: Rank) -> tuple[Chain, ...]:
        """The chain of each layer: shapes only."""

    def errors(
        self,
        weights: Sequence[np.ndarray],
        ranks: Sequence[Rank],
        statistics: Sequence[LayerStatistics] | None = None,
    ) -> np.ndarray:
        """Predicted squared relative error for each of `ranks`, without factorising for each.

        Of the kernel, ``(||W - W~|| / ||W||)^2``; with `statistics`, of the output that these inputs give.
        """

    def estimate_rank(self, weights: Sequence[np.ndarray], estimator: Callable[[np.ndarray], int]) -> Rank:
        """The rank that a matrix rank estimator gives; 0 in it means that there is no signal to keep."""

    def factorize(
        self,
        weights: Sequence[np.ndarray],
        rank: Rank,
        statistics: Sequence[LayerStatistics] | None = None,
        *,
        rng: np.random.Generator,
        start: Sequence[Sequence[np.ndarray]] | None = None,
        draft: bool = False,
    ) -> Factorization:
        """Kernels of `rank`, in float64.

        An iterative fit with `statistics` goes on from the kernels `start`; as a `draft` it stops early.
        """


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Parameters
    ----------
    name
        Its name in the graph.
    shape
        One entry for each axis: a number, or a name or None where it is dynamic.
    dtype
        What the model computes it in.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype


Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)`` while long work goes on; a stage may say more after a colon and a space."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""
