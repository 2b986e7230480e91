"""What can be scaled is found, said and held at unit norm: on networks and trees of others."""

import functools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import networks
from tests.test_updates import assert_close, train
from unitnorm import updates
from unitnorm.updates import UPDATES, FilterAxes, axes_of_selection, build, examine_kernels

X = jnp.asarray(np.random.default_rng(0).normal(size=(32, 5)), jnp.float32)
PICTURES = jnp.asarray(np.random.default_rng(1).normal(size=(16, 3, 6, 6)), jnp.float32)

pytestmark = pytest.mark.usefixtures("hurried")


def normalised(h, axis=0):
    return (h - h.mean(axis, keepdims=True)) / h.std(axis, keepdims=True)


def random(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)


def norms_over(w, axes):
    return np.sqrt((np.asarray(w, float) ** 2).sum(axes))


def one_step(params, selection):
    tx = build("un", 0.1, selection)
    grads = jax.tree.map(jnp.ones_like, params)
    moved, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    return optax.apply_updates(params, moved)


def conv(x, kernel):
    return jax.lax.conv(x, kernel, (1, 1), "SAME")


def test_filters_that_come_first_are_found_and_trained_so():
    params = {"conv": random(4, 3, 3, 3), "bias": jnp.zeros(4), "out": random(4, 2)}

    def apply(p):
        h = conv(PICTURES, p["conv"]) + p["bias"][:, None, None]
        return normalised(h, (0, 2, 3)).clip(0).mean((2, 3)) @ p["out"]

    report = examine_kernels(apply, params)
    assert report.selection == {"conv": FilterAxes((1, 2, 3)), "bias": False, "out": False}
    assert axes_of_selection(report.selection) == {"conv": (1, 2, 3), "bias": None, "out": None}
    new = one_step(params, report.selection)
    np.testing.assert_allclose(norms_over(new["conv"], (1, 2, 3)), 1, atol=1e-6)
    assert np.abs(norms_over(new["out"], 0) - 1).max() > 0.1
    # named by hand, the bias and all that cannot hold such filters are passed over
    by_hand = examine_kernels(apply, params, axis=(1, 2, 3))
    assert by_hand.selection == report.selection
    reasons = {found.name: found.reason for found in by_hand.findings}
    assert reasons["conv"] == "a factor for each index of axis 0"
    assert "axis=(1, 2, 3)" in reasons["out"]
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["leaf", "bias", "conv", "out"]
    assert "(1, 2, 3)" in lines[2]


def test_a_kernel_that_is_normalised_in_part_is_left_out_with_a_warning():
    params = {"whole": random(5, 8), "part": random(5, 8)}

    def apply(p):
        h = X @ p["part"]
        free = h.at[:, :-1].set(normalised(h)[:, :-1])
        return jnp.concatenate([100 * normalised(X @ p["whole"]), free.at[:, -1].mul(0.02)], 1)

    with pytest.warns(UserWarning, match="part.*examine_kernels"):
        report = examine_kernels(apply, params)
    assert report.selection == {"whole": True, "part": False}


# --- Found ---------------------------------------------------------------------------------------


def selected(report):
    return {found.name: found.blocks for found in report.findings if found.selected}


@functools.cache
def examined(name):
    apply, params, expected = networks.NETWORKS[name]()
    return examine_kernels(apply, params), params, expected


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_what_can_be_scaled_in_networks_that_others_wrote(name):
    report, params, expected = examined(name)
    assert selected(report) == expected
    assert jax.tree.structure(report.selection) == jax.tree.structure(params)
    assert report.passes < 250


def test_one_network_on_paper():
    """The symmetries of attention with QK-norm as .docs/selections.md derives them, and no more."""
    report = examined("nnx-transformer")[0]
    at = "attention"
    assert {(pair.times, pair.divided, pair.factors) for pair in report.pairs} == {
        ((f"{at}/out/kernel",), (f"{at}/value/bias", f"{at}/value/kernel"), 8),
        ((f"{at}/key_ln/scale",), (f"{at}/query_ln/scale",), 4),
        ((f"{at}/key/kernel", f"{at}/query/kernel", f"{at}/value/kernel"), ("norm/scale",), 8),
        ((f"{at}/out/bias", f"{at}/out/kernel", "embed/embedding"), ("out/kernel",), 1),
    }
    assert all(pair.effect < 1e-3 for pair in report.pairs)
    # the report as JSON says the same
    said = json.loads(report.to_json())
    assert [tuple(pair["times"]) for pair in said["pairs"]] == [p.times for p in report.pairs]
    blocks = {f["name"]: f["blocks"] for f in said["findings"] if f["selected"]}
    assert blocks[f"{at}/key/bias"] == {"axes": [1], "view": None, "joint": f"{at}/key/kernel"}
    assert said["passes"] == report.passes


