"""A kernel is found wherever a model may keep it, read from its own place, and dropped when nothing reads it any more."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank.candidates import group_layers
from onnx_lowrank.graph.constants import MOST_STEPS, Constants, drop_unread, read_external, read_tensor, stored_bytes
from onnx_lowrank.graph.find import find_layers, model_cost
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.shapes import infer, model_inputs, sample_shapes
from onnx_lowrank.types import LowRankError
from tests.helpers import Rewritten, assert_same_function, composed, decompose, feeds_of, find, half, normal, parse


def params(model: onnx.ModelProto) -> int:
    loaded = load(model)
    sizes, _ = sample_shapes(model_inputs(loaded), {})
    return model_cost(loaded, infer(loaded, sizes))[0].params


def initializers(model: onnx.ModelProto) -> list[str]:
    return [tensor.name for tensor in model.graph.initializer]


# --- where kernels come from -----------------------------------------------------------------------------------------

KERNEL = normal(6, 4, 3, 3)
MATRIX = normal(5, 4)


def text_of(array: np.ndarray) -> str:
    return ", ".join(repr(float(value)) for value in array.ravel())


CHAINS = {
    "initializer": ("y = Conv (x, w)", {"w": KERNEL}),
    "Constant node": (f"w = Constant <value = float[6,4,3,3] {{{text_of(KERNEL)}}}> () y = Conv (x, w)", {}),
    "list of floats": (
        f"f = Constant <value_floats = [{text_of(KERNEL)}]> () s = Constant <value_ints = [6,4,3,3]> () "
        "w = Reshape (f, s) y = Conv (x, w)",
        {},
    ),
    "Identity": ("i = Identity (w) j = Identity (i) y = Conv (x, j)", {"w": KERNEL}),
    "Transpose": ("t = Transpose <perm=[3,2,0,1]> (w) y = Conv (x, t)", {"w": KERNEL.transpose(2, 3, 1, 0).copy()}),
    "Transpose of all axes": ("t = Transpose (w) y = Conv (x, t)", {"w": KERNEL.T.copy()}),
    "Reshape": (
        "r = Reshape (w, s) y = Conv (x, r)",
        {"w": KERNEL.reshape(6, 4, 9), "s": np.array([0, -1, 3, 3], np.int64)},
    ),
    "Cast": ("c = Cast <to=1> (w) y = Conv (x, c)", {"w": KERNEL.astype(np.float16)}),
    "Cast from float64": ("c = Cast <to=1> (w) y = Conv (x, c)", {"w": KERNEL.astype(np.float64)}),
    "Unsqueeze": ("u = Unsqueeze (w, a) y = Conv (x, u)", {"w": KERNEL[..., 0].copy(), "a": np.array([3], np.int64)}),
    "Squeeze": ("q = Squeeze (w, a) y = Conv (x, q)", {"w": KERNEL[None], "a": np.array([0], np.int64)}),
    "Squeeze of all": ("q = Squeeze (w) y = Conv (x, q)", {"w": KERNEL[None, ..., None]}),
    "all of them": (
        "c = Cast <to=1> (w) t = Transpose <perm=[1,0,2]> (c) r = Reshape (t, s) i = Identity (r) y = Conv (x, i)",
        {"w": KERNEL.reshape(6, 4, 9).transpose(1, 0, 2).astype(np.float64), "s": np.array([6, 4, 3, 3], np.int64)},
    ),
}


@pytest.mark.parametrize("what", CHAINS)
def test_a_kernel_is_found_through_what_derives_it_and_all_of_that_goes_with_it(what: str) -> None:
    body, arrays = CHAINS[what]
    original = parse(f"g (float[1,4,6,6] x) => (float[n,c,h,w] y) {{ {body} }}", **arrays)
    rewritten = decompose(original, "channel_svd", only=["y"])
    assert rewritten.found.skips == ()
    assert [node.op_type for node in rewritten.model.graph.node] == ["Conv", "Conv"]
    assert len(rewritten.model.graph.initializer) == 2
    onnx.checker.check_model(rewritten.model, full_check=True)
    assert_same_function(rewritten.model, original, feeds_of(original))


@pytest.mark.parametrize("form", ["Flatten", "Flatten <axis=2>", "Flatten <axis=-1>", "Flatten <axis=0>"])
def test_a_matrix_is_found_through_flatten_as_onnx_runtime_flattens_it(form: str) -> None:
    # MatMul through x (1, K): K is whatever Flatten leaves on the left
    array = normal(2, 3, 4)
    rows = {"Flatten": 2, "Flatten <axis=2>": 6, "Flatten <axis=-1>": 6, "Flatten <axis=0>": 1}[form]
    original = parse(f"g (float[1,{rows}] x) => (float[a,b] y) {{ f = {form} (w) y = MatMul (x, f) }}", w=array)
    rewritten = decompose(original, "svd")
    assert len(rewritten.reports) == 1
    assert_same_function(rewritten.model, original, feeds_of(original))


@pytest.mark.parametrize(("opset", "axes"), [(11, "<axes=[0]>"), (11, "<axes=[-3]>")])
def test_axes_are_read_from_attributes_before_operator_set_13(opset: int, axes: str) -> None:
    body = f"q = Squeeze {axes} (w) u = Unsqueeze <axes=[0]> (q) s = Squeeze <axes=[0]> (u) y = MatMul (x, s)"
    original = parse(f"g (float[3,5] x) => (float[m,n] y) {{ {body} }}", opset=opset, w=MATRIX[None])
    rewritten = decompose(original, "svd")
    assert len(rewritten.model.graph.node) == 2
    assert_same_function(rewritten.model, original, feeds_of(original))


def test_a_reshape_before_operator_set_5_says_its_shape_in_an_attribute() -> None:
    model = parse(
        "g (float[3,5] x) => (float[m,n] y) { r = Reshape <shape=[5,-1]> (w) y = MatMul (x, r) }",
        opset=4,
        w=MATRIX.reshape(-1),
    )
    (layer,) = find(model).layers
    np.testing.assert_array_equal(layer.read_weight(), MATRIX.T)


def test_a_custom_operator_of_a_known_name_is_not_followed() -> None:
    model = parse("g (float[3,5] x) => (float[m,n] y) { r = Identity (w) y = MatMul (x, r) }", w=MATRIX)
    model.graph.node[0].domain = "some.where"
    assert find(model).skips[0].reason == "its weight is computed when the model runs"


def sparse_of(array: np.ndarray, name: str, *, linear: bool) -> onnx.SparseTensorProto:
    where = np.argwhere(array)
    indices = np.ravel_multi_index(tuple(where.T), array.shape) if linear else where
    return helper.make_sparse_tensor(
        numpy_helper.from_array(array[tuple(where.T)], name),
        numpy_helper.from_array(np.asarray(indices, np.int64), "indices"),
        array.shape,
    )


def holes(array: np.ndarray) -> np.ndarray:
    return np.where(np.abs(array) > 0.1, array, 0).astype(array.dtype)


@pytest.mark.parametrize("linear", [True, False])
def test_a_sparse_initializer_is_a_kernel_and_goes_when_it_is_decomposed(linear: bool) -> None:
    kernel = holes(MATRIX)
    original = parse("g (float[3,5] x) => (float[m,n] y) { y = MatMul (x, w) }")
    original.graph.sparse_initializer.append(sparse_of(kernel, "w", linear=linear))
    assert params(original) == kernel.size
    rewritten = decompose(original, "svd")
    assert not rewritten.model.graph.sparse_initializer
    np.testing.assert_allclose(composed(rewritten, "y"), kernel.T, atol=1e-6)


def test_a_sparse_constant_node_is_a_kernel() -> None:
    kernel = holes(MATRIX)
    original = parse("g (float[3,5] x) => (float[m,n] y) { y = MatMul (x, w) }")
    original.graph.node.insert(
        0, helper.make_node("Constant", [], ["w"], sparse_value=sparse_of(kernel, "w_values", linear=True))
    )
    assert params(original) == kernel.size
    rewritten = decompose(original, "svd")
    assert len(rewritten.model.graph.node) == 2
    assert_same_function(rewritten.model, original, feeds_of(original))


@pytest.mark.parametrize("field", ["float_data", "raw_data"])
def test_data_are_read_from_either_field(field: str) -> None:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, MATRIX.shape, MATRIX.ravel(), raw=False)
    if field == "raw_data":
        tensor = helper.make_tensor("w", TensorProto.FLOAT, MATRIX.shape, MATRIX.tobytes(), raw=True)
    assert tensor.HasField("raw_data") == (field == "raw_data")
    np.testing.assert_array_equal(read_tensor(tensor, Path()), MATRIX)


@pytest.mark.parametrize(
    ("data_type", "data"), [(TensorProto.FLOAT, b"12345"), (TensorProto.FLOAT, b"1234"), (0, b""), (1234, b"1234")]
)
def test_damaged_data_are_an_error_that_names_the_tensor(data_type: int, data: bytes) -> None:
    tensor = TensorProto(name="w", data_type=data_type, dims=[2], raw_data=data)
    with pytest.raises(LowRankError, match="tensor 'w' is damaged"):
        read_tensor(tensor, Path())


def test_a_shape_that_does_not_fit_its_kernel_is_an_error_that_names_both() -> None:
    model = parse(
        "g (float[3,5] x) => (float[m,n] y) { r = Reshape (w, s) y = MatMul (x, r) }",
        w=MATRIX,
        s=np.array([7, 7], np.int64),
    )
    with pytest.raises(LowRankError, match="Reshape cannot make 'r' from a stored tensor: cannot reshape"):
        find(model)


# --- kernels that are also inputs ------------------------------------------------------------------------------------


def listed(names: list[str], ir_version: int) -> onnx.ModelProto:
    model = parse(
        "g (float[1,4,6,6] x) => (float[n,c,h,w] y) { y = Conv (x, w, b) }",
        opset=8,
        ir_version=ir_version,
        w=KERNEL,
        b=normal(6),
    )
    for tensor in model.graph.initializer:
        if tensor.name in names:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def test_a_kernel_that_is_meant_to_be_fed_is_left_alone() -> None:
    found = find(listed(["w"], 8))
    assert found.layers == ()
    assert "also an input of the model, which a user may feed" in found.skips[0].reason


def test_a_kernel_behind_a_shape_that_may_be_fed_is_left_alone() -> None:
    model = parse(
        "g (float[1,4,6,6] x, int64[4] s) => (float[n,c,h,w] y) { r = Reshape (w, s) y = Conv (x, r) }",
        w=KERNEL.reshape(6, 36),
        s=np.array([6, 4, 3, 3], np.int64),
    )
    assert "which a user may feed" in find(model).skips[0].reason


def test_another_initializer_that_may_be_fed_does_not_protect_the_kernel() -> None:
    original = listed(["b"], 8)
    rewritten = decompose(original, "channel_svd").model
    assert rewritten.graph.input == original.graph.input
    assert_same_function(rewritten, original, feeds_of(original))


@pytest.mark.parametrize("ir_version", [3, 8])
def test_where_every_initializer_is_listed_the_kernel_goes_from_the_inputs_too(ir_version: int) -> None:
    original = listed(["w", "b"], ir_version)
    rewritten = decompose(original, "channel_svd").model
    onnx.checker.check_model(rewritten, full_check=True)
    names = {value.name for value in rewritten.graph.input}
    assert names == {"x", *initializers(rewritten)}
    assert "w" not in names
    assert_same_function(rewritten, original, feeds_of(original))
    assert len(find(rewritten).layers) == 2, "the result can be decomposed again"


# --- kernels with other readers --------------------------------------------------------------------------------------

SHARED = """g (float[1,4,6,6] x) => (float[n,c,h,w] y) {
    ["first"] a = Conv <strides=[2,2], pads=[1,1,1,1]> (x, w)
    ["second"] b = Conv <dilations=[2,2], pads=[0,0,1,1]> (x, w)
    y = Sub (a, b)
}"""


def test_two_convolutions_that_share_a_kernel_share_its_factors() -> None:
    original = parse(SHARED, w=KERNEL)
    (group,) = group_layers(find(original).layers)
    assert group.names == ("first", "second")
    rewritten = decompose(original, "tucker2", half)
    assert len(initializers(rewritten.model)) == 3
    assert params(rewritten.model) == sum(report.params_after for report in rewritten.reports)
    assert [report.params_before for report in rewritten.reports] == [KERNEL.size, 0]
    whole = decompose(original, "tucker2").model
    assert_same_function(whole, original, feeds_of(original))


def priced(original: onnx.ModelProto, rewritten: Rewritten) -> int:
    """Parameters of the rewritten model, as its candidates were priced: the rest, and what became of each group."""
    rest = params(original)
    for group in group_layers(rewritten.found.layers):
        if group.names[0] in rewritten.nodes:
            rest -= group.dense.cost.params
    return rest + sum(report.params_after for report in rewritten.reports)


@pytest.mark.parametrize(
    ("body", "arrays"),
    [
        pytest.param("y = Conv (x, w) z = Gather (w, i)", {"i": np.array([1], np.int64)}, id="Gather"),
        pytest.param("y = Conv (x, w) z = Identity (w)", {}, id="Identity to an output"),
        pytest.param("v = Identity (w) y = Conv (x, v) z = Neg (v)", {}, id="on the way"),
        pytest.param("v = Identity (w) y = Conv (x, v) z = Neg (w)", {}, id="at the root"),
    ],
)
def test_a_kernel_that_is_read_in_another_way_too_stays_and_is_counted(
    body: str, arrays: dict[str, np.ndarray]
) -> None:
    original = parse(f"g (float[1,4,6,6] x) => (float[] y, float[] z) {{ {body} }}", w=KERNEL, **arrays)
    rewritten = decompose(original, "channel_svd")
    assert "w" in initializers(rewritten.model)
    assert all(layer.weight_kept for layer in rewritten.found.layers)
    assert params(rewritten.model) == priced(original, rewritten)
    assert_same_function(rewritten.model, original, feeds_of(original))


def test_a_kernel_read_in_two_forms_is_decomposed_for_each_and_goes_with_the_last() -> None:
    original = parse(
        """g (float[1,4,6,6] x) => (float[] y, float[] z) {
            y = Conv (x, w)
            t = Transpose <perm=[0,1,3,2]> (w)
            z = Conv (x, t)
        }""",
        w=KERNEL,
    )
    one = decompose(original, "channel_svd", only=["z"])
    assert [initializers(one.model)[0], len(one.model.graph.node)] == ["w", 3]
    assert params(one.model) == priced(original, one)
    both = decompose(original, "channel_svd")
    assert "w" not in initializers(both.model)
    assert params(both.model) < priced(original, both), "each is priced as if the other stayed"
    for rewritten in (one, both):
        assert_same_function(rewritten.model, original, feeds_of(original))


@pytest.mark.parametrize("form", ["y = Conv (x, w)", "v = Identity (w) y = Conv (x, v)"])
def test_a_kernel_that_is_an_output_of_the_model_stays(form: str) -> None:
    original = parse(f"g (float[1,4,6,6] x) => (float[] y, float[6,4,3,3] w) {{ {form} }}", w=KERNEL)
    rewritten = decompose(original, "channel_svd")
    assert "w" in initializers(rewritten.model)
    assert params(rewritten.model) == priced(original, rewritten)
    assert_same_function(rewritten.model, original, feeds_of(original))


def test_a_square_matrix_read_in_both_directions_is_decomposed_for_each() -> None:
    original = parse(
        """g (float[3,5] x) => (float[m,n] y, float[m,n] z, float[m,n] v) {
            y = MatMul (x, w)
            z = Gemm <transB=1> (x, w)
            v = Gemm (x, w)
        }""",
        w=normal(5, 5),
    )
    rewritten = decompose(original, "svd")
    assert len(rewritten.reports) == 3
    assert_same_function(rewritten.model, original, feeds_of(original))


def test_a_matrix_read_in_one_direction_by_gemm_and_matmul_is_shared() -> None:
    original = parse(
        "g (float[3,5] x) => (float[m,n] y, float[m,n] z) { y = MatMul (x, w) z = Gemm <alpha=2.0> (x, w) }",
        w=MATRIX,
    )
    rewritten = decompose(original, "svd")
    assert len(initializers(rewritten.model)) == 2
    assert_same_function(rewritten.model, original, feeds_of(original))


def test_transposed_convolutions_that_share_a_kernel_with_different_strides_agree() -> None:
    original = parse(
        """g (float[1,4,3,3] x) => (float[] y, float[] z) {
            y = ConvTranspose (x, w)
            z = ConvTranspose <strides=[2,2]> (x, w)
        }""",
        w=normal(4, 6, 1, 1),
    )
    assert_same_function(decompose(original, "svd").model, original, feeds_of(original))


IN_SUBGRAPH = """g (float[1,4,6,6] x, bool c) => (float[n,k,h,w] y, float[] z) {
    ["conv"] y = Conv (x, w)
    z = If (c) <
        then_branch = t () => (float[] p) { p = Neg (w) },
        else_branch = e () => (float[] q) { q = Identity (w) }
    >
}"""


def test_a_kernel_that_a_subgraph_reads_stays() -> None:
    original = parse(IN_SUBGRAPH, w=KERNEL)
    rewritten = decompose(original, "channel_svd")
    assert "w" in initializers(rewritten.model)
    assert params(rewritten.model) == priced(original, rewritten)
    feeds = {"x": feeds_of(original)["x"], "c": np.array(True)}
    assert_same_function(rewritten.model, original, feeds)


def test_a_shape_that_others_read_too_stays() -> None:
    original = parse(
        "g (float[1,4,6,6] x) => (float[n,c,h,w] y, int64[4] z) { r = Reshape (v, s) y = Conv (x, r) z = Neg (s) }",
        v=KERNEL.reshape(6, 36),
        s=np.array([6, 4, 3, 3], np.int64),
    )
    rewritten = decompose(original, "channel_svd").model
    assert "s" in initializers(rewritten)
    assert "v" not in initializers(rewritten)
    assert_same_function(rewritten, original, feeds_of(original))


def test_only_what_nothing_reads_is_dropped() -> None:
    model = load(parse("g (float[3,5] x) => (float[m,n] y) { i = Identity (w) y = MatMul (x, v) }", w=MATRIX, v=MATRIX))
    drop_unread(model, ["v", "i", "y", "x", "nothing"])
    assert initializers(model.proto) == ["v"]
    assert [node.output[0] for node in model.graph.node] == ["y"]
    assert [value.name for value in model.graph.input] == ["x"]


def test_what_is_fed_or_computed_is_never_dropped() -> None:
    model = load(
        parse(
            "g (float[3,5] x, float[3] unread) => (float[m,n] y) { i = Identity (x) k = Neg (w) y = MatMul (x, v) }",
            w=MATRIX,
            v=MATRIX,
        )
    )
    drop_unread(model, ["unread", "i", "k"])
    assert [value.name for value in model.graph.input] == ["x", "unread"]
    assert [node.op_type for node in model.graph.node] == ["Neg", "MatMul"]
    assert initializers(model.proto) == ["w", "v"]


def test_a_constant_is_known_by_its_root() -> None:
    body = "i = Identity (w) q = QuantizeLinear (i, s) d = DequantizeLinear (q, s) y = MatMul (x, d)"
    constants = Constants(load(parse(f"g (float[3,5] x) => (float[m,n] y) {{ {body} }}", w=MATRIX, s=np.float32(0.1))))
    constant = constants.find("d")
    assert constant is not None
    assert constant.root == "w"
    assert constant.quantized
    assert constants.chain("i") == ["i", "w"]
    assert constants.find("x") is None
    assert constants.find("y") is None


# --- external data ---------------------------------------------------------------------------------------------------


def external(model: onnx.ModelProto, name: str, location: str, **where: int) -> TensorProto:
    """Say that an initializer is stored in a file, which is not written here."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **where}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for models, with another one as the current."""
    (tmp_path / "model").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "model"


