"""Pictures varied at random, in the space of the model's input: flipped, shifted, mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from onnx_lowrank.types import LowRankError

Tensors = dict[str, torch.Tensor]

SHIFT = 8
"""Pictures are shifted by at most one in so many of their pixels, and mirrored beyond their edge."""

CHANNELS = (1, 3)
"""A picture has grey or three colours, along its second axis."""

SMALLEST = 16
"""Shortest side of what is taken for a picture."""


def is_picture(x: torch.Tensor) -> bool:
    """Whether an input is a batch of pictures: (N, 1 or 3, height, width)."""
    return x.ndim == 4 and x.shape[1] in CHANNELS and min(x.shape[2:]) >= SMALLEST and x.is_floating_point()


def flip(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Half of the pictures turned around, left to right."""
    turned = torch.from_numpy(rng.random(len(x)) < 0.5).to(x.device)
    return torch.where(turned[:, None, None, None], x.flip(3), x)


def crop(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Each picture shifted by at most one in ``SHIFT`` of its pixels, along both axes."""
    most = [max(1, size // SHIFT) for size in x.shape[2:]]
    wide = F.pad(x, (most[1], most[1], most[0], most[0]), mode="reflect")
    by = [rng.integers(0, 2 * m + 1, len(x)) for m in most]
    return torch.stack(
        [
            picture[:, top : top + x.shape[2], left : left + x.shape[3]]
            for picture, top, left in zip(wide, by[0].tolist(), by[1].tolist(), strict=True)
        ]
    )


def mixup(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Every picture with some of another: shares from a Beta(0.4, 0.4), none of more than a half.

    Labels cannot follow: it is for distillation, where the original says what the mixture is.

    References
    ----------
    Zhang, Cisse, Dauphin & Lopez-Paz (2018), "mixup: beyond empirical risk minimization".
    """
    drawn = rng.beta(0.4, 0.4, len(x))
    share = torch.from_numpy(np.minimum(drawn, 1 - drawn)).to(device=x.device, dtype=x.dtype)[:, None, None, None]
    return (1 - share) * x + share * x[torch.from_numpy(rng.permutation(len(x))).to(x.device)]


AUGMENTATIONS: dict[str, Callable[[torch.Tensor, np.random.Generator], torch.Tensor]] = {
    "flip": flip,
    "crop": crop,
    "mixup": mixup,
}

DEFAULT = ("flip", "crop")


def augmentations(names: Sequence[str] | None, *, labelled: bool) -> tuple[str, ...]:
    """The augmentations asked for; flips and shifts where nothing was said.

    Raises
    ------
    LowRankError
        For an unknown one, and for mixtures where labels are learnt.
    """
    chosen = DEFAULT if names is None else tuple(name for name in names if name != "none")
    if unknown := [name for name in chosen if name not in AUGMENTATIONS]:
        raise LowRankError(f"augmentation '{unknown[0]}' was given: of {', '.join(AUGMENTATIONS)} or none was expected")
    if labelled and "mixup" in chosen:
        raise LowRankError("augmentation mixup was given with labels: it is for --finetune distill")
    return chosen


def varied(feeds: Tensors, names: Sequence[str], rng: np.random.Generator) -> Tensors:
    """The pictures among `feeds` varied; everything else as it is."""
    changed = dict(feeds)
    seed = int(rng.integers(1 << 62))
    for name, x in feeds.items():
        same = np.random.default_rng(seed)  # pictures of one sample belong together
        for each in names if is_picture(x) else ():
            changed[name] = AUGMENTATIONS[each](changed[name], same)
    return changed
