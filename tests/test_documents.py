"""Every block of code in the README and the pages of docs/ runs, and the site is built from them without a warning."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import models
import onnx_lowrank as lr
from models import layers
from onnx_lowrank.cli import main
from onnx_lowrank.config import Config
from onnx_lowrank.options import OPTIONS
from tests.documents import Block, blocks, documents
from tests.helpers import arrays, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(models.__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in documents(ROOT)}
NOT_RUN = 9
"""Most blocks that do not run: each is one that nobody sees break."""

SECONDS = 300
"""Most that a block may take in a shell: one that waits for something would wait forever."""


def test_the_rules_let_no_block_escape() -> None:
    read = [block for name, text in PAGES.items() for block in blocks(text, name)]
    assert sum(block.runs for block in read) > 50
    assert len([block for block in read if "not run" in block.marks]) <= NOT_RUN


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```bash\nls\n```\n", "'bash' is not one of"),
        ("```\nls\n```\n", "'' is not one of"),
        ("```sh\nls\n", "not closed"),
        ("- x\n\n  ```sh\n  ls\n  ```\n", "indented"),
        ("~~~\nls\n~~~\n", "a fence"),
        ("Run\n\n    ls\n", "indented code: ls"),
        ("<pre>ls</pre>\n", "in HTML"),
        ("<!-- not run: -->\n```sh\nls\n```\n", "no reason"),
        ("<!-- skip: no time -->\n```sh\nls\n```\n", "'skip' is not one of"),
    ],
)
def test_code_that_no_rule_covers_is_found(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        blocks(text, "page")


def test_blocks_are_read_with_their_marks() -> None:
    text = "a\n\n<!-- not run: it takes a day -->\n```sh\nls\n```\n\n```python\n# my.py\nx = 1\n```\nb\n"
    first, second = blocks(text, "page")
    assert (first.place, first.runs, first.marks) == ("page:4", False, {"not run": "it takes a day"})
    assert (second.runs, second.file, second.marks) == (True, "my.py", {})


# They run


def stand_in() -> onnx.ModelProto:
    """A small network with the input and the classes of the digits, for commands about ``model.onnx``, any model."""
    weights = layers.seeded(np.random.default_rng(0))
    graph, x = layers.start("model", (1, 8, 8))
    for number, channels in enumerate((16, 32, 32, 32)):
        x = graph.relu(graph.conv(x, f"conv{number}", weights, channels, 3, pad=1), f"relu{number}")
        if number == 1:
            x = graph.max_pool(x, "pool", 2, 2)
    x = graph.flatten(graph.global_average_pool(x, "mean"), "flat")
    graph = layers.finish(graph, graph.gemm(x, "fc", weights, 10))
    return layers.export(graph, "Stands for any model.")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every page may count on: the shipped model and its samples, under the names that pages call them by."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "models").mkdir()
    for path in (models.DIGITS, models.DIGITS_CALIBRATE, models.DIGITS_TEST):
        shutil.copy(path, folder / "models")
        shutil.copy(path, folder)
    onnx.save(stand_in(), folder / "model.onnx")
    pictures, test = arrays(models.DIGITS_CALIBRATE)["input"], arrays(models.DIGITS_TEST)
    np.savez(folder / "pictures.npz", input=pictures[:64])
    # the stand-in knows nothing of digits: no drop is promised on labels that it only guesses
    given = run(str(folder / "model.onnx"), {"input": test["input"][:200]})[0].argmax(axis=1)
    np.savez(folder / "test.npz", input=test["input"][:200], labels=given)
    np.savez(folder / "labelled.npz", input=test["input"][:64], labels=test["labels"][:64])
    return folder


@pytest.fixture(scope="module")
def times(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured times, which pages have in common."""
    return tmp_path_factory.mktemp("times")


