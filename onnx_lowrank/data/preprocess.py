"""From a picture to the array that the model was trained on, as a TOML file says and never guessed."""

from __future__ import annotations

import dataclasses
import io
import math
import sys
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from onnx_lowrank.types import LowRankError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHANNELS = {"RGB": 3, "BGR": 3, "GRAY": 1}
LAYOUTS = ("NCHW", "NHWC")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocess:
    """How pictures become inputs: resize, crop, then ``(x * scale - mean) / std`` on values from 0 to 255.

    Parameters
    ----------
    resize
        One number: the shorter side, in pixels, the other in proportion. Two: height and width. None: as it is.
    crop
        Side, or height and width, of the part cut from the centre. None: all of it.
    channels
        ``RGB``, ``BGR`` or ``GRAY`` (ITU-R 601 luma).
    scale
        Multiplied first: ``0.00392156862745098`` brings 0..255 to 0..1.
    mean, std
        After `scale`; one number for each channel in the order of `channels`, or one for all.
    layout
        ``NCHW`` or ``NHWC``.
    interpolation
        ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``, as in Pillow (antialiased when shrinking).

    Raises
    ------
    LowRankError
        For a value out of its range.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    channels: str = "RGB"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "NCHW"
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name, known in (("channels", tuple(CHANNELS)), ("layout", LAYOUTS), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in known:
                raise LowRankError(f"{name} = {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("resize", "crop"):
            object.__setattr__(self, name, _sides(name, getattr(self, name)))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), CHANNELS[self.channels]))
        if not _is_number(self.scale) or self.scale == 0 or 0 in self.std:
            raise LowRankError(f"scale = {self.scale!r}, std = {list(self.std)}: expected finite numbers other than 0")


def load_preprocess(path: str | PathLike[str]) -> Preprocess:
    """Read a `Preprocess` from a TOML file whose keys are its fields.

    Parameters
    ----------
    path
        The file, for example::

            resize = 256
            crop = 224
            scale = 0.00392156862745098
            mean = [0.485, 0.456, 0.406]
            std = [0.229, 0.224, 0.225]

    Raises
    ------
    LowRankError
        For a missing file, bad TOML, an unknown key or a value out of its range.
    """
    path = Path(fspath(path))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LowRankError(f"{path}: the preprocess file cannot be read ({error.strerror})") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise LowRankError(f"{path}: the preprocess file is not valid TOML: {error}") from error
    known = [item.name for item in dataclasses.fields(Preprocess)]
    if unknown := sorted(set(values) - set(known)):
        raise LowRankError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        return Preprocess(**values)
    except LowRankError as error:
        raise LowRankError(f"{path}: {error}") from error


def apply_preprocess(picture: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Turn one picture into one sample.

    Parameters
    ----------
    picture
        uint8, (height, width) for grey or (height, width, 1 or 3) in RGB order.
    preprocess
        What to do.

    Returns
    -------
    ndarray
        float64, (channels, height, width) or (height, width, channels).

    Raises
    ------
    LowRankError
        For a picture of another form, or smaller than the crop.

    Examples
    --------
    >>> grey = np.full((6, 4), 255, np.uint8)
    >>> apply_preprocess(grey, Preprocess(crop=2, channels="GRAY", scale=1 / 255, mean=(0.5,), std=(0.5,)))
    array([[[1., 1.],
            [1., 1.]]])
    """
    if (
        picture.dtype != np.uint8
        or picture.ndim not in (2, 3)
        or (picture.ndim == 3 and picture.shape[2] not in (1, 3))
    ):
        raise LowRankError(
            f"a picture is {picture.dtype} {picture.shape}, expected uint8 (height, width) or (height, width, 1 or 3)"
        )
    picture = _crop(_resize(_colours(picture, preprocess.channels), preprocess), preprocess.crop)
    values: np.ndarray = (picture * float(preprocess.scale) - np.array(preprocess.mean)) / np.array(preprocess.std)
    return values.transpose(2, 0, 1) if preprocess.layout == "NCHW" else values  # (h, w, c) -> (c, h, w)


def decode_picture(content: bytes, where: str) -> np.ndarray:
    """Decode an encoded picture (PNG, JPEG...) to uint8 (height, width) or (height, width, 3); `where` names it."""
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(content)) as image:
            # Deeper pixels would be clipped to 255 by Pillow, silently.
            if image.mode.startswith(("I", "F")):
                raise LowRankError(f"{where}: a picture of mode {image.mode}, expected 8 bits a channel: convert it")
            pixels: np.ndarray = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
            return pixels
    except LowRankError:
        raise
    # Pillow has one exception for each way a file is broken: SyntaxError for PNG, struct.error, its own bomb check...
    except Exception as error:
        raise LowRankError(f"{where}: not a picture that can be decoded ({error})") from error


def _pillow() -> ModuleType:
    # Imported here because it is optional: arrays need it only to be resized or turned grey.
    try:
        from PIL import Image
    except ImportError as error:
        raise LowRankError("pictures need Pillow: pip install 'onnx-lowrank[images]'") from error
    return Image


def _colours(picture: np.ndarray, channels: str) -> np.ndarray:
    """(height, width, channels) in the order asked for."""
    picture = picture[:, :, 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture
    if channels == "GRAY":
        return (picture if picture.ndim == 2 else np.asarray(_pillow().fromarray(picture).convert("L")))[:, :, None]
    picture = np.repeat(picture[:, :, None], 3, axis=2) if picture.ndim == 2 else picture
    return picture[:, :, ::-1] if channels == "BGR" else picture


def _resize(picture: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    height, width = picture.shape[:2]
    if preprocess.resize is None:
        return picture
    if isinstance(preprocess.resize, int):
        short = min(height, width)
        size = (preprocess.resize * height // short, preprocess.resize * width // short)
    else:
        size = preprocess.resize
    if size == (height, width):
        return picture
    pillow = _pillow()
    image = pillow.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else np.ascontiguousarray(picture))
    resized = np.asarray(image.resize(size[::-1], getattr(pillow.Resampling, preprocess.interpolation.upper())))
    return resized.reshape(*size, picture.shape[2])


def _crop(picture: np.ndarray, crop: int | tuple[int, int] | None) -> np.ndarray:
    if crop is None:
        return picture
    sides = (crop, crop) if isinstance(crop, int) else crop
    if sides[0] > picture.shape[0] or sides[1] > picture.shape[1]:
        raise LowRankError(
            f"a picture of {picture.shape[0]} x {picture.shape[1]} is smaller than the crop of "
            f"{sides[0]} x {sides[1]}: resize first"
        )
    # A margin that cannot be halved is rounded as torchvision's CenterCrop does it, half to even.
    top, left = (round((have - side) / 2) for have, side in zip(picture.shape, sides, strict=False))
    return picture[top : top + sides[0], left : left + sides[1]]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _sides(name: str, value: Any) -> int | tuple[int, int] | None:
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if value is None:
        return None
    if (
        len(sides) > 2
        or not sides
        or not all(_is_number(side) and isinstance(side, int) and side > 0 for side in sides)
    ):
        raise LowRankError(f"{name} = {value!r}, expected a number of pixels or [height, width]")
    return sides[0] if len(sides) == 1 else sides


def _numbers(name: str, value: Any, channels: int) -> tuple[float, ...]:
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(numbers) not in (1, channels) or not all(_is_number(number) for number in numbers):
        raise LowRankError(
            f"{name} = {value!r}, expected {channels} finite numbers, one for each channel, or one for all"
        )
    return tuple(float(number) for number in numbers)
