"""Compile a kernel at its first use or ahead of it, keep it in the user's cache, and say why where that cannot be."""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Final

import torch

from batchlab.kernels.source import Source, included

__all__ = ["BuildError", "build", "cache_folder", "compiled", "find_compiler", "load", "say", "writable"]

FLAGS: Final = (
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fno-math-errno",
    "-Wno-psabi",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
)
"""Those of all kernels; hidden, so that two versions of one in a process do not take each other's functions."""

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


def find_compiler() -> list[str]:
    """The command that compiles C++: $CXX, or the first of c++, g++ and clang++ that is there.

    Raises:
        BuildError: there is none, or not the one that is asked for.
    """
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


def writable(folder: Path) -> bool:
    """Whether a file can be made in a folder, which need not be there yet; nothing is made to find out."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except (OSError, StopIteration):
        return False
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@cache
def _private_folder() -> Path:
    """One for this process, removed at its end."""
    folder, owner = Path(tempfile.mkdtemp(prefix="batchlab-")), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _folder(fall_back: bool) -> Path:
    """The cache, or a private folder for this process where it cannot be written to."""
    folder = cache_folder()
    if writable(folder):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            return folder
    if not fall_back:
        raise BuildError(f"{folder} cannot be written to: set BATCHLAB_KERNELS to a folder that can")
    if not _private_folder().is_dir():  # somebody has tidied up
        _private_folder.cache_clear()
    return _private_folder()


def _key(source: Source) -> str:
    """The name in the cache: another one for other text, flags, torch or processor."""
    facts = [
        *(path.read_bytes() for path in included(source.path)),
        torch.__version__.encode(),
        " ".join([*FLAGS, *source.flags, *source.libraries]).encode(),
        _processor().encode(),
        sys.platform.encode(),
    ]
    digest = hashlib.sha256(b"\0".join(facts)).hexdigest()
    return f"{source.name}-{digest[:16]}"


def compiled(source: Source) -> Path | None:
    """The library of a source as it is now, for this machine, if the cache has it; compiles nothing."""
    return _intact(cache_folder(), _key(source))


def say(line: str) -> None:
    """Print a notice on standard error."""
    print(f"batchlab: {line}", file=sys.stderr, flush=True)


def build(source: Source, announce: Callable[[str], None] = say, fall_back: bool = True) -> Path:
    """Return the compiled library of a C++ source, compiling it if the cache has none for this machine.

    The result appears in the cache under its final name at once. Of processes that start together one compiles, and the
    others wait for it. The name has a checksum of the contents: what a killed build or a full disk leaves, a later one
    replaces.

    Args:
        source: what to compile.
        announce: called with a line before the compilation.
        fall_back: where the cache cannot be written to, compile for this process alone; else that is an error.

    Raises:
        BuildError: no compiler, or it failed; with its first lines of output.
    """
    key = _key(source)
    found = _intact(cache_folder(), key)
    if found is not None:
        return found
    compiler = find_compiler()
    folder = _folder(fall_back)
    # Workers that start together would all compile; one does, and the others find its library.
    with _alone(folder, key):
        return _intact(folder, key) or _compile(source, compiler, folder, key, announce)


def load(library: Path) -> None:
    """Make the operators of a compiled library known to torch.

    Raises:
        BuildError: it cannot be loaded; with what the system says.
    """
    try:
        torch.ops.load_library(str(library))
    except (RuntimeError, OSError) as error:
        raise BuildError(f"{library} cannot be loaded: {error.__cause__ or error}") from error


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
            with suppress(OSError):  # not left to closing: a process forked meanwhile has the file open, too
                fcntl.flock(stream, fcntl.LOCK_UN)


def _compile(source: Source, compiler: list[str], folder: Path, key: str, announce: Callable[[str], None]) -> Path:
    torch_folder = Path(torch.__file__).parent
    announce(f"compiling {source.path.name}, once (up to half a minute), kept in {folder}")
    with tempfile.TemporaryDirectory(prefix="batchlab-") as work:
        built = Path(work) / f"{key}.so"
        includes = [torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include"]
        command = [*compiler, *FLAGS, *source.flags, *(f"-I{place}" for place in includes), str(source.path)]
        command += ["-o", str(built), f"-L{torch_folder / 'lib'}", *(f"-l{name}" for name in source.libraries)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{compiler[0]} did not compile {source.path.name}: {error}") from error
        if done.returncode != 0:
            raise BuildError(f"{compiler[0]} did not compile {source.path.name}: {done.stderr.strip()[:600]}")
        target = folder / f"{key}-{_digest(built)}.so"
        handle, partial = tempfile.mkstemp(dir=folder, suffix=".partial")
        os.close(handle)
        try:
            shutil.copyfile(built, partial)
            Path(partial).chmod(0o755)
            Path(partial).replace(target)
        except OSError as error:
            Path(partial).unlink(missing_ok=True)
            raise BuildError(f"{folder} cannot hold the compiled {source.path.name}: {error}") from error
    return target
