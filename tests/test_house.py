"""Rules of the house, read off the sources: who imports what, who prints, what is explained, what a new member takes."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import models
import onnx_lowrank as lr
from onnx_lowrank import config
from onnx_lowrank.cli import main
from onnx_lowrank.decompositions import DECOMPOSITIONS
from tests.helpers import arrays, run

PACKAGE = Path(lr.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT = {
    "onnx": ("graph/", "interop/", "integrations/", "quantize/qdq.py"),
    "onnx_graphsurgeon": ("graph/", "interop/"),
    "onnx_ir": ("interop/", "integrations/"),
    "olive": ("integrations/",),
    "polygraphy": ("integrations/",),
    "google": ("graph/",),
    "onnxruntime": ("runtime/", "quantize/qdq.py"),
    "jinja2": ("report/page.py",),
    "torch": ("finetune/",),
    "dask": ("work/cluster.py",),
    "distributed": ("work/cluster.py",),
    "MNN": ("runtime/mnn.py",),
    "_tools": ("runtime/mnn.py",),
    "argparse": ("cli.py", "options.py", "runtime/portable.py"),
}
"""Libraries that have one place each, so that everything else can be used and tested without them."""

NUMERIC_CORE = ("linalg.py", "randomized.py", "types.py", "decompositions/", "ranks/", "budgets/")
KNOWS_NUMBERS_ONLY = {"numpy", "scipy", "onnx_lowrank"}


FLOW = (
    *("types", "files", "linalg", "randomized", "cache", "work"),
    *("graph", "runtime", "verification", "data", "config", "interop"),
    *("ranks", "decompositions", "candidates", "layer_tasks", "shortcuts", "channels", "subject"),
    *(
        "calibration",
        "rewriting",
        "targets",
        "budgets",
        "quantize",
        "latency",
        "planning",
        "report",
        "finetune",
        "search",
    ),
    *("recipes", "pipeline", "options", "cli", "integrations", "__init__", "__main__"),
)
"""Folders and files of the package: each imports only what stands before it, so that nothing goes in circles."""


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that a source imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layers"
            yield node.module or ""


def members(tree: ast.AST) -> Iterator[str]:
    """Full names of what a source imports from the package itself, as in ``from onnx_lowrank import runtime``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "onnx_lowrank":
            yield from (f"onnx_lowrank.{alias.name}" for alias in node.names)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.fixture(params=SOURCES, ids=place)
