"""What is said about an installation is so, and nothing about it can make it fail or change anything."""

import json
import os
import subprocess
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from batchlab.kernels.build import BuildError, build
from batchlab.kernels.source import Source
from batchlab.lab import installation, records
from batchlab.lab.data import CATALOG
from batchlab.lab.installation import describe_installation


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """The only kernel there is, with an empty cache."""
    path = tmp_path / "tiny.cpp"
    path.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setenv("BATCHLAB_KERNELS", str(tmp_path / "cache"))
    only = Source(path)
    monkeypatch.setattr(installation, "SOURCES", (only,))
    return only


def test_versions_and_machine_are_those_of_the_records() -> None:
    found, environment = describe_installation(), records.describe_environment()
    for name in ("batchlab", "python", "numpy"):
        assert found["versions"][name] == environment[name]
    assert found["versions"]["torch"].startswith(torch.__version__)
    assert found["machine"]["processor"] == environment["processor"]
    assert found["machine"]["threads"] == f"{torch.get_num_threads()}, of torch"
    assert f"of {os.cpu_count()}" in found["machine"]["cores"]
    assert json.loads(json.dumps(found)) == found
    assert "unknown" not in json.dumps(found)


def test_states_of_a_kernel(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> str:
        return describe_installation()["kernels"]["tiny"]

    monkeypatch.setenv("CXX", "/nonexistent")
    assert "there is no C++ compiler $CXX=/nonexistent" in state()
    assert "PyTorch's own operations serve" in state()
    assert describe_installation()["kernels"]["compiler"] == "none: there is no C++ compiler $CXX=/nonexistent"
    monkeypatch.setenv("CXX", "true")
    assert state() == "not compiled yet: at its first use, or now with `batchlab build`"
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("BATCHLAB_KERNELS", str(source.path))  # a file
    assert "cannot be written to" in state()
    assert "cannot be written to" in describe_installation()["kernels"]["cache"]
    monkeypatch.setenv("BATCHLAB_KERNELS", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX")
    try:
        library = build(source)
    except BuildError as error:
        pytest.skip(str(error))
    assert state() == "compiled, in the cache"
    monkeypatch.setenv("CXX", "/nonexistent")  # which is not needed any more
    assert state() == "compiled, in the cache"
    library.unlink()
    library.write_bytes(b"half")
    assert state() != "compiled, in the cache"


def test_a_part_that_fails_says_why_and_the_others_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    whole = describe_installation()
    for owner, name in (
        (records, "describe_environment"),
        (installation, "locate_dataset"),
        (installation, "compiled"),
        (installation, "find_compiler"),
        (installation, "cache_folder"),
        (metadata, "requires"),
        (metadata, "version"),
        (torch, "get_num_threads"),
        (os, "sysconf"),
        (subprocess, "run"),
        (torch.cuda, "is_available"),
        (torch.accelerator, "is_available"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            found = describe_installation()
        assert list(found) == list(whole)
        broken = [text for facts in found.values() for text in facts.values() if "RuntimeError: broken" in text]
        assert broken, name
        for section in ("versions", "machine", "kernels", "data"):
            assert list(found[section]) == list(whole[section])


def test_without_metadata_and_data_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    monkeypatch.setenv("BATCHLAB_DATA", str(tmp_path / "nowhere"))
    found = describe_installation()
    assert "PackageNotFoundError" in found["extras"]["unknown"]
    assert list(found["data"]) == [entry.title for entry in CATALOG.values()]
    assert "nowhere does not exist" in found["data"]["MNIST"]


def test_missing_parts_of_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy>=1.26", "rich>=13.7; extra == 'lab'", 'no-such-thing ; (python_version > "3") and extra == "lab"']
    monkeypatch.setattr(metadata, "requires", lambda name: [*lines, "ruff==1; extra == 'dev'"])
    extras = describe_installation()["extras"]
    assert list(extras) == ["dev", "lab"]
    assert extras["lab"] == f"no-such-thing not installed, rich {metadata.version('rich')}"


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30, major=9, minor=0)

    def properties(index: int) -> SimpleNamespace:
        if index == 1:
            raise RuntimeError("fell off the bus")
        return card

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    gpus = describe_installation()["GPUs"]
    assert gpus["cuda:0"] == "Some GPU, 80.0 GiB, compute capability 9.0"
    assert "fell off the bus" in gpus["cuda:1"]


def test_the_home_folder_is_not_named(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BATCHLAB_DATA", str(tmp_path / "nowhere"))
    found = describe_installation()
    assert str(tmp_path) not in json.dumps(found)
    assert found["kernels"]["cache"] == found["variables"]["BATCHLAB_KERNELS"] == "~/cache"
    monkeypatch.setenv("BATCHLAB_KERNELS", f"{tmp_path}-other/cache")
    assert describe_installation()["variables"]["BATCHLAB_KERNELS"] == f"{tmp_path}-other/cache"


def test_it_takes_no_time() -> None:
    records.describe_environment.cache_clear()
    started = time.process_time()
    describe_installation()
    assert time.process_time() - started < 2
