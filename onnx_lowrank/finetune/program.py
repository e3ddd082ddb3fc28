"""An ONNX graph as a function of its stored tensors, with gradients.

Every node runs by the torch function of its operator, over a dictionary of tensors by name: a kernel that several layers read,
or one put together by a Concat, is one parameter, and its gradients add up by themselves. What has been trained goes back into
the same graph by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from onnx_lowrank.finetune.ops import OPS, Node, to_tensor
from onnx_lowrank.finetune.rounding import Rounder
from onnx_lowrank.graph.plain import PlainGraph, PlainNode, is_floating
from onnx_lowrank.quantize.rounding import Rounding
from onnx_lowrank.types import LowRankError

OLDEST = 7
"""Operator set from which on operators broadcast as they do now."""

WEIGHTS: dict[str, tuple[int, ...]] = {
    "Add": (0, 1),
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "PRelu": (1,),
    "RMSNormalization": (1,),
}
"""Inputs of operators that are weights where they are stored."""

THROUGH = ("Cast", "Concat", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that weights may pass on their way."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Step:
    node: Node
    run: Callable[..., Any]
    forget: tuple[str, ...]
    """Tensors that nothing reads afterwards."""


class Program:
    """The main graph of a model as a differentiable function.

    Parameters
    ----------
    graph
        See :func:`onnx_lowrank.graph.plain.plain_graph`.
    trained
        Names of the stored tensors to train; see :func:`weights_of`.
    widen
        Compute half precision as float32.
    device
        Where tensors live: ``cpu``, ``cuda``...
    rounding
        What is rounded as a quantised model rounds it.

    Attributes
    ----------
    parameters
        The trained tensors, by name.
    statistics
        Means and variances of BatchNormalization nodes, by name: they follow the batches under `batch_statistics`.

    Raises
    ------
    LowRankError
        For operators that are not in the table, with their names, and for nodes with graphs of their own.
    """

    def __init__(
        self,
        graph: PlainGraph,
        trained: Collection[str] = (),
        *,
        widen: bool = True,
        device: str = "cpu",
        rounding: Rounding | None = None,
    ) -> None:
        self.inputs, self.outputs, self.device = graph.inputs, graph.outputs, torch.device(device)
        if graph.opset < OLDEST:
            raise LowRankError(f"a model of opset {graph.opset} cannot be trained: {OLDEST} or newer was expected")
        _refuse_unknown(graph.nodes)
        nodes = [Node(node, graph.opset, widen) for node in graph.nodes]
        stored = {name: to_tensor(value, widen=widen) for name, value in graph.values.items() if _runs(value)}
        if missing := set(trained) - set(stored):
            raise LowRankError(f"the graph stores nothing called {', '.join(sorted(missing)[:3])}")
        self.parameters = {
            name: torch.nn.Parameter(stored[name].to(self.device)) for name in stored if name in set(trained)
        }
        self._rounder = Rounder(rounding) if rounding else None
        self.statistics = {
            name: stored[name].to(self.device) for name in _followed(graph) if name in stored and name not in trained
        }
        self._constants: Tensors = {
            name: self._placed(value)
            for name, value in stored.items()
            if name not in self.parameters and name not in self.statistics
        }
        self._steps = self._compiled(nodes)

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        """Whole numbers stay where the processor reads them: they are shapes and indices."""
        return value if value.dtype in (torch.int32, torch.int64) else value.to(self.device)

    def _compiled(self, nodes: Sequence[Node]) -> list[_Step]:
        """Work out now what never changes; of the rest, when each tensor is read last."""
        changing = {*self.inputs, *self.parameters, *self.statistics}
        left: list[Node] = []
        for node in nodes:
            plain = node.plain
            if not plain.inputs and set(plain.outputs) & changing:
                continue  # a Constant that trains
            if changing.isdisjoint(plain.inputs):
                with torch.no_grad():
                    outputs = _call(node, OPS[plain.op_type], self._constants)
                self._constants |= {name: self._placed(value) for name, value in outputs.items()}
            else:
                changing |= set(plain.outputs)
                left.append(node)
        last = {name: index for index, node in enumerate(left) for name in node.plain.inputs}
        made = {name for node in left for name in node.plain.outputs} | set(self.inputs)
        ends: dict[int, list[str]] = {}
        for name in made - set(self.outputs):
            ends.setdefault(last.get(name, -1), []).append(name)
        return [_Step(node, OPS[node.plain.op_type], tuple(ends.get(index, ()))) for index, node in enumerate(left)]

    def __call__(
        self,
        feeds: Mapping[str, torch.Tensor],
        keep: Collection[str] = (),
        *,
        instead: Mapping[str, torch.Tensor] | None = None,
        batch_statistics: bool = False,
    ) -> Tensors:
        """Run the graph.

        Parameters
        ----------
        feeds
            A tensor for each input.
        keep
            Names of tensors within the graph that are wanted beside the outputs.
        instead
            What goes on in the place of tensors within the graph: the blocks between them become independent, each with an
            input that others made. What the graph itself makes of these names is among the results.
        batch_statistics
            Normalise by each batch's own statistics, and let the stored ones follow.

        Returns
        -------
        dict
            The outputs, in the order of the graph, then what was to be kept.
        """
        instead = instead or {}
        wanted = {*self.outputs, *keep, *instead}
        alive: Tensors = {**self._constants, **self.parameters, **self.statistics, **feeds}
        round_to = self._rounder
        if round_to:
            alive |= {name: round_to.weight(name, value) for name, value in (self._constants | self.parameters).items()}
            alive |= {name: round_to.activation(name, value) for name, value in feeds.items()}
        results: Tensors = {}
        for step in self._steps:
            run = step.run
            plain = step.node.plain
            if batch_statistics and plain.op_type == "BatchNormalization" and plain.inputs[3] in self.statistics:
                run = _normalise
            made = _call(step.node, run, alive)
            for name, value in made.items():
                passed = round_to.activation(name, value) if round_to else value
                if name in wanted:
                    results[name] = passed
                alive[name] = instead.get(name, passed)
            for name in step.forget:
                alive.pop(name, None)
        for name in self.outputs:  # what never changes may be an output too
            results.setdefault(name, alive[name])
        order = (*self.outputs, *(name for name in results if name not in self.outputs))
        return {name: results[name] for name in order}

    def values(self) -> dict[str, np.ndarray]:
        """What may have changed, by name: parameters and statistics."""
        return {n: v.detach().cpu().numpy().copy() for n, v in {**self.parameters, **self.statistics}.items()}

    def state(self) -> Tensors:
        """A copy of what may have changed."""
        return {name: v.detach().clone() for name, v in {**self.parameters, **self.statistics}.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` gave."""
        with torch.no_grad():
            for name, value in {**self.parameters, **self.statistics}.items():
                value.copy_(state[name])

    def tensors(self, feeds: Mapping[str, np.ndarray], *, channels_last: bool = False) -> Tensors:
        """Feeds as tensors, on the device; pictures may have their channels last, which products in bfloat16 like."""
        made = {name: to_tensor(value, widen=True).to(self.device) for name, value in feeds.items()}
        if not channels_last:
            return made
        return {n: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for n, v in made.items()}


