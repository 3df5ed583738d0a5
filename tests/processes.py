"""Several processes of one process group, for tests: gloo, on this machine, one thread each."""

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[..., Any]


def join(rank: int, world: int, folder: str, jobs: list[tuple[str, Work, tuple[Any, ...]]]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=180))
    try:
        results = {name: work(rank, *arguments) for name, work, arguments in jobs}
    finally:
        # A rank once ended with "terminate called without an active exception", a thread that nobody joined. The cause
        # was not found, nor could it be repeated; a guess is that something in a cycle kept the group until the exit.
        gc.collect()
        dist.destroy_process_group()
    torch.save(results, Path(folder) / f"{rank}.pt")


def spawn(world: int, folder: Path, jobs: list[tuple[str, Work, tuple[Any, ...]]]) -> dict[str, list[Any]]:
    """Do all jobs in the same processes (starting one costs seconds): name -> what each rank returned."""
    mp.spawn(join, (world, str(folder), jobs), nprocs=world)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return {name: [rank[name] for rank in ranks] for name, _, _ in jobs}
