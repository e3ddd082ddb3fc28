"""The ways that are compared, by name: what each is called, where it runs, and the module that carries it out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Way:
    """One way.

    Parameters
    ----------
    title
        As the table calls it.
    place
        `module:function` under `tools.benchmark`: given a model and samples it returns what makes a model of a share of
        the MACs and writes it.
    peer
        Runs in the environment of the peers.
    shares
        Makes a model of any share of the MACs; otherwise one model.
    dear
        Takes a minute or more: the least share is found by bisection instead of trying all.
    """

    title: str
    place: str
    peer: bool = True
    shares: bool = True
    dear: bool = False

    def load(self) -> Callable[[Path, Path], Callable[[float | None, Path], None]]:
        module, function = self.place.split(":")
        found: Any = getattr(importlib.import_module(f"tools.benchmark.{module}"), function)
        return found


WAYS = {
    "tucker": Way("EVBMF + Tucker-2, tensorly", "with_tensorly:tucker"),
    "cp": Way("EVBMF + CP, tensorly", "with_tensorly:cp", dear=True),
    "cp_uniform": Way("CP, the same share of every layer, tensorly", "with_tensorly:cp_uniform", dear=True),
    "aidge": Way("VBMF + Tucker-2, aidge_compression", "with_aidge:weakened"),
    "balf": Way("whitened SVD, one energy threshold (BALF's recipe)", "by_papers:whitened", peer=False),
    "spatial": Way("spatial SVD, the same share of every layer", "by_papers:spatial", peer=False),
    "enc_map": Way("spatial SVD, the same energy in every layer (ENC-Map)", "by_papers:enc_map", peer=False),
    "int8": Way("INT8 alone, onnxruntime.quantization", "int8:alone", peer=False, shares=False),
    "ours": Way("this tool", "ours:floats", peer=False, dear=True),
    "ours_int8": Way("this tool, `--quantize int8`", "ours:int8", peer=False, dear=True),
}
