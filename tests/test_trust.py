"""A model is data from somebody else: nothing of it runs, reads or writes elsewhere, or takes more than this machine has."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_lowrank as lr
from onnx_lowrank.cli import BAD_INPUT, main
from onnx_lowrank.config import read_config
from onnx_lowrank.graph import limits
from onnx_lowrank.graph.constants import read_tensor
from onnx_lowrank.graph.model import MAX_PROTO_BYTES, load
from onnx_lowrank.graph.shapes import infer
from onnx_lowrank.graph.tensors import read_tensor_file
from onnx_lowrank.types import LowRankError
from tests.helpers import normal, parse
from tests.tiny import classifier, contents, save

HUGE = 1 << 40
MATRIX = normal(16, 12)


def product(**stored: np.ndarray) -> onnx.ModelProto:
    return parse("g (float[N,16] x) => (float[m,n] y) { y = MatMul (x, w) }", **stored)


def claims(model: onnx.ModelProto, **fields: object) -> onnx.ModelProto:
    model.graph.initializer.append(TensorProto(name="w", **fields))
    return model


def outside(*where: tuple[str, str], name: str = "w") -> dict[str, object]:
    entries = [onnx.StringStringEntryProto(key=key, value=value) for key, value in where]
    return {"name": name, "data_location": TensorProto.EXTERNAL, "external_data": entries}


# --- what a model claims ---------------------------------------------------------------------------------------------


def huge_initializer() -> onnx.ModelProto:
    return claims(product(), data_type=TensorProto.FLOAT, dims=[HUGE, 4])


def huge_packed_initializer() -> onnx.ModelProto:
    return claims(product(), data_type=TensorProto.INT4, dims=[HUGE, 4], raw_data=b"\0")


def huge_sparse_initializer() -> onnx.ModelProto:
    model = product()
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [16, HUGE]))
    return model


def huge_input() -> onnx.ModelProto:
    return parse(f"g (float[N,{HUGE},16] x) => (float[a,m,n] y) {{ y = MatMul (x, w) }}", w=MATRIX)


def huge_activation() -> onnx.ModelProto:
    return parse(
        "g (float[N,16] x) => (float[m,n] y) { p = Expand (x, s) y = MatMul (p, w) }",
        w=MATRIX,
        s=np.array([HUGE, 16], np.int64),
    )


def huge_padding() -> onnx.ModelProto:
    text = "g (float[N,4,8] x) => (float[a,b,c] y) { y = Conv <pads=[0,1099511627776]> (x, w) }"
    return parse(text, w=normal(8, 4, 3))


def huge_constant() -> onnx.ModelProto:
    text = "g (float[N,16] x) => (float[m,n] y) { r = Reshape (w, s) y = MatMul (x, r) }"
    return parse(text, w=MATRIX, s=np.array([16, HUGE], np.int64))


HUGE_CLAIMS = [
    huge_initializer,
    huge_packed_initializer,
    huge_sparse_initializer,
    huge_input,
    huge_activation,
    huge_padding,
    huge_constant,
]


@pytest.mark.parametrize("claim", HUGE_CLAIMS, ids=lambda claim: claim.__name__)
def test_a_claim_of_2_to_the_40_elements_is_refused_in_one_line_before_anything_is_allocated(
    claim: Callable[[], onnx.ModelProto], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save(claim(), tmp_path / "m.onnx")
    before = peak_memory()
    for command in (["inspect", str(path)], ["compress", str(path), str(tmp_path / "o.onnx"), "--budget", "macs=0.9"]):
        assert main(command) == BAD_INPUT
        said = capfd.readouterr().err
        assert said.startswith("onnx-lowrank: ")
        assert said.count("\n") == 1
    assert peak_memory() - before < 1 << 28
    assert list(contents(tmp_path)) == ["m.onnx"]


def peak_memory(which: str = "VmPeak") -> int:
    """Bytes of addresses (``VmPeak``) or of memory (``VmHWM``) that this process has had at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def test_a_data_file_with_a_hole_of_terabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "machine_memory", lambda: 1 << 30)
    with open(tmp_path / "w.bin", "wb") as file:
        file.truncate(1 << 36)
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[1 << 34], **outside(("location", "w.bin")))
    with pytest.raises(LowRankError, match=r"tensor 'w' takes 69 GB, more than the 1 GB of this machine"):
        read_tensor(tensor, tmp_path)


def test_a_data_file_that_is_too_short_takes_no_memory_for_what_is_claimed(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 64)
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[HUGE], **outside(("location", "w.bin")))
    with pytest.raises(LowRankError, match=r"w\.bin ends before tensor 'w' does"):
        read_tensor(tensor, tmp_path)


