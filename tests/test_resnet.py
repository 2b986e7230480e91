"""The convolutional network of studies: its filters, its augmentation, its schedule, in a study."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitnorm
from unitnorm.archbn import protocol
from unitnorm.archbn.resnet import NETWORKS, PAD, augment, convolutional
from unitnorm.data import Dataset
from unitnorm.run.config import parse
from unitnorm.run.loop import Session
from unitnorm.run.records import Records
from unitnorm.study.config import Plan
from unitnorm.study.experiment import Study

SHAPE = (8, 8, 3)


def colours(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of two classes, reddish and bluish."""
    labels = (np.arange(count) % 2).astype(np.int32)
    images = rng.integers(0, 120, (count, *SHAPE))
    images[labels == 0, ..., 0] += 80
    images[labels == 1, ..., 2] += 80
    return images.reshape(count, -1).astype(np.uint8), labels


@pytest.fixture(scope="module")
def data() -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset("colours", *colours(rng, 120), *colours(rng, 40), SHAPE, 2, "0" * 64)


def test_its_kernels_are_those_that_the_library_finds(data):
    network = convolutional("resnet9-narrow", SHAPE, 2)
    params, stats = network.init(jax.random.key(0))
    x = jnp.asarray(data.train_images[:32], jnp.float32)
    found = unitnorm.normalized_kernels(lambda p: network.apply(p, stats, x, True)[0], params)
    chosen = unitnorm.normalize_filters(params, found)
    for old, new, mine in zip(
        *map(jax.tree.leaves, (params, chosen, network.mask(params))), strict=True
    ):
        assert bool(jnp.any(old != new)) == mine
    assert len(network.filters(params)) == 8
    logits, moved = network.apply(params, stats, x, True)
    assert logits.shape == (32, 2)
    assert jax.tree.structure(moved) == jax.tree.structure(stats)


def test_augmentation_moves_and_mirrors_whole_images(data):
    x = jnp.asarray(data.train_images[:60], jnp.float32)
    changed = augment(SHAPE, jax.random.key(1), x).reshape(-1, *SHAPE)
    padded = np.pad(x.reshape(-1, *SHAPE), ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), "reflect")
    moves = set()
    for image, found in zip(padded, np.asarray(changed), strict=True):
        views = {
            (top, left, flip): image[top : top + 8, left : left + 8][:, ::flip]
            for top in range(2 * PAD + 1)
            for left in range(2 * PAD + 1)
            for flip in (1, -1)
        }
        moves |= {place for place, view in views.items() if np.array_equal(view, found)}
    assert len({top for top, _, _ in moves}) > 4
    assert {flip for _, _, flip in moves} == {1, -1}


def test_the_rate_warms_up_and_falls_to_zero():
    base, warm = jnp.float32(0.5), jnp.int32(protocol.WARM_UP)
    done = jnp.array([0.0, 0.05, 0.1, 0.55, 1.0])
    found = protocol.rate_within(warm, base, base, done)
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.25, 0], atol=1e-6)
    assert protocol.rate_within(jnp.int32(protocol.CONSTANT), base, base, done[3]) == base


PLAN = {
    "question": "Does it pay?", "datasets": ["colours"], "depths": [],
    "networks": ["resnet9-narrow"], "tune": {"first": 1, "count": 0},
    "compare": {"first": 10, "count": 2},
    "training": {
        "loss": {"batch_size": 20, "reduction": "mean"},
        "train": {"train_images": 90, "validation_images": 30, "min_epochs": 4, "max_epochs": 4},
    },
    "arms": {"un": {"update": "un", "rates": [0.05], "schedule": "warm-up"}},
}  # fmt: skip


def test_a_study_trains_it_like_archbn(data):
    assert set(NETWORKS) == {*get_args(get_args(Plan.model_fields["networks"].annotation)[0])}
    study = Study(parse(PLAN, "plan", Plan))
    (group,) = study.missing(Records.empty(study.schema))
    runs = study.compute(group, data, Session()).rows["runs"]
    assert list(runs["network"].unique()) == ["resnet9-narrow"]
    assert len(runs) == 2
    assert runs["test_error"].max() < 0.3
    assert runs["layer_angles"].str.split().map(len).eq(8).all()
