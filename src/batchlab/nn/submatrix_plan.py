"""What each dropout of a chain saves, in words, for `repr`."""

from __future__ import annotations

from batchlab.nn.batchwise_dropout import BatchwiseDropout
from batchlab.nn.submatrix_layers import Step, batch_norm_dimensions, convolution_dimensions, dropout_ahead, keeps_zero

__all__ = ["describe"]


def _dimensions(steps: list[Step], start: int) -> int:
    """The usual number of dimensions at a place in the chain, by the first layer from there on that tells."""
    for _, module, kind in steps[start:]:
        if kind == "convolution":
            return convolution_dimensions(module) + 2
        if kind == "batch_norm":
            return batch_norm_dimensions(module)[0]
        if kind == "linear" or kind == "flatten":
            return 2
    return 2


def _rows_left_out(steps: list[Step]) -> dict[int, str]:
    """For each dropout that spares a layer its outputs, that layer's name."""
    found = {}
    for index, (name, module, kind) in enumerate(steps):
        if kind in ("linear", "convolution"):
            ndim = 2 if kind == "linear" else convolution_dimensions(module) + 2
            ahead = dropout_ahead(steps, index, ndim, 1, as_training=True)
            if ahead is not None:
                found[ahead] = name
    return found


def _columns_left_out(steps: list[Step], index: int) -> tuple[str | None, str]:
    """The layer that a dropout spares its inputs, or None and where the features are put back as zeros."""
    dim = steps[index].module.dim
    for name, module, kind in steps[index + 1 :]:
        if kind == "linear":
            return (name, "") if dim == -1 or dim == _dimensions(steps, index) - 1 or dim == 1 else (None, name)
        if kind == "convolution":
            return (name, "") if dim in (1, -1 - convolution_dimensions(module)) else (None, name)
        passes = (
            kind in ("pooling", "prelu", "flatten")
            or (kind == "elementwise" and keeps_zero(module))
            or (isinstance(module, BatchwiseDropout) and module.p == 0)
        )
        if not passes:
            return None, f"{name} ({type(module).__name__})"
    return None, "the end"


def describe(steps: list[Step]) -> list[str]:
    """One line for each dropout of the chain, for inputs of the usual number of dimensions."""
    lines = []
    rows = _rows_left_out(steps)
    for index, (name, module, kind) in enumerate(steps):
        if not isinstance(module, BatchwiseDropout) or module.p == 0:
            continue
        if kind != "dropout":  # hooks: it is called as it is
            lines.append(f"dropout {name} leaves out nothing, and masks")
            continue
        column, place = _columns_left_out(steps, index)
        saved = [f"rows of {rows[index]}"] if index in rows else []
        saved += [f"columns of {column}"] if column else []
        line = f"dropout {name} " + (f"leaves out {' and '.join(saved)}" if saved else "leaves out nothing")
        lines.append(line if column else f"{line}, and masks before {place}")
    return lines
