"""A tiny model that any execution provider for neural networks can run: what probing one takes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs


def probe_model() -> tuple[bytes, dict[str, np.ndarray]]:
    """A convolution and a ReLU, and feeds for them."""
    x, hidden, y = (gs.Variable(name, np.float32, (1, 4, 8, 8)) for name in ("x", "hidden", "y"))
    graph = gs.Graph(inputs=[x], outputs=[y], opset=13)
    kernel = gs.Constant("kernel", np.full((4, 4, 3, 3), 0.1, np.float32))
    graph.layer(op="Conv", inputs=[x, kernel], outputs=[hidden], attrs={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]})
    graph.layer(op="Relu", inputs=[hidden], outputs=[y])
    proto = gs.export_onnx(graph)
    proto.ir_version = 8
    return proto.SerializeToString(), {"x": np.ones((1, 4, 8, 8), np.float32)}
