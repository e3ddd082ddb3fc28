"""Eclipse Aidge's `aidge_compression`, as its README shows: ranks by VBMF, weakened by one factor for all layers, Tucker-2.

The factor is what reaches a share of the MACs: 0 keeps every rank full, 1 takes those of VBMF.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import aidge_backend_cpu  # noqa: F401 - what the compressor computes on
import aidge_compression
import aidge_core
import aidge_onnx
import numpy as np
import onnx

from tools.benchmark.by_papers import Make
from tools.benchmark.measure import macs

STEPS = 64
"""Factors are multiples of one over this."""
OPSET, IR = 18, 10


def weakened(model: Path, samples: Path) -> Make:
    original = onnx.load(model)
    name = original.graph.input[0].name
    with np.load(samples) as archive:
        sample = archive[name][:1]
    dense, known = macs(original, sample), dict[int, float]()

    def share_of(step: int, out: Path) -> float:
        path = out.with_name(f"step{step}.onnx")
        if step not in known:
            _compress(model, step / STEPS, sample.shape, path)
            known[step] = macs(onnx.load(path), sample) / dense
        return known[step]

    def make(share: float | None, out: Path) -> None:
        low, high = 0, STEPS  # the least factor that keeps no more than the share
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if share_of(middle, out) <= float(share or 0) else (middle + 1, high)
        if share_of(low, out) > float(share or 0):
            raise RuntimeError(f"the ranks of VBMF keep {known[low]:.3f} of the MACs")
        shutil.copy(out.with_name(f"step{low}.onnx"), out)

    return make


def _compress(model: Path, factor: float, shape: tuple[int, ...], out: Path) -> None:
    graph = aidge_onnx.load_onnx(str(model))
    replaced = aidge_compression.Compressor(factor).compress(graph)
    if not replaced:
        raise RuntimeError("aidge_compression replaced no layer (built for another version of aidge_core?)")
    first = next(iter(graph.get_input_nodes(aidge_core.InputCategory.Data)))
    last = next(iter(graph.get_output_nodes()))
    answers = [d.dim_value or 1 for d in onnx.load(model).graph.output[0].type.tensor_type.shape.dim]
    aidge_onnx.export_onnx(
        graph,
        str(out),
        inputs_dims={first.name(): [list(shape)]},
        outputs_dims={last.name(): [[1, *answers[1:]]]},
        opset=OPSET,
        ir_version=IR,
    )
