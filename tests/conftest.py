"""Shared set-up: two CPU devices, so that sharding is always on, and small data and configs."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest

from tests.idx import idx_of

# Before any test asks for a device. Some results must not depend on it: see tests/test_devices.py.
jax.config.update("jax_num_cpu_devices", 2)

# The same generated cases every time; UNITNORM_RANDOM_CASES=1 in the environment draws new ones.
hypothesis.settings.register_profile(
    "unitnorm", derandomize=not os.environ.get("UNITNORM_RANDOM_CASES"), deadline=None
)
hypothesis.settings.load_profile("unitnorm")


def blobs(
    rng: np.random.Generator, count: int, side: int = 6, classes: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Images that can be learnt: each class has a bright pattern of its own, under noise."""
    patterns = np.random.default_rng(7).integers(0, 120, (classes, side, side))
    labels = np.arange(count) % classes
    rng.shuffle(labels)
    noise = rng.integers(0, 60, (count, side, side))
    return (patterns[labels] + noise).astype(np.uint8), labels.astype(np.uint8)


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of one's own: 600 training and 200 test images, 6 × 6, 4 classes."""
    folder = tmp_path_factory.mktemp("blobs")
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 600), ("t10k", 200)):
        images, labels = blobs(rng, count)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_of(images))
        packed = gzip.compress(idx_of(labels), mtime=0)
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(packed)
    return folder


@pytest.fixture(scope="session")
def small_toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that trains in a moment on `idx_folder`."""
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(
        "runs = 3\ndepths = [1, 2]\n"
        "[model]\nwidth = 8\nbn_momentum = 0.9\n"
        "[loss]\nbatch_size = 20\n"
        "[sweep]\nrates = [1e-2, 1e-3]\ntrain_images = 100\nvalidation_images = 50\nepochs = 3\n"
        "[train]\ntrain_images = 410\nvalidation_images = 150\nmin_epochs = 3\nmax_epochs = 6\n"
    )
    return path