def one_product() -> onnx.ModelProto:
    return parse("g (float[3,5] x) => (float[m,n] y) { y = MatMul (x, w) }", w=MATRIX)


def test_external_data_are_beside_the_model_and_not_in_the_current_folder(elsewhere: Path) -> None:
    model = one_product()
    external(model, "w", "w.bin")
    onnx.save(model, elsewhere / "m.onnx")
    (elsewhere / "w.bin").write_bytes(MATRIX.tobytes())
    Path("w.bin").write_bytes((MATRIX + 1).tobytes())
    loaded = load(os.path.relpath(elsewhere / "m.onnx"))
    np.testing.assert_array_equal(read_tensor(loaded.graph.initializer[0], loaded.folder), MATRIX)
    os.chdir(elsewhere)
    np.testing.assert_array_equal(read_tensor(loaded.graph.initializer[0], loaded.folder), MATRIX)


def test_external_data_are_read_from_several_files_with_offsets_and_lengths(elsewhere: Path) -> None:
    model = parse("g (float[3,5] x) => (float[m,n] y) { y = Gemm (x, w, b) }", w=MATRIX, b=normal(4))
    bias = normal(4)
    external(model, "w", "deep/w.bin", offset=8, length=MATRIX.nbytes)
    external(model, "b", "b.bin", offset=16)
    (elsewhere / "deep").mkdir()
    (elsewhere / "deep" / "w.bin").write_bytes(b"\xff" * 8 + MATRIX.tobytes() + b"\xff" * 8)
    (elsewhere / "b.bin").write_bytes(b"\xff" * 16 + bias.tobytes())
    onnx.save(model, elsewhere / "m.onnx")
    loaded = load(elsewhere / "m.onnx")
    for tensor, expected in zip(loaded.graph.initializer, (MATRIX, bias), strict=True):
        np.testing.assert_array_equal(read_tensor(tensor, loaded.folder), expected)
    assert loaded.data_files == {elsewhere / "deep" / "w.bin", elsewhere / "b.bin"}


