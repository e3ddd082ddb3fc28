"""A few hundred of the models that tools/fuzz_loader.py makes by the hundred thousand."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_lowrank as lr
from onnx_lowrank.graph import limits
from tools.fuzz_loader import MACHINE_BYTES, mutate, seeds

LAYERS = {
    "convolutions": 2,
    "products": 2,
    "derived": 1,
    "constants": 2,
    "bodies": 0,
    "quantised": 0,
    "shaped": 2,
    "function": 0,
    "sparse": 1,
    "external": 1,
    "trained": 1,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(limits, "machine_memory", lambda: MACHINE_BYTES)
    (tmp_path / "w.bin").write_bytes(np.arange(20, dtype=np.float32).tobytes())
    return tmp_path / "m.onnx"


def test_what_is_mutated_is_whole_and_has_layers(place: Path) -> None:
    found = {}
    for name, data in seeds().items():
        place.write_bytes(data)
        found[name] = len(lr.inspect(place, jobs=1).layers)
    assert found == LAYERS


def test_mutated_models_are_inspected_or_refused(place: Path) -> None:
    rng, known = random.Random(0), list(seeds().values())
    outcomes = {"inspected": 0, "refused": 0}
    for _ in range(300):
        place.write_bytes(mutate(rng.choice(known), rng))
        try:
            lr.inspect(place, jobs=1)
            outcomes["inspected"] += 1
        except lr.LowRankError as error:
            assert str(error).isprintable()
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 30, outcomes


def test_a_mutation_changes_the_model_and_the_same_seed_does_it_alike() -> None:
    data = seeds()["convolutions"]
    changed = [mutate(data, random.Random(seed)) for seed in range(50)]
    assert changed == [mutate(data, random.Random(seed)) for seed in range(50)]
    assert len({*changed, data}) > 40
    assert onnx.ModelProto.FromString(data).graph.node[1].op_type == "ConvTranspose"
