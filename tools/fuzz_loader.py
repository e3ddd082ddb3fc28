"""Fuzz the loader: small models, mutated, through load, find and inspect; a crash is anything but one line of LowRankError.

    python -m tools.fuzz_loader OUT [--seconds 600] [--blind] [--seed 0]

Mutations are of the message's fields (sizes, types, names, attributes, what reads what) and, one in eight, of its bytes. With
``atheris`` installed coverage guides them; ``--blind`` does without. Every crash found is written to OUT once, by the type of
its exception and the line that it came from, and the run goes on; OUT may be given again to try what is in it first. A hang is
ten seconds for one model; the machine is said to have 256 MiB, and 4 GiB of addresses are too many (with ``--blind``).
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx import helper, numpy_helper

HANG_SECONDS = 10
MEMORY_BYTES = 4 << 30
MACHINE_BYTES = 1 << 28
"""What the machine is said to have: what takes more has to be refused."""

MOST_BYTES = 1 << 14
"""Of a mutated model."""

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    5,
    7,
    16,
    127,
    255,
    1 << 16,
    (1 << 31) - 1,
    -(1 << 31),
    1 << 40,
    (1 << 62) + 1,
    (1 << 63) - 1,
)
FRACTIONS = (0.0, -1.0, 0.5, 1e-40, 3e38, float("inf"), float("nan"))
TEXTS = (
    "",
    "x",
    "y",
    "w",
    "N",
    "SAME_UPPER",
    "VALID",
    "NOTSET",
    "ai.onnx",
    "../w.bin",
    "/etc/passwd",
    "w.bin",
    "-1",
    "0",
)
OPERATORS = (
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "Identity",
    "Transpose",
    "Reshape",
    "Cast",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Constant",
    "DequantizeLinear",
    "BatchNormalization",
    "Relu",
    "Add",
    "If",
    "Loop",
    "Einsum",
    "LSTM",
)


class Hang(Exception):
    """A model took too long."""


def seeds() -> dict[str, bytes]:
    """Small models that have between them every kind of thing that the loader reads."""
    made = {name: _parsed(text) for name, text in TEXT_MODELS.items()}
    chain = made["derived"]
    kernel = np.arange(20, dtype=np.float32).reshape(5, 4)
    values, indices = numpy_helper.from_array(kernel[0], "s"), numpy_helper.from_array(np.arange(4), "indices")
    sparse = _parsed("g (float[3,5] x) => (float[3,4] y) { y = MatMul (x, s) }")
    sparse.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [5, 4]))
    external = _parsed("g (float[3,5] x) => (float[3,4] y) { y = MatMul (x, w) }")
    external.graph.initializer.append(
        onnx.TensorProto(name="w", data_type=1, dims=[5, 4], data_location=onnx.TensorProto.EXTERNAL)
    )
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", "80")):
        external.graph.initializer[0].external_data.add(key=key, value=value)
    trained = onnx.ModelProto()
    trained.CopyFrom(chain)
    trained.training_info.add().algorithm.CopyFrom(chain.graph)
    trained.graph.quantization_annotation.add(tensor_name="w")
    trained.metadata_props.add(key="k", value="v")
    made |= {"sparse": sparse, "external": external, "trained": trained}
    return {name: model.SerializeToString() for name, model in made.items()}


TEXT_MODELS = {
    "convolutions": """g (float[N,4,6,6] x) => (float[N,c,h,w] y)
        <float[6,4,3,3] w, float[6] b, float[6,2,3,3] v> {
        [first] a = Conv <pads=[1,1,1,1], strides=[1,1], dilations=[1,1], group=1, kernel_shape=[3,3]> (x, w, b)
        [second] r = ConvTranspose <auto_pad="SAME_UPPER", strides=[2,2], output_padding=[1,1]> (a, v)
        y = Relu (r)
    }""",
    "products": """g (float[N,5] x) => (float[N,4] y, float[4] z) <float[5,4] w, float[4] b, float[4,4] v> {
        a = Gemm <alpha=0.5, beta=2.0, transA=0, transB=0> (x, w, b)
        y = MatMul (a, v)
        z = Identity (b)
    }""",
    "derived": """g (float[3,5] x) => (float[m,n] y) <float[4,5] w, int64[2] s = {5, 4}, int64[1] a = {0}> {
        t = Transpose <perm=[1,0]> (w) u = Unsqueeze (t, a) q = Squeeze (u, a) f = Flatten <axis=1> (q)
        c = Cast <to=1> (f) r = Reshape (c, s) i = Identity (r) y = MatMul (x, i)
    }""",
    "constants": """g (float[3,5] x) => (float[m,n] y) {
        w = Constant <value = float[5,2] {1,2,3,4,5,6,7,8,9,10}> () v = Constant <value_floats = [1.0, 2.0]> ()
        a = MatMul (x, w) k = Constant <value_ints = [2, 1]> () r = Reshape (v, k) y = MatMul (a, r)
    }""",
    "bodies": """g (float[3,5] x, bool c) => (float[m,n] y) <float[5,4] w> {
        y = If (c) <then_branch = g1 () => (float[m,n] t) { t = MatMul (x, w) },
                    else_branch = g2 () => (float[m,n] e) { e = MatMul (x, w) }>
    }""",
    "quantised": """g (float[1,4,6,6] x) => (float[n,c,h,w] y) <int8[6,4,3,3] q, float s = {0.5}, int8 z = {0}, float[6] g> {
        w = DequantizeLinear (q, s, z) a = Conv (x, w) y = BatchNormalization (a, g, g, g, g)
    }""",
    "shaped": """g (float[N,C,H,W] x, float[] z) => (float[a,b] y) <float[8,10] w, float[4,3,3,3] k> {
        h = Conv <auto_pad="SAME_LOWER"> (x, k) p = GlobalAveragePool (h) f = Flatten (p) s = Shape (f)
        e = Expand (z, s) d = Add (f, e) j = Concat <axis=1> (d, f) y = MatMul (j, w)
    }""",
    "function": """g (float[3,5] x) => (float[m,n] y) <float[5,4] w> { y = my.twice (x, w) }
        <domain: "my", opset_import: ["" : 17]> twice (x, w) => (y) { a = MatMul (x, w) y = Add (a, a) }""",
}


def _parsed(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "my" : 1]>\n{text}')
    rng = np.random.default_rng(0)
    for info in model.graph.value_info:  # what the text declares without a value
        kind = info.type.tensor_type
        shape, dtype = [d.dim_value for d in kind.shape.dim], helper.tensor_dtype_to_np_dtype(kind.elem_type)
        model.graph.initializer.append(
            numpy_helper.from_array((3 * rng.standard_normal(shape)).astype(dtype), info.name)
        )
    del model.graph.value_info[:]
    return model


# --- mutations -------------------------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A model with one to four things changed."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
        broken = rng.random() < 1 / 8
    except DecodeError:
        broken = True
    if broken:
        return _mutate_bytes(data, rng)
    try:
        for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
            _mutate_field(model, rng)
        return model.SerializeToString()
    except ValueError:  # a text that is no UTF-8 came in with the bytes
        return _mutate_bytes(data, rng)


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) + 1)
        what = rng.randrange(4)
        if what == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif what == 1:
            changed[place:place] = rng.randbytes(rng.randint(1, 8))
        elif what == 2:
            del changed[place : place + rng.randint(1, 8)]
        elif place < len(changed):
            changed[place] = rng.randrange(256)
    return bytes(changed)


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if _repeated(field) else [value]:
                yield from _messages(inner)


def _repeated(field: FieldDescriptor) -> bool:
    if hasattr(field, "is_repeated"):  # from protobuf 6.31, where the other warns
        return bool(field.is_repeated)
    return bool(field.label == FieldDescriptor.LABEL_REPEATED)


def _mutate_field(model: onnx.ModelProto, rng: random.Random) -> None:
    """Change a field of a message anywhere in the model, mostly one that is set."""
    messages = list(_messages(model))
    message = rng.choice(messages)
    present = [field for field, _ in message.ListFields()]
    fields = present if present and rng.random() < 0.85 else list(message.DESCRIPTOR.fields)
    field = rng.choice(fields)
    pool = [m for m in messages if m.DESCRIPTOR is field.message_type]
    if _repeated(field):
        _mutate_list(message, field, pool, rng)
    elif rng.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type is not None:
        if pool:
            other = rng.choice(pool).SerializeToString()
            getattr(message, field.name).ParseFromString(other)
        else:
            getattr(message, field.name).SetInParent()
    else:
        setattr(message, field.name, _value(model, field, getattr(message, field.name), rng))


def _mutate_list(message: Message, field: FieldDescriptor, pool: list[Message], rng: random.Random) -> None:
    items = getattr(message, field.name)
    what = rng.randrange(4)
    if what == 0 and len(items):
        del items[rng.randrange(len(items))]
    elif field.message_type is not None:
        if what == 1 and len(items) > 1:
            order = list(items)
            rng.shuffle(order)
            copies = [item.SerializeToString() for item in order]
            del items[:]
            for text in copies:
                items.add().ParseFromString(text)
        elif pool:
            text = rng.choice(pool).SerializeToString()
            (items.add() if what == 2 or not len(items) else rng.choice(items)).ParseFromString(text)
    elif what == 1 or not len(items):
        items.append(_value(message, field, items[0] if len(items) else None, rng))
    else:
        place = rng.randrange(len(items))
        items[place] = _value(message, field, items[place], rng)


def _value(message: Message, field: FieldDescriptor, old: Any, rng: random.Random) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.choice((b"", b"SAME_UPPER", (old or b"")[:-1], (old or b"") * 2, rng.randbytes(8)))
        return rng.choice((*TEXTS, *OPERATORS, *_names(message)))
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice(FRACTIONS)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    bits = 31 if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 63
    number = rng.choice((*NUMBERS, (old or 0) + 1, (old or 0) - 1, -(old or 0)))
    if kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64):
        return abs(number) & ((1 << bits) - 1)
    return max(-(1 << bits), min(number, (1 << bits) - 1))


def _names(message: Message) -> list[str]:
    if not isinstance(message, onnx.NodeProto):
        nodes = [m for m in _messages(message) if isinstance(m, onnx.NodeProto)]
    else:
        nodes = [message]
    return [name for node in nodes for name in [*node.input, *node.output]]


# --- the run ---------------------------------------------------------------------------------------------------------


class Target:
    """Takes models, and keeps those that crash."""

    def __init__(self, out: Path, folder: Path) -> None:
        from onnx_lowrank import LowRankError, inspect
        from onnx_lowrank.graph import limits

        limits.machine_memory = lambda: MACHINE_BYTES
        self._refusal, self._inspect = LowRankError, inspect
        self._out, self._model = out, folder / "model.onnx"
        (folder / "w.bin").write_bytes(np.arange(20, dtype=np.float32).tobytes())
        self.tried = self.refused = 0
        self.found: set[str] = set()

    def __call__(self, data: bytes) -> None:
        self.tried += 1
        self._model.write_bytes(data)
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self._inspect(self._model, jobs=1)
        except self._refusal as error:
            self.refused += 1
            if "\n" in str(error):
                self._keep(data, error)
        except Exception as error:
            self._keep(data, error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _keep(self, data: bytes, error: BaseException) -> None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "onnx_lowrank" in f.filename]
        place = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
        name = f"{type(error).__name__}-{Path(place.filename).stem}-{place.name.strip('<>')}-{place.lineno}"
        if name in self.found:
            return
        self.found.add(name)
        (self._out / f"{name}.onnx").write_bytes(data)
        (self._out / f"{name}.txt").write_text("".join(traceback.format_exception(error)))
        print(f"crash {name}: {str(error)[:200]}", flush=True)


def _too_long(*_: object) -> None:
    raise Hang(f"{HANG_SECONDS} s for one model")


def blind(target: Target, corpus: list[bytes], seconds: float, seed: int) -> None:
    """Mutations of mutations, without a guide."""
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = rng.choice(corpus)
        for _ in range(rng.randint(1, 3)):
            data = mutate(data, rng)[:MOST_BYTES]
        target(data)


def guided(target: Target, corpus: Path, seconds: float, seed: int) -> None:
    """By coverage of this package, in ``corpus``."""
    import atheris

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        return mutate(data, random.Random(seed))[:most]

    limits = [f"-max_total_time={int(seconds)}", f"-max_len={MOST_BYTES}", f"-seed={seed + 1}"]
    limits += [
        "-timeout=120",
        f"-rss_limit_mb={MEMORY_BYTES >> 20}",
        "-print_final_stats=1",
        f"-artifact_prefix={corpus.parent}/",
    ]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], target, custom_mutator=mutator)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true")
    args = parser.parse_args()
    corpus = args.out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (corpus / f"seed-{name}").write_bytes(data)
    if args.blind:  # coverage needs addresses of its own
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, _too_long)
    if not args.blind:
        import atheris

        with atheris.instrument_imports(include=["onnx_lowrank"]):
            import onnx_lowrank  # noqa: F401
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        target = Target(args.out, Path(folder))
        for known in sorted(args.out.glob("*.onnx")):
            target(known.read_bytes())
        if args.blind:
            blind(target, [path.read_bytes() for path in sorted(corpus.iterdir())], args.seconds, args.seed)
        else:
            guided(target, corpus, args.seconds, args.seed)
        print(f"{target.tried} models, {target.refused} of them refused, {len(target.found)} kinds of crash")


if __name__ == "__main__":
    main()