@pytest.mark.parametrize("location", ["../secret.bin", "{root}/secret.bin", "deep/../../secret.bin"])
def test_external_data_outside_the_folder_are_refused(elsewhere: Path, location: str) -> None:
    (elsewhere / "deep").mkdir()
    (elsewhere.parent / "secret.bin").write_bytes(MATRIX.tobytes())
    model = one_product()
    external(model, "w", location.format(root=elsewhere.parent))
    onnx.save(model, elsewhere / "m.onnx")
    with pytest.raises(
        LowRankError, match=r"tensor 'w' is stored in .*secret\.bin, which leads outside the model's folder"
    ):
        find(elsewhere / "m.onnx")


def test_a_link_out_of_the_folder_is_refused(elsewhere: Path) -> None:
    (elsewhere.parent / "secret.bin").write_bytes(MATRIX.tobytes())
    (elsewhere / "w.bin").symlink_to(elsewhere.parent / "secret.bin")
    model = one_product()
    external(model, "w", "w.bin")
    onnx.save(model, elsewhere / "m.onnx")
    with pytest.raises(LowRankError, match="leads outside the model's folder: refused; copy the model and its data"):
        find(elsewhere / "m.onnx")


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        (None, {}, r"tensor 'w' is stored in .*w\.bin, which is not there: copy it beside the model"),
        (MATRIX.tobytes()[:-1], {}, r"w\.bin ends before tensor 'w' does: was its copy interrupted\?"),
        (MATRIX.tobytes(), {"offset": 1}, r"w\.bin ends before tensor 'w' does"),
        (MATRIX.tobytes(), {"offset": 10**12}, r"w\.bin ends before tensor 'w' does"),
        (MATRIX.tobytes(), {"offset": -1}, "tensor 'w'"),
        (MATRIX.tobytes(), {"offset": "one"}, "tensor 'w' is damaged"),
    ],
    ids=["missing", "short", "late", "later", "negative", "no number"],
)
def test_a_data_file_that_is_missing_or_short_is_one_clear_error(
    elsewhere: Path, content: bytes | None, where: dict[str, int], message: str
) -> None:
    model = one_product()
    external(model, "w", "w.bin", **where)
    onnx.save(model, elsewhere / "m.onnx")
    if content is not None:
        (elsewhere / "w.bin").write_bytes(content)
    with pytest.raises(LowRankError, match=message) as caught:
        find(elsewhere / "m.onnx")
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_a_data_file_is_not_there(elsewhere: Path) -> None:
    model = one_product()
    external(model, "w", "w.bin")
    onnx.save(model, elsewhere / "m.onnx")
    (elsewhere / "w.bin").mkdir()
    with pytest.raises(LowRankError, match="which is not there"):
        find(elsewhere / "m.onnx")