class Page:
    """A page being followed by a reader."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._printed = ""

    def follow(self, block: Block) -> None:
        if block.file:
            Path(block.file).write_text(block.text)
        if block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json":
            json.loads(block.text)
        elif "prints" in block.marks:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            printed = doctest.OutputChecker().check_output(block.text, self._printed, flags)
            assert printed, f"{block.place}: this is what was printed:\n{self._printed}"
        elif block.runs and not block.file and not self._lacks(block):
            code = self._run_python(block) if block.language == "python" else self._run_shell(block)
            self._printed, complaint = self._capfd.readouterr()
            allowed = (0, 1) if "may miss" in block.marks else (0,)
            assert code in allowed, f"{block.place}: {code}\n{self._printed[-3000:]}\n{complaint[-2000:]}"

    @staticmethod
    def _lacks(block: Block) -> bool:
        return any(find_spec(name) is None for name in block.marks.get("needs", "").split())

    def _run_python(self, block: Block) -> int:
        exec(compile(block.text, block.place, "exec"), self._names)
        return 0

    def _run_shell(self, block: Block) -> int:
        lines = [line for line in block.text.replace("\\\n", " ").splitlines() if shlex.split(line, comments=True)]
        commands = [shlex.split(line, comments=True) for line in lines]
        if any(words[0] != "onnx-lowrank" or {"|", "||", "&&", ">"} & set(words) for words in commands):
            return subprocess.run(["sh", "-ec", block.text], timeout=SECONDS, check=False).returncode
        worst = 0
        for words in commands:  # in this process, which has loaded everything
            worst = max(worst, main(words[1:]))
            if worst > 1 or (worst and "may miss" not in block.marks):
                break
        return worst


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if any(b.runs for b in blocks(text))])
def test_the_blocks_of_a_page_run(
    name: str,
    files: Path,
    times: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("ONNX_LOWRANK_CACHE", str(times))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    page = Page(capfd)
    for block in blocks(PAGES[name], name):
        page.follow(block)


# What the pages are about


PLUGINS = {
    "onnx-graphsurgeon": "onnx_graphsurgeon",
    "onnx-ir": "onnx_ir",
    "ONNX Runtime quantisation": "onnxruntime",
    "Polygraphy": "polygraphy",
    "Olive": "olive",
}
"""Section of the page on plug-ins -> the package that it is about."""


def test_every_plug_in_has_its_section_and_its_examples() -> None:
    text = PAGES["docs/plugins.md"]
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert sections.keys() == PLUGINS.keys()
    for name, section in sections.items():
        assert name in text.partition("\n## ")[0], "the table at the top"
        assert any(block.runs for block in blocks(section))


def test_every_public_name_is_in_the_reference() -> None:
    named = re.findall(r"^::: onnx_lowrank\.(?:pipeline\.)?(\w+)$", PAGES["docs/reference/python.md"], re.MULTILINE)
    assert set(lr.__all__) <= set(named)


def test_every_decomposition_and_estimator_is_explained() -> None:
    pages = "\n".join(text for name, text in PAGES.items() if name.startswith("docs/methods/"))
    headings = "\n".join(re.findall(r"^#+ .*$", pages, re.MULTILINE))
    for name in (*lr.decompositions.DECOMPOSITIONS, *lr.ranks.RANK_ESTIMATORS, *lr.budgets.BUDGET_SOLVERS):
        assert f"`{name}`" in headings, f"no section explains {name}"


# The site

needs_mkdocs = pytest.mark.skipif(find_spec("mkdocs") is None, reason="the extra docs is not installed")


class Loaded(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.addresses.append(str(given["src"]))
        if tag == "link" and given.get("rel") in ("stylesheet", "preconnect", "preload", "icon"):
            self.addresses.append(str(given["href"]))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        pages[path.relative_to(folder).as_posix()] = page = Loaded()
        page.feed(path.read_text(encoding="utf-8"))
    return pages


@needs_mkdocs
def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site: dict[str, Loaded]) -> None:
    for name in PAGES:
        if name.startswith("docs/"):
            assert name.removeprefix("docs/").replace(".md", ".html") in site
    for name, page in site.items():
        assert page.addresses
        assert not [address for address in page.addresses if "//" in address], name


@needs_mkdocs
def test_tables_read_off_the_code_are_up_to_date() -> None:
    from tools.pages import TABLE, with_tables

    pages = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
    assert sum(len(TABLE.findall(text)) for text in pages.values()) >= 5
    for path, text in pages.items():
        assert with_tables(text) == text, f"{path.name}: write its tables anew by `python -m tools.pages`"
        stale = TABLE.sub(lambda found: f"<!-- table: {found[1]} -->\nold\n<!-- end -->", text)
        assert with_tables(stale) == text


@needs_mkdocs
def test_formulas_tables_and_references_are_made(site: dict[str, Loaded]) -> None:
    for name, page in site.items():
        assert "<!-- table" not in page.text and ":class:" not in page.text and ":func:" not in page.text, name
        assert r"\(" not in page.text and r"\[" not in page.text and "$$" not in page.text, name


@needs_mkdocs
def test_the_reference_has_every_option_key_and_field(site: dict[str, Loaded]) -> None:
    commands, keys = site["reference/commands.html"].text, site["reference/config.html"].text
    for flag in (flag for group in OPTIONS.values() for flag, _ in group):
        assert flag in commands
    pages = importlib.import_module("tools.pages")
    meanings = pages._parameters(Config)
    for field in dataclasses.fields(Config):
        assert field.name in keys
        assert meanings[field.name]
    result = lr.compress(
        models.DIGITS, budget={"macs": 0.7}, methods="svd,spatial_svd", target="nnapi"
    ).report.to_dict()
    told = {path for path, _, _ in pages.fields_of(lr.Report)} | {"version", "met"}
    free = ("config", "seconds", "environment", "placement", "original_placement", "others", "partitions")

    def check(value: Any, path: str) -> None:
        if isinstance(value, dict) and path.rpartition(".")[2] not in free:
            for key, item in value.items():
                here = f"{path}.{key}" if path else key
                assert {here, f"{here}[]", f"{here}.*"} & told, here
                check(item, f"{here}[]" if f"{here}[]" in told else here)
        elif isinstance(value, list) and path.endswith("[]"):
            for item in value:
                check(item, path)

    check(result, "")
