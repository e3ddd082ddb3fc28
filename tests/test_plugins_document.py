"""The examples of docs/plugins.md, run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import models

ROOT = Path(models.__file__).parents[1]
TEXT = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
NEEDS = {
    "onnx-graphsurgeon": "onnx_graphsurgeon",
    "onnx-ir": "onnx_ir",
    "ONNX Runtime quantisation": "onnxruntime",
    "Polygraphy": "polygraphy",
    "Olive": "olive",
}
"""Section -> the package that it is about."""


def blocks(section: str) -> list[tuple[str, str]]:
    """Language and text of each."""
    return re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def test_every_section_has_its_examples_and_its_package() -> None:
    assert SECTIONS.keys() == NEEDS.keys()
    for name, section in SECTIONS.items():
        assert name in TEXT.partition("\n## ")[0], "the table at the top"
        assert {language for language, _ in blocks(section)} <= {"python", "sh"}
        assert blocks(section)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", SECTIONS)
def test_the_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    for path in (models.DIGITS, models.DIGITS_CALIBRATE, models.DIGITS_TEST):
        shutil.copy(path, tmp_path)
    for language, text in blocks(SECTIONS[name]):
        if script := re.match(r"# (\w+\.py)\n", text):
            Path(script[1]).write_text(text)
        elif language == "python":
            exec(text, {"__name__": "__main__"})
            assert capfd.readouterr().out.strip()
        else:
            done = subprocess.run(["sh", "-ec", text], check=False)
            out, complaint = capfd.readouterr()
            assert done.returncode == 0, f"{text}\n{out[-2000:]}\n{complaint[-2000:]}"
            assert out.strip()
