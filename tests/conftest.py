"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from onnx_lowrank.cache import FOLDER, LIMIT


@pytest.fixture(autouse=True, scope="session")
def no_times_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured times go to a folder of the tests, not to the user's; results of layers, which would hide a change, nowhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("cache")))
        patch.setenv(LIMIT, "0")
        yield