def test_bfloat16_hides_nothing():
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    layers = []
    for _ in range(8):
        layers += [nnx.Linear(5, 5, **options), nnx.BatchNorm(5, **options), nnx.relu]
    report = examine_kernels(*networks.of_nnx(nnx.Sequential(*layers), X))
    kernels = [f"layers/{i}/kernel" for i in range(0, 24, 3)]
    assert selected(report) == dict.fromkeys(kernels, FilterAxes((0,)))


def test_parameters_on_several_devices_and_code_that_is_not_compiled_give_the_same():
    params = {"kernel": random(6, 4), "out": random(4, 3)}
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    x = jax.device_put(random(32, 6), rows)

    def apply(p):
        return normalised(x @ p["kernel"]) @ p["out"]

    said = []
    plain = examine_kernels(apply, params, progress=said.append)
    spread = examine_kernels(jax.jit(apply), jax.device_put(params, rows))
    assert plain.selection == spread.selection == {"kernel": True, "out": False}
    assert said[0] == "row 1 of 8"


def test_what_stops_differentiation_stops_no_symmetry():
    def apply(p):
        h, stop = X @ p["kernel"], jax.lax.stop_gradient
        return (h - stop(h.mean(0))) / stop(h.std(0)) @ p["out"]

    assert updates.normalized_kernels(apply, {"kernel": random(5, 4), "out": random(4, 3)}) == {
        "kernel": True,
        "out": False,
    }


def test_a_factor_of_vectors_alone_or_with_several_kernels_is_found_and_not_selected():
    params = {"a": random(5, 4), "b": random(3, 4), "scale": random(4), "good": random(4, 4)}

    def apply(p):
        h = normalised(X @ p["a"] + X[:, :3] @ p["b"], 1)  # one factor for both
        return normalised((p["scale"] * h) @ p["good"])  # one for all scales

    report = examine_kernels(apply, params)
    assert report.selection == {"a": False, "b": False, "scale": False, "good": True}
    found = {finding.name: finding for finding in report.findings}
    assert found["a"].blocks == found["b"].blocks == FilterAxes((0, 1), joint="a")
    assert "together with b; not selected: several kernels" in found["a"].reason
    assert found["scale"].blocks == FilterAxes((0,))
    assert "no kernel" in found["scale"].reason
    # for a selection by hand, which is trained as any other
    by_hand = {name: found[name].blocks if name in "ab" else False for name in params}
    new = one_step(params, by_hand)
    together = (np.asarray(new["a"]) ** 2).sum() + (np.asarray(new["b"]) ** 2).sum()
    np.testing.assert_allclose(together, 1, atol=1e-6)


def test_a_part_of_a_fused_kernel_is_said_and_left_out():
    params = {"qkv": random(5, 24), "out": random(4, 4), "good": random(4, 3)}

    def apply(p):
        heads = (X.reshape(4, 8, 5) @ p["qkv"]).reshape(4, 8, 3, 2, 4)
        q, k, v = jnp.moveaxis(heads, 2, 0)
        q, k = normalised(q, -1), normalised(k, -1)
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        h = jnp.einsum("bhqk,bkhd->bqhd", weights, v) @ p["out"]
        return normalised(h.reshape(-1, 4) @ p["good"])

    with pytest.warns(UserWarning, match="in part alone.*qkv"):
        report = examine_kernels(apply, params)
    reasons = {found.name: found.reason for found in report.findings}
    assert reasons["qkv"] == "in part: 4 of 6 parts of axis 1"


def test_one_entry_has_no_direction():
    params = {"thin": random(1, 4), "good": random(5, 4)}

    def apply(p):
        return normalised(X[:, :1] @ p["thin"]) + normalised(X @ p["good"])

    assert updates.normalized_kernels(apply, params) == {"thin": False, "good": True}


# --- Not found, and why ---------------------------------------------------------------------------


KEYS = iter(jax.random.split(jax.random.key(0), 9))


