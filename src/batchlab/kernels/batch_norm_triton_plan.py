"""How batch normalization in Triton reads x: in which layout, tiles and programs; from its shape and strides alone."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

__all__ = ["Plan", "dense", "like", "merge_blocks", "next_power_of_two", "plan"]

TILE: Final = 2048
"""Numbers in a tile: 16 for each of 128 threads, four 16-byte loads in flight in float32, two in bfloat16. `moments`
then takes 64 to 80 registers a thread (sm_90), and six to eight programs fit into a multiprocessor's 65536."""

RUN: Final = 512
"""Neighbouring positions of a plane in a tile, at most (1 KiB in bfloat16); more channels instead waste fewer lanes at
the ends of planes: 3136 = 56² positions fill 6.1 of 7 such runs, but 1.5 of 2 tiles."""

CHANNELS: Final = 64
"""Neighbouring channels of rows in a tile, at most: a line of 128 bytes in bfloat16, two in float32."""

PROGRAMS: Final = 2048
"""Programs to split a sum into, if there is enough to add: 15 on each of an H100's 132 multiprocessors. Not the number
that this device has: a sum should not depend on it."""

SUM_STEPS: Final = (8, 256)
"""Tiles that a program adds: at least 8 (64 KiB of float32), since each program's part is merged later; at most 256,
since each lane adds that many numbers in turn, and their roundings grow with it."""

APPLY_STEPS: Final = (1, 8)
"""The same for kernels without a sum; with more than one tile, the loads of a channel's coefficients are shared."""

MERGED_CHANNELS: Final = 8
"""Channels that one program merges: a sector of 32 bytes. More would leave fewer programs with longer loops."""


class Plan(NamedTuple):
    """How x is read: as planes (samples, channels, plane), or rows (plane, channels), in which tiles and programs."""

    rows: bool
    channels: int
    plane: int
    steps: int
    per_program: int
    splits: int
    blocks: int
    block_c: int
    block_s: int

    @property
    def walk(self) -> dict[str, int | bool]:
        """The arguments that all kernels over x share."""
        return {
            "steps": self.steps,
            "per_program": self.per_program,
            "channels": self.channels,
            "plane": self.plane,
            "ROWS": self.rows,
            "BLOCK_C": self.block_c,
            "BLOCK_S": self.block_s,
        }


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()


def _channels_innermost(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Return `x` if it is contiguous or its channels are innermost, else a contiguous copy."""
    return x if x.is_contiguous() or _channels_innermost(x) else x.contiguous()


def like(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """Return `tensor` in the memory format of the dense `x`: kernels use one offset for both."""
    if tensor is None:
        return None
    if x.is_contiguous():
        return tensor.contiguous()
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def plan(x: Tensor, *, sums: bool) -> Plan:
    """Return how to read the dense and not empty `x`, with or without `sums` over its samples."""
    least, most = SUM_STEPS if sums else APPLY_STEPS
    samples, channels = x.shape[:2]
    plane = x.numel() // (samples * channels)
    rows = plane == 1 or not x.is_contiguous()
    if rows:
        samples, plane = 1, samples * plane
        block_c = min(next_power_of_two(channels), CHANNELS, TILE)
    else:
        block_c = min(next_power_of_two(channels), TILE // min(next_power_of_two(plane), RUN, TILE))
    block_s = min(next_power_of_two(plane), TILE // block_c)
    steps = samples * -(-plane // block_s)
    blocks = -(-channels // block_c)
    per_program = min(max(-(-steps * blocks // PROGRAMS), least), most)
    return Plan(rows, channels, plane, steps, per_program, -(-steps // per_program), blocks, block_c, block_s)


def merge_blocks(plan: Plan) -> dict[str, int]:
    """Return the tile of kernels that merge a plan's splits."""
    block_c = min(next_power_of_two(plan.channels), MERGED_CHANNELS)
    return {"BLOCK_C": block_c, "BLOCK_P": min(next_power_of_two(plan.splits), max(TILE // block_c, 1))}
