"""Residual networks for ImageNet and CIFAR.

References
----------
He, Zhang, Ren, Sun (2016), "Deep residual learning for image recognition", table 1 (ImageNet) and section 4.2 (CIFAR,
option A shortcuts).
De, Smith (2020), "Batch normalization biases residual blocks towards the identity function in deep networks" (the
size 1 / sqrt(depth) of the branches).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from models import layers
from models.layers import Weights

# The convolutions of a block's branch: (kernel, channels as a multiple of the width).
BASIC = ((3, 1), (3, 1))
BOTTLENECK = ((1, 1), (3, 1), (1, 4))
WIDTHS = (64, 128, 256, 512)


def imagenet(name: str, weights: Weights, branch: Sequence[tuple[int, int]], repeats: Sequence[int]) -> gs.Graph:
    """224 x 224 pictures, 1000 classes; the stride of a bottleneck is on its 3x3 convolution."""
    graph, x = layers.start(name, (3, 224, 224))
    x = _conv_bn_relu(graph, x, weights, kernel=7, channels=64, stride=2)
    x = graph.max_pool(x, "maxpool", 3, 2, 1)
    x = _stages(graph, x, weights, branch, repeats, WIDTHS, projection=True)
    return _head(graph, x, weights, 1000)


def cifar_wide(name: str, weights: Weights, repeats: Sequence[int], classes: int, part: int = 1) -> gs.Graph:
    """The ImageNet stages (64 to 512 channels) on 32 x 32 pictures: 3x3 first convolution, no max pool; a `part` of the channels."""
    graph, x = layers.start(name, (3, 32, 32))
    widths = [width // part for width in WIDTHS]
    x = _conv_bn_relu(graph, x, weights, kernel=3, channels=widths[0])
    x = _stages(graph, x, weights, BASIC, repeats, widths, projection=True)
    return _head(graph, x, weights, classes)


def cifar(name: str, weights: Weights, repeats: int) -> gs.Graph:
    """The CIFAR-10 network of the paper: 16, 32, 64 channels, 6 * repeats + 2 layers, shortcuts without parameters."""
    graph, x = layers.start(name, (3, 32, 32))
    x = _conv_bn_relu(graph, x, weights, kernel=3, channels=16)
    x = _stages(graph, x, weights, BASIC, (repeats,) * 3, (16, 32, 64), projection=False)
    return _head(graph, x, weights, 10)


def _conv_bn_relu(
    graph: gs.Graph, x: gs.Variable, weights: Weights, kernel: int, channels: int, stride: int = 1
) -> gs.Variable:
    x = graph.conv(x, "conv1", weights, channels, kernel, stride, kernel // 2)
    return graph.relu(graph.batch_norm(x, "bn1", weights), "relu")


def _stages(
    graph: gs.Graph,
    x: gs.Variable,
    weights: Weights,
    branch: Sequence[tuple[int, int]],
    repeats: Sequence[int],
    widths: Sequence[int],
    projection: bool,
) -> gs.Variable:
    # The variance grows by 1 + gain**2 in every block: with depth blocks, by a factor e at most.
    gain = sum(repeats) ** -0.5
    for stage, (width, count) in enumerate(zip(widths, repeats, strict=True), 1):
        for index in range(count):
            stride = 2 if stage > 1 and index == 0 else 1
            x = _block(graph, x, weights, f"layer{stage}.{index}", branch, width, stride, projection, gain)
    return x


def _block(
    graph: gs.Graph,
    x: gs.Variable,
    weights: Weights,
    name: str,
    branch: Sequence[tuple[int, int]],
    width: int,
    stride: int,
    projection: bool,
    gain: float,
) -> gs.Variable:
    y, left = x, stride
    for index, (kernel, multiple) in enumerate(branch, 1):
        step = left if kernel == 3 else 1
        y = graph.conv(y, f"{name}.conv{index}", weights, width * multiple, kernel, step, kernel // 2)
        left //= step
        last = index == len(branch)
        y = graph.batch_norm(y, f"{name}.bn{index}", weights, gain if last else 1.0)
        if not last:
            y = graph.relu(y, f"{name}.relu{index}")
    if x.shape != y.shape and projection:
        x = graph.conv(x, f"{name}.downsample.0", weights, y.shape[1], 1, stride)
        x = graph.batch_norm(x, f"{name}.downsample.1", weights)
    elif x.shape != y.shape:
        x = graph.subsample_and_pad(x, f"{name}.shortcut", y.shape[1], stride)
    return graph.relu(graph.add(y, x, f"{name}.add"), f"{name}.relu")


def _head(graph: gs.Graph, x: gs.Variable, weights: Weights, classes: int) -> gs.Variable:
    x = graph.flatten(graph.global_average_pool(x, "avgpool"), "flatten")
    return layers.finish(graph, graph.gemm(x, "fc", weights, classes))
