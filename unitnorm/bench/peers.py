"""The loop that a user of PyTorch and its optimisers would write: one run, step after step.

On a GPU where PyTorch has one, else on the CPU with as many threads as PyTorch takes. The data lie
in memory as float32 and are shuffled each epoch by indexing, which is several times as fast as a
DataLoader.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from unitnorm.archbn.config import Config, Model
from unitnorm.bench.worker import RATE
from unitnorm.data import Dataset, load_dataset


class ArchBN(nn.Module):
    """The same network as `unitnorm.archbn.model.ArchBN`."""

    def __init__(self, config: Model, features: int, classes: int, depth: int):
        super().__init__()
        width, momentum = config.width, 1 - config.bn_momentum
        sizes = [features] + [width // 2] * depth
        self.linear = nn.ModuleList(nn.Linear(size, width, bias=False) for size in sizes[:-1])
        self.norm = nn.ModuleList(
            nn.BatchNorm1d(width, eps=config.bn_epsilon, momentum=momentum) for _ in range(depth)
        )
        self.theta = nn.Linear(sizes[-1], classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes)."""
        for linear, norm in zip(self.linear, self.norm, strict=True):
            h = torch.relu(norm(linear(x)))
            x = nn.functional.max_pool1d(h.unsqueeze(1), 2).squeeze(1)
        return self.theta(x)


def make_optimisers(name: str, network: ArchBN) -> list[Any]:
    """PyTorch's "SGD"; geoopt's "RiemannianSGD" with the filters on its Sphere; or
    Emerging-Optimizers' "ObliqueSGD" for the filters, which takes matrices alone, with SGD for the
    rest."""
    if name == "SGD":
        return [torch.optim.SGD(network.parameters(), lr=RATE)]
    for linear in network.linear:
        linear.weight.data = nn.functional.normalize(linear.weight.data)
    if name == "RiemannianSGD":
        import geoopt

        for linear in network.linear:
            # the sphere is that of the last dimension: one for each filter
            linear.weight = geoopt.ManifoldParameter(linear.weight, manifold=geoopt.Sphere())
        return [geoopt.optim.RiemannianSGD(network.parameters(), lr=RATE)]
    from emerging_optimizers.riemannian_optimizers import ObliqueSGD

    rest = [*network.norm.parameters(), *network.theta.parameters()]
    filters = list(network.linear.parameters())
    return [ObliqueSGD(filters, lr=RATE, momentum=0.0, dim=1), torch.optim.SGD(rest, lr=RATE)]


class Loop:
    """One run's training with one of `make_optimisers`."""

    def __init__(self, depth: int, data: Dataset, config: Config, optimiser: str):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch = config.loss.batch_size
        self.x = torch.tensor(data.train_images, dtype=torch.float32, device=self.device)
        self.y = torch.tensor(data.train_labels.astype(np.int64), device=self.device)
        torch.manual_seed(0)
        self.network = ArchBN(config.model, data.train_images.shape[1], data.classes, depth)
        self.network.to(self.device)
        self.optimisers = make_optimisers(optimiser, self.network)

    def train(self, order: torch.Tensor) -> None:
        """One step for each mini-batch of `order`, int64 (images,)."""
        self.network.train()
        for index in order.split(self.batch):
            self.network.zero_grad()
            logits = self.network(self.x[index])
            loss = nn.functional.cross_entropy(logits, self.y[index], reduction="sum")
            loss.backward()
            for optimiser in self.optimisers:
                optimiser.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def serve(optimiser: str, depth: int, images: int) -> Iterator[dict[str, Any]]:
    """`Loop` over so many images in a new order."""
    loop = Loop(depth, load_dataset(), Config(), optimiser)
    yield {"samples": images}
    while True:
        loop.train(torch.randperm(len(loop.y), device=loop.device)[:images])
        yield {}


torch_sgd = partial(serve, "SGD")
geoopt = partial(serve, "RiemannianSGD")
oblique_sgd = partial(serve, "ObliqueSGD")
