"""Decomposed models with inputs of fixed size and a few samples: what checks of other places run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import models
import onnx_lowrank as lr
from onnx_lowrank.graph.fixed import fixed
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.save import save
from onnx_lowrank.graph.shapes import model_inputs, sample_shapes
from onnx_lowrank.runtime import Session
from tools.cifar import inputs, lossless

SAMPLES = 10


@dataclass(frozen=True)
class Case:
    """A model, dense and decomposed, and samples of its one input."""

    name: str
    dense: Path
    small: Path
    input: str
    samples: np.ndarray

    @property
    def paths(self) -> Mapping[str, Path]:
        return {"dense": self.dense, "decomposed": self.small}

    def expected(self, path: Path) -> np.ndarray:
        """Outputs of this machine's CPU, one after the other."""
        session = Session(path)
        return np.concatenate([session.run({self.input: x[None]})[0].ravel() for x in self.samples])


def cases(data: Path, folder: Path, target: str = "cpu") -> Iterator[Case]:
    """The model that comes with the project, and two of the development data where it is there; half of the MACs each."""
    with np.load(models.DIGITS_TEST) as archive:
        digits = archive["input"][:SAMPLES]
    sources = [("digits", Path(models.DIGITS), digits)]
    if (data / "models").is_dir():
        pictures, _ = lossless(data / "cifar10" / "test_500.npz")
        raw, scaled = (inputs(pictures[:SAMPLES], scaled=scaled) for scaled in (False, True))
        sources.append(("resnet8", data / "models" / "mlperf_resnet8_cifar10" / "model.onnx", raw))
        sources.append(("resnet20", data / "models" / "cifar10_resnet20" / "model_bn.onnx", scaled))
    for name, path, samples in sources:
        dense, small = folder / f"{name}.onnx", folder / f"{name}.small.onnx"
        lr.compress(path, budget={"macs": 0.5}, target=target).save(folder / "made.onnx")
        for source, out in ((path, dense), (folder / "made.onnx", small)):
            model = load(source)
            specs = model_inputs(model)
            save(fixed(model, sample_shapes(specs, {specs[0].name: (1, *samples.shape[1:])})[0]), out)
        yield Case(name, dense, small, specs[0].name, samples)


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest output."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def parser(text: str | None) -> argparse.ArgumentParser:
    """Options that all checks have."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=Path("../shared/data"), help="development data")
    return made
