"""Channels that carry nothing on any sample: left out with all that is computed for them, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import onnx_lowrank as lr
from onnx_lowrank.channels import without_dead_channels
from onnx_lowrank.graph.channels import families
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.drop_channels import Kept, with_channels
from onnx_lowrank.graph.model import load
from onnx_lowrank.graph.shapes import infer
from onnx_lowrank.types import no_progress
from tests import random_models, tiny
from tests.helpers import Feeds, assert_close, feeds_of, normal, parse, run

CHAIN = """g (float[N, 4, 9, 9] x) => (float[N, 5, 9, 9] y) {
  [first] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
  n = BatchNormalization (a, scale, shift, mean, variance)
  r = Relu (n)
  [second] y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, w2)
}"""

MOBILE = """g (float[N, 4, 9, 9] x) => (float[N, 5, 9, 9] y) {
  [wide] a = Conv <kernel_shape = [1, 1]> (x, w1, b1)
  r = Clip (a, zero, six)
  [each] d = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 12> (r, wd, bd)
  s = HardSwish (d)
  p = GlobalAveragePool (s)
  [gate] g = Conv <kernel_shape = [1, 1]> (p, wg, bg)
  h = HardSigmoid (g)
  m = Mul (s, h)
  [narrow] y = Conv <kernel_shape = [1, 1]> (m, w2)
}"""

DEAD = [1, 4, 5, 9]


def chain(**changed: np.ndarray) -> onnx.ModelProto:
    """Twelve channels between two convolutions, of which a ReLU cuts off ``DEAD`` whatever comes."""
    shift = normal(12, seed=3)
    shift[DEAD] = -100
    stored = {"w1": normal(12, 4, 3, 3), "b1": normal(12, seed=1), "w2": normal(5, 12, 3, 3), "shift": shift}
    stored |= {"scale": np.ones(12, "float32"), "mean": normal(12), "variance": np.ones(12, "float32")}
    return parse(CHAIN, **(stored | changed))


def mobile(*, alive: float = 1.0) -> onnx.ModelProto:
    """An inverted residual with a gate; the depthwise filters of ``DEAD`` are 0, so that each gives what its bias does."""
    depthwise = normal(12, 1, 3, 3)
    depthwise[DEAD] = 0
    kernels = {"w1": normal(12, 4, 1, 1), "w2": normal(5, 12, 1, 1), "wg": normal(12, 12, 1, 1), "wd": depthwise}
    biases = {
        "b1": normal(12, seed=1),
        "bd": np.float32(alive) * (np.float32(0.5) + np.abs(normal(12, seed=2))),
        "bg": np.zeros(12, "float32"),
    }
    return parse(MOBILE, zero=np.array(0, "float32"), six=np.array(6, "float32"), **kernels, **biases)


def dropped(proto: onnx.ModelProto, block: int = 1, count: int = 6) -> tuple[onnx.ModelProto, int]:
    """The model without dead channels, on some samples, and how many were dropped."""
    feeds = [feeds_of(proto, seed=seed, x=(2, 4, 9, 9)) for seed in range(count)]
    model = load(proto)
    made, gone = without_dead_channels(model, infer(model, {"x": (1, 4, 9, 9)}), feeds, block, no_progress)
    onnx.checker.check_model(made.proto, full_check=True)
    return made.proto, gone.channels


def stored(proto: onnx.ModelProto) -> list[tuple[int, ...]]:
    return sorted(tuple(tensor.dims) for tensor in proto.graph.initializer)


def same(made: onnx.ModelProto, proto: onnx.ModelProto, tolerance: float = 1e-5) -> None:
    feeds = feeds_of(proto, seed=99, x=(3, 4, 9, 9))
    assert_close(run(made, feeds), run(proto, feeds), tolerance)


def test_what_a_relu_cuts_off_is_left_out_of_all_that_holds_it() -> None:
    proto = chain()
    made, gone = dropped(proto)
    assert gone == 4
    assert stored(made) == sorted([(8, 4, 3, 3), *[(8,)] * 5, (5, 8, 3, 3)])
    assert [node.name for node in made.graph.node] == [node.name for node in proto.graph.node]
    same(made, proto)


def test_a_channel_that_some_sample_wakes_stays() -> None:
    shift = normal(12, seed=3)
    shift[DEAD] = -100
    shift[4] = 0
    proto = chain(shift=shift)
    made, gone = dropped(proto)
    assert gone == 3
    same(made, proto)


def test_a_number_that_is_the_same_everywhere_goes_into_the_bias() -> None:
    proto = mobile()
    assert dropped(proto)[1] == 0, "the gate varies, and with it what the channel is"
    plain = parse(MOBILE.replace("p = GlobalAveragePool (s)\n", "").replace("[gate] g = Conv <kernel_shape = [1, 1]> (p, wg, bg)\n", "")
                  .replace("h = HardSigmoid (g)\n", "").replace("m = Mul (s, h)", "m = Identity (s)"))  # fmt: skip
    plain.graph.initializer.extend(t for t in proto.graph.initializer if t.name not in ("wg", "bg"))
    made, gone = dropped(plain)
    assert gone == 4 and (5,) in stored(made)
    same(made, plain)


def test_a_gate_that_reads_and_scales_the_channels_is_cut_with_them() -> None:
    proto = mobile(alive=0.0)
    made, gone = dropped(proto)
    assert gone == 4
    assert stored(made) == sorted([(), (), (8, 4, 1, 1), *[(8,)] * 3, (8, 1, 3, 3), (8, 8, 1, 1), (5, 8, 1, 1)])
    (each,) = (node for node in made.graph.node if node.name == "each")
    assert next(a.i for a in each.attribute if a.name == "group") == 8
    same(made, proto)


def test_what_is_left_is_kept_to_whole_blocks() -> None:
    proto = chain()
    for block, gone in ((1, 4), (3, 3), (5, 2), (8, 4), (16, 0)):
        made, count = dropped(proto, block)
        assert count == gone, block
        same(made, proto)


def test_numbers_that_are_padded_around_are_no_constants() -> None:
    shift = normal(12, seed=3)
    scale = np.ones(12, "float32")
    scale[DEAD], shift[DEAD] = 0, 2
    _, gone = dropped(chain(scale=scale, shift=shift))
    assert gone == 0, "at the border, half of a patch is 0"


def test_sums_hold_a_channel_until_both_sides_are_dead() -> None:
    text = CHAIN.replace(
        "r = Relu (n)", "[beside] c = Conv <kernel_shape = [1, 1]> (x, w3) s = Add (n, c) r = Relu (s)"
    )
    beside = normal(12, 4, 1, 1, seed=7)
    proto = parse(text, w3=beside)
    proto.graph.initializer.extend(chain().graph.initializer)
    made, gone = dropped(proto)
    assert gone == 4 and (8, 4, 1, 1) in stored(made)
    same(made, proto)
    beside[DEAD[0]] *= 200
    loud = parse(text, w3=beside)
    loud.graph.initializer.extend(chain().graph.initializer)
    assert dropped(loud)[1] == 3


def test_products_of_rows_are_layers_too() -> None:
    text = """g (float[N, 4] x) => (float[N, 5] y) {
      a = Gemm <transB = 1> (x, w1, b1) r = Relu (a) m = MatMul (r, w2) s = Add (m, b2) t = Relu (s) y = MatMul (t, w3) }"""
    first, second = normal(12, seed=1), normal(10, seed=2)
    first[DEAD], second[[0, 3]] = -100, -100
    proto = parse(text, w1=normal(12, 4), b1=first, w2=normal(12, 10), b2=second, w3=normal(10, 5))
    feeds = [feeds_of(proto, seed=seed, x=(50, 4)) for seed in range(3)]
    model = load(proto)
    made, gone = without_dead_channels(model, infer(model, {"x": (1, 4)}), feeds, 1, no_progress)
    assert gone.channels >= 6 and len(gone.makers) == 2
    assert_close(run(made.proto, feeds[0]), run(proto, feeds[0]), 1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("r = Relu (n)", "f = Relu (n) r = Softmax <axis = 1> (f)"),
        ("r = Relu (n)", "f = Relu (n) r = Transpose <perm = [0, 1, 3, 2]> (f)"),
        ("(float[N, 5, 9, 9] y)", "(float[N, 5, 9, 9] y, float[N, 12, 9, 9] r)"),
        ("r = Relu (n)", "f = Relu (n) k = Shape (f) c = ConstantOfShape (k) r = Add (f, c)"),
    ],
)
def test_what_mixes_channels_or_shows_them_closes_a_family(old: str, new: str) -> None:
    proto = parse(CHAIN.replace(old, new))
    proto.graph.initializer.extend(chain().graph.initializer)
    made, gone = dropped(proto)
    assert gone == 0 and made == proto


def test_a_kernel_that_is_read_twice_stays_whole() -> None:
    proto = parse(CHAIN.replace("y)", "y, float[N, 12, 9, 9] z)", 1).replace(
        "r = Relu (n)", "r = Relu (n) z = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1)"))  # fmt: skip
    proto.graph.initializer.extend(chain().graph.initializer)
    assert dropped(proto)[1] == 0


def test_a_weight_that_users_may_feed_stays() -> None:
    proto = chain()
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w2", onnx.TensorProto.FLOAT, (5, 12, 3, 3)))
    assert dropped(proto)[1] == 0


def test_a_network_that_is_dead_throughout_keeps_a_channel() -> None:
    proto = chain(shift=np.full(12, -100, "float32"))
    made, gone = dropped(proto)
    assert gone == 11
    (y,) = run(made, feeds_of(proto, x=(2, 4, 9, 9)))
    assert y.shape == (2, 5, 9, 9) and not y.any()


def test_infinity_says_nothing_about_the_others() -> None:
    shift = normal(12, seed=3)
    shift[0] = np.inf
    assert dropped(chain(shift=shift))[1] == 0


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
def test_every_version_of_the_operators(opset: int) -> None:
    proto = chain()
    proto.opset_import[0].version = opset
    assert dropped(proto)[1] == 4


def test_half_precision() -> None:
    proto = parse(CHAIN.replace("float[", "float16["), **{
        tensor.name: numpy_helper.to_array(tensor).astype("float16") for tensor in chain().graph.initializer
    })  # fmt: skip
    made, gone = dropped(proto)
    assert gone == 4
    same(made, proto, 1e-2)


def test_families_of_residual_streams_reach_over_all_blocks() -> None:
    text = """g (float[N, 4, 9, 9] x) => (float[N, 5, 9, 9] y) {
      a = Conv <kernel_shape = [1, 1]> (x, w0) b = Conv <kernel_shape = [1, 1]> (a, w1) r = Relu (b)
      c = Conv <kernel_shape = [1, 1]> (r, w2) s = Add (a, c) y = Conv <kernel_shape = [1, 1]> (s, w3) }"""
    kernels = {"w0": normal(6, 4, 1, 1), "w1": normal(8, 6, 1, 1), "w2": normal(6, 8, 1, 1), "w3": normal(5, 6, 1, 1)}
    model = load(parse(text, **kernels))
    found = {family.tensors: family for family in families(model, infer(model, {"x": (1, 4, 9, 9)}))}
    assert set(found) == {("a", "c", "s"), ("b", "r")}
    assert {reading.tensor for reading in found["a", "c", "s"].readings} == {"a", "s"}


OPTIONS: dict[str, Any] = {"methods": "channel_svd,svd", "align": 1, "jobs": 1, "budget": {"macs": 0.7}}


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return feeds_of(chain(), seed=5, x=(40, 4, 9, 9))["x"]


def test_the_report_counts_what_was_dropped_and_compares_with_what_was_given(
    tmp_path: Path, samples: np.ndarray
) -> None:
    proto = chain()
    made = lr.compress(proto, calibrate=[{"x": samples}], drop_dead_channels=True, **OPTIONS)
    assert made.met and any(
        note == "4 channel(s) that carry nothing on any of 40 calibration samples were dropped: of first"
        for note in made.report.notes
    )
    feeds = {"x": samples[:1]}
    original, compressed = made.report.original, made.report.compressed
    assert (original.macs, original.params) == tiny.count(proto, feeds)
    made.save(tmp_path / "small.onnx")
    assert (compressed.macs, compressed.params) == tiny.count(onnx.load(tmp_path / "small.onnx"), feeds)


def test_it_alone_may_be_enough(samples: np.ndarray) -> None:
    proto = chain()
    made = lr.compress(
        proto, calibrate=[{"x": samples}], drop_dead_channels=True, **(OPTIONS | {"budget": {"macs": 0.9}})
    )
    assert made.met and not made.report.unchanged and not made.report.layers
    same(made.model, proto)


def test_nothing_else_need_be_asked_for(samples: np.ndarray) -> None:
    proto = chain()
    made = lr.compress(proto, calibrate=[{"x": samples}], drop_dead_channels=True, align=1, jobs=1)
    assert made.met and not made.report.layers and made.report.compressed.macs < made.report.original.macs
    same(made.model, proto)
    awake = chain(shift=normal(12, seed=3))
    made = lr.compress(awake, calibrate=[{"x": samples}], drop_dead_channels=True, align=1, jobs=1)
    assert made.report.unchanged and made.model == awake


def test_it_says_so_where_none_is_dead(samples: np.ndarray) -> None:
    proto = chain(shift=normal(12, seed=3))
    notes = lr.compress(proto, calibrate=[{"x": samples}], drop_dead_channels=True, **OPTIONS).report.notes
    assert any("no channel was dropped: there is none that carries nothing on any of 40" in note for note in notes)


def test_it_needs_samples() -> None:
    with pytest.raises(
        lr.LowRankError, match="drop_dead_channels looks at what channels carry on samples: give calibrate"
    ):
        lr.compress(chain(), drop_dead_channels=True, **OPTIONS)


def test_a_plan_made_with_it_is_carried_out_with_it(samples: np.ndarray) -> None:
    options = OPTIONS | {"calibrate": [{"x": samples}], "drop_dead_channels": True}
    plan = lr.analyze(chain(), **options)
    del options["budget"], options["methods"]
    made = lr.apply(chain(), plan, **options)
    assert made.report.compressed.macs == plan.cost.macs


def test_a_large_number_in_one_channel_says_nothing_of_what_others_carry() -> None:
    shift = np.zeros(12, "float32")
    scale = np.ones(12, "float32")
    scale[0], shift[0] = 0, 3000
    assert dropped(chain(scale=scale, shift=shift))[1] == 0


def test_each_output_is_looked_at_by_itself() -> None:
    text = CHAIN.replace("kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, w2)", "kernel_shape = [1, 1]> (r, w2)")
    kernel = np.zeros((2, 12, 1, 1), "float32")
    kernel[0, :6], kernel[1, 6:] = 2000, 1
    proto = parse(text.replace("float[N, 5", "float[N, 2"), w2=kernel)
    proto.graph.initializer.extend(t for t in chain(shift=np.ones(12, "float32")).graph.initializer if t.name != "w2")
    assert dropped(proto)[1] == 0


def test_what_is_left_out_together_is_bounded() -> None:
    scale, shift = np.full(12, 6e-4, "float32"), np.zeros(12, "float32")
    scale[0] = 1
    stored = {"scale": scale, "shift": shift, "mean": np.zeros(12, "float32"), "b1": np.zeros(12, "float32")}
    kernel = np.ones((5, 12, 1, 1), "float32")
    text = CHAIN.replace("kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, w2)", "kernel_shape = [1, 1]> (r, w2)")
    first = np.ones((12, 4, 3, 3), "float32")
    proto = parse(text, w1=first, variance=np.ones(12, "float32"), w2=kernel, **stored)
    assert dropped(proto)[1] == 1, "each of eleven moves the sum by 0.0006 of what the first does"


def test_a_bias_that_the_type_does_not_hold_leaves_the_channels() -> None:
    text = CHAIN.replace("float[", "float16[").replace("3, 3], pads = [1, 1, 1, 1]> (r, w2)", "1, 1]> (r, w2)")
    scale, shift = np.ones(12), np.zeros(12)
    scale[:2], shift[:2] = 0, 40000
    kernels = {"w1": normal(12, 4, 3, 3), "b1": normal(12), "w2": np.ones((5, 12, 1, 1))}
    stored = kernels | {"scale": scale, "shift": shift, "mean": np.zeros(12), "variance": np.ones(12)}
    proto = parse(text, **{name: np.asarray(value, "float16") for name, value in stored.items()})
    assert dropped(proto)[1] == 0


def test_layers_that_may_not_be_changed_keep_their_channels(samples: np.ndarray) -> None:
    proto = chain()
    options: dict[str, Any] = {"calibrate": [{"x": samples}], "drop_dead_channels": True, "align": 1, "jobs": 1}
    for name in ("first", "second"):
        assert lr.compress(proto, exclude=[name], **options).report.unchanged
    assert lr.compress(proto, include=["first", "second"], **options).report.compressed.params < 800


def test_a_plan_says_what_it_was_made_without(samples: np.ndarray, tmp_path: Path) -> None:
    options = {"calibrate": [{"x": samples}], "align": 1, "jobs": 1}
    plan = lr.analyze(chain(), budget={"macs": 0.5}, methods="channel_svd", drop_dead_channels=True, **options)
    with pytest.raises(lr.LowRankError, match="of the model less 4 dead"):
        lr.apply(chain(), plan, **options)
    with pytest.raises(lr.LowRankError, match="of the model less 4 dead"):
        lr.apply(chain(), plan, drop_dead_channels=True, **(options | {"align": 16}))


def test_a_published_pipeline_with_nothing_else_asked_for(samples: np.ndarray) -> None:
    made = lr.compress(chain(), recipe="automatic_rank", calibrate=[{"x": samples}], drop_dead_channels=True, jobs=1)
    assert made.met and made.report.compressed.macs < made.report.original.macs


def test_what_several_nodes_read_is_cut_once() -> None:
    text = CHAIN.replace("r = Relu (n)", "p = Add (n, map) q = Relu (p) s = Sub (q, map) r = Relu (s)")
    proto = parse(text, map=np.abs(normal(1, 12, 9, 9)))
    proto.graph.initializer.extend(chain().graph.initializer)
    made, gone = dropped(proto)
    assert gone == 4 and stored(made).count((1, 8, 9, 9)) == 1
    same(made, proto)


@pytest.mark.parametrize("node", ["s = Mul (n, k)", "s = Pad (n, none, k)"])
def test_numbers_that_users_may_feed_are_not_trusted(node: str) -> None:
    proto = parse(
        CHAIN.replace("r = Relu (n)", f"{node} r = Relu (s)"), k=np.array(1, "float32"), none=np.zeros(8, np.int64)
    )
    proto.graph.initializer.extend(chain().graph.initializer)
    assert dropped(proto)[1] == 4
    proto.graph.input.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, ()))
    assert dropped(proto)[1] == 0


def test_a_pad_along_axes_that_are_fed_may_shift_channels() -> None:
    text = CHAIN.replace("float[N, 4, 9, 9] x)", "float[N, 4, 9, 9] x, int64[2] axes)")
    proto = parse(
        text.replace("r = Relu (n)", "s = Pad (n, none, , axes) r = Relu (s)"), opset=18, none=np.zeros(4, np.int64)
    )
    proto.graph.initializer.extend(chain().graph.initializer)
    model = load(proto)
    assert not families(model, infer(model, {"x": (1, 4, 9, 9), "axes": (2,)}))


def test_an_input_that_is_one_number_for_all_samples(samples: np.ndarray) -> None:
    text = CHAIN.replace("g (", "g (float k, ").replace("r = Relu (n)", "s = Mul (n, k) r = Relu (s)")
    proto = parse(text)
    proto.graph.initializer.extend(chain().graph.initializer)
    feeds = [{"k": np.array(1, "float32"), "x": samples}]
    made = lr.compress(
        proto, calibrate=feeds, drop_dead_channels=True, align=1, jobs=1, input_shape={"x": (1, 4, 9, 9)}
    )
    assert made.met


def without_reading(proto: onnx.ModelProto, kept: Sequence[Kept]) -> onnx.ModelProto:
    """The model with zeros in the place of all that its kernels have for channels that are not kept."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    constants = Constants(load(proto))
    for each in kept:
        for reading in each.family.readings:
            node = copy.graph.node[reading.part.position]
            stem = node.input[1]
            known = {tensor.name: numpy_helper.to_array(tensor) for tensor in copy.graph.initializer}
            constant = constants.find(stem)
            kernel = np.array(constant.read() if constant else known[stem])
            rest = np.setdiff1d(np.arange(each.family.size), each.channels)
            kernel[(slice(None),) * reading.part.axis + (rest,)] = 0
            node.input[1] = f"{stem}_zeroed"
            copy.graph.initializer.append(numpy_helper.from_array(kernel, node.input[1]))
    return copy


