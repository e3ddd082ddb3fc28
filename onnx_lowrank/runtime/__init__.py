"""Engines: ONNX Runtime with its providers, sessions, times and tools for mobile targets, and MNN. The only importer of both."""

from onnx_lowrank.runtime.apart import AnySession, SessionApart, open_session, probe_apart, profile_nodes, time_pair
from onnx_lowrank.runtime.machine import block_size, processor
from onnx_lowrank.runtime.mnn import NAME as MNN
from onnx_lowrank.runtime.mnn import MNNSession, disagreement, mnn_version, require_mnn
from onnx_lowrank.runtime.mobile import OpList, Partitions, check_partitions, convert_to_ort, simplify
from onnx_lowrank.runtime.providers import (
    CPU,
    available_providers,
    installed_plugins,
    known_providers,
    named,
    needs,
    simulated,
    version,
)
from onnx_lowrank.runtime.session import OPTIMIZED, WEIGHTS, Feeds, RunSettings, Session, probe, tensor_shapes
from onnx_lowrank.runtime.timing import Profile, Timing, typical

__all__ = [
    "CPU",
    "MNN",
    "OPTIMIZED",
    "WEIGHTS",
    "AnySession",
    "Feeds",
    "MNNSession",
    "OpList",
    "Partitions",
    "Profile",
    "RunSettings",
    "Session",
    "SessionApart",
    "Timing",
    "available_providers",
    "block_size",
    "check_partitions",
    "convert_to_ort",
    "disagreement",
    "installed_plugins",
    "known_providers",
    "mnn_version",
    "named",
    "needs",
    "open_session",
    "probe",
    "probe_apart",
    "processor",
    "profile_nodes",
    "require_mnn",
    "simplify",
    "simulated",
    "tensor_shapes",
    "time_pair",
    "typical",
    "version",
]
