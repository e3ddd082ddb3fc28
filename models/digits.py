"""The network of ``digits.onnx``: handwritten digits of 8 x 8 pixels, trained by ``tools/train_digits.py``."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from models import layers
from models.layers import Weights

# (name, channels in, channels out) of the 3x3 convolutions; names as in a PyTorch state_dict.
CONVS = (
    ("conv1", 1, 32),
    ("conv2", 32, 64),
    ("block.conv1", 64, 64),
    ("block.conv2", 64, 64),
    ("conv3", 64, 64),
    ("conv4", 64, 64),
)


def network(weights: Weights) -> gs.Graph:
    """Five convolutions at 8 x 8, two of them a residual block; a max pool; one at 4 x 4; mean; ten classes.

    The input is (N, 1, 8, 8): the pixels of scikit-learn's digits, 0 to 16, divided by 16.
    """
    graph, x = layers.start("digits", (1, 8, 8))
    shortcut = x
    for name, _, channels in CONVS:
        if name == "block.conv1":
            shortcut = x
        if name == "conv4":
            x = graph.max_pool(x, "pool", 2, 2)
        x = graph.conv(x, name, weights, channels, 3, pad=1)
        x = graph.batch_norm(x, name.replace("conv", "bn"), weights)
        if name == "block.conv2":
            x = graph.add(x, shortcut, "block.add")
        x = graph.relu(x, name.replace("conv", "relu"))
    x = graph.flatten(graph.global_average_pool(x, "avgpool"), "flatten")
    return layers.finish(graph, graph.gemm(x, "fc", weights, 10))
