"""Every figure on a study's page stands above the caption that the report gives it; links lead somewhere."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from batchlab.lab.report import FigureBlock
from batchlab.lab.studies.comparison_study import read_finished

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDIES = ["whitening", "factorization", "dropout-or-bn", "rectifiers", "learning-rates", "why"]


def _figures(of: Any) -> Iterator[FigureBlock]:
    if isinstance(of, FigureBlock):
        yield of
    elif isinstance(of, list | tuple):
        for one in of:
            yield from _figures(one)
    elif is_dataclass(of):
        for field in fields(of):
            yield from _figures(getattr(of, field.name))


@pytest.mark.parametrize("study", STUDIES)
def test_every_figure_on_the_page_has_its_caption(study: str) -> None:
    comparison = import_module(f"batchlab.lab.studies.{study.replace('-', '_')}").COMPARISON
    finished = read_finished(comparison, EXPERIMENTS / study)
    names = [path.stem for path in (EXPERIMENTS / study / "figures").glob("*.svg")]
    # In place of each drawing its name: then a block tells which figures it has.
    page = comparison.build_page(finished, comparison.summarize(finished), "", {name: f"<{name}>" for name in names})
    captions = {name: block.caption for block in _figures(page) for name in re.findall("<(.+?)>", block.svg)}
    text = (EXPERIMENTS / study / "README.md").read_text()
    shown = re.findall(r"!\[[^\]]+\]\(figures/(.+?)\.svg\)", text)
    assert shown
    below = re.sub(r"\s+", " ", text)
    for name in shown:
        more_images = r"(?: !\[[^\]]+\]\([^)]+\))*"  # side by side, under one caption
        assert re.search(rf"\(figures/{name}\.svg\){more_images} \*{re.escape(captions[name])}\*", below), name


@pytest.mark.parametrize("study", sorted(path.parent.name for path in EXPERIMENTS.glob("*/README.md")))
def test_links_within_a_page_lead_somewhere(study: str) -> None:
    text = (EXPERIMENTS / study / "README.md").read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    anchors = {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert not [link for link in links if link.startswith("#") and link[1:] not in anchors]
    files = [link for link in links if not link.startswith(("#", "http"))]
    assert not [link for link in files if not (EXPERIMENTS / study / link.partition("#")[0]).exists()]
