"""Decomposed models on ARM64, emulated: numerics of the aarch64 build of ONNX Runtime under qemu-user, no times.

    python -m tools.check_arm64 --work ARM [--data ../shared/data]

For Debian. Fetched into ARM, and left there: packages of Debian (an aarch64 Python with its libraries, and qemu; the system
is not changed, its lists of packages for amd64 have to be there) and wheels of onnxruntime and numpy. Outputs have to agree
with this machine's CPU to 1e-4 of the largest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from onnx_lowrank.runtime import version
from tools.deployed import cases, difference, parser

TOLERANCE = 1e-4

PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libc6", "zlib1g", "libffi8")

PROCESSOR = "".join(
    f"processor\t: {core}\nFeatures\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc asimddp\n"
    "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n"
    for core in range(2)
)
"""What /proc/cpuinfo says on a Neoverse N1: this machine's own, which qemu passes on, makes ONNX Runtime crash."""

RUN = """
import json, sys
import numpy as np, onnxruntime as ort
task = json.load(open(sys.argv[1]))
samples = np.load(task["samples"])
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 4
for path, out in task["models"]:
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    np.save(out, np.concatenate([session.run(None, {task["input"]: x[None]})[0].ravel() for x in samples]))
import platform
print(platform.machine(), platform.python_version(), ort.__version__, np.__version__)
"""


def run(*command: str | Path, **options: object) -> str:
    """What a command says; an error where it fails."""
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **options).stdout  # type: ignore[call-overload]


def fetch(work: Path) -> None:
    """Packages and wheels, unpacked below `work`."""
    root, state, got = work / "root", work / "apt", work / "packages"
    for folder in (root, got, state / "lists" / "partial", state / "cache" / "archives" / "partial", state / "state"):
        folder.mkdir(parents=True, exist_ok=True)
    (state / "state" / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": state / "state",
        "Dir::State::Lists": state / "lists",
        "Dir::State::status": state / "state" / "status",
        "Dir::Cache": state / "cache",
    }
    apt = ["apt-get", *(f"-o{key}={value}" for key, value in settings.items())]
    run(*apt, "update")
    run(*apt, "install", "--yes", "--no-install-recommends", "--download-only", *PACKAGES)
    for package in (state / "cache" / "archives").glob("*.deb"):
        run("dpkg", "-x", package, root)
    run("apt-get", "download", "qemu-user-static", cwd=got)
    run("dpkg", "-x", next(got.glob("qemu-user-static*.deb")), work / "qemu")
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text(PROCESSOR)
    python = next((root / "usr" / "bin").glob("python3.*")).name.removeprefix("python")
    wheels = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28, 34)]
    wanted = ["--only-binary=:all:", f"--python-version={python}", *wheels, f"--target={work / 'site'}"]
    run(sys.executable, "-m", "pip", "install", "--quiet", *wanted, f"onnxruntime=={version()}")


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--work", type=Path, required=True, help="folder for what is fetched")
    arguments = options.parse_args()
    work, held, said = arguments.work.resolve(), True, ""
    if not (work / "site" / "onnxruntime").is_dir():
        fetch(work)
    python = next((work / "root" / "usr" / "bin").glob("python3.*"))
    emulated = [work / "qemu" / "usr" / "bin" / "qemu-aarch64-static", "-cpu", "neoverse-n1", "-L", work / "root"]
    emulated += [python, "-S"]
    print("| model | difference: dense | decomposed | held |\n" + "|---" * 4 + "|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "run.py").write_text(RUN)
        for case in cases(arguments.data, folder):
            np.save(folder / "samples.npy", case.samples)
            outputs = {which: folder / f"{which}.npy" for which in case.paths}
            made = [(str(path), str(outputs[which])) for which, path in case.paths.items()]
            task = {"input": case.input, "samples": str(folder / "samples.npy"), "models": made}
            (folder / "task.json").write_text(json.dumps(task))
            site = {**os.environ, "PYTHONPATH": str(work / "site")}
            said = run(*emulated, folder / "run.py", folder / "task.json", env=site).strip().splitlines()[-1]
            off = [difference(np.load(outputs[which]), case.expected(path)) for which, path in case.paths.items()]
            good = max(off) < TOLERANCE
            held &= good
            print(f"| {case.name} | {off[0]:.1e} | {off[1]:.1e} | {'yes' if good else 'NO'} |", flush=True)
    print(f"\nMachine, Python, ONNX Runtime and NumPy: {said}")
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
