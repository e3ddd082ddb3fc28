"""AlexNet, one tower.

References
----------
Krizhevsky (2014), "One weird trick for parallelizing convolutional neural networks" (the single-tower widths).
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from models import layers
from models.layers import Weights


def imagenet(name: str, weights: Weights) -> gs.Graph:
    """224 x 224 pictures, 1000 classes, 61,100,840 parameters."""
    graph, x = layers.start(name, (3, 224, 224))
    x = _features(graph, x, weights, first_pad=2, pool=3)
    x = graph.flatten(x, "flatten")
    for index in (1, 2):
        x = graph.relu(graph.gemm(x, f"fc{index}", weights, 4096), f"fc{index}.relu")
    return layers.finish(graph, graph.gemm(x, "fc3", weights, 1000))


def cifar10(name: str, weights: Weights, part: int = 1) -> gs.Graph:
    """32 x 32 pictures, 10 classes, 2,472,266 parameters: the same convolutions and one fully connected layer.

    With `part` 2, half the channels: 624,810 parameters.
    """
    graph, x = layers.start(name, (3, 32, 32))
    x = _features(graph, x, weights, first_pad=5, pool=2, part=part)
    return layers.finish(graph, graph.gemm(graph.flatten(x, "flatten"), "fc", weights, 10))


def _features(
    graph: gs.Graph, x: gs.Variable, weights: Weights, first_pad: int, pool: int, part: int = 1
) -> gs.Variable:
    plan = ((64, 11, 4, first_pad), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
    for index, (channels, kernel, stride, pad) in enumerate(plan, 1):
        x = graph.conv(x, f"conv{index}", weights, channels // part, kernel, stride, pad, bias=True)
        x = graph.relu(x, f"conv{index}.relu")
        if index in (1, 2, 5):
            x = graph.max_pool(x, f"pool{index}", pool, 2)
    return x
