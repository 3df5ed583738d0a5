"""What a bug report needs, and what serves here: versions, machine, kernels, data, optional parts."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from batchlab.kernels import SOURCES
from batchlab.kernels.build import BuildError, cache_folder, compiled, find_compiler, writable
from batchlab.kernels.source import Source
from batchlab.lab.data import CATALOG, locate_dataset

__all__ = ["describe_installation"]

VARIABLES: Final = (
    "BATCHLAB_DATA",
    "BATCHLAB_KERNELS",
    "BATCHLAB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
    "XDG_CACHE_HOME",
)

Facts = dict[str, str]


def _told(find: Callable[[], Any]) -> str:
    """What was found, or why it could not be: a broken installation is what somebody wants to see."""
    try:
        text = str(find())
    except Exception as error:
        text = f"unknown ({type(error).__name__}: {error})"
    try:
        home = str(Path.home())
    except RuntimeError:
        return text
    # Reports are public, and the name of a home folder is often a person's.
    return re.sub(re.escape(home) + r"(?![\w.-])", "~", text) if len(home) > 1 else text


def _environment() -> dict[str, Any]:
    # Here, because it imports other optional parts, and that one of them is missing is to be told.
    from batchlab.lab.records import describe_environment

    return describe_environment()


def _version(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def _commit() -> str:
    return _environment()["commit"] or "not a checkout"


def _torch() -> str:
    cuda, rocm = torch.version.cuda, torch.version.hip
    built = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "the CPU alone"
    return f"{torch.__version__} (built for {built})"


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} for this process, of {os.cpu_count()}"


def _gigabytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file():
        text = limit.read_text(encoding="ascii").strip()
        if text.isdecimal() and int(text) < total:
            return f"{_gigabytes(int(text))} for this process, of {_gigabytes(total)}"
    return _gigabytes(total)


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, {_gigabytes(found.total_memory)}, compute capability {found.major}.{found.minor}"


def _gpus() -> Facts:
    if torch.cuda.is_available():
        return {f"cuda:{index}": _told(partial(_gpu, index)) for index in range(torch.cuda.device_count())}
    if torch.accelerator.is_available():
        return {"other": str(torch.accelerator.current_accelerator())}
    return {"none": "this torch finds none"}


def _compiler() -> str:
    try:
        command = find_compiler()
    except BuildError as error:
        return f"none: {error}"
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=5, check=False)
    return f"{' '.join(command)} ({(done.stdout.splitlines() or ['says no version'])[0]})"


def _kernel(source: Source) -> str:
    if compiled(source) is not None:
        return "compiled, in the cache"
    try:
        find_compiler()
    except BuildError as error:
        return f"not compiled, and {error}: PyTorch's own operations serve, right but slower"
    if not writable(cache_folder()):
        return "not compiled, and the cache cannot be written to: each process compiles it anew; set BATCHLAB_KERNELS"
    return "not compiled yet: at its first use, or now with `batchlab build`"


def _cache() -> str:
    folder = cache_folder()
    return f"{folder}{'' if writable(folder) else ' (cannot be written to)'}"


def _data(name: str) -> str:
    source, folder = locate_dataset(name)
    if source == "embedded":
        return "5,000 digits, which come with batchlab"
    if source == "download":
        return f"not here; a study downloads it to {folder}"
    return f"in {folder}"


def _extras() -> Facts:
    wanted: dict[str, list[str]] = {}
    for line in metadata.requires("batchlab") or []:
        found = re.match(r"""([\w.-]+).*;.*\bextra *== *["']([\w.-]+)["']""", line)
        if found:
            wanted.setdefault(found[2], []).append(found[1])
    return {
        extra: ", ".join(f"{name} {_version(name)}" for name in sorted(names))
        for extra, names in sorted(wanted.items())
    }


def _section(facts: Mapping[str, Callable[[], Any]]) -> Facts:
    return {label: _told(find) for label, find in facts.items()}


def _whole(find: Callable[[], Facts]) -> Facts:
    """A section whose labels have to be found, too."""
    try:
        return {label: _told(partial(str, text)) for label, text in find().items()}
    except Exception as error:
        return {"unknown": f"{type(error).__name__}: {error}"}


def describe_installation() -> dict[str, Facts]:
    """What is installed here and what serves, as sections of labels and texts, without the name of the home folder.

    Compiles, downloads and changes nothing, and never fails: what cannot be found out says why.

    >>> describe_installation()["versions"]["batchlab"]
    '...'
    """
    return {
        "versions": _section(
            {
                "batchlab": lambda: _environment()["batchlab"],
                "commit": _commit,
                "python": lambda: _environment()["python"],
                "torch": _torch,
                "numpy": lambda: _environment()["numpy"],
                "triton": lambda: _version("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"),
            }
        ),
        "machine": _section(
            {
                "system": lambda: _environment()["system"],
                "processor": lambda: _environment()["processor"],
                "vectors": lambda: _environment()["vector_instructions"],
                "cores": _cores,
                "threads": lambda: f"{torch.get_num_threads()}, of torch",
                "memory": _memory,
            }
        ),
        "GPUs": _whole(_gpus),
        "kernels": _section(
            {
                **{source.name: partial(_kernel, source) for source in SOURCES},
                "compiler": _compiler,
                "cache": _cache,
            }
        ),
        "data": _section({entry.title: partial(_data, name) for name, entry in CATALOG.items()}),
        "extras": _whole(_extras),
        "variables": _whole(lambda: {name: os.environ[name] for name in VARIABLES if name in os.environ}),
    }
