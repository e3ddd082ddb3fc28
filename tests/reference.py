"""Convolutions from their definition, by loops over kernel positions: what tests of chains of kernels compare with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnx_lowrank.types import Chain, ConvSpec, Stage


def convolve(x: np.ndarray, kernel: np.ndarray, spec: ConvSpec) -> np.ndarray:
    """Conv or ConvTranspose of `x` (N, in, spatial...) as the ONNX specification defines them; without a bias."""
    assert kernel.shape == spec.weight_shape
    inputs = np.split(x, spec.group, axis=1)
    kernels = np.split(kernel, spec.group)
    one = _transposed if spec.transposed else _plain
    return np.concatenate([one(i, k, spec) for i, k in zip(inputs, kernels, strict=True)], axis=1)


def _plain(x: np.ndarray, kernel: np.ndarray, spec: ConvSpec) -> np.ndarray:
    size = x.shape[2:]
    pads = _pads(spec, size)
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    extents = [(k - 1) * d + 1 for k, d in zip(spec.kernel, spec.dilations, strict=True)]
    out = [(p - e) // s + 1 for p, e, s in zip(padded.shape[2:], extents, spec.strides, strict=True)]
    total = np.zeros((len(x), len(kernel), *out))
    for position in itertools.product(*map(range, spec.kernel)):
        window = tuple(
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, d, s, n in zip(position, spec.dilations, spec.strides, out, strict=True)
        )
        total += np.einsum("oi,ni...->no...", kernel[(..., *position)], padded[(..., *window)])
    return total


def _transposed(x: np.ndarray, kernel: np.ndarray, spec: ConvSpec) -> np.ndarray:
    size = x.shape[2:]
    extents = [(k - 1) * d + 1 for k, d in zip(spec.kernel, spec.dilations, strict=True)]
    whole = [(n - 1) * s + p + e for n, s, p, e in zip(size, spec.strides, spec.output_padding, extents, strict=True)]
    total = np.zeros((len(x), kernel.shape[1], *whole))
    for position in itertools.product(*map(range, spec.kernel)):
        window = tuple(
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, d, s, n in zip(position, spec.dilations, spec.strides, size, strict=True)
        )
        total[(..., *window)] += np.einsum("io,ni...->no...", kernel[(..., *position)], x)
    crop = tuple(slice(begin, n - end) for n, (begin, end) in zip(whole, _pads(spec, size), strict=True))
    return total[(..., *crop)]


def _pads(spec: ConvSpec, size: Sequence[int]) -> list[tuple[int, int]]:
    """Begin and end of each axis, with automatic padding worked out."""
    if spec.auto_pad == "NOTSET":
        return list(zip(spec.pads[: spec.ndim], spec.pads[spec.ndim :], strict=True))
    if spec.auto_pad == "VALID":
        return [(0, 0)] * spec.ndim
    pads = []
    for n, k, d, s, extra in zip(size, spec.kernel, spec.dilations, spec.strides, spec.output_padding, strict=True):
        extent = (k - 1) * d + 1
        total = (n - 1) * s + extra + extent - n * s if spec.transposed else (-(-n // s) - 1) * s + extent - n
        assert total >= 0, "the specification leaves negative padding open"
        small, large = total // 2, total - total // 2
        pads.append((small, large) if spec.auto_pad == "SAME_UPPER" else (large, small))
    return pads


def run_chain(chain: Chain, kernels: Sequence[np.ndarray], x: np.ndarray) -> np.ndarray:
    """`x` through the stages of `chain`, one after the other."""
    for stage, kernel in zip(chain, kernels, strict=True):
        x = convolve(x, kernel, stage.spec)
    return x


def responses(chain: Chain, kernels: Sequence[np.ndarray], size: Sequence[int]) -> np.ndarray:
    """What `chain` answers to a one at each single place of an input of `size`: all of the linear map."""
    channels = chain[0].spec.in_channels
    places = channels * int(np.prod(size))
    return run_chain(chain, kernels, np.eye(places).reshape(places, channels, *size)).reshape(places, -1)


def effective_kernel(chain: Chain, kernels: Sequence[np.ndarray]) -> np.ndarray:
    """The kernel that `chain` amounts to, up to the direction of its axes: its answer to a one in each input channel.

    Strides, padding and dilations only say where a kernel is applied, so that they are left out here.
    """
    bare = tuple(Stage(_bare(stage.spec)) for stage in chain)
    channels, ndim = bare[0].spec.in_channels, bare[0].spec.ndim
    x = np.eye(channels).reshape(channels, channels, *(1,) * ndim)
    if not any(stage.spec.transposed for stage in bare):  # a transposed convolution spreads the one by itself
        sizes = np.max([stage.spec.kernel for stage in bare], axis=0, initial=1)
        x = np.pad(x, [(0, 0), (0, 0), *((k - 1, k - 1) for k in sizes[:ndim])])
    return run_chain(bare, kernels, x)


def counted_macs(chain: Chain, size: Sequence[int]) -> int:
    """Multiplications of `chain` by its definition, counted one by one, those with padding too."""
    macs = 0
    for stage in chain:
        spec = stage.spec
        after = convolve(np.zeros((1, spec.in_channels, *size)), np.zeros(spec.weight_shape), spec).shape[2:]
        for _ in itertools.product(*map(range, size if spec.transposed else after)):
            for _ in range(spec.group):
                for _ in range(spec.out_channels // spec.group):
                    for _ in range(spec.in_channels // spec.group):
                        macs += int(np.prod(spec.kernel))
        size = after
    return macs


def _bare(spec: ConvSpec) -> ConvSpec:
    ndim = spec.ndim
    return replace(
        spec,
        strides=(1,) * ndim,
        pads=(0,) * 2 * ndim,
        dilations=(1,) * ndim,
        auto_pad="NOTSET",
        output_padding=(0,) * ndim,
    )
