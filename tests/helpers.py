"""What tests of models share: graphs in ONNX text, runs, decompositions of whole models, and comparisons."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper

from onnx_lowrank.candidates import group_layers, price
from onnx_lowrank.decompositions import find_decomposition, lift
from onnx_lowrank.graph.find import Found, find_layers
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.shapes import infer, model_inputs, sample_shapes
from onnx_lowrank.rewriting.rewrite import LayerReport, rewrite
from onnx_lowrank.types import Plan, Rank, no_progress
from onnx_lowrank.work.tasks import Work

Feeds = dict[str, np.ndarray]

SHARED = Path(os.environ.get("ONNX_LOWRANK_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
needs_shared = pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="ONNX_LOWRANK_DATA has no cifar10")


def parse(text: str, *, opset: int = 17, ir_version: int = 8, **stored: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX text without its header; `stored` become initializers."""
    model = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored.items())
    return model


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """A kernel of independent normal numbers, scaled so that what it computes is of the size of its input."""
    rng = np.random.default_rng([seed, *shape])
    return (rng.standard_normal(shape) / np.sqrt(max(1, int(np.prod(shape[1:]))))).astype(dtype)


def feeds_of(model: onnx.ModelProto, *, seed: int = 1, **shapes: Sequence[int]) -> Feeds:
    """Normal numbers for every input; `shapes` where the model leaves sizes open."""
    rng = np.random.default_rng(seed)
    inputs = model_inputs(load(model))
    sizes, _ = sample_shapes(inputs, shapes)
    return {item.name: rng.standard_normal(sizes[item.name]).astype(item.dtype) for item in inputs}


def run(model: onnx.ModelProto | str, feeds: Mapping[str, np.ndarray], *, optimize: bool = True) -> list[np.ndarray]:
    """Outputs of a model (or of the file at a path) in ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


@dataclass(frozen=True)
class Rewritten:
    """A model after its layers were decomposed."""

    model: onnx.ModelProto
    found: Found
    reports: tuple[LayerReport, ...]

    @property
    def nodes(self) -> dict[str, tuple[str, ...]]:
        """Names of the new nodes of each layer."""
        return {report.name: report.nodes for report in self.reports}

    def node(self, name: str) -> onnx.NodeProto:
        """The node of this name, or with this output where it has no name."""
        return next(n for n in self.model.graph.node if name in (n.name, *n.output))


def find(model: onnx.ModelProto | Path, **shapes: Sequence[int]) -> Found:
    """The layers of a model, or of the file at a path."""
    loaded = load(model)
    sizes, _ = sample_shapes(model_inputs(loaded), shapes)
    return find_layers(loaded, infer(loaded, sizes))


def full(rank: Rank) -> Rank:
    """The rank at which a decomposition is exact."""
    return rank


def half(rank: Rank) -> Rank:
    """A rank at which it is not."""
    return tuple(max(1, r // 2) for r in rank)


def ones(rank: Rank) -> Rank:
    """The lowest rank."""
    return (1,) * len(rank)


def decompose(
    model: onnx.ModelProto | Path,
    name: str,
    rank: Callable[[Rank], Rank] = full,
    *,
    only: Sequence[str] | None = None,
    **shapes: Sequence[int],
) -> Rewritten:
    """Every layer that decomposition `name` applies to (or those in `only`), at `rank` of its highest rank."""
    loaded = load(model)
    sizes, _ = sample_shapes(model_inputs(loaded), shapes)
    found = find_layers(loaded, infer(loaded, sizes))
    groups = group_layers(found.layers)
    choices = []
    for group in groups:
        specs = [layer.spec for layer in group.layers]
        decomposition = find_decomposition(name)
        if lift.refuses(decomposition, specs) or (only is not None and not set(only) & set(group.names)):
            continue
        choices.append(price(group, name, rank(lift.max_rank(decomposition, specs)), 0.0))
    result, reports = rewrite(loaded, found, groups, Plan(tuple(choices)), seed=0, work=Work(), progress=no_progress)
    return Rewritten(result.proto, found, reports)


def assert_close(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float) -> None:
    """Same number, dtype and shape of arrays, and no element further off than `tolerance` of the largest expected."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        wide, reference = a.astype(np.float64), e.astype(np.float64)
        size = np.abs(reference).max()
        assert np.isfinite(size)
        assert size > 0, "nothing is computed: the comparison could not fail"
        off = np.abs(wide - reference).max() / size
        assert off <= tolerance, f"off by {off:.3g} of the largest value, {tolerance:.3g} was allowed"


def assert_same_function(
    actual: onnx.ModelProto, expected: onnx.ModelProto, feeds: Feeds, tolerance: float = 1e-5
) -> None:
    """Two models give the same in ONNX Runtime, with its optimisations off and with all of them."""
    for optimize in (False, True):
        assert_close(run(actual, feeds, optimize=optimize), run(expected, feeds, optimize=optimize), tolerance)


def stored(model: onnx.ModelProto, name: str) -> np.ndarray:
    """Value of an initializer."""
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def with_stored(model: onnx.ModelProto, name: str, value: np.ndarray) -> onnx.ModelProto:
    """A copy with another value of an initializer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return copy


def composed(rewritten: Rewritten, layer: str) -> np.ndarray:
    """The kernel that a layer's new nodes compute together, in float64, read off the nodes themselves.

    Every spatial axis is spanned by one stage alone, so that the composition is a product of matrices over the
    channels at each position of the kernel.
    """
    steps = [_dense(rewritten, rewritten.node(name)) for name in rewritten.nodes[layer]]
    total = steps[0]
    for step in steps[1:]:
        total = np.einsum("oc...,ci...->oi...", step, total)
    return total


def _dense(rewritten: Rewritten, node: onnx.NodeProto) -> np.ndarray:
    """One stage's kernel as (out, in, spatial...), without groups."""
    values = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in rewritten.model.graph.initializer}
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "MatMul":
        return values[node.input[1]].T if node.input[1] in values else values[node.input[0]]
    if node.op_type == "Gemm":
        return values[node.input[1]] if attributes.get("transB") else values[node.input[1]].T
    return ungrouped(values[node.input[1]], attributes.get("group", 1), transposed=node.op_type == "ConvTranspose")


def ungrouped(kernel: np.ndarray, group: int, *, transposed: bool) -> np.ndarray:
    """A kernel in ONNX order as (out, in, spatial...), with zeros between the groups."""
    rows, columns = kernel.shape[0] // group, kernel.shape[1]
    dense = np.zeros((kernel.shape[0], columns * group, *kernel.shape[2:]))
    for g in range(group):
        dense[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = kernel[g * rows : (g + 1) * rows]
    return dense.swapaxes(0, 1) if transposed else dense


def regrouped(dense: np.ndarray, group: int, *, transposed: bool) -> np.ndarray:
    """The inverse of :func:`ungrouped`; nothing may lie between the groups."""
    dense = dense.swapaxes(0, 1) if transposed else dense
    rows, columns = dense.shape[0] // group, dense.shape[1] // group
    blocks = [dense[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(group)]
    kernel = np.concatenate(blocks)
    assert np.count_nonzero(dense) == np.count_nonzero(kernel)
    return kernel


def arrays(path: Path | str) -> dict[str, np.ndarray]:
    """All of an archive, which is closed."""
    with np.load(path) as archive:
        return dict(archive)
