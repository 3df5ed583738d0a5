"""Reports: one self-contained HTML file made of a few kinds of blocks."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from batchlab.lab.files import write_text

__all__ = [
    "Block",
    "FigureBlock",
    "Gallery",
    "Page",
    "Paragraph",
    "Picture",
    "Section",
    "Table",
    "png",
    "write_collection",
    "write_page",
]


@dataclass(frozen=True)
class Paragraph:
    """Text; `code` shows it as a command."""

    text: str
    code: bool = False
    kind: str = "paragraph"


@dataclass(frozen=True)
class FigureBlock:
    """A figure and the caption that explains it to someone who reads nothing else."""

    svg: str
    caption: str
    kind: str = "figure"


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first column holds the names of the rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    kind: str = "table"


@dataclass(frozen=True)
class Picture:
    """A small image (PNG, base64) with lines of text under it."""

    png: str
    alternative: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Gallery:
    """Pictures in a grid; those after the first `shown` open on demand."""

    pictures: Sequence[Picture]
    caption: str
    shown: int = 24
    kind: str = "gallery"


Block = Paragraph | FigureBlock | Table | Gallery


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report: it opens with the answer and the one figure that shows it.

    Args:
        title: of the page.
        question: one sentence.
        answer: two sentences.
        hero: the figure that shows the answer.
        sections: everything else.
        footer: data, versions, machine, command.
    """

    title: str
    question: str
    answer: Sequence[str]
    hero: FigureBlock
    sections: Sequence[Section]
    footer: Sequence[str]


def png(image: Tensor) -> str:
    """A grey image (H, W) uint8 as PNG in base64, ink dark on white."""
    buffer = io.BytesIO()
    Image.fromarray(255 - image.numpy()).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _write(path: Path, template: str, **values: Any) -> None:
    environment = Environment(
        loader=PackageLoader("batchlab.lab"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template(template).render(**values)
    write_text(path, re.sub(r"(\d) %", "\\1\u00a0%", html))  # a number and its sign stay on one line


def write_page(page: Page, path: Path) -> None:
    """Write the page as one HTML file that needs no network and no other file."""
    _write(path, "report.html.j2", page=page)


def _own_ids(block: Block, prefix: str) -> Block:
    """The block, with ids in its figure that no other study's figures have."""
    if not isinstance(block, FigureBlock):
        return block
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", block.svg)
    return replace(block, svg=svg)


def _within(page: Page, prefix: str) -> Page:
    sections = [replace(part, blocks=[_own_ids(block, prefix) for block in part.blocks]) for part in page.sections]
    hero = _own_ids(page.hero, prefix)
    assert isinstance(hero, FigureBlock)
    return replace(page, hero=hero, sections=sections)


def write_collection(
    title: str, introduction: str, pages: Mapping[str, Page], path: Path, notes: Sequence[str] = ()
) -> None:
    """Write several studies' reports as one HTML file: contents, a table of questions and answers, then each report.

    Args:
        title: of the page.
        introduction: a sentence under it.
        pages: name of the study, which becomes the address of its part -> report.
        path: of the file.
        notes: sentences under the table.
    """
    parts = {name: _within(page, name) for name, page in pages.items()}
    _write(path, "collection.html.j2", title=title, introduction=introduction, pages=parts, notes=notes)
