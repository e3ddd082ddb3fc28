"""Decomposed models on Qualcomm's NPU, as its simulator has it: numerics and placement, no times.

    python3 -m venv qnn && qnn/bin/pip install '.[qnn]' pillow && qnn/bin/python -m tools.check_qnn [--data ../shared/data]

In fp32 the CPU and the simulator have to agree to 1e-4 of the largest output; with the architecture of a chip named it
computes in fp16, and 1e-2 is asked. Every node has to be on the provider. What the simulator does not even take as it was
given counts against nobody, and is shown.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from onnx_lowrank.report.data import package_version
from onnx_lowrank.runtime import RunSettings, open_session, version
from onnx_lowrank.types import LowRankError
from tools.deployed import cases, difference, parser

CONFIGURATIONS = {
    "fp32": ({"backend_type": "htp"}, 1e-4),
    "fp16, v75": ({"backend_type": "htp", "htp_arch": "75", "soc_model": "57"}, 1e-2),
}


def main() -> int:
    arguments = parser(__doc__).parse_args()
    held, refused = True, set[tuple[str, str]]()
    print(f"ONNX Runtime {version()}, onnxruntime-qnn {package_version('onnxruntime-qnn')}\n")
    print("| model | | configuration | nodes on QNN | difference to the CPU | held |\n" + "|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as place:
        for case in cases(arguments.data, Path(place), target="qnn"):
            for which, path in case.paths.items():
                expected = case.expected(path)
                for configuration, (options, tolerance) in CONFIGURATIONS.items():
                    try:
                        session = open_session(path, RunSettings("qnn", options=tuple(options.items())))
                        outputs = [session.run({case.input: sample[None]})[0].ravel() for sample in case.samples]
                    except LowRankError as error:
                        refused |= {(case.name, configuration)} if which == "dense" else set()
                        held &= (case.name, configuration) in refused
                        print(
                            f"| {case.name} | {which} | {configuration} | {str(error)[:160]} | | not run |", flush=True
                        )
                        continue
                    placed, off = session.placement, difference(np.concatenate(outputs), expected)
                    there, count = placed.get("QNNExecutionProvider", 0), sum(placed.values())
                    good = off < tolerance and there == count
                    held &= good
                    row = f"{there} of {count} | {off:.1e} | {'yes' if good else 'NO'}"
                    print(f"| {case.name} | {which} | {configuration} | {row} |", flush=True)
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
