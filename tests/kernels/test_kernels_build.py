"""Kernels are compiled once, whoever asks first, and where that cannot be done PyTorch's own operations serve."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab import kernels
from batchlab.kernels import batch_norm
from batchlab.kernels.build import BuildError, _alone, build, cache_folder, compiled, writable
from batchlab.kernels.source import Source

pytestmark = pytest.mark.skipif(not kernels.submatrix.available(), reason="no C++ compiler")

TINY = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("BATCHLAB_KERNELS", str(folder))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "tiny.cpp"
    path.write_text(TINY)
    return Source(path)


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHLAB_KERNELS", "/a/b")
    assert cache_folder() == Path("/a/b")
    monkeypatch.delenv("BATCHLAB_KERNELS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_folder() == Path("/c/batchlab/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "batchlab" / "kernels"


def test_compiles_once(cache: Path, source: Source, capfd: pytest.CaptureFixture[str]) -> None:
    library = build(source)
    assert library.parent == cache
    assert answer(library) == 42
    assert "compiling tiny.cpp, once" in capfd.readouterr().err
    written = library.stat().st_mtime_ns
    assert build(source) == library
    assert library.stat().st_mtime_ns == written
    assert capfd.readouterr().err == ""
    assert [path.name for path in cache.iterdir()] == [library.name]  # nothing partial is left


def test_another_source_or_compiler_flag_is_another_library(source: Source, cache: Path) -> None:
    first = build(source)
    source.path.write_text(TINY.replace("42", "ANSWER"))
    other = Source(source.path, flags=("-DANSWER=43",))
    second = build(other)
    third = build(replace(other, flags=("-DANSWER=44",)))
    assert len({first, second, third}) == 3
    assert first.parent == second.parent == third.parent == cache
    assert (answer(second), answer(third)) == (43, 44)
    assert compiled(other) == second


def test_a_source_has_its_flags_and_libraries(cache: Path, source: Source) -> None:
    source.path.write_text(
        "#include <cmath>\n#if __cplusplus >= 202002L\n#error as all kernels\n#endif\n"
        + TINY.replace("42", "TORCH_TARGET_VERSION != 0")
    )
    with pytest.raises(BuildError, match="as all kernels"):
        build(source)
    assert answer(build(replace(source, flags=(*source.flags, "-std=c++17")))) == 1
    with pytest.raises(BuildError, match="no-such-library"):
        build(replace(source, flags=(*source.flags, "-std=c++17"), libraries=("no-such-library",)))


def test_what_is_in_the_cache_is_found_and_nothing_is_compiled_to_find_it(cache: Path, source: Source) -> None:
    assert compiled(source) is None
    assert not cache.exists()
    library = build(source)
    assert compiled(source) == library
    library.unlink()
    library.write_bytes(b"")
    assert compiled(source) is None


def test_lines_go_to_who_asks(cache: Path, source: Source, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    build(source, lines.append)
    assert lines == [f"compiling tiny.cpp, once (up to half a minute), kept in {cache}"]
    build(source, lines.append)
    assert len(lines) == 1
    assert capfd.readouterr().err == ""


def test_whether_a_folder_can_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert writable(tmp_path)
    assert writable(tmp_path / "a" / "b")
    assert not writable(tmp_path / "file")
    assert not writable(tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_falling_back_an_unusable_folder_is_an_error(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BATCHLAB_KERNELS", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"file cannot be written to: set BATCHLAB_KERNELS"):
        build(source, fall_back=False)


@pytest.mark.parametrize("size", [0, 10, 5000, -1], ids=["empty", "header", "half", "changed"])
def test_a_damaged_library_is_built_again(cache: Path, source: Source, size: int) -> None:
    library = build(source)
    whole = library.read_bytes()
    damaged = whole[:size] if size >= 0 else whole[:-1] + bytes([whole[-1] ^ 1])
    library.unlink()  # a new file: the old one may be loaded here
    library.write_bytes(damaged)
    found = build(source)
    assert found.read_bytes() == whole
    assert answer(found) == 42
    assert len(list(cache.glob("*.so"))) == 1


def test_two_processes_at_once(cache: Path, source: Source) -> None:
    code = (
        "from pathlib import Path\nfrom batchlab.kernels.build import build\n"
        "from batchlab.kernels.source import Source\n"
        f"print(build(Source(Path({str(source.path)!r}))))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    names = {out.strip() for out, _ in outputs}
    assert len(names) == 1
    assert answer(Path(names.pop())) == 42
    assert len(list(cache.iterdir())) == 1
    if os.name == "posix":
        assert sum("compiling" in err for _, err in outputs) == 1  # the other one waited


def test_an_unusable_folder_is_replaced(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BATCHLAB_KERNELS", str(tmp_path / "file" / "below"))
    library = build(source)
    assert tmp_path not in library.parents
    assert answer(library) == 42
    library.unlink()
    library.parent.rmdir()


def test_a_folder_that_cannot_be_written_to_is_replaced(
    cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode, **options: path != cache and access(path, mode, **options))
    library = build(source)
    assert library.parent != cache
    assert answer(library) == 42
    library.unlink()
    library.parent.rmdir()


def test_what_the_compiler_says_is_in_the_error(cache: Path, source: Source) -> None:
    source.path.write_text("int f() { return misspelled; }")
    with pytest.raises(BuildError, match=r"did not compile tiny.cpp:(.|\n)*misspelled"):
        build(source)
    assert not list(cache.iterdir())


def test_a_compiler_that_only_fails(cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    script = source.path.parent / "compiler"
    script.write_text("#!/bin/sh\necho licence expired >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(BuildError, match=r"compiler did not compile tiny\.cpp: licence expired"):
        build(source)


def test_the_compiler_may_have_arguments(source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env c++")
    assert answer(build(source)) == 42
    assert list(cache.iterdir())


def test_no_other_compiler_replaces_the_chosen_one(
    source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(BuildError, match=r"there is no C\+\+ compiler \$CXX=/nonexistent"):
        build(source)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(BuildError, match=r"looked for \$CXX, c\+\+, g\+\+, clang\+\+"):
        build(source)


STEP = """
import warnings
import torch
from torch import nn
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from batchlab import kernels
    from batchlab.nn import BatchwiseDropout, SubmatrixSequential
    from batchlab.optim import SubmatrixSGD
    torch.manual_seed(0)
    modules = [
        nn.Conv2d(2, 6, 3), nn.ReLU(), BatchwiseDropout(), nn.Flatten(),
        nn.Linear(54, 20), nn.ReLU(), BatchwiseDropout(), nn.Linear(20, 9), nn.ReLU(), BatchwiseDropout(0.3),
        nn.Linear(9, 3),
    ]
    net = SubmatrixSequential(*modules, mode="submatrix").double()
    optimizer = SubmatrixSGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.ones(4, 2, 5, 5, dtype=torch.float64)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
