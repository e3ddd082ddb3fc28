"""Networks to compress: those of the papers, untrained, and one small trained one.

The networks of `NAMES` are built in seconds with onnx-graphsurgeon's layer API and seeded weights whose spectra look
like those of trained networks (see `models.layers.power_law`): enough for shapes, costs, latency and the numerics of
factorization, not for accuracy. `DIGITS` is trained; `DIGITS_CALIBRATE` and `DIGITS_TEST` are its data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from models import alexnet, layers, resnet, vgg
from models.layers import Weights
from onnx_lowrank.types import LowRankError

__all__ = ["DIGITS", "DIGITS_CALIBRATE", "DIGITS_TEST", "NAMES", "build", "network"]

DIGITS = Path(__file__).with_name("digits.onnx")
DIGITS_CALIBRATE = Path(__file__).with_name("digits_calibrate.npz")
DIGITS_TEST = Path(__file__).with_name("digits_test.npz")

_NETWORKS: dict[str, Callable[[str, Weights], gs.Graph]] = {
    "alexnet": alexnet.imagenet,
    "vgg16": vgg.imagenet,
    "resnet18": partial(resnet.imagenet, branch=resnet.BASIC, repeats=(2, 2, 2, 2)),
    "resnet34": partial(resnet.imagenet, branch=resnet.BASIC, repeats=(3, 4, 6, 3)),
    "resnet50": partial(resnet.imagenet, branch=resnet.BOTTLENECK, repeats=(3, 4, 6, 3)),
    "resnet20_cifar10": partial(resnet.cifar, repeats=3),
    "resnet56_cifar10": partial(resnet.cifar, repeats=9),
    "resnet110_cifar10": partial(resnet.cifar, repeats=18),
    "resnet18_cifar10": partial(resnet.cifar_wide, repeats=(2, 2, 2, 2), classes=10),
    "resnet34_cifar10": partial(resnet.cifar_wide, repeats=(3, 4, 6, 3), classes=10),
    "resnet34_cifar100": partial(resnet.cifar_wide, repeats=(3, 4, 6, 3), classes=100),
    "resnet34_half_cifar10": partial(resnet.cifar_wide, repeats=(3, 4, 6, 3), classes=10, part=2),
    "vgg16_cifar10": vgg.cifar10,
    "vgg_small_cifar10": vgg.cifar10_small,
    "alexnet_cifar10": alexnet.cifar10,
    "alexnet_half_cifar10": partial(alexnet.cifar10, part=2),
}
NAMES = tuple(_NETWORKS)


def network(name: str, weights: Weights) -> gs.Graph:
    """The graph of a network with the weights given.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    weights : callable
        ``weights(name, shape, gain=1.0)`` returns the float32 array of an initializer, see `models.layers.Weights`.

    Returns
    -------
    onnx_graphsurgeon.Graph
        Input ``input`` of shape ("N", 3, height, width), output ``output`` of shape ("N", classes).

    Raises
    ------
    LowRankError
        For a name that is not in `NAMES`.
    """
    if name not in _NETWORKS:
        raise LowRankError(f"no network is called {name!r}: choose one of {', '.join(NAMES)}")
    return _NETWORKS[name](name, weights)


def build(name: str, seed: int = 0) -> onnx.ModelProto:
    """An untrained network with seeded weights; the same seed gives the same bytes.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    seed : int, default 0

    Returns
    -------
    onnx.ModelProto
        float32, opset 17, the batch dimension is ``N``.

    Raises
    ------
    LowRankError
        For a name that is not in `NAMES`.

    Examples
    --------
    >>> model = build("resnet20_cifar10")
    >>> [node.name for node in model.graph.node][:3]
    ['conv1', 'bn1', 'relu']
    """
    graph = network(name, layers.seeded(np.random.default_rng(seed)))
    return layers.export(graph, f"{name}, untrained: weights drawn at random with seed {seed}.")