def test_a_model_for_a_larger_machine_is_refused_on_this_one_and_runs_at_smaller_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "machine_memory", lambda: 1 << 20)
    model = parse("g (float[N,4,H,W] x) => (float[n,c,h,w] y) { y = Conv (x, k) }", k=normal(8, 4, 3, 3))
    with pytest.raises(LowRankError, match=r"tensor 'x' of \[1, 4, 224, 224\] takes .*: give --input-shape"):
        lr.inspect(model)
    assert len(lr.inspect(model, input_shape={"x": (1, 4, 16, 16)}).layers) == 1


@pytest.mark.parametrize(
    "text",
    [
        "g (float[4] x) => (float[m] y) {{ y = Mul (x, a) }}",
        "g (float[4] x) => (float[m] y) {{ q = Squeeze (a) y = Reshape (x, q) }}",
    ],
)
def test_a_list_that_claims_more_than_it_holds_is_refused_before_shapes_are_inferred_from_it(text: str) -> None:
    model = parse(text.format())
    model.graph.initializer.append(helper.make_tensor("a", TensorProto.INT64, [1], [0]))
    model.graph.initializer[0].dims[0] = 1 << 31
    with pytest.raises(
        LowRankError, match=r"tensor 'a' is damaged \(its shape is \[2147483648\], and the whole model has"
    ):
        lr.inspect(model)


@pytest.mark.parametrize("operator", ["Squeeze (x)", "Mul (x, x)", "Cast <to=7> (x)"])
def test_shapes_of_long_lists_are_inferred_in_little_memory(operator: str) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = peak_memory("VmHWM")
    text = f"g (float[{1 << 24}] x) => (y) {{ y = {operator} h = Relu (x) }}"
    assert infer(load(parse(text)), {"x": (1 << 24,)})["h"] == (1 << 24,)
    assert peak_memory("VmHWM") - before < 1 << 28


@pytest.mark.parametrize("where", ["initializer", "sparse", "attribute", "body"])
def test_a_shape_below_zero_is_damage(where: str) -> None:
    model = product(w=MATRIX)
    tensor = TensorProto(name="bad", data_type=TensorProto.FLOAT, dims=[-1, 4], raw_data=b"\0" * 64)
    if where == "initializer":
        model.graph.initializer.append(tensor)
    elif where == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    else:
        node = helper.make_node("Constant", [], ["c"], value=tensor)
        if where == "body":
            body = helper.make_graph([node], "body", [], [helper.make_tensor_value_info("c", 1, None)])
            node = helper.make_node("If", ["x"], ["z"], then_branch=body, else_branch=body)
        model.graph.node.append(node)
    with pytest.raises(LowRankError, match=r"tensor 'bad' is damaged \(its shape is \[-1, 4\]\)"):
        load(model)


def test_a_file_that_no_message_can_fill_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "m.onnx", "wb") as file:
        file.truncate(MAX_PROTO_BYTES + 1)
    with pytest.raises(LowRankError, match="has 2 GB, and an ONNX file no more than 2"):
        load(tmp_path / "m.onnx")


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.onnx")
    with pytest.raises(LowRankError, match="is a device or a pipe"):
        load(tmp_path / "m.onnx")


# --- where a model leads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "a/../../secret.bin", "link.bin", "link/secret.bin"]
)
@pytest.mark.parametrize("what", ["kernel", "bias", "body"])
def test_data_of_any_tensor_outside_the_folder_are_refused_and_never_copied_into_a_result(
    tmp_path: Path, location: str, what: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(MATRIX.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "link").symlink_to(tmp_path)
    model = parse("g (float[N,16] x) => (float[m,n] y) { y = Gemm (x, w, b) }", w=MATRIX, b=normal(12))
    secret = TensorProto(data_type=TensorProto.FLOAT, dims=[12], **outside(("location", location), name="s"))
    if what == "body":
        node = helper.make_node("Constant", [], ["s"], value=secret)
        body = helper.make_graph([node], "body", [], [helper.make_tensor_value_info("s", 1, None)])
        model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=body, else_branch=body))
    else:
        place = {"kernel": 0, "bias": 1}[what]
        secret.name, secret.dims[:] = "wb"[place], model.graph.initializer[place].dims
        model.graph.initializer[place].CopyFrom(secret)
    save(model, folder / "m.onnx")
    for work in (lambda: lr.inspect(folder / "m.onnx"), lambda: lr.compress(folder / "m.onnx", budget={"macs": 0.9})):
        with pytest.raises(LowRankError, match="which leads outside the model's folder: refused"):
            work()


