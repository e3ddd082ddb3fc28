"""What the documentation needs beside its pages: formulas as MathML, tables read off the code, and docstrings.

    python -m tools.pages        # write the tables of the reference anew, after a change of options or of reports

MkDocs takes this file as its hooks (``on_...``), griffe as its extension (`Roles`). A table stands between
``<!-- table: NAME -->`` and ``<!-- end -->``, so that pages can be read in the repository too; a test sees that it is that of
the code.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

from onnx_lowrank import cli, config
from onnx_lowrank.data import Preprocess
from onnx_lowrank.report import data, results

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
PAGES = Path(__file__).resolve().parents[1] / "docs"
TABLE = re.compile(r"^<!-- table: ([\w ]+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([\w.]+)`")


def with_tables(markdown: str) -> str:
    """A page with its tables as they are now."""
    return TABLE.sub(
        lambda found: f"<!-- table: {found[1]} -->\n\n{TABLES[found[1]]().strip()}\n\n<!-- end -->", markdown
    )


def on_page_content(html: str, **_: Any) -> str:
    """Pages with their formulas in MathML, which browsers show by themselves."""
    return FORMULA.sub(_formula, html)


def _formula(found: re.Match[str]) -> str:
    text = html.unescape(found[2]).strip()
    inline = text.startswith(r"\(")
    made = convert(text[2:-2].strip(), display="inline" if inline else "block")
    return made if inline else f'<div class="formula">{made}</div>'


class Roles(griffe.Extension):
    """References of docstrings, in Sphinx's notation, as links where the site has a page for what they name."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(_link, obj.docstring.value)


def _link(found: re.Match[str]) -> str:
    shown = found[2].rpartition(".")[2] if found[1] else found[2]
    return f'<autoref optional identifier="{found[2]}"><code>{shown}</code></autoref>'


# Tables


def preprocess() -> str:
    """Every key of a preprocess file."""
    lines = [_row(_code(name), _literals(meaning)) for name, meaning in _parameters(Preprocess).items()]
    return "\n".join(["| key | meaning |", "|---|---|", *lines])


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _literals(text: str) -> str:
    """Text of a docstring as Markdown."""
    return ROLE.sub(lambda found: _code(found[2].rpartition(".")[2]), text).replace("``", "`")


def commands() -> str:
    """Every command with all of its options, from the parser."""
    parser = cli._parser()
    choices = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert isinstance(choices, dict)
    return "\n".join(line for name, sub in choices.items() for line in _command(name, sub))


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    places = [action.metavar for action in parser._actions if not action.option_strings]
    yield from (
        f"## {name}",
        "",
        f"`onnx-lowrank {' '.join([name, *map(str, places)])}`",
        "",
        f"{parser.description}",
        "",
    )
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.option_strings]
        if not actions:
            continue
        title = "common" if group.title == "options" else group.title
        yield from (f"**{title}**", "", "| option | meaning |", "|---|---|")
        yield from (_row(*_option(action)) for action in actions)
        yield ""


def _option(action: argparse.Action) -> tuple[str, str]:
    values = f" {action.metavar}" if action.metavar else ""
    flags = ", ".join(_code(flag + values) for flag in action.option_strings)
    return flags, (action.help or "").replace("%%", "%")


def keys() -> str:
    """Every field of Config: its name, default and meaning."""
    meanings = _parameters(config.Config)
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for item in dataclasses.fields(config.Config):
        default = item.default if item.default is not dataclasses.MISSING else None
        shown = "" if default in (None, ()) else _value(default)
        lines.append(_row(_code(item.name), _code(shown), _literals(meanings[item.name])))
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _parameters(kind: Any) -> dict[str, str]:
    """Name -> meaning, from the section of a numpy docstring."""
    found: dict[str, str] = {}
    text = re.sub(r"^    ", "", kind.__doc__ or "", flags=re.MULTILINE)
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[^\n]*\n---|\Z)", text, re.MULTILINE | re.DOTALL)
    for names, meaning in re.findall(
        r"^(\w[\w, ]*)\n((?:    [^\n]*\n|\s*\n)+)", section[1] if section else "", re.MULTILINE
    ):
        found |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return found


def fields_of(kind: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Path in the JSON, type and meaning of every field, those within it after it."""
    meanings, hints = _parameters(kind), typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        inner = next((part for part in _parts(hint) if dataclasses.is_dataclass(part)), None)
        path = prefix + item.name + (MANY.get(typing.get_origin(hint), "") if inner else "")
        yield path, _type(hint), meanings.get(item.name) or (_first_line(inner) if inner else "")
        if inner:
            yield from fields_of(inner, f"{path}.")


MANY: dict[Any, str] = {tuple: "[]", dict: ".*"}
"""How the path of an object goes on where there are many of its kind."""


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for part in typing.get_args(hint):
        yield from _parts(part)


def _type(hint: Any) -> str:
    kinds = {int: "number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    if hint in kinds:
        return kinds[hint]
    origin, inner = typing.get_origin(hint), [part for part in typing.get_args(hint) if part is not Ellipsis]
    if origin is tuple:
        return "list"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "object"
    return " or ".join(dict.fromkeys(map(_type, inner))) if inner else "any"


def _first_line(kind: Any) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def report() -> str:
    """Every field of the JSON of `compress` and `apply`, and of `verify`."""
    return _json(data.Report)


def verification() -> str:
    return _json(results.Verification)


def _json(kind: Any) -> str:
    own = [("version", "text", "Of this package."), ("met", "true or false", _first_line(kind.met))]
    rows = [*own, *fields_of(kind)]
    lines = [_row(_code(path), sort, _literals(meaning)) for path, sort, meaning in rows]
    return "\n".join(["| field | | meaning |", "|---|---|---|", *lines])


TABLES: dict[str, Callable[[], str]] = {
    "commands": commands,
    "keys": keys,
    "report": report,
    "verification": verification,
    "preprocess": preprocess,
}


def main() -> None:
    """Write the tables of all pages anew."""
    for page in sorted(PAGES.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if with_tables(text) != text:
            page.write_text(with_tables(text), encoding="utf-8")


if __name__ == "__main__":
    main()