STEPS = (
    *(
        "Relu",
        "Clip",
        "HardSwish",
        "Sigmoid",
        "BatchNormalization",
        "Add1",
        "AddC",
        "SubC",
        "PRelu",
        "depthwise",
        "sum",
        "product",
    ),
    *("gate", "Pad", "MaxPool", "AveragePool", "Resize", "mean", "conv", "conv", "conv"),
)
"""What a random network is made of; a number in front of C is one for each channel."""


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """Convolutions one after the other, and between them what works on every channel by itself."""
    lines, stored, names, channels = [], dict[str, np.ndarray](), ["t0"], 6

    def store(value: np.ndarray) -> str:
        stored[f"w{len(stored)}"] = value.astype("float32")
        return f"w{len(stored) - 1}"

    def node(text: str) -> None:
        names.append(f"t{len(lines) + 1}")
        lines.append(f"{names[-1]} = {text}")

    def conv(before: int, after: int, sides: tuple[int, ...] = (1, 3)) -> None:
        side, bias = draw(st.sampled_from(sides)), draw(st.booleans())
        pads = f", pads = [{', '.join(draw(st.sampled_from(('0', '1'))) * 4)}]" if side == 3 else ""
        inputs = [
            names[-1],
            store(normal(after, before, side, side, seed=len(stored))),
            *([store(normal(after))] * bias),
        ]
        node(f"Conv <kernel_shape = [{side}, {side}]{pads}> ({', '.join(inputs)})")

    lines.append(f"t1 = Conv <kernel_shape = [1, 1]> (t0, {store(normal(channels, 3, 1, 1))})")
    names.append("t1")
    alike = [names[-1]]  # of the same channels and size
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=3, max_size=9)):
        last, shape = names[-1], (channels, 1, 1)
        if step in ("Relu", "HardSwish", "Sigmoid"):
            node(f"{step} ({last})")
        elif step == "Clip":
            node(f"Clip ({last}, , {store(np.array(1.5))})")
        elif step == "BatchNormalization":
            values = [store(normal(channels, seed=i)) for i in range(3)] + [store(np.ones(channels))]
            node(f"BatchNormalization ({last}, {', '.join(values)})")
        elif step == "Add1":
            node(f"Add ({store(np.array([0.3]))}, {last})")
        elif step in ("AddC", "SubC"):
            node(f"{step[:3]} ({store(normal(*shape))}, {last})")
        elif step == "PRelu":
            node(f"PRelu ({last}, {store(normal(*shape))})")
        elif step == "depthwise":
            kernel, bias = store(normal(channels, 1, 3, 3, seed=len(stored))), store(normal(channels))
            node(f"Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = {channels}> ({last}, {kernel}, {bias})")
        elif step in ("sum", "product"):
            node(f"{'Add' if step == 'sum' else 'Mul'} ({draw(st.sampled_from(alike))}, {last})")
        elif step == "gate":
            node(f"GlobalAveragePool ({last})")
            conv(channels, channels, sides=(1,))
            node(f"Mul ({last}, {names[-1]})")
        elif step == "mean":
            node(f"ReduceMean <axes = [2, 3], keepdims = 1> ({last})")
            node(f"Sub ({last}, {names[-1]})")
        elif step == "Pad":
            stored[f"w{len(stored)}"] = np.array([0, 0, 1, 0, 0, 0, 0, 2], np.int64)
            node(f"Pad ({last}, w{len(stored) - 1})")
        elif step in ("MaxPool", "AveragePool"):
            node(f"{step} <kernel_shape = [2, 2]> ({last})")
        elif step == "Resize":
            node(f'Resize <mode = "nearest"> ({last}, , {store(np.array([1, 1, 2, 2]))})')
        else:
            after = draw(st.integers(2, 7))
            conv(channels, after)
            channels = after
        if step in ("conv", "Pad", "MaxPool", "AveragePool", "Resize"):
            alike.clear()
        alike.append(names[-1])
    conv(channels, 4)
    body = " ".join(lines[:-1]) + f" y = {lines[-1].partition(' = ')[2]}"
    return parse(f"g (float[1, 3, 16, 17] t0) => (float[1, 4, H, W] y) {{ {body} }}", **stored)


