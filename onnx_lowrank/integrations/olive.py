"""A pass of Olive's; needs the extra ``olive``. Olive finds it by the package configuration written here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Union

import onnx
from olive.common.config_utils import validate_config
from olive.common.utils import format_data
from olive.data.config import DataConfig
from olive.exception import OlivePassError
from olive.hardware import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.onnx.common import get_external_data_config, model_proto_to_olive_model
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.search.search_parameter import Categorical
from pydantic import model_validator

from onnx_lowrank import runtime
from onnx_lowrank.config import Config, make_config
from onnx_lowrank.pipeline import Result, compress
from onnx_lowrank.types import LowRankError

NAME = "OnnxLowRank"

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""What a search tries where nobody says."""

OWN = ("budget", "provider")
"""Options of `Config` that the pass describes by itself; all others are taken as they are."""

ENTRY = {
    "module_path": f"{__name__}.{NAME}",
    "supported_providers": ["*"],
    "supported_accelerators": ["*"],
    "supported_precisions": ["*"],
    "supported_algorithms": [],
    "supported_quantization_encodings": [],
    "dataset": "dataset_optional",
    "extra_dependencies": [],
}
"""Of the pass in a package configuration."""


def write_package_config(path: str | Path, base: str | Path | None = None) -> Path:
    """Write a package configuration with this pass, for ``olive.run(..., package_config=...)`` and ``--package-config``.

    Parameters
    ----------
    path
        A JSON file to write.
    base
        The configuration to add the pass to: Olive reads one in the place of its own, not beside it. None for its own.

    Returns
    -------
    Path
        That of the file.

    Raises
    ------
    LowRankError
        Where `base` is no package configuration, or `path` cannot be written.
    """
    base = Path(base or OlivePackageConfig.get_default_config_path())
    try:
        data = json.loads(base.read_text(encoding="utf-8"))
        data["passes"][NAME] = ENTRY
        OlivePackageConfig.model_validate(data)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LowRankError(
            f"{base} is no package configuration of Olive ({error}): JSON with passes was expected"
        ) from error
    path = Path(path)
    try:
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise LowRankError(f"{path} cannot be written ({error.strerror}): the path of a file was expected") from error
    return path


class OnnxLowRank(Pass):
    """`compress` as a pass of Olive, from an ONNX model to an ONNX model.

    ``budget`` is searched over where a search runs; ``budget_metric`` says of what it is a fraction. Every other option
    of :class:`~onnx_lowrank.config.Config` has its name and its everyday form. Data are given in the forms of this tool
    (``calibrate``, ``evaluate``) or as Olive's (``data_config``, ``evaluate_data_config``).

    A result that does not meet what was asked for raises ``OlivePassError``: a search leaves that point out, and goes on.
    Options and data that cannot be used raise LowRankError, which ends it.
    """

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: AcceleratorSpec) -> bool:
        """Not: latency is measured on its provider."""
        return False

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        data = Union[DataConfig, dict]  # noqa: UP007 - Olive asks typing for its members
        provider = accelerator_spec.execution_provider
        here = provider in runtime.available_providers()
        return {
            "budget": PassConfigParam(
                type_=float,
                default_value=0.5,
                search_defaults=Categorical(list(BUDGETS)),
                description="Fraction of the original to stay within; null for none, with max_drop or rank.",
            ),
            "budget_metric": PassConfigParam(
                type_=str, default_value="macs", description="What budget is of: macs, params, size or latency."
            ),
            "data_config": PassConfigParam(
                type_=data, description="Unlabelled samples, in the place of calibrate; labels are not looked at."
            ),
            "evaluate_data_config": PassConfigParam(
                type_=data, description="Samples for the accuracy check, in the place of evaluate."
            ),
            "provider": PassConfigParam(
                type_=str,
                default_value=provider if here else Config.provider,
                description="What latency is measured on; that of the accelerator where it works on this machine.",
            ),
            **{
                f.name: PassConfigParam(
                    type_=Any, description=f"{f.name} of onnx_lowrank.Config; null for its default."
                )
                for f in fields(Config)
                if f.name not in OWN
            },
            **get_external_data_config(),
        }

    @classmethod
    def _validators(cls) -> dict[str, Callable[..., Any]]:
        """Olive drops options that no pass has: a bound on the loss, spelt wrongly, would bound nothing."""
        return {"refuse_unknown": model_validator(mode="before")(classmethod(_refuse_unknown))}

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        given = config.model_dump()
        options = _options(given)
        for option, name in (("calibrate", "data_config"), ("evaluate", "evaluate_data_config")):
            if given[name] is not None:
                if options.get(option) is not None:
                    raise LowRankError(f"{option} and {name} were given: one of them was expected")
                options[option] = _data(given[name], model)
        result = compress(model.model_path, config=make_config(**options))
        if result.report.unmet:
            raise OlivePassError("; ".join(result.report.unmet))
        made = model_proto_to_olive_model(
            _whole(result), resolve_onnx_path(output_model_path, Path(model.model_path).name), config
        )
        made.model_attributes = {**(model.model_attributes or {}), "onnx_lowrank": _summary(result)}
        return made


def _refuse_unknown(config: type[BasePassConfig], values: Any) -> Any:
    unknown = [name for name in values if name not in config.model_fields] if isinstance(values, Mapping) else []
    if unknown:
        raise LowRankError(
            f"{NAME}: option {', '.join(unknown)} was given: one of {', '.join(sorted(config.model_fields))} was expected"
        )
    return values


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a Config among those of the pass."""
    options = {f.name: given[f.name] for f in fields(Config) if f.name not in OWN}
    ratio = given["budget"]
    return {
        **options,
        "provider": given["provider"],
        "budget": None if ratio is None else {given["budget_metric"]: ratio},
    }


def _data(data_config: Any, model: ONNXModelHandler) -> Callable[[], Iterator[Any]]:
    """Olive's data in the form of this tool, with labels where they have any; loaded once, read again and again."""
    batches = validate_config(data_config, DataConfig).to_data_container().create_dataloader()
    io_config = model.io_config

    def samples() -> Iterator[Any]:
        for batch in batches:
            feeds, labels = batch if isinstance(batch, (list, tuple)) and len(batch) == 2 else (batch, None)
            yield format_data(feeds, io_config) if labels is None else (format_data(feeds, io_config), labels)

    return samples


def _whole(result: Result) -> onnx.ModelProto:
    """The model with all its tensors in it, wherever those of the original were."""
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        path = Path(folder) / "model.onnx"
        result.save(path)
        return onnx.load(path)


def _summary(result: Result) -> dict[str, Any]:
    """What came of it, as Olive keeps it beside the model."""
    report = result.report.to_dict()
    keys = ("version", "original", "compressed", "budgets", "accuracy", "latency", "notes")
    return {"layers": len(result.report.layers), **{key: report[key] for key in keys}}
