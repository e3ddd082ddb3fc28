"""``python -m models NAME OUT.onnx [--seed N]`` writes an untrained network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import onnx

from models import NAMES, build
from onnx_lowrank.types import LowRankError


def main(argv: Sequence[str] | None = None) -> int:
    """Write the network asked for; 0, or 2 and one line on stderr for a wrong name or an unwritable file."""
    parser = argparse.ArgumentParser(prog="python -m models", description="Write an untrained network of the papers.")
    parser.add_argument("name", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("out", metavar="OUT.onnx")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        onnx.save(build(args.name, args.seed), args.out)
    except (LowRankError, OSError) as error:
        sys.stderr.write(f"python -m models: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