def _followed(graph: PlainGraph) -> list[str]:
    """Means and variances that only one BatchNormalization reads, in order: they can follow the batches."""
    readers = Counter(name for node in graph.nodes for name in node.inputs)
    found: list[str] = []
    for node in graph.nodes:
        pair = node.inputs[3:5]
        if node.op_type == "BatchNormalization" and all(readers[name] == 1 for name in pair):
            found += pair if set(pair) <= graph.values.keys() else ()
    return found


def weights_of(graph: PlainGraph, nodes: Collection[str] | None = None) -> tuple[str, ...]:
    """Names of the stored tensors that are weights: kernels, biases, scales and slopes of floating point.

    Parameters
    ----------
    nodes
        Names of the nodes whose weights are meant; None for all.
    """
    producers = {out: node for node in graph.nodes for out in node.outputs}
    found: dict[str, None] = {}
    for node in graph.nodes:
        if node.op_type in WEIGHTS and (nodes is None or node.key in nodes):
            for place in WEIGHTS[node.op_type]:
                if place < len(node.inputs):
                    found |= dict.fromkeys(_roots(node.inputs[place], graph, producers, node.op_type == "Add"))
    return tuple(found)


def _roots(name: str, graph: PlainGraph, producers: Mapping[str, PlainNode], vectors: bool) -> Iterable[str]:
    """Stored tensors that `name` is put together from; none where an input takes part."""
    values = graph.values
    if name not in values:
        node = producers.get(name)
        if node is None or node.op_type not in THROUGH:
            return ()
        parts = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        return [root for part in parts for root in _roots(part, graph, producers, vectors)]
    usable = is_floating(values[name]) and name not in graph.overridable
    return (name,) if usable and values[name].size > int(vectors) else ()


def _runs(value: np.ndarray) -> bool:
    """Whether torch has tensors of this type."""
    return value.dtype.kind in "iub" or is_floating(value)


def _refuse_unknown(nodes: Iterable[PlainNode]) -> None:
    unknown = [node for node in nodes if node.domain or node.op_type not in OPS or node.has_subgraphs]
    if unknown:
        titles = ", ".join(node.title for node in unknown[:3])
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise LowRankError(
            f"the model cannot be trained: there is no gradient for {titles}{more}; leave out --finetune"
        )


def _call(node: Node, run: Callable[..., Any], alive: Mapping[str, torch.Tensor]) -> Tensors:
    plain = node.plain
    try:
        made = run(node, *[alive[name] if name else None for name in plain.inputs])
    except LowRankError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError) as error:
        raise LowRankError(f"{plain.title} cannot be run for training: {error}") from error
    outputs = made if isinstance(made, tuple) else (made,)
    return {name: value for name, value in zip(plain.outputs, outputs, strict=False) if name}


def _normalise(
    node: Node, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
) -> torch.Tensor:
    """BatchNormalization by the statistics of the batch; the stored ones follow in place."""
    return F.batch_norm(
        x, mean, variance, scale, shift, True, 1.0 - node.get("momentum", 0.9), node.get("epsilon", 1e-5)
    )