@pytest.mark.parametrize(
    "value",
    [
        MATRIX.astype(np.float16),
        MATRIX.astype(ml_dtypes.bfloat16),
        MATRIX.astype(np.float64),
        np.array([[1, -3, 7], [5, 2, -8]], ml_dtypes.int4),
        np.array([3, 1, 0, 2, 1], ml_dtypes.uint2 if hasattr(TensorProto, "UINT2") else np.uint8),
        np.array([True, False, True]),
    ],
    ids=lambda value: value.dtype.name,
)
def test_external_data_of_every_width_are_read_as_they_are_inside_a_model(tmp_path: Path, value: np.ndarray) -> None:
    inline = numpy_helper.from_array(value, "t")
    (tmp_path / "t.bin").write_bytes(b"\xff" * 3 + inline.raw_data + b"\xff" * 3)
    tensor = TensorProto(name="t", data_type=inline.data_type, dims=inline.dims, data_location=TensorProto.EXTERNAL)
    for key, text in (("location", "t.bin"), ("offset", "3")):
        tensor.external_data.add(key=key, value=text)
    assert stored_bytes(tensor) == len(inline.raw_data)
    assert read_external(tensor, tmp_path) == inline.raw_data
    read = read_tensor(tensor, tmp_path)
    assert read.dtype == value.dtype
    np.testing.assert_array_equal(read, value)


