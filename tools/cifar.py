"""The CIFAR-10 pictures of the development data, as arrays."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def lossless(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """`images` uint8 (N, 32, 32, 3) and labels of an archive of plain pictures."""
    with np.load(file) as archive:
        return archive["images"], archive["labels"]


def jpeg(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same of an archive of JPEG files, end to end."""
    with np.load(file) as archive:
        data, ends, labels = archive["jpeg"].tobytes(), archive["offsets"], archive["labels"]
    pictures = [
        np.asarray(Image.open(io.BytesIO(data[first:last])).convert("RGB")) for first, last in itertools.pairwise(ends)
    ]
    return np.stack(pictures), labels


def inputs(images: np.ndarray, *, scaled: bool = True) -> np.ndarray:
    """float32 (N, 3, 32, 32): 0 to 255, or normalised as the ResNets take them."""
    values = images.astype(np.float32)
    if scaled:
        values = (values / 255 - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))
