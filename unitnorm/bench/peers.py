"""The loop that a user of PyTorch and its optimisers would write: one run, step after step.

On a GPU where PyTorch has one, else on the CPU with as many threads as PyTorch takes. The data lie
in memory as float32 and are shuffled each epoch by indexing, which is several times as fast as a
DataLoader.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from unitnorm.archbn.config import Config
from unitnorm.bench.worker import RATE
from unitnorm.data import Dataset, load_dataset


class ArchBN(nn.Module):
    """The same network as `unitnorm.archbn.model.ArchBN`."""

    def __init__(self, features: int, depth: int, width: int, classes: int, config: Config):
        super().__init__()
        momentum, epsilon = 1 - config.model.bn_momentum, config.model.bn_epsilon
        sizes = [features] + [width // 2] * depth
        self.linear = nn.ModuleList(nn.Linear(size, width, bias=False) for size in sizes[:-1])
        self.norm = nn.ModuleList(
            nn.BatchNorm1d(width, eps=epsilon, momentum=momentum) for _ in range(depth)
        )
        self.theta = nn.Linear(sizes[-1], classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes)."""
        for linear, norm in zip(self.linear, self.norm, strict=True):
            h = torch.relu(norm(linear(x)))
            x = nn.functional.max_pool1d(h.unsqueeze(1), 2).squeeze(1)
        return self.theta(x)


class Loop:
    """One run's training.

    Args:
      depth: of the network.
      optimiser: PyTorch's "SGD"; geoopt's "RiemannianSGD" with the filters on its Sphere; or
        Emerging-Optimizers' "ObliqueSGD" for the filters, which takes matrices alone, with SGD for
        the rest.
    """

    def __init__(self, depth: int, mnist: Dataset, config: Config, optimiser: str):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch = config.loss.batch_size
        self.x = torch.tensor(mnist.train_images, dtype=torch.float32, device=self.device)
        self.y = torch.tensor(mnist.train_labels.astype(np.int64), device=self.device)
        torch.manual_seed(0)
        features = mnist.train_images.shape[1]
        self.model = ArchBN(features, depth, config.model.width, mnist.classes, config)
        self.model.to(self.device)
        filters = [linear.weight for linear in self.model.linear if isinstance(linear, nn.Linear)]
        if optimiser != "SGD":
            for weight in filters:
                weight.data = nn.functional.normalize(weight.data)
        if optimiser == "RiemannianSGD":
            import geoopt

            for linear in self.model.linear:
                # the sphere is that of the last dimension: one for each filter
                linear.weight = geoopt.ManifoldParameter(linear.weight, manifold=geoopt.Sphere())
            optimisers = [geoopt.optim.RiemannianSGD(self.model.parameters(), lr=RATE)]
        elif optimiser == "ObliqueSGD":
            from emerging_optimizers.riemannian_optimizers import ObliqueSGD

            rest = [*self.model.norm.parameters(), *self.model.theta.parameters()]
            optimisers = [
                ObliqueSGD(filters, lr=RATE, momentum=0.0, dim=1),
                torch.optim.SGD(rest, lr=RATE),
            ]
        else:
            optimisers = [torch.optim.SGD(self.model.parameters(), lr=RATE)]
        self.optimisers: list[Any] = optimisers

    def train(self, order: torch.Tensor) -> None:
        """One step for each mini-batch of `order`, int64 (images,)."""
        self.model.train()
        for index in order.split(self.batch):
            self.model.zero_grad()
            logits = self.model(self.x[index])
            loss = nn.functional.cross_entropy(logits, self.y[index], reduction="sum")
            loss.backward()
            for optimiser in self.optimisers:
                optimiser.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def weights(self) -> list[np.ndarray]:
        """Every W and θ, one filter per row, first layer first."""
        found = [*self.model.linear, self.model.theta]
        return [linear.weight.detach().cpu().numpy() for linear in found]


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