def check_cut(proto: onnx.ModelProto, feeds: Feeds, seed: int) -> bool:
    """Take channels out at random: what is left computes what it did with zeros in their place. Whether any was taken out."""
    model, rng = load(proto), np.random.default_rng(seed)
    kept = []
    for family in families(model, infer(model, {name: value.shape for name, value in feeds.items()})):
        channels = np.sort(rng.choice(family.size, int(rng.integers(1, family.size + 1)), replace=False))
        kept.append(Kept(family, channels, {reading.tensor: np.zeros(family.size) for reading in family.readings}))
    made = with_channels(model, kept).proto
    onnx.checker.check_model(made, full_check=True)
    for got, wanted in zip(run(made, feeds), run(without_reading(proto, kept), feeds), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4 * (1 + np.abs(wanted).max(initial=0)))
    return any(len(each.channels) < each.family.size for each in kept)


def test_any_channels_of_random_networks_can_be_taken_out() -> None:
    cut = []

    @settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(networks(), st.integers(0, 99))
    def each(proto: onnx.ModelProto, seed: int) -> None:
        cut.append(check_cut(proto, feeds_of(proto), seed))

    each()
    assert sum(cut) > len(cut) / 2


def test_of_random_models_what_is_not_understood_is_left_alone() -> None:
    cut = []

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(random_models.models(), st.integers(0, 99))
    def each(case: tuple[onnx.ModelProto, Feeds], seed: int) -> None:
        cut.append(check_cut(*case, seed))

    each()
    assert any(cut) and not all(cut)
