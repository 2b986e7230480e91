"""The convolutional network of studies: its filters, its augmentation, its schedule, in a study."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import unitnorm
from unitnorm.archbn import protocol
from unitnorm.archbn.resnet import NETWORKS, PAD, Conv, augment, convolutional
from unitnorm.data import Dataset
from unitnorm.run.config import parse
from unitnorm.run.loop import Session
from unitnorm.run.records import Records
from unitnorm.study.config import Plan
from unitnorm.study.experiment import Study

SHAPE = (16, 16, 3)
PLAN = {
    "question": "Does it pay?", "datasets": ["colours"], "depths": [],
    "networks": ["resnet9-narrow"], "tune": {"first": 1, "count": 0},
    "compare": {"first": 10, "count": 2},
    "training": {
        "loss": {"batch_size": 20, "reduction": "mean"},
        "train": {"train_images": 80, "validation_images": 30, "min_epochs": 4, "max_epochs": 4},
    },
    "arms": {"un": {"update": "un", "rates": [0.05], "schedule": "warm-up"}},
}  # fmt: skip


def colours(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of two classes, reddish and bluish."""
    labels = (np.arange(count) % 2).astype(np.int32)
    images = rng.integers(0, 120, (count, *SHAPE))
    images[labels == 0, ..., 0] += 80
    images[labels == 1, ..., 2] += 80
    return images.reshape(count, -1).astype(np.uint8), labels


RNG = np.random.default_rng(0)
DATA = Dataset("colours", *colours(RNG, 120), *colours(RNG, 40), SHAPE, 2, "0" * 64)
X = jnp.asarray(DATA.train_images[:60], jnp.float32)


def test_its_kernels_are_those_that_the_library_finds(hurried):
    network = convolutional("resnet9-narrow", SHAPE, 2)
    params, stats = jax.jit(network.init)(jax.random.key(0))
    apply = jax.jit(lambda p: network.apply(p, stats, X[:32], True))
    found = unitnorm.normalized_kernels(lambda p: apply(p)[0], params)
    chosen = unitnorm.normalize_filters(params, found)
    changed = jax.tree.map(lambda old, new: bool(jnp.any(old != new)), params, chosen)
    assert changed == network.mask(params)
    assert len(network.filters(params)) == 8
    logits, moved = apply(params)
    assert logits.shape == (32, 2)
    assert jax.tree.structure(moved) == jax.tree.structure(stats)


@pytest.mark.parametrize("stride", [1, 2])
def test_its_convolution_is_one(stride):
    conv, x = Conv(3, 5, stride, nnx.Rngs(0)), X[:4].reshape(-1, *SHAPE).transpose(3, 1, 2, 0)
    dimensions = ("CHWN", "HWIO", "CHWN")
    expected = jax.lax.conv_general_dilated(
        x, conv.kernel[...], (stride, stride), ((1, 1), (1, 1)), dimension_numbers=dimensions
    )
    np.testing.assert_allclose(conv(x), expected, rtol=1e-5, atol=1e-3)


def test_augmentation_moves_and_mirrors_whole_images():
    changed = np.asarray(augment(SHAPE, jax.random.key(1), X)).reshape(-1, *SHAPE)
    padded = np.pad(X.reshape(-1, *SHAPE), ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), "reflect")
    places = range(2 * PAD + 1)
    moves = {
        (top, flip)
        for image, found in zip(padded, changed, strict=True)
        for top in places
        for left in places
        for flip in (1, -1)
        if np.array_equal(image[top : top + 16, left : left + 16][:, ::flip], found)
    }
    assert len({top for top, _ in moves}) > 4
    assert {flip for _, flip in moves} == {1, -1}


def test_the_rate_warms_up_and_falls_to_zero():
    base, warm = jnp.float32(0.5), jnp.int32(protocol.WARM_UP)
    done = jnp.array([0.0, 0.05, 0.1, 0.55, 1.0])
    found = protocol.rate_within(warm, base, base, done)
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.25, 0], atol=1e-6)
    assert protocol.rate_within(jnp.int32(protocol.CONSTANT), base, base, done[3]) == base


@pytest.mark.slow
def test_a_study_trains_it_like_archbn(hurried):
    assert set(NETWORKS) == {*get_args(get_args(Plan.model_fields["networks"].annotation)[0])}
    study = Study(parse(PLAN, "plan", Plan))
    (group,) = study.missing(Records.empty(study.schema))
    runs = study.compute(group, DATA, Session()).rows["runs"]
    assert list(runs["network"]) == ["resnet9-narrow"] * 2
    assert runs["test_error"].max() < 0.3
    assert runs["layer_angles"].str.split().map(len).eq(8).all()