# --- what no exporter writes -----------------------------------------------------------------------------------------


def derived(body: str) -> onnx.ModelProto:
    return parse(f"g (float[3,5] x) => (float[m,n] y) {{ {body} }}", w=MATRIX, s=np.array([5, 4], np.int64))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("a = Identity (b) b = Identity (a) y = MatMul (x, a)", id="a circle"),
        pytest.param("r = Reshape (r, r) y = MatMul (x, r)", id="of itself"),
        pytest.param("a = Identity (w) a = Identity (a) a = Identity (a) y = MatMul (x, a)", id="made anew"),
        pytest.param(
            "v0 = Identity (w)"
            + "".join(f" v{i + 1} = Identity (v{i})" for i in range(5000))
            + " y = MatMul (x, v5000)",
            id="a long chain",
        ),
        pytest.param(
            "v0 = Reshape (w, s)"
            + "".join(f" v{i + 1} = Reshape (v{i}, v{i})" for i in range(90))
            + " y = MatMul (x, v90)",
            id="twice as much work at each step",
        ),
    ],
)
def test_a_kernel_derived_in_a_circle_or_by_endless_work_is_left_alone_at_once(body: str) -> None:
    model = load(derived(body))
    found = find_layers(model, {"x": (3, 5)})
    assert len(found.layers) + len(found.skips) == 1
    assert len(Constants(model).chain(model.graph.node[-1].input[1])) <= 2


