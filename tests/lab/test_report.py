import base64
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from PIL import Image

from batchlab.lab.comparison import Curve
from batchlab.lab.figures import accuracy_curves, percentile_bands, rate_search
from batchlab.lab.report import FigureBlock, Gallery, Page, Paragraph, Picture, Section, Table, png, write_page

NAN = float("nan")
CURVE = Curve((0, 10, 20, 40), (0.1, 0.5, 0.8, 0.9), (0.1, 0.4, 0.7, 0.85), (0.1, 0.6, 0.9, 0.95))
ALONE = Curve((0, 10), (0.1, 0.2), (NAN, NAN), (NAN, NAN))


def figures() -> dict[str, str]:
    bands = {"a": ([10, 20, 40], [[-1, 0, 1], [-2, 0, 2], [-3, 0, 3]])}
    search = {"a": {0.1: [0.5, 0.6], 1.0: [0.9, 0.8]}, "b": {0.1: [0.4], 1.0: [0.3]}}
    return {
        "curves": accuracy_curves("c", {"a": CURVE, "b": ALONE}, gap=(0.8, 20, 40, "2×"), description="a < b & c"),
        "bands": percentile_bands("p", bands, description="bands"),
        "search": rate_search("r", search, {"a": 1.0, "b": 0.1}, description="search"),
    }


@pytest.mark.parametrize("name", ["curves", "bands", "search"])
def test_figures_are_small_deterministic_svg_in_the_colours_of_the_page(name: str) -> None:
    svg = figures()[name]
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert svg == figures()[name]
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert len(svg) < 60_000
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    title = next(child for child in root if child.tag.endswith("title"))
    assert title.text in {"a < b & c", "bands", "search"}


def page() -> Page:
    picture = Picture(png(torch.arange(64, dtype=torch.uint8).view(8, 8)), "a digit", ["label: 3", "8: 60 %"])
    blocks = [
        Paragraph("a <b>tag</b> & more"),
        Table(["x", "y"], [["1", "2"]], "a table"),
        Gallery([picture] * 5, "five", shown=2),
        FigureBlock(figures()["bands"], "bands"),
    ]
    return Page(
        "Title",
        "Question?",
        ["One.", "Two."],
        FigureBlock(figures()["curves"], "hero"),
        [Section("S", blocks)],
        ["end"],
    )


def test_the_page_is_one_file_that_asks_the_network_for_nothing(tmp_path: Path) -> None:
    write_page(page(), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert "@import" not in html
    assert "a &lt;b&gt;tag&lt;/b&gt; &amp; more" in html
    assert html.count("<img") == 5
    assert "The other 3" in html
    assert html.index("One.") < html.index("<svg") < html.index("<h2>")
    for need in ("prefers-color-scheme: dark", "@media print", "width=device-width", 'lang="en"'):
        assert need in html
    write_page(page(), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == html


def test_images_are_dark_ink_on_white() -> None:
    pixels = torch.tensor([[0, 255]], dtype=torch.uint8)
    image = Image.open(io.BytesIO(base64.b64decode(png(pixels))))
    assert [image.getpixel((0, 0)), image.getpixel((1, 0))] == [255, 0]
