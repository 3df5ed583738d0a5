"""Whatever the documents show as code runs: README, cards, and every docstring's example."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import batchlab

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "cards").glob("*.md"))]
MODULES = sorted(
    info.name for info in pkgutil.walk_packages(batchlab.__path__, "batchlab.") if not info.name.endswith("__main__")
)


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks(page)
    assert code, f"{page.name} shows no code"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in code:
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if "triton" in name or name.endswith("_cuda"):
        pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(module, optionflags=flags, extraglobs={"torch": __import__("torch")})
    assert failed == 0


def test_public_names_have_docstrings_with_an_example() -> None:
    missing = []
    for package in (batchlab.functional, batchlab.nn, batchlab.optim, batchlab.surgery):
        for name in package.__all__:
            thing = getattr(package, name)
            if not thing.__doc__:
                missing.append(f"{package.__name__}.{name}")
            elif package is not batchlab.surgery and ">>>" not in thing.__doc__:
                missing.append(f"{package.__name__}.{name} (example)")
    assert not missing


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("experiments/*/README.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken
