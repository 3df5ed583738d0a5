"""Compile a kernel at its first use, keep it in the user's cache, and say why where that cannot be done."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Final

import torch

__all__ = ["BuildError", "build", "cache_folder"]

FLAGS: Final = (
    "-O3",
    "-march=native",
    "-std=c++20",
    "-Wno-psabi",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
"""The last one: torch's stable interface as of 2.11, so that a build serves later versions of torch too."""

GLUE: Final = ("-O2", "-UTORCH_TARGET_VERSION")
"""Of a source that computes nothing itself, and needs more than the stable interface."""

TIMEOUT: Final = 300.0


class BuildError(RuntimeError):
    """A kernel could not be built; the message says why and what serves instead."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: $BATCHLAB_KERNELS, or batchlab/kernels in the user's cache."""
    chosen = os.environ.get("BATCHLAB_KERNELS")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchlab" / "kernels"


@cache
def _processor() -> str:
    """What -march=native depends on; a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))  # with arguments, perhaps: "ccache g++"
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"there is no C++ compiler $CXX={chosen[0]}")  # and no other replaces an explicit choice
        return chosen
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return [found]
    raise BuildError("there is no C++ compiler (looked for $CXX, c++, g++, clang++)")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _intact(folder: Path, key: str) -> Path | None:
    """The library in the cache, if it is whole: to load a part of one could end the process."""
    try:
        found = sorted(folder.glob(f"{key}-*.so"))
        return next((library for library in found if library.stem.endswith(_digest(library))), None)
    except OSError:
        return None


def _writable(folder: Path) -> Path:
    """The folder, or a private one for this process where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="batchlab-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="batchlab-"))


def build(source: Path, flags: tuple[str, ...] = ()) -> Path:
    """Return the compiled library of a C++ source, compiling it if the cache has none for this machine.

    The result appears in the cache under its final name at once. Of processes that start together one compiles, and the
    others wait for it. The name has a checksum of the contents: what a killed build or a full disk leaves, a later one
    replaces.

    Raises:
        BuildError: no compiler, or it failed; with its first lines of output.
    """
    # Its headers lie beside it; which of them it includes is not looked up.
    text = b"\0".join(path.read_bytes() for path in [source, *sorted(source.parent.glob("*.hpp"))])
    key = (
        source.stem
        + "-"
        + hashlib.sha256(
            b"\0".join(
                [
                    text,
                    torch.__version__.encode(),
                    " ".join(FLAGS + flags).encode(),
                    _processor().encode(),
                    sys.platform.encode(),
                ]
            )
        ).hexdigest()[:16]
    )
    found = _intact(cache_folder(), key)
    if found is not None:
        return found
    compiler = _compiler()
    folder = _writable(cache_folder())
    # Workers that start together would all compile; one does, and the others find its library.
    with _alone(folder, key):
        return _intact(folder, key) or _compile(source, [*compiler, *FLAGS, *flags], folder, key)


@contextmanager
def _alone(folder: Path, key: str) -> Iterator[None]:
    """Keep other processes from compiling the same thing meanwhile, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / f"{key}.lock"
    with path.open("w") as stream:
        with suppress(OSError):  # a file system without locks: compiled twice, and no harm
            fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # who waits has it open; who comes later finds the library


def _compile(source: Path, compiler: list[str], folder: Path, key: str) -> Path:
    torch_folder = Path(torch.__file__).parent
    started = time.perf_counter()
    print(f"batchlab: compiling {source.name}, once (up to half a minute) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="batchlab-") as work:
        built = Path(work) / f"{key}.so"
        includes = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
        command = [*compiler, *(f"-I{folder}" for folder in includes), str(source), "-o", str(built)]
        command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{compiler[0]} did not compile {source.name}: {error}") from error
        if done.returncode != 0:
            raise BuildError(f"{compiler[0]} did not compile {source.name}: {done.stderr.strip()[:600]}")
        target = folder / f"{key}-{_digest(built)}.so"
        handle, partial = tempfile.mkstemp(dir=folder, suffix=".partial")
        os.close(handle)
        try:
            shutil.copyfile(built, partial)
            Path(partial).chmod(0o755)
            Path(partial).replace(target)
        except OSError as error:
            Path(partial).unlink(missing_ok=True)
            raise BuildError(f"{folder} cannot hold the compiled {source.name}: {error}") from error
    seconds = time.perf_counter() - started
    print(f"batchlab: compiled {source.name} in {seconds:.0f} s, kept in {folder}", file=sys.stderr, flush=True)
    return target