@pytest.mark.parametrize(("steps", "layers"), [(MOST_STEPS, 1), (MOST_STEPS + 1, 0)])
def test_a_kernel_is_followed_over_so_many_operators(steps: int, layers: int) -> None:
    body = "".join(f"v{i + 1} = Identity (v{i}) " for i in range(steps))
    model = parse(f"g (float[3,5] x) => (float[m,n] y) {{ {body} y = MatMul (x, v{steps}) }}", v0=MATRIX)
    assert len(find(model).layers) == layers


def test_a_constant_that_refers_to_an_attribute_of_no_function_is_none() -> None:
    model = derived("k = Constant <value = float[1] {1}> () y = MatMul (x, k)")
    attribute = model.graph.node[0].attribute[0]
    attribute.ref_attr_name = "elsewhere"
    assert Constants(load(model)).find("k") is None


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("indices", numpy_helper.from_array(np.array([0.5, 1.0, 2.0], np.float32), "indices")),
        ("indices", numpy_helper.from_array(np.array([0, 1, 20], np.int64), "indices")),
        ("indices", numpy_helper.from_array(np.array([[0, 1, 2]], np.int64), "indices")),
        ("values", numpy_helper.from_array(np.ones(4, np.float32), "w")),
    ],
    ids=["fractions", "outside", "too many axes", "too many values"],
)
def test_a_damaged_sparse_tensor_is_one_line_that_names_it(field: str, change: TensorProto) -> None:
    model = parse("g (float[3,5] x) => (float[m,n] y) { y = MatMul (x, w) }")
    kernel = np.zeros((5, 4), np.float32)
    kernel[0, :3] = 1
    sparse = sparse_of(kernel, "w", linear=True)
    getattr(sparse, field).CopyFrom(change)
    model.graph.sparse_initializer.append(sparse)
    with pytest.raises(LowRankError, match="sparse tensor 'w' is damaged") as caught:
        find(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [1 << 40, -(1 << 40), 1 << 62])
