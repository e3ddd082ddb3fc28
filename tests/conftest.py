"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from onnx_lowrank.cache import FOLDER, LIMIT
from onnx_lowrank.latency import table
from onnx_lowrank.search import bench
from onnx_lowrank.verification import verify


@pytest.fixture(autouse=True, scope="session")
def no_times_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured times go to a folder of the tests, not to the user's; results of layers, which would hide a change, nowhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("cache")))
        patch.setenv(LIMIT, "0")
        yield


@pytest.fixture(autouse=True, scope="session")
def no_time_to_be_sure_of_times() -> Iterator[None]:
    """Measurements take as many rounds as they must, and no seconds beyond: no test goes by what they find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "LEAST_SECONDS", 0.0)
        patch.setattr(table, "CHECK_LEAST", 0.0)
        patch.setattr(bench, "QUICK_LEAST", 0.0)
        yield
