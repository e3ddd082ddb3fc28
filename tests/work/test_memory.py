"""Memory of processes that work on layers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

ARRAYS = """
import resource, sys
import numpy as np
from onnx_lowrank.work.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(1 << 17)
before = faults()
for _ in range(100):
    np.ones(1 << 17)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these thresholds")
def test_arrays_take_the_place_of_those_before_them_where_a_threshold_would_keep_them_from_it() -> None:
    """A worker of Dask is started with such a threshold; each array of a megabyte has 256 pages."""

    def faults(way: str) -> int:
        dask = os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", ARRAYS, way]
        return int(subprocess.run(command, env=dask, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < 1000
    assert faults("as it is") > 20_000
