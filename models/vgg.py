"""VGG-16: thirteen 3x3 convolutions in five stages, each followed by a 2x2 max pool.

References
----------
Simonyan, Zisserman (2015), "Very deep convolutional networks for large-scale image recognition", configuration D.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from models import layers
from models.layers import Weights

SMALL_STAGES = ((64, 2), (128, 2), (128, 2))
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def imagenet(name: str, weights: Weights) -> gs.Graph:
    """224 x 224 pictures, 1000 classes, 138,357,544 parameters, no batch normalization."""
    graph, x = layers.start(name, (3, 224, 224))
    x = graph.flatten(_features(graph, x, weights, normalized=False), "flatten")
    for index in (1, 2):
        x = graph.relu(graph.gemm(x, f"fc{index}", weights, 4096), f"fc{index}.relu")
    return layers.finish(graph, graph.gemm(x, "fc3", weights, 1000))


def cifar10(name: str, weights: Weights) -> gs.Graph:
    """32 x 32 pictures, 10 classes, 14,728,266 parameters; convolutions with bias and batch normalization."""
    graph, x = layers.start(name, (3, 32, 32))
    x = graph.flatten(_features(graph, x, weights, normalized=True), "flatten")
    return layers.finish(graph, graph.gemm(x, "fc", weights, 10))


def cifar10_small(name: str, weights: Weights) -> gs.Graph:
    """32 x 32 pictures, 10 classes: six convolutions in three stages, in the same style; 557,898 parameters."""
    graph, x = layers.start(name, (3, 32, 32))
    x = _features(graph, x, weights, normalized=True, stages=SMALL_STAGES)
    return layers.finish(
        graph, graph.gemm(graph.flatten(graph.global_average_pool(x, "avgpool"), "flatten"), "fc", weights, 10)
    )


def _features(
    graph: gs.Graph, x: gs.Variable, weights: Weights, normalized: bool, stages: tuple[tuple[int, int], ...] = STAGES
) -> gs.Variable:
    for stage, (channels, repeats) in enumerate(stages, 1):
        for index in range(1, repeats + 1):
            place = f"{stage}_{index}"
            x = graph.conv(x, f"conv{place}", weights, channels, 3, pad=1, bias=True)
            if normalized:
                x = graph.batch_norm(x, f"bn{place}", weights)
            x = graph.relu(x, f"relu{place}")
        x = graph.max_pool(x, f"pool{stage}", 2, 2)
    return x