print(kernels.submatrix.available())
print([str(w.message) for w in caught if w.category is RuntimeWarning])
print([round(p.sum().item(), 9) for p in net.parameters()], kernels.submatrix.release_memory() >= 0)
"""


def test_without_a_compiler_results_are_equal(cache: Path) -> None:
    with_kernel = python(STEP, BATCHLAB_KERNELS="")
    without = python(STEP, CXX="/nonexistent")
    assert with_kernel.returncode == without.returncode == 0, without.stderr
    first, second = with_kernel.stdout.splitlines(), without.stdout.splitlines()
    assert (first[0], second[0]) == ("True", "False")
    assert first[1] == "[]"
    assert second[1].count("there is no C++ compiler") == 1
    assert "right, but slower" in second[1]
    assert first[2] == second[2]
    assert not cache.exists() or not list(cache.iterdir())


def test_a_damaged_library_and_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCHLAB_KERNELS")
    library = build(kernels.submatrix.SOURCE)
    cache.mkdir()
    (cache / library.name).write_bytes(library.read_bytes()[:40000])
    done = python(STEP, CXX="/nonexistent", BATCHLAB_KERNELS=str(cache))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_forked_during_a_build_keeps_nobody_waiting(cache: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    cache.mkdir()
    with _alone(cache, "key"), batch_norm._LOADING:
        waiting = (cache / "key.lock").open("w")
        child = os.fork()
        if child == 0:
            opened = batch_norm._LOADING.acquire(timeout=10)
            time.sleep(30 if opened else 0)  # with the files of its parent open
            os._exit(1)
    try:
        with waiting:
            fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.2)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it has the lock, and sleeps
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_cache_that_cannot_be_written_to_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    (tmp_path / "temporary").mkdir()
    code = (
        "from batchlab.kernels import build; a, b = build._folder(True), build._folder(True); print(a == b, a.is_dir())"
    )
    done = python(code, BATCHLAB_KERNELS=str(tmp_path / "cache"), TMPDIR=str(tmp_path / "temporary"))
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert list((tmp_path / "temporary").iterdir()) == []
