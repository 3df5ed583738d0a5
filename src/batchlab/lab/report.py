"""Reports: one self-contained HTML file made of a few kinds of blocks."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from PIL import Image
from torch import Tensor

from batchlab.lab.files import write_text

__all__ = ["Block", "FigureBlock", "Gallery", "Page", "Paragraph", "Picture", "Section", "Table", "png", "write_page"]


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


def write_page(page: Page, path: Path) -> None:
    """Write the page as one HTML file that needs no network and no other file."""
    source = files("batchlab.lab").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(source).render(page=page)
    write_text(path, re.sub(r"(\d) %", "\\1\u00a0%", html))  # a number and its sign stay on one line