def test_a_place_of_data_that_is_no_path_is_damage(tmp_path: Path) -> None:
    with pytest.raises(LowRankError, match="tensor 'w' is damaged"):
        load(
            claims(product(), data_type=1, dims=[16, 12], external_data=outside(("location", "a\0b"))["external_data"])
        )


def test_a_tensor_of_test_data_reads_nothing_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.bin").write_bytes(MATRIX.tobytes())
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[16, 12], **outside(("location", "../secret.bin")))
    (tmp_path / "data" / "input_0.pb").write_bytes(tensor.SerializeToString())
    with pytest.raises(LowRankError, match="leads outside"):
        read_tensor_file(tmp_path / "data" / "input_0.pb")


NAMES = ["../../out", "/tmp/out", "..", "a/b\\c", "$(touch made)", "~/x", "-rf", "con", "C:\\x", "n" * 300]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_model_are_no_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "work"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    model = classifier()
    model.graph.name = model.domain = model.producer_name = name
    model.graph.node[0].name = name
    model.graph.initializer[0].name = model.graph.node[0].input[1] = name
    save(model, folder / "m.onnx")
    outs = ["--plan", "p.json", "--json", "r.json", "--quiet"]
    assert main(["compress", "m.onnx", "o.onnx", "--budget", "macs=0.5", *outs]) == 0
    assert set(contents(tmp_path)) == {
        "deep",
        "deep/work",
        *(f"deep/work/{n}" for n in ("m.onnx", "o.onnx", "p.json", "r.json")),
    }


@pytest.mark.parametrize("command", ["inspect", "compress", "refused"])
def test_names_in_a_model_move_no_cursor_and_begin_no_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = classifier()
    for index, node in enumerate(model.graph.node):
        node.name = f"a\x1b[2J\x1b]0;b\x07\x9b\r\n{index}"
    if command == "refused":
        model.graph.initializer[0].name = model.graph.node[0].input[1] = "w\x1b[2J\nw"
        model.graph.initializer[0].raw_data = b"\0"
    path, out = str(save(model, tmp_path / "m.onnx")), str(tmp_path / "o.onnx")
    assert main(["inspect", path] if command != "compress" else ["compress", path, out, "--budget", "macs=0.5"]) in (
        0,
        2,
    )
    said = capsys.readouterr()
    assert not set("\x1b\x07\x9b\r") & set(said.out + said.err)
    assert said.err.count("\n") == (command == "refused")


def test_the_data_of_a_result_have_its_name_whatever_the_source_calls_its_own(tmp_path: Path) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    bias = normal(12)
    (tmp_path / "model" / "deep" / "b.bin").write_bytes(bias.tobytes())
    model = parse("g (float[N,16] x) => (float[m,n] y) { y = Gemm (x, w, b) }", w=MATRIX)
    where = outside(("location", "deep/../deep/b.bin"), name="b")
    model.graph.initializer.append(TensorProto(data_type=TensorProto.FLOAT, dims=[12], **where))
    save(model, tmp_path / "model" / "m.onnx")
    lr.compress(tmp_path / "model" / "m.onnx", budget={"macs": 0.9}).save(tmp_path / "out" / "o.onnx")
    assert set(contents(tmp_path / "out")) == {"o.onnx", "o.onnx.data"}
    assert bias.tobytes() in (tmp_path / "out" / "o.onnx.data").read_bytes()


# --- what runs -------------------------------------------------------------------------------------------------------


