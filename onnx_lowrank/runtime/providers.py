"""Execution providers: which there are, how one is had, and whether it ran what it was given.

ONNX Runtime itself makes a warning of a provider that is absent, retries on the CPU where one fails, and gives the CPU
whatever a provider does not take. So a provider counts as absent unless this build has it or a library was registered,
nothing is retried, and a session says where its nodes are.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Iterable, Mapping

import onnxruntime as ort

from onnx_lowrank.types import LowRankError

CPU = "CPUExecutionProvider"

PLUGINS = {"QNNExecutionProvider": "onnxruntime_qnn"}
"""Providers that come as a Python package of their own, beside ONNX Runtime: registered where it is installed."""

NEEDS = {
    "XnnpackExecutionProvider": "the Android or iOS package of ONNX Runtime, or a build with --use_xnnpack: no wheel has it",
    "NnapiExecutionProvider": "an Android device and the onnxruntime-android package",
    "CoreMLExecutionProvider": "macOS on arm64 (its wheel has it), or iOS and the onnxruntime-c package",
    "QNNExecutionProvider": "pip install onnxruntime-qnn (on x86-64 Linux that is Qualcomm's simulator: numerics and "
    "placement), inputs of fixed size, and --provider-option backend_type=htp",
    "CUDAExecutionProvider": "an NVIDIA GPU and pip install onnxruntime-gpu in the place of onnxruntime",
    "TensorrtExecutionProvider": "an NVIDIA GPU, TensorRT and pip install onnxruntime-gpu in the place of onnxruntime",
    "OpenVINOExecutionProvider": "pip install onnxruntime-openvino in the place of onnxruntime",
    "DmlExecutionProvider": "Windows and pip install onnxruntime-directml in the place of onnxruntime",
    "AzureExecutionProvider": "a model that calls a service of Azure: it runs no ordinary nodes",
}
"""What it takes to have a provider."""

SIMULATED = ("QNNExecutionProvider",)
"""Providers that run on a simulator of their device where the processor is an x86."""

_libraries: dict[str, str] = {}
"""Libraries registered in this process."""


def available_providers() -> tuple[str, ...]:
    """Execution providers in this build of ONNX Runtime, and registered ones: names, not yet a proof that they work."""
    return tuple(ort.get_available_providers())


def known_providers() -> tuple[str, ...]:
    """Every execution provider that ONNX Runtime has a name for."""
    return tuple(ort.get_all_providers())


def installed_plugins() -> tuple[str, ...]:
    """Providers of :data:`PLUGINS` whose package is installed."""
    return tuple(name for name, package in PLUGINS.items() if importlib.util.find_spec(package))


def version() -> str:
    """Version of ONNX Runtime."""
    return str(ort.__version__)


def needs(provider: str) -> str:
    """What it takes to have a provider, as the end of a sentence; empty where nothing is known of it."""
    return f"; it needs {NEEDS[provider]}" if provider in NEEDS else ""


def simulated(provider: str, system: str | None = None) -> str:
    """What is to be said of times of a provider that only imitates its device; empty where it is the device.

    Parameters
    ----------
    system
        What the machine calls itself that it ran on, as `platform.platform` does; None for this one.
    """
    name = (system or platform.machine()).lower()
    if provider in SIMULATED and any(kind in name for kind in ("x86_64", "amd64")):
        return f"{provider} is a simulator on {'that' if system else 'this'} machine: its times say nothing of the device's"
    return ""


def find_provider(wanted: str, libraries: Iterable[tuple[str, str]] = ()) -> str:
    """Full name of a provider, as ONNX Runtime spells it; libraries are registered on the way.

    Parameters
    ----------
    wanted
        In full or without ``ExecutionProvider``, in any case.
    libraries
        Names and paths of libraries of providers to register first.

    Raises
    ------
    LowRankError
        Where there is no such provider. ONNX Runtime itself would run on the CPU with a warning only.
    """
    for name, path in libraries:
        _register(name, path)
    plugin = named(wanted, PLUGINS)
    if plugin and not named(wanted, available_providers()) and plugin in installed_plugins():
        _register(plugin, _library_of(PLUGINS[plugin]))
    have = available_providers()
    found = named(wanted, have)
    if found is None:
        known = named(wanted, known_providers())
        raise LowRankError(
            f"execution provider '{wanted}' is not in this build of ONNX Runtime: one of {', '.join(have)} was expected"
            + (needs(known) if known else "")
        )
    return found


def _library_of(package: str) -> str:
    """Path of the library in a provider's package."""
    try:
        return str(importlib.import_module(package).get_library_path())
    except Exception as error:  # whatever its initialisation does
        raise LowRankError(f"package {package} is installed and cannot be used: {one_line(error)}") from error


def named(wanted: str, names: Iterable[str]) -> str | None:
    """That of `names` which is called `wanted`."""
    spellings = ((name, name.lower()) for name in names)
    return next((n for n, low in spellings if wanted.lower() in (low, low.removesuffix("executionprovider"))), None)


def _register(name: str, path: str) -> None:
    """Register the library of a provider, once."""
    if _libraries.get(name) == path:
        return
    if name in available_providers():
        raise LowRankError(f"provider library {name}={path}: ONNX Runtime has a provider of that name already")
    try:
        ort.register_execution_provider_library(name, path)
    except Exception as error:
        raise LowRankError(
            f"{path} cannot be loaded as the library of execution provider {name}: {one_line(error)}"
        ) from error
    _libraries[name] = path


def use_provider(options: ort.SessionOptions, name: str, given: Mapping[str, str]) -> dict[str, object]:
    """Let a session use provider `name`: through its options for one of a library, else by what is returned.

    Raises
    ------
    LowRankError
        Where a provider of a library has no device here.
    """
    if name not in _libraries:
        return {"providers": [CPU] if name == CPU else [(name, dict(given)), CPU]}
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise LowRankError(f"execution provider {name} finds no device here{needs(name)}")
    # of several the most special: a phone has an NPU, a GPU and a CPU
    order = ("NPU", "GPU", "CPU")
    devices.sort(key=lambda d: next((i for i, kind in enumerate(order) if str(d.device.type).endswith(kind)), 3))
    options.add_provider_for_devices(devices[:1], dict(given))
    return {}


def fell_back(provider: str, placement: Mapping[str, int]) -> str:
    """What is to be said of where the nodes of a session for `provider` run; empty where it has them all.

    Parameters
    ----------
    placement
        Nodes of each provider, as the session says; empty where it does not say.

    Examples
    --------
    >>> fell_back("FooExecutionProvider", {"FooExecutionProvider": 3, "CPUExecutionProvider": 1})
    'FooExecutionProvider runs 3 of 4 nodes, the others are on CPUExecutionProvider'
    """
    if provider == CPU or set(placement) == {provider}:
        return ""
    if not placement:
        return f"ONNX Runtime {version()} does not say where nodes run (1.24 does)"
    count, others = sum(placement.values()), ", ".join(name for name in placement if name != provider)
    if placement.get(provider):
        return f"{provider} runs {placement[provider]} of {count} nodes, the others are on {others}"
    return f"{provider} runs none of the {count} nodes, all are on {others}"


def one_line(error: Exception) -> str:
    """What an exception says, short enough for one line."""
    return " ".join(str(error).split())[:400]