def source(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_a_source_imports_only_what_its_layer_may(source: Path) -> None:
    for module in imports(parsed(source)):
        allowed = MAY_IMPORT.get(module.partition(".")[0])
        assert allowed is None or place(source).startswith(allowed), f"{place(source)} imports {module}"


def room(path: str) -> str:
    """The folder of a source in the package, or its own name."""
    return path.partition("/")[0].removesuffix(".py")


def test_every_source_has_its_room_in_the_flow(source: Path) -> None:
    assert room(place(source)) in FLOW, "a new folder has a place in FLOW, and a line in CONTRIBUTING.md"


def test_a_source_imports_only_what_stands_before_it_in_the_flow(source: Path) -> None:
    own = FLOW.index(room(place(source)))
    for module in (*imports(parsed(source)), *members(parsed(source))):
        top, _, inner = module.partition(".")
        there = room(inner.replace(".", "/"))
        if top == "onnx_lowrank" and inner and there in FLOW:
            assert FLOW.index(there) <= own, f"{place(source)} imports {module}, which comes after it"


def test_no_source_imports_itself_by_way_of_others() -> None:
    names = {".".join(("onnx_lowrank", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in SOURCES}
    arrows = {name: {m for m in imports(parsed(path)) if m in names} - {name} for name, path in names.items()}
    assert sum(map(len, arrows.values())) > 300
    order = list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError, with the circle
    assert order.index("onnx_lowrank.types") < order.index("onnx_lowrank.pipeline")


def test_the_rooms_of_the_flow_are_explained() -> None:
    explained = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in FLOW:
        shown = f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"
        assert f"`{shown}`" in explained or name.startswith("__"), f"{shown} is not in CONTRIBUTING.md"


def test_the_numeric_core_knows_numbers_only() -> None:
    core = [path for path in SOURCES if place(path).startswith(NUMERIC_CORE)]
    assert len(core) > 10
    for path in core:
        for module in imports(parsed(path)):
            top = module.partition(".")[0]
            known = top in KNOWS_NUMBERS_ONLY or top in sys.stdlib_module_names
            assert known, f"{place(path)} imports {module}"
            if top == "onnx_lowrank" and module != "onnx_lowrank":
                inner = module.split(".", 1)[1].replace(".", "/")
                core_names = tuple(name.removesuffix(".py").removesuffix("/") for name in NUMERIC_CORE)
                assert inner.startswith(core_names), f"{place(path)} imports {module}"


def test_a_process_that_works_on_layers_imports_numbers_only() -> None:
    code = (
        "import sys, onnx_lowrank.layer_tasks, onnx_lowrank.report.spectra\n"
        "print(*[m for m in ('onnx', 'onnxruntime', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_every_public_name_is_found_when_it_is_asked_for() -> None:
    assert [name for name in lr.__all__ if not hasattr(lr, name)] == []
    assert dir(lr) == sorted(lr.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lr.nothing


def test_the_rule_finds_an_import_at_any_depth() -> None:
    tree = ast.parse("def f():\n    if 1:\n        import onnx.helper\n        from onnxruntime import x\n")
    assert list(imports(tree)) == ["onnx.helper", "onnxruntime"]


def writes_to_the_terminal(tree: ast.AST) -> bool:
    nodes = list(ast.walk(tree))
    flushed = [node.value for node in nodes if isinstance(node, ast.Attribute) and node.attr == "flush"]
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            return True
        if (
            isinstance(node, ast.Attribute)
            and node not in flushed
            and ast.unparse(node) in ("sys.stdout", "sys.stderr")
        ):
            return True
    return any(module == "rich.console" for module in imports(tree))


def test_only_the_command_line_prints(source: Path) -> None:
    assert writes_to_the_terminal(parsed(source)) is (place(source) in ("cli.py", "runtime/portable.py"))


@pytest.mark.parametrize("text", ["print(1)", "import sys\nsys.stderr.write('')", "from rich.console import Console"])
def test_the_rule_finds_what_prints(text: str) -> None:
    assert writes_to_the_terminal(ast.parse(text))


def test_a_source_says_what_it_is_for(source: Path) -> None:
    assert ast.get_docstring(parsed(source)), f"{place(source)} has no docstring"


def test_no_random_number_comes_from_a_global_generator(source: Path) -> None:
    allowed = {"default_rng", "Generator", "SeedSequence"}
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("np.random", "numpy.random"):
            assert node.attr in allowed, f"{place(source)}: {ast.unparse(node)}"
    assert "random" not in [module.partition(".")[0] for module in imports(parsed(source))]


def public_names() -> list[str]:
    return [name for name in lr.__all__ if not isinstance(getattr(lr, name), types.ModuleType)]


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_is_explained(name: str) -> None:
    found = getattr(lr, name)
    text = inspect.getdoc(found)
    assert text, f"{name} has no docstring"
    assert not text.startswith(f"{name}("), "that of a dataclass, made up by Python"
    if inspect.isfunction(found):
        assert text.split("\n")[0].endswith("."), "the first line is a sentence"


def test_what_is_public_is_there() -> None:
    assert sorted(set(lr.__all__)) == sorted(lr.__all__)
    for name in ("compress", "analyze", "apply", "verify", "inspect", "Config", "LowRankError", "Plan", "Report"):
        assert name in lr.__all__
    for module in (lr.ranks, lr.decompositions, lr.budgets):
        assert module.__doc__


# A decomposition is one file and one line


def test_a_decomposition_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = section(ROOT / "CONTRIBUTING.md", "Adding a decomposition")
    (file,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    imported, member = re.findall(r"^\+(.*\n)", text, re.M)
    shutil.copytree(PACKAGE, tmp_path / "onnx_lowrank")
    folder = tmp_path / "onnx_lowrank" / "decompositions"
    (folder / "first_channels.py").write_text(file)
    table = (folder / "__init__.py").read_text()
    table = table.replace("        SVD(),\n", f"        SVD(),\n{member}")
    (folder / "__init__.py").write_text(
        table.replace("from onnx_lowrank.types", f"{imported}from onnx_lowrank.types", 1)
    )
    # at its highest rank it computes what the original does
    (tmp_path / "plan.json").write_text(
        '{"choices": [{"layers": ["conv2"], "decomposition": "first_channels", "rank": 32}]}'
    )

    def command(words: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = [sys.executable, "-m", "onnx_lowrank", *words.split(), "--jobs", "1", "--quiet"]
        subprocess.run(done, cwd=tmp_path, env=environment, check=True)

    command(
        f"compress {models.DIGITS} small.onnx --budget macs=0.9 --methods first_channels --align 1 --json small.json"
    )
    command(f"apply {models.DIGITS} plan.json whole.onnx --json whole.json")
    small, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("small", "whole"))
    assert {layer["decomposition"] for layer in small["layers"]} == {"first_channels"}
    assert "it is for pictures only" in {skip["reason"] for skip in small["skips"]}
    assert [layer["name"] for layer in whole["layers"]] == ["conv2"]
    x = {"input": arrays(models.DIGITS_TEST)["input"][:8]}
    made, original = (run(str(path), x)[0] for path in (tmp_path / "whole.onnx", models.DIGITS))
    np.testing.assert_allclose(made, original, rtol=1e-4, atol=1e-4)


def section(document: Path, title: str) -> str:
    """What stands under a heading."""
    return document.read_text(encoding="utf-8").split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


# What the documents say


def commands(text: str) -> list[list[str]]:
    """Command lines of this program in the shell blocks of a document."""
    found = []
    for block in re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||[;|]", line.removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                program = next((i for i, word in enumerate(words) if word.endswith("onnx-lowrank")), None)
                if words[:3] in (["python", "-m", "onnx_lowrank"], ["python3", "-m", "onnx_lowrank"]):
                    program = 2
                if program is not None and not {"pip", "git", "cd"} & set(words[:program]):
                    found.append(words[program + 1 :])
    return found


def test_commands_are_found_in_documents() -> None:
    text = (
        "```sh\npip install onnx-lowrank && .venv/bin/onnx-lowrank inspect a.onnx   # a remark\n"
        "$ onnx-lowrank compress a.onnx \\\n  b.onnx --budget macs=0.5\n```\n"
        "```python\nonnx-lowrank nothing\n```\n```console\npython -m onnx_lowrank providers | head\n```\n"
    )
    assert commands(text) == [
        ["inspect", "a.onnx"],
        ["compress", "a.onnx", "b.onnx", "--budget", "macs=0.5"],
        ["providers"],
    ]


DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
    if path.is_file()
]
DOCUMENTED = [(path.name, line) for path in DOCUMENTS for line in commands(path.read_text(encoding="utf-8"))]


@pytest.mark.skipif(not DOCUMENTED, reason="the documents have no command line of this program yet")
@pytest.mark.parametrize(("document", "line"), DOCUMENTED or [("", [])], ids=lambda part: " ".join(part)[:60])
def test_a_command_in_a_document_is_one_that_the_program_takes(
    document: str, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where none of its files is, so that all that can be wrong with it is that
    try:
        code = main(line)
    except SystemExit as exit_:  # --help, --version
        code = int(exit_.code or 0)
    complaint = capsys.readouterr().err
    missing = re.search("cannot be read|no such file|does not exist", complaint)
    assert code == 0 or (code == 2 and missing), f"{document}: {shlex.join(line)}: {complaint}"


def test_an_unknown_option_in_a_document_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in ("compress a.onnx b.onnx --smaller", "compress a.onnx b.onnx --budget flops=0.5", "shrink a.onnx"):
        assert main(line.split()) == 2
        assert not re.search("cannot be read|no such file|does not exist", capsys.readouterr().err)


TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_test_imports_from_the_package_is_there(path: Path) -> None:
    # pytest skips a module that cannot be imported without a word, because of --doctest-ignore-import-errors
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            try:
                module = importlib.import_module(node.module or "")
            except ModuleNotFoundError as error:
                if (error.name or "").startswith(PACKAGE.name):
                    raise
                continue  # an extra that is not installed
            for name in (alias.name for alias in node.names):
                found = hasattr(module, name) or (hasattr(module, "__path__") and find_spec(f"{node.module}.{name}"))
                # half imported: an extra
                found = found or name in Path(module.__file__ or "").read_text(encoding="utf-8")
                assert found, f"{node.module} has no {name}"


def test_every_method_and_default_named_in_the_code_exists() -> None:
    assert set(config.METHODS) <= set(DECOMPOSITIONS)
    assert all(name == member.name for name, member in DECOMPOSITIONS.items())
