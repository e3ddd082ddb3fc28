"""What mobile targets make of decomposed models, told without the devices: parts before and after, for every model.

    python -m tools.check_targets [--data ../shared/data] [--share 0.7] [--models GLOB]

Each model is compressed to a share of its MACs for NNAPI and for CoreML, by the weights alone, and saved; one that cannot
be so small is saved as far as it goes. Counted are the parts that the target takes, and the nodes in them, of the model as
a provider sees it: sizes fixed, constants and BatchNormalization folded. They are counted twice: by this tool, which
looks at sizes and stored weights too, and by ONNX Runtime's own usability checker, which goes by the names of operators.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.tools import onnx_model_utils as utils
from onnxruntime.tools.mobile_helpers import usability_checker as checker

import onnx_lowrank as lr
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.shapes import model_inputs, sample_shapes

CHECKS: dict[str, Any] = {
    "nnapi": lambda model: checker.check_nnapi_partitions(model, True),
    "coreml": lambda model: checker.check_coreml_partitions(model, True, "coreml_supported_mlprogram_ops.md"),
}


def by_names(path: Path, target: str, folder: Path) -> tuple[int, int, int]:
    """Parts, nodes taken and nodes, by ONNX Runtime's checker alone."""
    model = onnx.load(str(path))
    sizes, _ = sample_shapes(model_inputs(load(path)), {})
    for name, shape in sizes.items():
        utils.make_input_shape_fixed(model.graph, name, list(shape))
    onnx.save(model, folder / "fixed.onnx")
    utils.optimize_model(folder / "fixed.onnx", folder / "basic.onnx")
    found = CHECKS[target](onnx.shape_inference.infer_shapes(onnx.load(str(folder / "basic.onnx"))))
    return found.num_partitions, found.num_supported_nodes, found.num_nodes


def row(path: Path, target: str, share: float, folder: Path) -> bool:
    """One line of the table; whether the target takes the result no worse than the original."""
    name = f"{path.parent.name}/{path.stem}".removesuffix("/model")
    try:
        result = lr.compress(path, budget={"macs": share}, target=target)
    except lr.LowRankError as error:
        print(f"| {name} | {target} | - | - | {error} | | | | - |", flush=True)
        return True
    result.save(folder / "out.onnx")
    report = result.report
    (found,) = report.targets
    pairs = [(p.num_partitions, p.num_supported, p.num_nodes) for p in found.partitions.values()]
    named = [by_names(each, target, folder) for each in (path, folder / "out.onnx")]
    held = all(b[0] <= a[0] and b[1] * a[2] >= a[1] * b[2] for a, b in (pairs, named))
    cells = [f"{parts} ({taken} of {nodes})" for parts, taken, nodes in [*pairs, *named]]
    macs, changed = report.compressed.macs / report.original.macs, len(report.layers)
    reached = f"{macs:.3f}" + ("" if result.met else ", not met")
    print(
        f"| {name} | {target} | {reached} | {changed} | {' | '.join(cells)} | {'yes' if held else 'NO'} |", flush=True
    )
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--models", default="*/*.onnx", help="pattern below DATA/models")
    arguments = parser.parse_args()
    print("| model | target | MACs | layers | before | after | before, by names | after, by names | held |")
    print("|---" * 9 + "|")
    paths = sorted((arguments.data / "models").glob(arguments.models))
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(path, target, arguments.share, Path(folder)) for path in paths for target in CHECKS]
    print(f"\n{sum(rows)} of {len(rows)} held")
    return 0 if all(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
