"""Whole graphs: the same outputs as ONNX Runtime, weights found, shared and joined kernels, values written back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import models

torch = pytest.importorskip("torch", reason="training needs the extra [finetune]")

from onnx_lowrank.finetune.program import Program, weights_of  # noqa: E402
from onnx_lowrank.graph.model import load  # noqa: E402
from onnx_lowrank.graph.plain import plain_graph, with_values  # noqa: E402
from onnx_lowrank.types import LowRankError  # noqa: E402
from tests.helpers import SHARED, assert_close, needs_shared, normal, parse, run  # noqa: E402

TIED = """net (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, w)
  r = Relu (a)
  b = Conv <pads = [1, 1, 1, 1]> (r, w)
  joined = Concat <axis = 0> (shared, own)
  y = Conv (b, joined)
}"""


def tied() -> onnx.ModelProto:
    return parse(TIED, w=normal(4, 4, 3, 3), shared=normal(2, 4, 1, 1), own=normal(2, 4, 1, 1, seed=1))


def program_of(model: onnx.ModelProto, trained: tuple[str, ...] | None = None) -> Program:
    graph = plain_graph(load(model))
    return Program(graph, weights_of(graph) if trained is None else trained)


@pytest.mark.parametrize("name", ["resnet20_cifar10", "alexnet_cifar10", "digits"])
def test_a_network_gives_what_onnx_runtime_gives(name: str) -> None:
    model = onnx.load(models.DIGITS) if name == "digits" else models.build(name, 0)
    shape = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
    feeds = {model.graph.input[0].name: normal(*shape, seed=1)}
    program = program_of(model)
    with torch.no_grad():
        results = program(program.tensors(feeds))
    assert_close([results[n].numpy() for n in program.outputs], run(model, feeds), 1e-5)


@needs_shared
@pytest.mark.parametrize(
    "name", ["ppocrv3_det", "ultraface_rfb320", "dtln_2", "mnist_cntk", "superres_espcn", "mlperf_kws"]
)
def test_a_real_network_gives_what_onnx_runtime_gives(name: str) -> None:
    model = onnx.load(SHARED / "models" / name / "model.onnx")
    program = program_of(model)
    inputs = [i for i in model.graph.input if i.name in program.inputs]
    sizes = {
        i.name: [d.dim_value or (2 if not k else 64) for k, d in enumerate(i.type.tensor_type.shape.dim)]
        for i in inputs
    }
    rng = np.random.default_rng(1)
    feeds = {name: 50 * rng.normal(size=size).astype("float32") for name, size in sizes.items()}
    with torch.no_grad():
        results = program(program.tensors(feeds))
    assert_close([results[n].numpy() for n in program.outputs], run(model, feeds), 1e-3)


def test_gradients_of_a_shared_and_a_joined_kernel_add_up() -> None:
    model = tied()
    program = program_of(model)
    assert set(program.parameters) == {"w", "shared", "own"}
    x = torch.from_numpy(normal(2, 4, 6, 6, seed=9))
    program({"x": x})["y"].square().sum().backward()
    w, shared, own = (torch.tensor(onnx.numpy_helper.to_array(t)).requires_grad_() for t in model.graph.initializer)
    conv = torch.nn.functional.conv2d
    hidden = conv(torch.relu(conv(x, w, padding=1)), w, padding=1)
    conv(hidden, torch.cat([shared, own])).square().sum().backward()
    for name, tensor in (("w", w), ("shared", shared), ("own", own)):
        torch.testing.assert_close(program.parameters[name].grad, tensor.grad)


def test_what_was_trained_goes_back_by_name() -> None:
    model = tied()
    model.graph.initializer[0].doc_string = "kept"
    program = program_of(model)
    with torch.no_grad():
        for value in program.parameters.values():
            value.mul_(0.5)
    written = with_values(load(model), program.values()).proto
    assert [t.name for t in written.graph.initializer] == ["w", "shared", "own"]  # one of each came out
    assert written.graph.initializer[0].doc_string == "kept"
    assert written.graph.node == model.graph.node
    feeds = {"x": normal(2, 4, 6, 6, seed=9)}
    with torch.no_grad():
        expected = program(program.tensors(feeds))["y"].numpy()
    assert_close(run(written, feeds), [expected], 1e-5)
    assert not np.allclose(run(model, feeds)[0], expected)


def test_blocks_given_inputs_of_their_own_are_independent() -> None:
    program = program_of(tied())
    x = torch.from_numpy(normal(2, 4, 6, 6, seed=9))
    other = torch.from_numpy(normal(2, 4, 6, 6, seed=10))
    results = program({"x": x}, instead={"r": other})
    torch.testing.assert_close(results["r"], torch.relu(program({"x": x}, keep=["a"])["a"]))
    (gradient,) = torch.autograd.grad(results["y"].sum(), program.parameters["own"])
    assert not torch.allclose(results["y"], program({"x": x})["y"])
    assert gradient.abs().sum() > 0


def test_normalisations_follow_the_batch_on_request() -> None:
    model = models.build("resnet20_cifar10", 0)
    program = program_of(model)
    name = next(n.input[3] for n in model.graph.node if n.op_type == "BatchNormalization")
    before = program.statistics[name].clone()
    x = {"input": torch.from_numpy(normal(4, 3, 32, 32, seed=1)) + 3.0}
    frozen = program(x)
    torch.testing.assert_close(program.statistics[name], before)
    moving = program(x, batch_statistics=True)
    assert not torch.allclose(program.statistics[name], before)
    output = program.outputs[0]
    assert not torch.allclose(frozen[output], moving[output])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("y = Gelatinize (x)", "no gradient for Gelatinize"),
        ("y = my.domain.Relu (x)", "no gradient for my.domain:Relu"),
        (
            "c = Constant <value = bool {1}> ()\n y = If (c) <then_branch = g () => (float[N, 4] a) { a = Relu (x) }, else_branch = h () => (float[N, 4] b) { b = Exp (x) }>",
            "no gradient for If",
        ),
    ],
)
def test_what_has_no_gradient_is_refused_by_name(text: str, said: str) -> None:
    model = parse(f"net (float[N, 4] x) => (float[N, 4] y) {{ {text} }}")
    model.opset_import.add(domain="my.domain", version=1)
    with pytest.raises(LowRankError, match=said):
        Program(plain_graph(load(model)))


def test_only_weights_are_found() -> None:
    graph = plain_graph(load(models.build("resnet20_cifar10", 0)))
    found = weights_of(graph)
    assert all(graph.stored[name].dtype.kind == "f" for name in found)
    statistics = {n for node in graph.nodes if node.op_type == "BatchNormalization" for n in node.inputs[3:]}
    assert not statistics & set(found)
    (first,) = (node for node in graph.nodes if node.inputs[0] == "input")
    assert weights_of(graph, [first.name]) == first.inputs[1:2]
