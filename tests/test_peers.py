"""Step by step agreement, in float64, with three libraries for optimisation on manifolds.

The problem is a random dense layer (12 inputs, 5 filters) with a quadratic loss that is not
invariant to scale, so that its gradient is far from tangent.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unitnorm import updates

STEPS, RATE = 50, 0.05


def peer(name):
    """A package of the extra `peers`, or a skip that says which."""
    before = jax.config.jax_enable_x64
    try:
        return pytest.importorskip(name, reason=f"needs {name}: see CONTRIBUTING")
    finally:  # pymanopt sets float64 for the whole process, other tests' too
        jax.config.update("jax_enable_x64", before)


def problem():
    random = np.random.default_rng(0)
    start, target = random.normal(size=(2, 12, 5))
    curvature = random.normal(size=(12, 12))
    return start / np.linalg.norm(start, axis=0), curvature @ curvature.T / 12, target


def ours(tx):
    """Our filters after each step, shape (steps, 12, 5)."""
    with jax.enable_x64(True):
        start, curvature, target = map(jnp.asarray, problem())
        w, state, path = start, tx.init(start), []
        for _ in range(STEPS):
            displacement, state = tx.update(curvature @ w - target, state, w)
            w = optax.apply_updates(w, displacement)
            path.append(np.asarray(w))
    assert np.abs(path[-1] - path[0]).max() > 0.1
    return np.stack(path)


def theirs(make):
    """A PyTorch optimiser's filters after each step. There a filter is a row."""
    torch = peer("torch")
    start, curvature, target = (torch.tensor(a) for a in problem())
    w, optimizer = make(start.T.contiguous())
    path = []
    for _ in range(STEPS):
        w.grad = (curvature @ w.detach().T - target).T.contiguous()
        optimizer.step()
        path.append(w.detach().numpy().T.copy())
    return np.stack(path)


def geoopts(name, prepare=lambda state: None, **options):
    """The filters of one of geoopt's optimisers, whose state `prepare` may set."""
    geoopt = peer("geoopt")

    def make(rows):
        w = geoopt.ManifoldParameter(rows, manifold=geoopt.Sphere())
        optimizer = getattr(geoopt.optim, name)([w], lr=RATE, **options)
        prepare(optimizer.state[w])
        return w, optimizer

    return theirs(make)


def assert_same(path, other):
    np.testing.assert_allclose(path, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("update", "name", "options"),
    [(updates.un, "RiemannianSGD", {}), (updates.un_adam, "RiemannianAdam", {"eps": 1e-8})],
)
def test_un_and_un_adam_are_geoopts(update, name, options):
    assert_same(geoopts(name, **options), ours(update(RATE)))


@pytest.mark.parametrize(
    ("update", "nesterov"), [(updates.un_momentum, False), (updates.un_nesterov, True)]
)
def test_momentum_is_geoopts_from_a_zero_buffer(update, nesterov):
    torch = peer("torch")

    def zero_buffer(state):
        state["momentum_buffer"] = torch.zeros(5, 12, dtype=torch.float64)

    path, options = ours(update(RATE, 0.9)), {"momentum": 0.9, "nesterov": nesterov}
    assert_same(path, geoopts("RiemannianSGD", zero_buffer, **options))
    # Left alone, geoopt starts from the Euclidean gradient, and its first step is another.
    assert np.abs(path[0] - geoopts("RiemannianSGD", **options)[0]).max() > 1e-3


def test_un_is_emerging_optimizers_oblique_sgd():
    emerging = peer("emerging_optimizers.riemannian_optimizers")

    def make(rows):
        w = peer("torch").nn.Parameter(rows)
        return w, emerging.ObliqueSGD([w], lr=RATE, momentum=0.0, dim=1)

    assert_same(theirs(make), ours(updates.un(RATE)))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_un_is_descent_on_pymanopts_oblique_manifold(momentum):
    manifold = peer("pymanopt").manifolds.Oblique(12, 5)
    w, curvature, target = problem()
    buffer, path = np.zeros_like(w), []
    for _ in range(STEPS):
        gradient = manifold.euclidean_to_riemannian_gradient(w, curvature @ w - target)
        buffer = momentum * buffer + gradient
        moved = manifold.retraction(w, -RATE * buffer)
        w, buffer = moved, manifold.transport(w, moved, buffer)
        path.append(w)
    update = updates.un_momentum(RATE, momentum) if momentum else updates.un(RATE)
    assert_same(ours(update), np.stack(path))
