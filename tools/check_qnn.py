"""Decomposed models on Qualcomm's NPU, as its simulator has it: numerics and placement, no times.

    python3 -m venv qnn && qnn/bin/pip install '.[qnn]' pillow && qnn/bin/python -m tools.check_qnn [--data ../shared/data]

Each configuration of the provider runs in a process of its own, because it keeps its options for the process. In fp32 the
CPU and the simulator have to agree to 1e-4 of the largest output; with the architecture of a chip named it computes
in fp16, and 1e-2 is asked. Every node has to be on the provider. What the simulator does not even take as it was given
counts against nobody, and is shown.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from onnx_lowrank.report.data import package_version
from onnx_lowrank.runtime import RunSettings, Session, version
from tools.deployed import cases, difference, parser

CONFIGURATIONS = {
    "fp32": ({"backend_type": "htp"}, 1e-4),
    "fp16, v75": ({"backend_type": "htp", "htp_arch": "75", "soc_model": "57"}, 1e-2),
}


def run_there(model: Path, configuration: str, folder: Path) -> dict[str, int]:
    """Run the samples in `folder` in this process; outputs go to a file, and nodes by provider are returned."""
    options, _ = CONFIGURATIONS[configuration]
    session = Session(model, RunSettings("qnn", options=tuple(options.items())))
    with np.load(folder / "samples.npz") as archive:
        ((name, samples),) = archive.items()
    np.save(folder / "outputs.npy", np.concatenate([session.run({name: x[None]})[0].ravel() for x in samples]))
    return session.placement


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--one", nargs=3, metavar=("MODEL", "CONFIGURATION", "FOLDER"), help="for the processes begun")
    arguments = options.parse_args()
    if arguments.one:
        model, configuration, place = arguments.one
        placed = run_there(Path(model), configuration, Path(place))
        (Path(place) / "placed.json").write_text(json.dumps(placed))
        return 0
    held, refused = True, set[tuple[str, str]]()
    print(f"ONNX Runtime {version()}, onnxruntime-qnn {package_version('onnxruntime-qnn')}\n")
    print("| model | | configuration | nodes on QNN | difference to the CPU | held |\n" + "|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for case in cases(arguments.data, folder, target="qnn"):
            np.savez(folder / "samples.npz", **{case.input: case.samples})
            for which, path in case.paths.items():
                expected = case.expected(path)
                for configuration, (_, tolerance) in CONFIGURATIONS.items():
                    command = [sys.executable, "-m", "tools.check_qnn", "--one", str(path), configuration, place]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    if done.returncode:
                        refused |= {(case.name, configuration)} if which == "dense" else set()
                        held &= (case.name, configuration) in refused
                        said = done.stderr.strip().splitlines()[-1].partition(": ")[2][:160]
                        print(f"| {case.name} | {which} | {configuration} | {said} | | not run |", flush=True)
                        continue
                    placed = json.loads((folder / "placed.json").read_text())
                    off = difference(np.load(folder / "outputs.npy"), expected)
                    there, count = placed.get("QNNExecutionProvider", 0), sum(placed.values())
                    good = off < tolerance and there == count
                    held &= good
                    row = f"{there} of {count} | {off:.1e} | {'yes' if good else 'NO'}"
                    print(f"| {case.name} | {which} | {configuration} | {row} |", flush=True)
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
