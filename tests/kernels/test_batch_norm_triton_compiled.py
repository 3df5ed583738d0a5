"""The Triton kernels compiled for an H100 and an A100, on any machine: what the interpreter does not see.

Triton brings NVIDIA's assembler along, so a kernel that does not compile, or spills, is found without a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tests.triton_kernels  # noqa: F401  # skips this module where triton is not installed

PROGRAM = Path(__file__).parents[1] / "triton_compile.py"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In a process of its own: here the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


@pytest.mark.slow
def test_compiled_kernels(compiled: list[dict[str, Any]]) -> None:
    assert len(compiled) == 26
    for result in compiled:
        assert result["stack"] <= 16, result  # nothing much is spilled to memory
        assert result["atomics"] == 0, result  # every sum has one order
        if not result["double"]:  # where exp looks at half of a number
            assert result["flushes"] == 0, result  # subnormal numbers are kept
        if result["aligned"]:  # 16 bytes a thread and access, none smaller than 4, in both layouts
            assert result["stack"] == 0, result
            assert result["wide"] > 0, result
            assert result["narrow"] == 0, result
            assert result["registers"] <= 128, result  # four programs of 128 threads on a multiprocessor at least
