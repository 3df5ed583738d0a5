"""A kernel is made of its file and the headers that this includes, and of no other."""

import subprocess
from pathlib import Path

import pytest
import torch

from batchlab import kernels
from batchlab.kernels.build import BuildError, build, compiled, find_compiler
from batchlab.kernels.source import Source, included


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.hpp"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def names(path: Path) -> list[str]:
    return sorted(file.name for file in included(path))


def test_headers_are_followed_to_the_end_and_others_are_not(tmp_path: Path) -> None:
    source = tmp_path / "one.cpp"
    source.write_text(
        '#include <vector>\n#include "a.hpp"\n  #  include\t"inner/b.hpp"  // why\n#include "absent.hpp"\n'
        'const char* text = "other.hpp";\n// #include "other.hpp"\n#include <other.hpp>\n#include NAME\n'
    )
    write(tmp_path, a='#pragma once\r\n#include "c.hpp"\r\n', c='#include "a.hpp"\n#include "c.hpp"', other="")
    write(tmp_path, inner__b='#include "d.hpp"\n#include "../e.hpp"', inner__d="", d="not this one", e="")
    assert names(source) == ["a.hpp", "b.hpp", "c.hpp", "d.hpp", "e.hpp", "one.cpp"]
    assert tmp_path / "inner" / "d.hpp" in included(source)
    assert tmp_path / "d.hpp" not in included(source)
    assert len(included(source)) == len(set(included(source)))


def test_a_source_without_headers_and_one_of_strange_bytes(tmp_path: Path) -> None:
    source = tmp_path / "one.cpp"
    source.write_bytes(b"int f();")
    assert included(source) == (source,)
    source.write_bytes(b'// \xff\xfe\n#include "a.hpp"\n')
    write(tmp_path, a="")
    assert names(source) == ["a.hpp", "one.cpp"]


@pytest.mark.parametrize("source", kernels.SOURCES, ids=lambda source: source.name)
def test_the_compiler_sees_the_same_headers(source: Source) -> None:
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    command = [*compiler, "-MM", "-march=native", "-std=c++20", *source.flags]
    include = Path(torch.__file__).parent / "include"
    command += ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"), str(source.path)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout
    words = listed.replace("\\\n", " ").split()[1:]
    assert {Path(word).resolve() for word in words} == set(included(source.path))


def test_a_changed_header_makes_only_its_own_kernels_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHLAB_KERNELS", str(tmp_path / "cache"))
    write(tmp_path, shared='#include "deep.hpp"\n', deep="#define DEEP 1\n", own="#define OWN 2\n", unused="")
    first, second = Source(tmp_path / "first.cpp"), Source(tmp_path / "second.cpp")
    first.path.write_text('#include "shared.hpp"\nextern "C" int answer() { return DEEP; }\n')
    second.path.write_text('#include "own.hpp"\n#include "shared.hpp"\nextern "C" int answer() { return OWN; }\n')
    try:
        libraries = [build(first), build(second)]
    except BuildError as error:
        pytest.skip(str(error))
    write(tmp_path, unused="int new_text;")
    assert [compiled(first), compiled(second)] == libraries
    write(tmp_path, own="#define OWN 3\n")
    assert [compiled(first), compiled(second)] == [libraries[0], None]
    write(tmp_path, own="#define OWN 2\n", deep="#define DEEP 4\n")
    assert [compiled(first), compiled(second)] == [None, None]
    write(tmp_path, deep="#define DEEP 1\n")
    assert [compiled(first), compiled(second)] == libraries


def test_each_kernel_is_listed_once() -> None:
    folder = Path(kernels.__file__).parent
    assert sorted(source.path for source in kernels.SOURCES) == sorted(folder.glob("*.cpp"))
