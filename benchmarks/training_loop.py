"""What the lab's training loop costs over the same steps written down by hand.

The limit is 1.0: the loop can add bookkeeping, never save work. Goal: at most 1.10.
"""

from itertools import count

import torch
from torch.nn import functional as F

from batchlab.lab.networks import MLP
from batchlab.lab.optimizers import make_optimizer
from batchlab.lab.settings import NetworkSettings, OptimizerSettings
from batchlab.lab.training import batch_order, train
from benchmarks.harness import interleave, report

STEPS, BATCH, IMAGES = 200, 60, 60_000


def bare(network: MLP, optimizer: torch.optim.SGD, images: torch.Tensor, labels: torch.Tensor, seed: int) -> None:
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))
    network.train()
    for step in range(STEPS):
        indices = order[step * BATCH : (step + 1) * BATCH]
        loss = F.cross_entropy(network(images[indices]), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(rounds: int = 40) -> None:
    """Compare on the study's network, without and with batch norm."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = (torch.rand(IMAGES, 28, 28) > 0.8).float(), torch.randint(0, 10, (IMAGES,))
    for normalization in ("none", "batch_norm"):
        settings = OptimizerSettings()
        networks = [MLP(784, 10, NetworkSettings(normalization=normalization)) for _ in range(2)]
        optimizers = [make_optimizer(network, settings, images) for network in networks]
        seeds = count()

        def by_hand(networks=networks, optimizers=optimizers, seeds=seeds) -> None:  # type: ignore[no-untyped-def]
            bare(networks[0], optimizers[0], images, labels, next(seeds))

        def ours(networks=networks, optimizers=optimizers, seeds=seeds, settings=settings) -> None:  # type: ignore[no-untyped-def]
            order = batch_order(IMAGES, BATCH, next(seeds), 0, STEPS)
            train(networks[1], optimizers[1], settings, images, labels, order, 0, STEPS)

        timings = interleave({"bare": by_hand, "lab": ours}, rounds, f"training loop, {normalization}")
        report("training_loop", f"784-100-100-100-10 sigmoid, {normalization}, batch 60", timings, rounds, STEPS)


if __name__ == "__main__":
    main()