@pytest.mark.parametrize(
    ("apply", "complaint"),
    [
        (
            lambda p: normalised(X @ p["kernel"]) * jax.random.bernoulli(next(KEYS), 0.5, (32, 5)),
            "not deterministic.*fix the key",
        ),
        (lambda p: np.asarray(X @ p["kernel"]), "cannot be traced by JAX"),
        (lambda p: X @ p["kernel"] / 0, "not finite"),
        (lambda p: jnp.tanh(X @ p["kernel"]), "outputs, and none is normalised in part"),
        (
            lambda p: normalised(X @ p["kernel"]) @ p["kernel"],
            "tied: used 2 times, and normalised at 1 of them alone",
        ),
    ],
    ids=["random", "not traced", "not finite", "not normalised", "tied"],
)
def test_what_stands_in_the_way_is_said(apply, complaint):
    with pytest.raises(ValueError, match=complaint):
        examine_kernels(apply, {"kernel": random(5, 5)})


def test_running_statistics_are_told_from_no_normalisation():
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
    model = nnx.Sequential(nnx.Linear(5, 4, rngs=rngs), norm, nnx.Linear(4, 3, rngs=rngs))
    with pytest.raises(ValueError, match=r"; layers/0/kernel could be.*training mode"):
        updates.normalized_kernels_nnx(model, X)


def test_two_normalisers_on_one_kernel_are_warned_of():
    rngs = nnx.Rngs(0)
    inside = nnx.WeightNorm(nnx.Linear(5, 4, rngs=rngs), rngs=rngs)
    model = nnx.Sequential(inside, nnx.BatchNorm(4, rngs=rngs))
    with pytest.warns(UserWarning, match="layers/0/layer_instance/kernel is inside nnx.WeightNorm"):
        updates.normalized_kernels_nnx(model, X)


# --- Held at unit norm ----------------------------------------------------------------------------

BLOCKS = {
    "heads and biases": {
        "kernel": FilterAxes((0, 2), joint="q"),
        "bias": FilterAxes((1,), joint="q"),
        "rest": False,
    },
    "groups": {"kernel": FilterAxes((0, 2), (6, 2, 3, 2)), "bias": None, "rest": False},
    "whole": {"kernel": FilterAxes((0, 1, 2)), "bias": False, "rest": False},
    "filters and biases": {
        "kernel": FilterAxes((0,), joint="q"),
        "bias": FilterAxes((), joint="q"),
        "rest": False,
    },
}


def as_rows(kind, tree):
    """The blocks one by one, taken entry by entry: (blocks, entries)."""
    w, b = np.asarray(tree["kernel"]), np.asarray(tree["bias"])
    if kind == "heads and biases":
        return np.stack([[*w[:, h].ravel(), *b[h]] for h in range(2)])
    if kind == "groups":
        return np.stack([w[:, h, i::2].ravel() for h in range(2) for i in range(2)])
    if kind == "whole":
        return w.reshape(1, -1)
    return np.stack([[*w[:, h, i], b[h, i]] for h in range(2) for i in range(6)])


@pytest.mark.parametrize("kind", ["heads and biases", "groups", "whole"])
@pytest.mark.parametrize("name", UPDATES)
def test_every_update_does_to_blocks_what_it_does_to_filters(name, kind):
    shapes = {"kernel": (6, 2, 6), "bias": (2, 6), "rest": (3, 3)}
    draws = np.random.default_rng(3)
    trees = [
        {n: jnp.asarray(draws.normal(size=s), jnp.float32) for n, s in shapes.items()}
        for _ in range(4)
    ]
    rows = [jnp.asarray(as_rows(kind, tree)) for tree in trees]

    def path(tx, start, *grads):
        given = iter(grads)
        return train(tx, start, lambda _: next(given), len(grads))

    found = path(build(name, 0.1, BLOCKS[kind]), *trees)
    expected = path(UPDATES[name].filters(0.1, axis=1), *rows)
    for step, row in enumerate(expected):
        moved = as_rows(kind, jax.tree.map(operator.itemgetter(step), found))
        np.testing.assert_allclose(moved, row, rtol=2e-5, atol=2e-6)
    off = np.abs(np.linalg.norm(moved, axis=1) - 1).max()
    assert off < 1e-6 or not UPDATES[name].constrained


@pytest.mark.parametrize("kind", BLOCKS)
def test_normalize_filters_divides_blocks_by_their_norms(kind):
    params = {"kernel": random(6, 2, 6), "bias": random(2, 6), "rest": random(3, 3)}
    unit = updates.normalize_filters(params, BLOCKS[kind])
    rows = as_rows(kind, params)
    np.testing.assert_allclose(
        as_rows(kind, unit), rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=1e-5
    )
    np.testing.assert_array_equal(unit["rest"], params["rest"])