def test_axes_beyond_all_axes_are_an_error_that_names_the_operator(number: int) -> None:
    text = "g (float[3,5] x) => (float[m,n] y) { u = Unsqueeze (w, a) y = MatMul (x, u) }"
    with pytest.raises(LowRankError, match="Unsqueeze cannot make 'u' from a stored tensor"):
        find(parse(text, w=MATRIX, a=np.array([number], np.int64)))


def test_a_cast_that_overflows_is_a_kernel_that_is_not_finite() -> None:
    text = "g (float16[3,5] x) => (float16[m,n] y) { c = Cast <to = 10> (w) y = MatMul (x, c) }"
    with pytest.raises(LowRankError, match="weight 'c' holds NaN or infinity"):
        find(parse(text, w=MATRIX * np.float32(1e30)))


def test_data_that_do_not_fill_their_shape_are_damaged_also_where_several_are_packed_in_a_byte() -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.INT4, dims=[4, 4], raw_data=b"\x11" * 9)
    with pytest.raises(LowRankError, match=r"tensor 'w' is damaged \(9 bytes for a shape of \[4, 4\], which has 8\)"):
        read_tensor(tensor, Path())


def test_what_else_is_said_of_external_data_is_passed_over_in_silence(elsewhere: Path) -> None:
    (elsewhere / "w.bin").write_bytes(MATRIX.tobytes())
    model = one_product()
    external(model, "w", "w.bin", colour=3)
    onnx.save(model, elsewhere / "m.onnx")
    assert len(find(elsewhere / "m.onnx").layers) == 1
