"""Memory that waits for its next use: how much of it, whose it is, and how it goes back."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from batchlab import kernels
from batchlab.kernels import batch_norm, submatrix

MIB = 2**20
SLACK = 9 / 8  # sizes are rounded up by at most an eighth

compiled = pytest.mark.skipif(
    not (batch_norm.available() and submatrix.available()), reason="no C++ compiler: nothing waits"
)


def normalized(mib: int) -> torch.Tensor:
    x = torch.ones(mib * MIB // 64, 16)
    return batch_norm.forward(x, None, None, None, None, None, None, 0.1, 1e-5, 0)[0]


def gathered(mib: float) -> torch.Tensor:
    return submatrix.gather(torch.empty(int(mib * MIB) // 1024, 256), None, None)


@compiled
def test_one_call_gives_back_what_waits_in_every_library() -> None:
    kernels.release_memory()
    kept, freed, block = normalized(4), normalized(4), gathered(3)
    assert kernels.release_memory() == 0  # all of it is in use
    del freed, block
    assert 7 * MIB <= kernels.release_memory() <= 7 * MIB * SLACK
    assert kernels.release_memory() == 0
    assert torch.equal(kept, torch.zeros_like(kept))


@compiled
def test_each_library_has_memory_of_its_own() -> None:
    kernels.release_memory()
    del_me = normalized(4)
    del del_me
    assert submatrix.release_memory() == 0
    assert 4 * MIB <= batch_norm.release_memory() <= 4 * MIB * SLACK
    block = gathered(3)
    del block
    assert batch_norm.release_memory() == 0
    assert 3 * MIB <= submatrix.release_memory() <= 3 * MIB * SLACK


@compiled
def test_a_piece_serves_sizes_a_quarter_smaller_and_no_others() -> None:
    kernels.release_memory()
    piece = gathered(4)
    address = piece.data_ptr()
    del piece
    assert gathered(4).data_ptr() == address
    assert gathered(3.3).data_ptr() == address
    assert gathered(4).data_ptr() == address  # and keeps its size
    larger, smaller = gathered(4.6), gathered(3)
    assert address not in (larger.data_ptr(), smaller.data_ptr())
    assert gathered(4).data_ptr() == address


@compiled
def test_of_many_sizes_no_more_waits_than_was_in_use_or_the_floor() -> None:
    kernels.release_memory()
    for mib in range(3, 40, 6):  # 126 MiB in all
        gathered(mib)
    assert 40 * MIB <= submatrix.release_memory() <= 64 * MIB
    together = [gathered(40), gathered(40)]
    together.clear()
    for mib in range(3, 40, 6):
        gathered(mib)
    assert 64 * MIB <= submatrix.release_memory() <= 80 * MIB * SLACK


@compiled
def test_ever_so_many_small_pieces_do_not_wait() -> None:
    kernels.release_memory()
    held = [submatrix.gather(torch.ones(1, 16), None, None) for _ in range(3000)]
    held.clear()
    assert submatrix.release_memory() == 1024 * 64


@compiled
def test_no_two_results_share_memory_whoever_frees_what_when() -> None:
    def work(seed: int) -> bool:
        random = torch.Generator().manual_seed(seed)
        held: list[tuple[torch.Tensor, float]] = []
        for step in range(400):
            rows = int(torch.randint(0, 900, (), generator=random))
            held.append((submatrix.gather(torch.full((rows, 64), seed + step / 1000), None, None), seed + step / 1000))
            while len(held) > int(torch.randint(1, 12, (), generator=random)):
                result, value = held.pop(int(torch.randint(len(held), (), generator=random)))
                if not torch.equal(result, torch.full_like(result, value)):
                    return False
            if step % 100 == 99:
                kernels.release_memory()
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_to_release_compiles_nothing() -> None:
    code = (
        "from batchlab import kernels\nprint(kernels.release_memory(), kernels.batch_norm._load.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.split() == ["0", "0"]