class Cnn(nnx.Module):
    """No name tells a normalised kernel from another, and some start at zero."""

    def __init__(self, rngs):
        zeros, ones = nnx.initializers.zeros_init(), nnx.initializers.ones_init()
        self.classifier = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs)  # ReLU, normalised
        self.norm0 = nnx.BatchNorm(4, rngs=rngs)
        self.b = nnx.Linear(4, 4, rngs=rngs)  # its bias, a ReLU, normalised
        self.norm1 = nnx.BatchNorm(4, scale_init=zeros, bias_init=ones, rngs=rngs)
        self.batchnorm = nnx.Linear(4, 4, rngs=rngs)  # its bias, normalised by layer
        self.norm2 = nnx.LayerNorm(4, rngs=rngs)
        self.filters = nnx.Linear(4, 3, kernel_init=zeros, rngs=rngs)  # not normalised

    def __call__(self, x):
        x = self.norm0(nnx.relu(self.classifier(x)))
        x = nnx.relu(self.norm1(nnx.relu(self.b(nnx.max_pool(x, (2, 2), (2, 2))))))
        return self.filters(self.norm2(self.batchnorm(jnp.mean(x, (1, 2)))))


def test_what_is_found_is_trained_in_nnx():
    """Joint leaves in an nnx.Optimizer: each block at norm one."""
    model, images = Cnn(nnx.Rngs(0)), PICTURES.transpose(0, 2, 3, 1)[..., :2]
    before = jax.tree.map(jnp.copy, nnx.state(model))
    selection = updates.normalized_kernels_nnx(model, images)
    assert_close(nnx.state(model), before, atol=0)  # its running statistics too
    params = nnx.state(model, nnx.Param)
    assert jax.tree.structure(selection) == jax.tree.structure(params)
    found = {path[0].key for path, chosen in jax.tree.leaves_with_path(selection) if chosen}
    assert found == {"classifier", "b", "batchnorm"}
    assert nnx.to_pure_dict(selection)["classifier"] == {"kernel": True}

    nnx.update(model, updates.normalize_filters(params, selection))
    optimizer = nnx.Optimizer(model, build("un-adam", 0.05, selection), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(images) - 1) ** 2))(model))

    for _ in range(3):
        step(model, optimizer)
    np.testing.assert_allclose(norms_over(model.classifier.kernel[...], (0, 1, 2)), 1, atol=1e-6)
    each, whole = (np.vstack([m.kernel[...], m.bias[...]]) for m in (model.b, model.batchnorm))
    np.testing.assert_allclose(norms_over(each, 0), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(whole), 1, atol=1e-6)
    moved = nnx.state(model, nnx.Param)
    for name in ("classifier", "b", "batchnorm", "filters"):
        assert np.abs(moved[name]["kernel"][...] - before[name]["kernel"][...]).max() > 1e-3


def test_none_is_passed_over_in_selections_and_gradients():
    params = {"kernel": random(5, 3), "frozen": random(5, 3), "bias": jnp.ones(3)}
    tx = build("un-momentum", 0.1, {"kernel": True, "frozen": True, "bias": None})
    grads = {"kernel": jnp.ones((5, 3)), "frozen": None, "bias": None}
    moved, state = tx.update(grads, tx.init(params), params)
    assert moved["frozen"] is None
    assert moved["bias"] is None
    np.testing.assert_allclose(norms_over(params["kernel"] + moved["kernel"], 0), 1, atol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    prefix = build("un", 0.1, {"a": None, "b": True})
    both = {"a": {"x": jnp.ones(2), "y": None}, "b": random(5, 3)}
    moved, _ = prefix.update(both, prefix.init(both), both)
    np.testing.assert_allclose(moved["a"]["x"], -0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("selection", "complaint"),
    [
        ({"a": FilterAxes((0,), (5, 4)), "b": False}, "a of shape .5, 3. has no filters as"),
        ({"a": FilterAxes((2,)), "b": False}, "a of shape .5, 3. has no filters as"),
        (
            {"a": FilterAxes((0,), joint="q"), "b": FilterAxes((1,), joint="q")},
            "b of shape .5, 3. has 5, those before it named 'q' have 3",
        ),
    ],
)
def test_blocks_that_do_not_fit_are_refused(selection, complaint):
    with pytest.raises(ValueError, match=complaint):
        build("un", 0.1, selection).init({"a": random(5, 3), "b": random(5, 3)})
