"""A pass for pipelines of onnx-ir; needs the extra ``onnx-ir``."""

from __future__ import annotations

import logging
from typing import Any

import onnx_ir as ir

from onnx_lowrank.config import Config
from onnx_lowrank.interop.onnx_ir import from_proto, to_proto
from onnx_lowrank.pipeline import compress, configured
from onnx_lowrank.report.data import Report
from onnx_lowrank.types import LowRankError

logger = logging.getLogger(__name__)


class LowRankPass(ir.passes.InPlacePass):
    """`compress` as a pass of onnx-ir.

    The model stays the same object, with another graph in it: nodes and values are new, tensors that were not changed are
    the same, in their files where they were in files. Where nothing is worth changing the graph stays too.

    Parameters
    ----------
    config, options
        See :class:`~onnx_lowrank.config.Config`; at least one of ``budget``, ``max_drop`` and ``rank``.

    Raises
    ------
    LowRankError
        For an option that makes no sense, at once. Called, as :func:`onnx_lowrank.compress`, and where what was asked
        for was not met: the model is left as it was. A ``PassManager`` passes it on as the cause of its ``PassError``.

    Examples
    --------
    >>> import models
    >>> model = ir.load(models.DIGITS)
    >>> shrink = LowRankPass(budget={"macs": 0.5}, jobs=1)
    >>> ir.passes.Sequential(shrink)(model).modified
    True
    >>> shrink.report.met
    True
    """

    def __init__(self, *, config: Config | None = None, **options: Any) -> None:
        super().__init__()
        self.config = configured(config, options)
        self.report: Report | None = None
        """Of the last call."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Compress `model`; ``modified`` tells whether anything was worth changing."""
        given = to_proto(model)
        result = compress(given, config=self.config)
        self.report = result.report
        if result.report.unmet:
            raise LowRankError(
                f"{'; '.join(result.report.unmet)}: the model is left as it was; ask for what can be reached"
            )
        if result.model == given:
            return ir.passes.PassResult(model, False)
        graph = from_proto(result.model).graph
        before = {tensor.name: tensor for tensor in given.graph.initializer}
        for tensor in result.model.graph.initializer:
            if before.get(tensor.name) == tensor:
                graph.initializers[tensor.name].const_value = model.graph.initializers[tensor.name].const_value
        model.graph = graph
        logger.info("%d layer(s) decomposed", len(result.report.layers))
        return ir.passes.PassResult(model, True)
