"""Blocks of code in the documents: which there are, which run, and why the others do not.

A block of ``sh`` or ``python`` runs, in the order of its page, in a folder with the files that ``FILES`` names; what one
Python block defines is there in the next. ``text``, ``toml`` and ``json`` are there to be read; TOML has to be TOML, and a
first line ``# NAME.toml`` (or ``# NAME.py``, in Python) makes a block that file. A comment on the line before a block says
what holds for it alone:

    <!-- needs: PACKAGE ... -->     skipped where one of these is not installed
    <!-- may miss: REASON -->       an exit code of 1 passes too: what was asked for may be out of reach there
    <!-- prints -->                 a block of text: what the block before it prints, with ... for whatever differs
    <!-- not run: REASON -->        does not run
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

RUN = ("sh", "python")
SHOWN = ("text", "toml", "json")
MARKS = ("needs", "may miss", "prints", "not run")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!--\s*([^:\n]*?)\s*(?::\s*([^\n]*?)\s*)?-->\n\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document.

    Parameters
    ----------
    place
        Document and line.
    language, text
        As written.
    marks
        What the comment before it says, by its first words.
    """

    place: str
    language: str
    text: str
    marks: dict[str, str]

    @property
    def runs(self) -> bool:
        return self.language in RUN and "not run" not in self.marks

    @property
    def file(self) -> str | None:
        """Name of the file that the block is."""
        found = re.match(r"# (\w+\.(?:py|toml))\n", self.text)
        return found[1] if found else None


def blocks(text: str, name: str = "") -> list[Block]:
    """The blocks of a document.

    Raises
    ------
    ValueError
        For code that no rule covers: indented, in a fence that is not closed or not of the kinds known, or with an
        unknown mark.
    """
    found, end = [], 0
    for match in FENCE.finditer(text):
        place = f"{name}:{text.count(chr(10), 0, match.start()) + 1}"
        language, code = match[1], match[2]
        mark = MARK.search(text, end, match.start())
        marks = {mark[1]: mark[2] or ""} if mark else {}
        _outside(text[end : match.start()], place)
        if language not in (*RUN, *SHOWN):
            raise ValueError(f"{place}: '{language}' is not one of {', '.join((*RUN, *SHOWN))}")
        if unknown := marks.keys() - set(MARKS):
            raise ValueError(f"{place}: '{unknown.pop()}' is not one of {', '.join(MARKS)}")
        if marks.get("not run") == "" or marks.get("may miss") == "" or marks.get("needs") == "":
            raise ValueError(f"{place}: the mark has no reason")
        found.append(Block(place, language, code, marks))
        end = match.end()
    _outside(text[end:], f"{name}, after its last block")
    return found


def _outside(text: str, place: str) -> None:
    """See that there is no code between blocks."""
    if re.search(r"^\s*(```|~~~)", text, re.MULTILINE):
        raise ValueError(f"before {place}: a fence that is indented or not closed")
    if re.search(r"^<(pre|code)\b", text, re.MULTILINE):
        raise ValueError(f"before {place}: code in HTML")
    lines = text.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith(("    ", "\t")) and not before.strip():
            raise ValueError(f"before {place}: indented code: {line.strip()}")


def documents(root: Path) -> list[Path]:
    """What people read."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted(root.glob("docs/**/*.md"))]
