"""Ways whose codes do not take ONNX, written after their papers on this package's decompositions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_lowrank.calibration.calibrate import collect
from onnx_lowrank.candidates import Group
from onnx_lowrank.config import make_config
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.rewriting.rewrite import rewrite
from onnx_lowrank.subject import open_subject
from onnx_lowrank.types import no_progress
from onnx_lowrank.work.tasks import Work
from tools.benchmark_accuracy import Pick, at_share, batches, same_energy, same_share, spectra, whitened_model

Make = Callable[["float | None", Path], None]


def opened(model: Path) -> tuple[Planner, list[Group]]:
    """A planner of the model and the layers that every way may decompose."""
    config = make_config(budget={"macs": 0.5})
    planner = Planner(open_subject(model, config), config, no_progress)
    specs = [(group, group.layers[0].spec) for group in planner.subject.groups]
    return planner, [group for group, spec in specs if not spec.depthwise and not spec.transposed]


def _by_weights(model: Path, picks: Callable[[Sequence[Group]], Pick]) -> Make:
    planner, groups = opened(model)
    pick, subject = picks(groups), planner.subject

    def make(share: float | None, out: Path) -> None:
        plan = at_share(planner, groups, pick, float(share or 0))
        made = rewrite(
            subject.model, subject.found, subject.groups, plan, seed=0, work=Work(), correct=False, progress=no_progress
        )[0]
        onnx.save(made.proto, out)

    return make


def spatial(model: Path, samples: Path) -> Make:
    """Jaderberg et al. (2014), the same share of the MACs in every layer."""
    return _by_weights(model, lambda groups: same_share(channel=False))


def enc_map(model: Path, samples: Path) -> Make:
    """Kim, Khan & Kyung (2019): the same normalised energy in every layer, the first layer by channels."""
    return _by_weights(
        model, lambda groups: same_energy(spectra(groups, None), squared=False, channel=False, first=groups[0])
    )


def whitened(model: Path, samples: Path) -> Make:
    """The recipe of BALF (2025): channel SVD in the norm of the layer's inputs, ranks by one energy threshold."""
    planner, groups = opened(model)
    with np.load(samples) as archive:
        feeds: Any = [feed for name in archive for feed in batches(name, archive[name])]
    names, subject = [group.layers[0].name for group in groups], planner.subject
    seen = collect(subject.model, subject.found, names, feeds, seed=0, progress=no_progress)
    usable = [group for group in groups if group.layers[0].name in seen]
    pick = same_energy(spectra(usable, seen), squared=True, channel=True, first=groups[0])

    def make(share: float | None, out: Path) -> None:
        onnx.save(whitened_model(planner, at_share(planner, usable, pick, float(share or 0)), seen), out)

    return make
