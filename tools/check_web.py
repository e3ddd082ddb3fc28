"""Decomposed models in ONNX Runtime Web: numerics and relative speed of its wasm build, in Node.

    npm install --prefix WEB onnxruntime-web && python -m tools.check_web --web WEB [--data ../shared/data]

Outputs have to agree with this machine's CPU to 1e-4 of the largest; times are of one thread, the models in turn.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from tools.deployed import cases, difference, parser

ROUNDS = 60
TOLERANCE = 1e-4


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--web", type=Path, required=True, help="folder with node_modules/onnxruntime-web")
    arguments = options.parse_args()
    script, package = Path(__file__).with_suffix(".mjs"), (arguments.web / "package.json").resolve()
    held = True
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    print(
        "| model | dense, ms | decomposed, ms | speedup | difference: dense | decomposed | held |\n" + "|---" * 7 + "|"
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for case in cases(arguments.data, folder):
            case.samples.astype(np.float32).tofile(folder / "samples")
            outputs = {which: folder / f"{which}.out" for which in case.paths}
            task = {
                "input": case.input,
                "shape": [1, *case.samples.shape[1:]],
                "samples": str(folder / "samples"),
                "rounds": ROUNDS,
                "models": [{"path": str(p), "outputs": str(outputs[w])} for w, p in case.paths.items()],
            }
            (folder / "task.json").write_text(json.dumps(task))
            command = ["node", str(script), str(package), str(folder / "task.json")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            answer = json.loads(said.strip().splitlines()[-1])
            dense, small = (np.array(times[10:]) for times in answer["times"])
            off = [difference(np.fromfile(outputs[w], np.float32), case.expected(p)) for w, p in case.paths.items()]
            good = max(off) < TOLERANCE
            held &= good
            times = f"{np.median(dense):.2f} | {np.median(small):.2f} | {np.median(dense / small):.2f}"
            print(f"| {case.name} | {times} | {off[0]:.1e} | {off[1]:.1e} | {'yes' if good else 'NO'} |", flush=True)
    print(f"\nNode {node}, onnxruntime-web {answer['version']}")
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
