"""Compile the Triton kernels for a GPU that is not there, and print what came out as JSON; run as a program."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchlab.kernels import batch_norm_triton as kernels
from batchlab.kernels import batch_norm_triton_affine as affine
from batchlab.kernels import batch_norm_triton_moments as moments
from batchlab.kernels import batch_norm_triton_settle as once

SIZES = {
    "steps": "i32",
    "per_program": "i32",
    "splits": "i32",
    "size": "i32",
    "count": "i32",  # of merge_moments; a number in float64 of settle_gradients
    "channels": "i32",
    "plane": "i32",
}


def found(kernel: Any, arguments: dict[str, Any], aligned: bool, capability: int) -> dict[str, Any]:
    """Loads, stores and atomics in the PTX, registers and stack in the binary.

    An argument is a type's name, or a value to compile for (as Triton does with 1 and None).
    """
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, str) and not name.isupper():
            signature[name] = value
            if value.startswith("*") or (aligned and name in ("channels", "plane")):
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(position,)] = value
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return {
        "kernel": kernel.fn.__name__,
        "rows": arguments.get("ROWS"),
        "aligned": aligned,
        "double": "*fp64" in arguments.values(),
        "wide": sum(ptx.count(f"{move}.global.v4.b32") for move in ("ld", "st")),
        "narrow": len(re.findall(r"(?:ld|st)\.global\.b(?:8|16)\b", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "flushes": len(re.findall(r"\.ftz\b", ptx)),
        "registers": int(registers),
        "stack": int(stack),
    }


def settling() -> list[dict[str, Any]]:
    """The kernels that have vectors of channels alone: everything given, and nothing that need not be."""
    given = ["mean", "lost", "variance", "numbers", "running_mean", "running_var", "sums"]
    given += ["of_weight", "of_bias", "factors"]
    full = {**SIZES, **dict.fromkeys(given, "*fp32"), "batches": "*i64", "BLOCK_C": 128}
    full |= dict.fromkeys(["count", "eps", "momentum", "correction"], "fp64")
    optional = ["lost", "running_mean", "running_var", "batches", "factors"]
    few = {**full, **dict.fromkeys(optional), "mean": "*fp64", "variance": "*fp64", "sums": "*fp64"}
    return [
        found(kernel, arguments, False, 90)
        for kernel in (once.settle, once.settle_gradients)
        for arguments in (full, few)
    ]


def main() -> None:
    assert not kernels.INTERPRETED
    assert not kernels.serves(torch.ones(2, 3))
    for tuned in (kernels._apply, kernels._input_gradient):
        assert set(tuned.keys) <= set(tuned.arg_names)
    # Numbers that Triton would else take as float32: an eps, a momentum, a count.
    wide = [
        parameter.name
        for kernel in (once.settle, once.settle_gradients)
        for parameter in kernel.params
        if parameter.annotation_type == "fp64"
    ]
    assert wide == ["eps", "momentum", "correction", "count"]
    results = []
    number, exact = "*bf16", "*fp32"
    tensors = dict.fromkeys(["x", "y", "grad", "output", "residual", "grad_x", "grad_residual"], number)
    values = dict.fromkeys(["statistics", "numbers", "weight", "bias", "factors", "sums", "out", "partial"], exact)
    shared = {**SIZES, **tensors, **values, "ACTIVATION": "relu", "WHOLE": False}
    reading = [affine.apply, affine.gradient_sums, affine.input_gradient, moments.moments]
    for rows, block_c, block_s in ((False, 4, 512), (True, 64, 32)):
        tile = {"ROWS": rows, "BLOCK_C": block_c, "BLOCK_S": block_s}
        activation = "sigmoid" if rows else "relu"
        results += [found(kernel, {**shared, **tile, "ACTIVATION": activation}, True, 90) for kernel in reading]
    merged = {**shared, "BLOCK_C": 8, "BLOCK_P": 256}
    results += [found(kernel, merged, True, 90) for kernel in (moments.merge_moments, affine.merge_sums)]
    # What is special: nothing optional, float64, sizes of one and beyond 2³¹, an older GPU.
    bare = {
        **shared,
        "factors": None,
        "weight": None,
        "bias": None,
        "residual": None,
        "output": None,
        "grad_residual": None,
    }
    double = {**shared, **dict.fromkeys([*tensors, *values], "*fp64"), "output": None}
    single = {**bare, "channels": 1, "plane": 1, "ROWS": True, "BLOCK_C": 1, "BLOCK_S": 1, "WHOLE": True}
    single |= {"ACTIVATION": None}
    large = {**bare, "plane": "i64", "count": "i64", "size": "i64", "ROWS": False, "BLOCK_C": 1, "BLOCK_S": 2048}
    large |= {"ACTIVATION": "leaky_relu"}
    double |= {"ROWS": True, "BLOCK_C": 64, "BLOCK_S": 8, "ACTIVATION": "silu"}
    for special, capability in ((single, 90), (large, 80), (double, 80)):
        results += [found(kernel, special, False, capability) for kernel in reading]
    results += settling()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
