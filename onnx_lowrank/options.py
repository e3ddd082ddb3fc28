"""The options of the command line, each a field of Config."""

from __future__ import annotations

import argparse
from typing import Any

from onnx_lowrank.budgets import BUDGET_SOLVERS
from onnx_lowrank.config import DAMAGES, METHODS, PRECISIONS, QUANTIZATIONS, TRAINING, Config, make_config, read_config
from onnx_lowrank.decompositions import DECOMPOSITIONS
from onnx_lowrank.ranks import RANK_ESTIMATORS
from onnx_lowrank.recipes import RECIPES
from onnx_lowrank.targets import TARGETS
from onnx_lowrank.verification.metrics import METRICS

OPTIONS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "goal": (
        (
            "--budget",
            {
                "action": "append",
                "metavar": "METRIC=RATIO",
                "help": "macs, params, size or latency, as a fraction of the original, 0.5 or 50%%; repeatable",
            },
        ),
        (
            "--max-drop",
            {"metavar": "X", "help": "largest loss of the metric accepted, with 95 %% confidence: 0.01 or 1%%"},
        ),
        ("--objective", {"metavar": "METRIC", "help": "what to make small under --max-drop (default: latency)"}),
        (
            "--recipe",
            {"metavar": "NAME", "help": f"a published pipeline, whole: {', '.join(RECIPES)}"},
        ),
        (
            "--solver",
            {"metavar": "NAME", "help": f"what chooses the ranks: {', '.join(BUDGET_SOLVERS)} (default: knapsack)"},
        ),
        (
            "--damage",
            {"metavar": "NAME", "help": f"what it adds up: {', '.join(DAMAGES)} (default: output)"},
        ),
        (
            "--rank",
            {
                "metavar": "ESTIMATOR",
                "help": f"no allocation: a rank for each layer by {', '.join(RANK_ESTIMATORS)}, as in energy=0.95",
            },
        ),
    ),
    "layers": (
        ("--methods", {"metavar": "LIST", "help": f"of {', '.join(DECOMPOSITIONS)} (default: {','.join(METHODS)})"}),
        ("--include", {"action": "append", "metavar": "GLOB", "help": "only layers of these names; repeatable"}),
        ("--exclude", {"action": "append", "metavar": "GLOB", "help": "no layers of these names; repeatable"}),
        (
            "--group",
            {
                "action": "append",
                "metavar": "NAME=GLOB",
                "help": "layers that may share a factor (joint_*); otherwise found from the graph; repeatable",
            },
        ),
        (
            "--align",
            {"type": int, "metavar": "N", "help": "multiple that ranks are kept to (default: this machine's kernels)"},
        ),
    ),
    "result": (
        (
            "--fold-batchnorm",
            {"action": "store_true", "default": None, "help": "fold BatchNormalization into convolutions at the end"},
        ),
        (
            "--quantize",
            {"metavar": "KIND", "help": f"{', '.join(QUANTIZATIONS)}: INT8 (QDQ) at the end (default: none)"},
        ),
    ),
    "graph": (
        (
            "--dequantize",
            {"action": "store_true", "default": None, "help": "bring a quantised model (QDQ) back to floats first"},
        ),
        (
            "--fold-shortcuts",
            {
                "action": "store_true",
                "default": None,
                "help": "write shortcuts that slice and pad as 1x1 convolutions first (faster in ResNets that have them)",
            },
        ),
        (
            "--drop-dead-channels",
            {
                "action": "store_true",
                "default": None,
                "help": "leave out channels that carry nothing on any calibration sample first (many mobile networks have them)",
            },
        ),
    ),
    "data": (
        (
            "--calibrate",
            {"metavar": "DATA", "help": "unlabelled samples: .npz, .npy, a folder of pictures, FILE.py:function..."},
        ),
        ("--evaluate", {"metavar": "DATA", "help": "samples for the accuracy check, with labels or without"}),
        ("--preprocess", {"metavar": "F.toml", "help": "how pictures become inputs"}),
        ("--metric", {"metavar": "NAME", "help": f"{', '.join(METRICS)} or FILE.py:function"}),
    ),
    "training": (
        ("--finetune", {"metavar": "KIND", "help": f"{', '.join(TRAINING)} (default: none); needs torch"}),
        ("--train", {"metavar": "DATA", "help": "samples to train on (distill: default those of --calibrate)"}),
        ("--epochs", {"type": int, "metavar": "N", "help": "times through them (default: 3,000 steps)"}),
        (
            "--learning-rate",
            {"type": float, "metavar": "X", "help": "the highest of AdamW's (default: 0.0003 to distill, 0.001)"},
        ),
        ("--train-batch", {"type": int, "metavar": "N", "help": "samples of a step (default: 64)"}),
        ("--augment", {"metavar": "LIST", "help": "of flip, crop, mixup; or none (default: flip,crop)"}),
        ("--trained", {"metavar": "LIST", "help": "all, touched or patterns of tensors' names (default: all)"}),
        ("--loss", {"metavar": "FILE.py:function", "help": "instead of cross entropy: function(outputs, labels)"}),
        (
            "--batch-statistics",
            {
                "action": argparse.BooleanOptionalAction,
                "default": None,
                "help": "let BatchNormalization follow the batches (default: with labels)",
            },
        ),
        (
            "--orthogonality",
            {
                "type": float,
                "metavar": "X",
                "help": "what the distance of factors from orthogonal ones counts in the recipe orthogonal (default: 1; 0: nothing)",
            },
        ),
        ("--device", {"metavar": "NAME", "help": "cpu or cuda (default: cpu)"}),
        (
            "--precision",
            {"metavar": "NAME", "help": f"of products in training: {', '.join(PRECISIONS)} (default: by device)"},
        ),
    ),
    "inputs": (
        ("--input-shape", {"action": "append", "metavar": "NAME:1,3,224,224", "help": "sizes of an input; repeatable"}),
    ),
    "target": (
        (
            "--target",
            {
                "metavar": "NAME",
                "help": f"what the result is to run on: {', '.join(TARGETS)}, or results of a bundle (.json) (default: cpu)",
            },
        ),
    ),
    "provider": (
        ("--provider", {"metavar": "NAME", "help": "execution provider that models run on (default: CPU)"}),
        (
            "--provider-option",
            {"action": "append", "metavar": "KEY=VALUE", "help": "an option of the provider; repeatable"},
        ),
        (
            "--provider-library",
            {"action": "append", "metavar": "NAME=PATH", "help": "library of a provider, to register; repeatable"},
        ),
    ),
    "latency": (
        ("--threads", {"type": int, "metavar": "N", "help": "threads of one operator (default: 1)"}),
        ("--batch-size", {"type": int, "metavar": "N", "help": "samples that latency is measured on (default: 1)"}),
    ),
    "work": (
        (
            "--exact",
            {
                "action": "store_true",
                "default": None,
                "help": "no randomised SVD, not even of kernels from 4096 x 4096 on",
            },
        ),
        ("--jobs", {"type": int, "metavar": "N", "help": "processes (default: one for each core)"}),
        (
            "--cluster",
            {"metavar": "ADDRESS", "help": "a Dask scheduler, as tcp://10.0.0.1:8786, in the place of --jobs"},
        ),
        ("--seed", {"type": int, "metavar": "N", "help": "of every random choice (default: 0)"}),
    ),
    "reports": (("--json", {"metavar": "F", "help": "write the report as JSON"}),),
    "page": (("--report", {"metavar": "F.html", "help": "write the report as a page, in one file (extra: report)"}),),
}
"""Options in groups; each is a field of Config, but for those that name a file to write."""


def add_options(sub: argparse.ArgumentParser, *groups: str) -> None:
    """Give a command the options of some groups."""
    for group in groups:
        box = sub.add_argument_group(group)
        for flag, settings in OPTIONS[group]:
            box.add_argument(flag, **settings)
    if "goal" in groups:
        sub.add_argument("--plan", metavar="F", help="write the plan as JSON, to edit and give to apply")
    sub.add_argument("--config", metavar="F.toml", help="options by their names; the command line has the last word")


FILES_WRITTEN = ("plan", "json", "report")

NOT_CONFIG = (
    "name",
    "command",
    "quiet",
    "verbose",
    "line",
    "model",
    "other",
    "out",
    "plan_file",
    "config",
    *FILES_WRITTEN,
)


def config_of(arguments: argparse.Namespace) -> Config:
    """What was asked for on the command line, and in the file that it names."""
    options = read_config(arguments.config) if arguments.config else {}
    given = {k: v for k, v in vars(arguments).items() if k not in NOT_CONFIG and v is not None}
    return make_config(**(options | given))