class Trap:
    """Leaves a trace where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.path,))


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["m.onnx", "m.pkl", "m.pt"])
def test_a_pickle_is_no_model_whatever_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(LowRankError, match="is not an ONNX model"):
        load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", ["npz", "npy", "pickle as npz", "plan", "config", "preprocess"])
def test_nothing_that_is_read_is_unpickled(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(classifier(), tmp_path / "m.onnx")
    array = np.array([Trap(tmp_path / "sprung")] * 4, dtype=object)
    file = tmp_path / f"data.{'npy' if kind == 'npy' else 'npz'}"
    if kind == "npz":
        np.savez(file, x=array)
    elif kind == "npy":
        np.save(file, array)
    else:
        file.write_bytes(pickle.dumps(array[0]))
    option = {"plan": None, "config": "--config", "preprocess": "--preprocess"}.get(kind, "--evaluate")
    data = [] if kind != "preprocess" else ["--evaluate", str(tmp_path)]
    command = ["compress", str(model), str(tmp_path / "o.onnx"), "--budget", "macs=0.5", *data, str(option), str(file)]
    if kind == "plan":
        command = ["apply", str(model), str(file), str(tmp_path / "o.onnx")]
    assert main(command) == BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "sprung").exists()


CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef f(*args):\n    return 0.0\n"


@pytest.mark.parametrize("key", ["calibrate", "evaluate", "train", "metric", "loss"])
@pytest.mark.parametrize("form", ["{path}:f", "./code.py:f", "{path}:"])
def test_a_file_of_options_never_names_code_that_runs(
    key: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text(CODE)
    save(classifier(), tmp_path / "m.onnx")
    (tmp_path / "c.toml").write_text(f"{key} = '{form.format(path=tmp_path / 'code.py')}'\nfinetune = 'labels'\n")
    assert main(["compress", "m.onnx", "o.onnx", "--budget", "macs=0.5", "--config", "c.toml"]) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "would execute a file: give it on the command line instead" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("provider_option = ['backend_path=/tmp/evil.so']", "libraries that it names"),
        ("provider_library = ['QNN=/tmp/evil.so']", "a file"),
        ("cluster = 'tcp://10.0.0.1:8786'", "what comes from there"),
    ],
)
def test_a_file_of_options_loads_no_library_and_joins_no_cluster(line: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f"provider = 'qnn'\n{line}\n")
    with pytest.raises(LowRankError, match=f"would execute {what}: give it on the command line instead"):
        read_config(tmp_path / "c.toml")


def test_a_name_that_is_stored_twice_is_refused() -> None:
    model = parse("g (float[1,8] x) => (float[1,8] y) { y = MatMul (x, w) }", w=normal(8, 8))
    model.graph.initializer.append(numpy_helper.from_array(normal(8, 8, seed=1), "w"))
    with pytest.raises(LowRankError, match=r"^the model given stores 'w' twice: export it again$"):
        lr.inspect(model)


def doubling(depth: int) -> onnx.ModelProto:
    """Functions each of which calls the one before twice."""
    made = []
    for i in range(depth):
        inner, domain = ("Relu", "") if i == 0 else (f"f{i - 1}", "d")
        nodes = [
            helper.make_node(inner, ["a"], ["b"], domain=domain),
            helper.make_node(inner, ["b"], ["c"], domain=domain),
        ]
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
        made.append(helper.make_function("d", f"f{i}", ["a"], ["c"], nodes, opsets))
    node = helper.make_node(f"f{depth - 1}", ["x"], ["y"], domain="d")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    return helper.make_model(graph, functions=made, opset_imports=opsets, ir_version=8)


def test_functions_that_come_to_a_thousand_million_nodes_are_refused_at_once() -> None:
    lr.inspect(doubling(5))
    with pytest.raises(LowRankError, match="comes to more than 1,000,000 nodes once its functions are called: refused"):
        lr.inspect(doubling(40))
    looped = doubling(3)
    looped.functions[0].node[0].op_type, looped.functions[0].node[0].domain = "f2", "d"
    with pytest.raises(LowRankError, match=r"is damaged: function 'f[02]' calls itself"):
        lr.inspect(looped)


def test_the_same_code_runs_where_the_command_line_names_it(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE)
    save(classifier(), tmp_path / "m.onnx")
    main(["inspect", str(tmp_path / "m.onnx"), "--quiet"])
    assert not (tmp_path / "ran").exists()
    metric = f"{tmp_path / 'code.py'}:f"
    main(["verify", *2 * [str(tmp_path / "m.onnx")], "--metric", metric, "--quiet"])
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["metadata", "description", "operator", "plan"])
def test_a_model_or_a_plan_that_names_code_runs_none(place: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE)
    reference, model = f"{tmp_path / 'code.py'}:f", classifier()
    if place == "metadata":
        for key in ("metric", "calibrate", "loss", "onnx_lowrank.source"):
            model.metadata_props.add(key=key, value=reference)
            model.graph.node[0].metadata_props.add(key=key, value=reference)
    elif place == "description":
        model.doc_string = model.graph.node[0].doc_string = reference
    elif place == "operator":
        model.graph.node.add(op_type="PythonOp", domain="com.microsoft", input=["x"], output=["z"])
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    save(model, tmp_path / "m.onnx")
    if place == "plan":
        (tmp_path / "p.json").write_text(f'{{"choices": [], "metric": "{reference}", "calibrate": "{reference}"}}')
        lr.apply(tmp_path / "m.onnx", tmp_path / "p.json")
    elif place == "operator":
        with pytest.raises(LowRankError, match="cannot load the model"):
            lr.compress(tmp_path / "m.onnx", budget={"macs": 0.5})
    else:
        lr.compress(tmp_path / "m.onnx", budget={"macs": 0.5})
    assert not (tmp_path / "ran").exists()
