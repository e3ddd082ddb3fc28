"""``python -m onnx_lowrank``."""

import sys

from onnx_lowrank.cli import main

sys.exit(main())
