"""`batchlab build` and `batchlab info`, as an image's script and a person meet them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import batchlab.cli.build as command
from batchlab import kernels
from batchlab.cli import main
from batchlab.kernels.build import BuildError, compiled, find_compiler
from batchlab.kernels.source import Source
from batchlab.lab import installation


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where two kernels of a line each, that are all there are, are to be kept."""
    sources = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.cpp"
        path.write_text(f"int {name}() {{ return 42; }}\n")
        sources.append(Source(path))
    for module in (command, installation):
        monkeypatch.setattr(module, "SOURCES", tuple(sources))
    folder = tmp_path / "cache"
    monkeypatch.setenv("BATCHLAB_KERNELS", str(folder))
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    return folder


def test_kernels_are_built_once_and_a_line_each_says_so(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build"]) == 0
    said = capsys.readouterr()
    libraries = sorted(cache.glob("*.so"))
    assert [library.name.split("-")[0] for library in libraries] == ["first", "second"]
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines] == ["first", "second"]
    for line, library in zip(lines, libraries, strict=True):
        assert re.search(r" built in \d+ s: ", line)
        assert line.endswith(str(library))
    assert "compiling first.cpp" in said.err
    written = [library.stat().st_mtime_ns for library in libraries]
    assert main(["build"]) == 0
    said = capsys.readouterr()
    assert [line.split(maxsplit=1)[1] for line in said.out.splitlines()] == [
        f"was there already: {library}" for library in libraries
    ]
    assert said.err == ""
    assert [library.stat().st_mtime_ns for library in libraries] == written


def test_one_that_fails_is_named_with_the_reason_and_the_others_are_built(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.SOURCES[0].path.write_text("int first() { return misspelled; }")
    assert main(["build"]) == 1
    said = capsys.readouterr()
    assert "batchlab: first: " in said.err
    assert "misspelled" in said.err
    assert said.out.startswith("second ")
    assert [path.name.split("-")[0] for path in cache.iterdir()] == ["second"]


def test_a_library_that_does_not_load_is_a_failure(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.SOURCES[0].path.write_text('extern "C" int absent_function();\nint value = absent_function();\n')
    assert main(["build"]) == 1
    assert re.search(r"batchlab: first: .*cannot be loaded: .*absent_function", capsys.readouterr().err)


def test_without_a_compiler(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    assert main(["build"]) == 1
    said = capsys.readouterr()
    assert said.err.count("there is no C++ compiler $CXX=/nonexistent") == 2
    assert "PyTorch's own operations serve" in said.err
    assert said.out == ""
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_to_is_no_reason_to_build_elsewhere(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHLAB_KERNELS", str(command.SOURCES[0].path))
    assert main(["build"]) == 1
    assert "set BATCHLAB_KERNELS to a folder that can" in capsys.readouterr().err


def test_help_says_where_they_go(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["build", "--help"])
    assert end.value.code == 0
    assert "BATCHLAB_KERNELS" in capsys.readouterr().out


def test_info_is_a_table_or_the_same_as_json(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plain = "".join(character for character in shown if character.isalnum())
    for section, facts in found.items():
        assert section in shown
        for label in facts:
            assert label in shown
        for text in ("".join(c for c in word if c.isalnum()) for fact in facts.values() for word in fact.split()):
            assert text in plain
    assert found["kernels"]["first"].startswith("not compiled yet")
    assert not cache.exists()
    assert main(["build"]) == 0
    capsys.readouterr()
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"]["second"] == "compiled, in the cache"


@pytest.mark.parametrize("words", [["info", "--colour"], ["build", "--folder", "x"], ["build", "first"]])
def test_a_mistake_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert f"see batchlab {words[0]} --help" in lines[0]


def test_both_start_without_what_studies_need() -> None:
    code = (
        "import sys\n"
        "for name in 'matplotlib joblib jinja2 PIL safetensors cattrs pooch'.split():\n"
        "    sys.modules[name] = None\n"
        "from batchlab.cli import main\n"
        "assert main(['info', '--json']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "ModuleNotFoundError" in found["versions"]["python"]
    assert found["kernels"].keys() >= {source.name for source in kernels.SOURCES}


@pytest.mark.skipif(not kernels.submatrix.available(), reason="no C++ compiler")
def test_what_build_finds_is_what_the_first_use_takes(tmp_path: Path) -> None:
    for source in kernels.SOURCES:
        library = compiled(source)
        assert library is not None
        shutil.copy(library, tmp_path)
    # In a process of its own: torch cannot have the same operators from two files.
    code = (
        "from batchlab import kernels\nfrom batchlab.cli import main\nassert main(['build']) == 0\n"
        "print(kernels.batch_norm.available(), kernels.submatrix.available())"
    )
    environment = {**os.environ, "BATCHLAB_KERNELS": str(tmp_path), "CXX": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("was there already") == len(kernels.SOURCES)
    assert done.stdout.split()[-2:] == ["True", "True"]
