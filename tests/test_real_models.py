"""Trained networks on real pictures: what the whole brings, at bounds that its parts alone do not reach."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import onnx_lowrank as lr
from tests.helpers import SHARED, needs_shared

PREPROCESS = Path(__file__).parent / "data" / "cifar10.toml"


def pictures(tmp_path: Path, count: int) -> Path:
    """Unlabelled training pictures."""
    with np.load(SHARED / "cifar10" / "train_2000.npz") as archive:
        np.savez(tmp_path / "pictures.npz", images=archive["images"][:count])
    return tmp_path / "pictures.npz"


@needs_shared
@pytest.mark.parametrize(("calibrated", "agreement"), [(True, 0.94), (False, 0.91)])
def test_resnet20_at_half_of_the_macs(tmp_path: Path, calibrated: bool, agreement: float) -> None:
    result = lr.compress(
        SHARED / "models" / "cifar10_resnet20" / "model_bn.onnx",
        calibrate=pictures(tmp_path, 256) if calibrated else None,
        evaluate=SHARED / "cifar10" / "test_500.npz",
        preprocess=PREPROCESS,
        budget={"macs": 0.5},
        methods="cp3",
    )
    assert result.met
    # plain SVD agrees on 15 % of these pictures, whitened SVD on 49 %
    assert result.report.accuracy.others["agreement"] > agreement


@needs_shared
def test_dead_channels_of_a_trained_network_cost_nothing(tmp_path: Path) -> None:
    result = lr.compress(
        SHARED / "models" / "cifar10_resnet20" / "model_bn.onnx",
        calibrate=pictures(tmp_path, 512),
        evaluate=SHARED / "cifar10" / "test_500.npz",
        preprocess=PREPROCESS,
        drop_dead_channels=True,
        align=1,
    )
    assert result.met and result.report.compressed.macs < 0.96 * result.report.original.macs
    assert result.report.accuracy.others["agreement"] == 1
    assert result.report.accuracy.others["sqnr"] > 40
