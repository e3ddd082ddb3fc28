"""ONNX Runtime's tools for mobile targets: partitions of a graph without the device, and the .ort format."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.tools.mobile_helpers import usability_checker as checker

from onnx_lowrank.runtime.providers import CPU, one_line
from onnx_lowrank.types import LowRankError


@dataclass(frozen=True)
class OpList:
    """The operators that a provider takes.

    Parameters
    ----------
    file
        List of ONNX Runtime, beside its usability checker. It goes by names; what its notes say beyond is in the rest.
    spatial
        For an operator, the numbers of spatial axes it is taken with; any, where it is not here.
    stored
        For an operator, the places of inputs that have to be stored in the model.
    most_axes
        Of any tensor.
    """

    file: str
    spatial: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stored: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    most_axes: int = 999

    def names(self) -> frozenset[str]:
        """The operators of ONNX itself that are in the list."""
        known = checker._SupportedOpsChecker(self.path)._ops
        return frozenset(name.partition(":")[2] for name in known if name.startswith("ai.onnx:"))

    @property
    def path(self) -> Path:
        """Where ONNX Runtime keeps the list."""
        return Path(checker.__file__).parent / self.file


@dataclass(frozen=True)
class Partitions:
    """How a provider would cut a graph.

    Parameters
    ----------
    num_nodes, num_supported
        Nodes of the graph as the provider sees it, and those that it takes.
    num_partitions
        Parts that it takes them in: each border between two costs a copy.
    unsupported
        Names of the nodes that it leaves to the CPU, or of their first outputs.
    """

    num_nodes: int
    num_supported: int
    num_partitions: int
    unsupported: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Of the nodes, those that it takes."""
        return self.num_supported / self.num_nodes if self.num_nodes else 1.0

    def no_worse_than(self, other: Partitions) -> bool:
        """Whether there are no more parts than in `other`, and no smaller share of the nodes is taken."""
        return self.num_partitions <= other.num_partitions and self.share >= other.share


class _Checker:
    """What the usability checker asks about each node: by its list, and by the notes that it does not look at itself."""

    def __init__(self, graph: Any, ops: OpList) -> None:
        self._listed, self._ops = checker._SupportedOpsChecker(ops.path), ops
        self._stored = {tensor.name for tensor in graph.initializer}
        pairs = [node for node in graph.node if node.op_type == "DequantizeLinear"]  # part of the node that reads it
        self._stored |= {node.output[0] for node in pairs if self._stored.issuperset(filter(None, node.input))}
        values = [*graph.input, *graph.output, *graph.value_info]
        self._axes = {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.HasField("tensor_type")}
        self.unsupported: dict[str, None] = {}  # in order; a node may be asked about twice

    def is_op_supported(self, node: Any) -> bool:
        taken = self._listed.is_op_supported(node) and self._notes_hold(node)
        if not taken:
            self.unsupported[node.name or node.output[0]] = None
        return taken

    def _notes_hold(self, node: Any) -> bool:
        spatial = self._ops.spatial.get(node.op_type)
        if spatial and self._axes.get(node.input[0], 0) - 2 not in spatial:
            return False
        places = self._ops.stored.get(node.op_type, ())
        return all(node.input[i] in self._stored for i in places if i < len(node.input) and node.input[i])

    def get_caveats(self) -> Sequence[str]:
        return self._listed.get_caveats()


def check_partitions(model: Any, ops: OpList) -> Partitions:
    """Parts that a provider would take a model in.

    Parameters
    ----------
    model
        A ModelProto of :func:`simplify` whose tensors all have their sizes.

    References
    ----------
    The usability checker of ONNX Runtime, whose ``check_nnapi_partitions`` and ``check_coreml_partitions`` are this with
    sizes required, one list each, and without the notes of the lists.
    """
    if not model.graph.node:
        return Partitions(0, 0, 0)
    asked = _Checker(model.graph, ops)
    with contextlib.redirect_stdout(io.StringIO()):
        found = checker.check_partitioning(model.graph, asked, True, ops.most_axes)
    return Partitions(found.num_nodes, found.num_supported_nodes, found.num_partitions, tuple(asked.unsupported))


def simplify(model: Path, out: Path) -> None:
    """Write what a provider sees of a model: constants and BatchNormalization folded, nothing fused, weights apart.

    Raises
    ------
    LowRankError
        Where ONNX Runtime refuses the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{out.name}.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "4096")
    try:
        ort.InferenceSession(str(model), options, providers=[CPU])
    except Exception as error:
        raise LowRankError(f"ONNX Runtime cannot load the model: {one_line(error)}") from error


def convert_to_ort(model: Path, out: Path, *, compiled: bool) -> None:
    """Write a model in the format that mobile builds of ONNX Runtime read.

    Parameters
    ----------
    compiled
        The provider compiles what it takes (NNAPI, CoreML): only what is folded stays folded, and fusions for the CPU are
        noted beside the graph. Otherwise they are made, but for those that belong to x86.

    Raises
    ------
    LowRankError
        Where ONNX Runtime refuses to.

    References
    ----------
    The options are those of ``onnxruntime.tools.convert_onnx_models_to_ort`` (styles Runtime and Fixed), which itself
    prints, sets up logging for the whole program and writes a file more.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(out)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.qdqisint8allowed", "0")
    if compiled:
        options.add_session_config_entry("optimization.minimal_build_optimizations", "save")
    try:
        ort.InferenceSession(str(model), options, providers=[CPU], disabled_optimizers=["NchwcTransformer"])
    except Exception as error:
        raise LowRankError(f"the model cannot be converted to the .ort format: {one_line(error)}") from error
