"""The error report as a page: self-contained HTML, and Markdown beside the figures, both made from the records."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from qlora.checkpoint import atomic_file
from qlora.markdown import markdown_table

from ..environment import LIBRARIES
from ..report import Row
from . import sections
from .sections import Section

TITLE = "Errors of 4-bit weights"
MOST_OPEN = 16  # lines of a table that is shown at once in the HTML; a longer one opens at a click
LEVELS = {"weights": sections.of_weights, "outputs": sections.of_outputs, "model": sections.of_model}


def write(
    folder: Path, found: dict[str, tuple[Path, list[Row]]], pictures: dict[str, bytes], figures: Path | None
) -> list[Path]:
    """Write `error.html` and `error.md` into a folder.

    Args:
        found: level -> a record and its rows, read by `records.read`, which refuses what contradicts the theory.
        pictures: PNGs by file name, for the HTML.
        figures: folder of the same pictures, which the Markdown links to; None: it shows none.
    """
    parts = sections.definitions()
    if {"weights", "model"} <= found.keys():
        parts = sections.in_short(found["weights"][1], found["model"][1]) + parts
    for level, (_, rows) in found.items():
        parts += LEVELS[level](rows)
    intro = _intro(found)
    pages = {
        "error.html": _html(intro, parts, pictures),
        "error.md": _markdown(intro, parts, {} if figures is None else _links(pictures, figures, folder)),
    }
    for name, text in pages.items():
        with atomic_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return [folder / name for name in pages]


def _intro(found: dict[str, tuple[Path, list[Row]]]) -> list[str]:
    lines = ["Made by python -m benchmarks.quant_error; docs/error.md says what is measured, how, and how to read it."]
    for path, rows in found.values():
        first = rows[0]
        versions = ", ".join(f"{name} {first[name]}" for name in LIBRARIES if first.get(name) is not None)
        changes = " with changes" if first["dirty"] else ""
        where = first["gpu"] or first["processor"]
        lines.append(f"{path.name}: commit {first['commit']}{changes}, {first['date']}, {where}, {versions}.")
    return lines


def _html(intro: list[str], parts: list[Section], pictures: dict[str, bytes]) -> str:
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    encoded = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    page = templates.get_template("page.html.j2")
    return page.render(title=TITLE, intro=intro, sections=parts, pictures=encoded, most_open=MOST_OPEN)


def _links(pictures: Iterable[str], figures: Path, folder: Path) -> dict[str, str]:
    return {name: os.path.relpath(figures / name, folder) for name in pictures}


def _markdown(intro: list[str], parts: list[Section], links: dict[str, str]) -> str:
    blocks = [f"# {TITLE}", *intro]
    for part in parts:
        blocks += [f"## {part.title}", part.text]
        if part.figure in links:
            blocks.append(f"![{part.title}]({links[part.figure]})")
        if part.body:
            blocks.append(markdown_table(part.head, part.body))
    return "\n\n".join(blocks) + "\n"
