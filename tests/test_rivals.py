"""The rivals' options against the published rules, on gradients that are tangent and that are not.

Their defaults stand beside all other updates in tests/test_updates.py.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import rivals
from unitnorm import updates
from unitnorm.updates import rivals as ours

STEPS, RATE = 12, 0.05
TARGET = np.random.default_rng(1).normal(size=(4, 15))
START = rivals.towards_sphere(np.random.default_rng(0).normal(size=(4, 15)))
START = rivals.towards_sphere(START - START.mean(1, keepdims=True))


def slanted(W):
    return 0.5 * W - TARGET


def tangent(W):
    """Of a loss that depends on directions alone."""
    unit = W / np.sqrt((W * W).sum(1, keepdims=True))
    return (unit * (unit * TARGET).sum(1, keepdims=True) - TARGET) / np.sqrt(
        (W * W).sum(1, keepdims=True)
    )


def together(W):
    """Tangent to all rows as one, to none alone."""
    signs = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    squares = (W * W).sum(1, keepdims=True)
    return 3 * signs * W / squares + tangent(W)


def walk(tx, gradient):
    with jax.enable_x64(True):
        w = jnp.asarray(START)
        state, path = tx.init(w), []
        step = jax.jit(tx.update)
        for _ in range(STEPS):
            moved, state = step(jnp.asarray(gradient(np.asarray(w))), state, w)
            w = optax.apply_updates(w, moved)
            path.append(np.asarray(w))
    return np.stack(path)


def rule(generator):
    return np.stack(list(itertools.islice(generator, STEPS)))


CASES = {
    "sgdp": (ours.sgdp(RATE, axis=-1), rivals.sgdp, {}),
    "sgdp-nesterov-decay": (
        ours.sgdp(RATE, 0.8, 0.1, nesterov=True, axis=-1),
        rivals.sgdp,
        {"momentum": 0.8, "decay": 0.1, "nesterov": True},
    ),
    "sgdp-never": (ours.sgdp(RATE, delta=0, axis=-1), rivals.sgdp, {"delta": 0}),
    "adamp": (ours.adamp(RATE, axis=-1), rivals.adamp, {}),
    "adamp-nesterov-decay": (
        ours.adamp(RATE, weight_decay=0.1, nesterov=True, axis=-1),
        rivals.adamp,
        {"decay": 0.1, "nesterov": True},
    ),
    "sgd-g": (ours.sgd_g(RATE, axis=-1), rivals.sgd_g, {}),
    "sgd-g-unclipped": (
        ours.sgd_g(RATE, 0.5, None, axis=-1),
        rivals.sgd_g,
        {"momentum": 0.5, "clip": None},
    ),
    "adam-g": (ours.adam_g(RATE, axis=-1), rivals.adam_g, {}),
    "adam-g-unclipped": (ours.adam_g(RATE, clip=None, axis=-1), rivals.adam_g, {"clip": None}),
    "nero": (ours.nero(RATE, axis=-1), rivals.nero, {}),
    "lars-decay": (
        ours.lars(RATE, 0.5, 0.1, 0.1),
        rivals.lars,
        {"momentum": 0.5, "decay": 0.1, "trust": 0.1},
    ),
    "rotational": (
        ours.rotational_sgd(RATE, 0.5, 0.1, axis=-1),
        rivals.rotational_sgd,
        {"momentum": 0.5, "decay": 0.1},
    ),
    "rotational-centred": (
        ours.rotational_sgd(RATE, weight_decay=0.1, zero_mean=True, axis=-1),
        rivals.rotational_sgd,
        {"decay": 0.1, "zero_mean": True},
    ),
    "adam-srt": (ours.adam_srt(RATE, axis=-1), rivals.adam_srt, {}),
    "hyperball": (ours.hyperball(RATE, axis=-1), rivals.hyperball, {}),
    "hyperball-whole": (
        ours.hyperball(RATE, optax.trace(0.9), axis=(0, 1), off_manifold="keep"),
        rivals.hyperball_of_momentum,
        {},
    ),
    "ngpt": (ours.ngpt(RATE, axis=-1), rivals.ngpt, {}),
    "renorm-sgd": (ours.renorm_sgd(RATE, axis=-1), rivals.renorm_sgd, {}),
    "renorm-sgd-heavy-ball": (
        ours.renorm_sgd(RATE, 0.5, nesterov=False, axis=-1),
        rivals.renorm_sgd,
        {"momentum": 0.5, "nesterov": False},
    ),
    "adamwn": (ours.adamwn(RATE, axis=-1), rivals.adamwn, {}),
    "adamwn-options": (
        ours.adamwn(RATE, norm_ratio=2.0, update_rate=0.3, axis=-1),
        rivals.adamwn,
        {"ratio": 2.0, "update_rate": 0.3},
    ),
    "adamwn-is-adamw": (
        optax.adamw(RATE, weight_decay=0.1),
        rivals.adamwn,
        {"ratio": 0.0, "update_rate": 0.1 * RATE},
    ),
    "muon": (ours.muon(RATE, axis=-1), rivals.muon, {}),
    "muon-decay": (
        ours.muon(RATE, 0.8, 0.1, nesterov=False, axis=-1),
        rivals.muon,
        {"momentum": 0.8, "decay": 0.1, "nesterov": False},
    ),
    "manifold-muon": (ours.manifold_muon(RATE, axis=-1), rivals.manifold_muon, {}),
    "manifold-muon-as-published": (
        ours.manifold_muon(RATE, dual_steps=100, dual_rate=0.01, axis=-1),
        rivals.manifold_muon,
        {"dual_steps": 100, "dual_rate": 0.01},
    ),
}


@pytest.mark.parametrize("gradient", [slanted, tangent, together])
@pytest.mark.parametrize("case", CASES)
def test_twelve_steps_as_published(case, gradient):
    tx, reference, options = CASES[case]
    expected = rule(reference(START, gradient, RATE, **options))
    np.testing.assert_allclose(walk(tx, gradient), expected, rtol=0, atol=1e-12)
    assert np.abs(expected[-1] - START).max() > 1e-2


@pytest.mark.parametrize("make", [ours.sgdp, ours.adamp])
def test_the_projection_is_made_where_weights_look_invariant(make):
    def radial(W):
        return 3 * W + 0.1 * slanted(W)

    for gradient, projects in ((radial, False), (tangent, True), (together, True)):
        never = walk(make(RATE, delta=0, axis=-1), gradient)
        assert (np.abs(walk(make(RATE, axis=-1), gradient) - never).max() > 1e-4) == projects


def test_weight_decay_follows_the_reduction_of_the_loss():
    summed = walk(updates.sgd_wd(RATE, summed_over=100), slanted)
    np.testing.assert_allclose(summed, walk(updates.sgd_wd(RATE, 0.05), slanted), atol=1e-15)
    assert np.abs(summed - walk(updates.sgd_wd(RATE), slanted)).max() > 1e-3
