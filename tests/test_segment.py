"""SegNet: layers against loops, loss against NumPy, devices, checkpoints, commands."""

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from flax import nnx
from PIL import Image

import unitnorm
from tests.common import ROOT, call
from unitnorm.cli.segment import PUBLISHED
from unitnorm.errors import Interrupted, UserError
from unitnorm.run import loop, records
from unitnorm.run.checkpoints import Checkpoints, Part
from unitnorm.run.config import load, parse_override
from unitnorm.segment import (
    config,
    data,
    evaluation,
    model,
    palette,
    predicting,
    synthetic,
    tables,
    training,
    weights,
)
from unitnorm.segment.experiment import Segmentation
from unitnorm.segment.schema import SCHEMA

SMALL = (
    "data.dataset=synthetic", "data.height=19", "data.width=26", "network.features=4",
    "network.kernel_size=3", "network.stages=1", "train.epochs=2", "train.batch_size=20",
    "learning_rates={b-sgd = 0.5, un = 0.5}",
)  # fmt: skip
OPTIONS = [word for text in SMALL for word in ("--set", text)]
NHWC = ("NHWC", "HWIO", "NHWC")
SAME_SIZE = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC}


@pytest.fixture(scope="module", autouse=True)
def _quick_to_compile(tmp_path_factory):
    """Compiling takes most of the time here: optimise little, and compile nothing twice."""
    values = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in list(values)[1:]}
    for name, value in values.items():
        jax.config.update(name, value)
    yield
    for name, value in {"jax_disable_most_optimizations": False, **before}.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def small():
    return load(None, dict(map(parse_override, SMALL)), config.SegmentConfig)


@pytest.fixture(scope="module")
def scenes(small):
    return data.load_scenes(small.data)


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("size", [(4, 7), (3, 1)])
def test_pooling_and_unpooling_are_max_pooling_and_its_transpose_with_ties_and_odd_sizes(size):
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 2, (2, *size, 3)).astype(np.float32)  # many ties, and negative
    new = rng.normal(size=(2, -(-size[0] // 2), -(-size[1] // 2), 3)).astype(np.float32)

    @jax.jit
    def values_and_gradients(x, new):
        indices = model.pool_indices(x)
        pooled, back = jax.vjp(lambda x: model.pool(x, indices), x)
        unpooled, forth = jax.vjp(lambda y: model.unpool(y, indices, *size), new)
        values, transpose = jax.vjp(lambda x: nnx.max_pool(x, (2, 2), (2, 2), "SAME"), x)
        # each is the other's gradient
        return (pooled, forth(x)[0], values), (unpooled, back(new)[0], *transpose(new))

    for *found, expected in values_and_gradients(x, new):
        for array in found:
            assert np.array_equal(array, expected)


def test_local_response_normalisation_equals_a_loop():
    x = np.random.default_rng(0).uniform(0, 255, (2, 2, 7))
    expected = np.empty_like(x)
    for i in range(7):
        squares = (x[..., max(0, i - 2) : i + 3] ** 2).sum(-1)
        expected[..., i] = x[..., i] / (1 + 1e-4 / 5 * squares) ** 0.75
    found = model.local_response_normalisation(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("size", "kernel_size"), [((23, 30), 7), ((1, 8), 2)])
def test_convolution_by_fourier_transforms_equals_the_direct_one_also_on_two_devices(
    size, kernel_size, monkeypatch
):
    monkeypatch.setattr(model, "FOURIER_PIXELS", 1)
    monkeypatch.setattr(model, "FOURIER_CHANNELS", 1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 3), dtype=np.float32)
    kernel = rng.standard_normal((kernel_size, kernel_size, 3, 4), dtype=np.float32)

    @partial(jax.jit, static_argnums=0)
    def with_gradients(way):
        mesh, chosen = evaluation.make_mesh(), config.SegNetConfig(convolution=way)
        compute = partial(model.choose_convolution(chosen, mesh), **SAME_SIZE)
        y, transpose = jax.vjp(compute, x, kernel)
        return y, *transpose(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    for ours, wanted in zip(with_gradients("fourier"), with_gradients("direct"), strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(ours / scale, wanted / scale, rtol=0, atol=3e-6)


@pytest.mark.parametrize(("way", "direct"), [("direct", 3), ("fourier", 2)])
def test_a_large_layer_of_many_channels_goes_through_fourier_transforms(way, direct):
    # the encoder's has three channels, the classifier's kernel one pixel; the decoder's is large
    chosen = config.SegNetConfig(convolution=way, features=16, kernel_size=3, stages=1)
    network, images = model.segnet(chosen), jnp.zeros((2, 45, 46, 3))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    text = str(jax.make_jaxpr(network.apply, static_argnums=3)(*shapes, images, True))
    assert text.count("conv_general_dilated[") == direct


@pytest.mark.parametrize(("backend", "direct"), [("cpu", False), ("gpu", True), ("tpu", True)])
def test_a_network_left_to_choose_takes_the_way_that_suits_the_device(monkeypatch, backend, direct):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    chosen = model.choose_convolution(config.SegNetConfig(), None)
    assert (chosen is jax.lax.conv_general_dilated) == direct


def test_the_dtype_is_of_the_convolutions_and_of_nothing_else():
    def text(dtype):
        chosen = config.SegNetConfig(features=4, kernel_size=3, stages=1, dtype=dtype)
        network = model.segnet(chosen)
        shapes = jax.eval_shape(network.init, jax.random.key(0))

        def total(params, stats, images):
            logits, moved = network.apply(params, stats, images, True)
            assert {str(x.dtype) for x in jax.tree.leaves((params, moved, logits))} == {"float32"}
            return logits.sum()

        images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
        return str(jax.make_jaxpr(jax.grad(total))(*shapes, images))

    # two convolutions of 3 × 3 forward; backward the gradients of both kernels and of one's input
    assert text("tensorfloat32").count("precision=(Precision.HIGH, Precision.HIGH)") == 5
    assert "Precision.HIGH," not in text("float32")
    assert "bf16" in text("bfloat16")
    assert "bf16" not in text("tensorfloat32")


def test_any_size_comes_out_at_its_size_and_the_filters_are_those_that_the_symmetry_finds(small):
    net = model.segnet(small.network.model_copy(update={"stages": 2}))
    params, stats = jax.jit(net.init)(jax.random.key(0))
    for size in ((1, 1), (23, 30), (17, 9)):
        images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
        logits, _ = jax.eval_shape(lambda *args: net.apply(*args, False), params, stats, images)
        assert logits.shape == (2, *size, 11)
    images = synthetic.scenes(4, 9, 12)[0].astype(np.float32)
    found = unitnorm.normalized_kernels(
        jax.jit(lambda params: net.apply(params, stats, images, True)[0]), params
    )
    assert found == net.mask(params)
    assert len(net.filters(params)) == 4
    for kernel in net.filters(params):
        np.testing.assert_allclose(unitnorm.filter_norms(kernel), 1, rtol=1e-6)


# ---------------------------------------------------------------- loss and metrics


def test_loss_equals_numpy_and_leaves_unlabelled_pixels_out():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 5, 4, 11)), rng.integers(0, 12, (2, 5, 4))
    labels[0, 0] = 11
    weights, known = rng.uniform(0.5, 2, 11), labels < 11
    log_p = scipy.special.log_softmax(logits, axis=-1)[known, labels[known]]
    found = training.weighted_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), weights)
    np.testing.assert_allclose(found, -np.mean(weights[labels[known]] * log_p), rtol=1e-5)
    nobody = jnp.full(labels.shape, 11)
    assert float(training.weighted_cross_entropy(jnp.asarray(logits), nobody, weights)) == 0.0


def test_confusion_and_figures_from_their_definitions():
    rng = np.random.default_rng(0)
    true, taken = rng.integers(0, 12, (3, 20, 30)), rng.integers(0, 11, (3, 20, 30))
    true[true == 4] = 3
    taken[taken == 4] = 5
    found = np.asarray(evaluation.count_confusion(jnp.asarray(true), jnp.asarray(taken)))
    counts = [[((true == t) & (taken == p)).sum() for p in range(11)] for t in range(11)]
    assert np.array_equal(found, counts)
    known, measured = true < 11, evaluation.measure(found)
    assert measured["global_accuracy"] == pytest.approx((true == taken)[known].mean())
    iou = {
        name: ((true == c) & (taken == c)).sum() / (((true == c) | (taken == c)) & known).sum()
        for c, name in enumerate(palette.NAMES)
        if c != 4  # no pixel: left out of the means
    }
    assert {name: measured[name] for name in iou} == pytest.approx(iou)
    assert np.isnan(measured[palette.NAMES[4]])
    assert measured["mean_iou"] == pytest.approx(np.mean([*iou.values()]))
    recall = [(taken[true == c] == c).mean() for c in range(11) if c != 4]
    assert measured["class_accuracy"] == pytest.approx(np.mean(recall))


def test_median_frequency_weights_by_hand():
    labels = np.array([[[0, 0, 0, 1]], [[0, 0, 11, 11]]], np.uint8)
    # f(0) = 5 / 8, f(1) = 1 / 4 (of the one image that has it), median 7 / 16
    expected = [7 / 16 / (5 / 8), 7 / 16 / (1 / 4), *[0] * 9]
    np.testing.assert_allclose(training.median_frequency_weights(labels), expected, rtol=1e-6)


def test_weights_divided_out_leave_the_frequencies_of_the_labels(small, scenes):
    labels, w = np.repeat(np.arange(4), [350, 100, 30, 20]), np.array([0.2, 0.7, 3.0, 5.0])
    frequencies = np.bincount(labels) / 500
    tilted = frequencies * w / (frequencies * w).sum()

    def loss(bias):
        return training.weighted_cross_entropy(jnp.tile(bias, (500, 1)), jnp.asarray(labels), w)

    bias = jnp.log(tilted)  # the best constant answer to the weighted loss
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(bias), 0, atol=1e-6)
    params = {"classifier": {"bias": bias}}
    found = training.divide_out(weights.Weights(params, None), w).params["classifier"]["bias"]
    np.testing.assert_allclose(jax.nn.softmax(found), frequencies, atol=1e-6)
    # a program does so with the weights of its loss, where the config asks for it
    program = make_program(small, scenes, class_prior="labels")
    params["classifier"]["bias"] = jnp.zeros(11)
    moved = program.measured(weights.Weights(params, None), 1).params["classifier"]["bias"]
    known = training.median_frequency_weights(scenes.splits["train"].labels)
    np.testing.assert_allclose(moved, -np.log(np.where(known > 0, known, 1)), atol=1e-6)


# ---------------------------------------------------------------- training


class Memory(Checkpoints):
    """Checkpoints in memory."""

    state = None

    def restore(self, part, like):
        return self.state

    def save(self, part, state, *, wait):
        self.state = state


def make_program(small, scenes, update="un", scales=(1.0, 1.0), **changes):
    changed = small.model_copy(update={"train": small.train.model_copy(update=changes)})
    train, val = scenes.splits["train"], scenes.splits["val"]
    return training.SegNetProgram(update, changed, update, 0, 0.5, list(scales), (train, val))


def run(program, stop_after=None, **session):
    """Trained to the end, or interrupted after so many mini-batches."""
    asked = itertools.count()
    session = loop.Session(interrupted=lambda: next(asked) == stop_after, **session)
    return program.take(loop.train(Part("segment un", "0" * 64, ()), program, session))


@pytest.fixture(scope="module")
def program(small, scenes):
    return make_program(small, scenes)


@pytest.fixture(scope="module")
def cropped(small, scenes):
    return make_program(small, scenes, statistics="batches", crop=[8, 10])


@pytest.fixture(scope="module")
def trained(program):
    return run(program)


def test_training_learns_and_keeps_filters_at_unit_norm(program, scenes, trained):
    loss, deviation, confusion = trained.figures
    assert loss[1] < loss[0]
    assert program._step._cache_size() == 1  # measuring compiles nothing anew
    assert (deviation < 1e-5).all()
    assert (confusion.sum((1, 2)) == (scenes.splits["val"].labels < 11).sum()).all()
    ious = [evaluation.measure(matrix)["mean_iou"] for matrix in confusion]
    assert int(trained.best_epoch) == 1 + int(np.argmax(ious))
    last = program.evaluator.confusion(trained.now, scenes.splits["val"]).sum(0)
    assert np.array_equal(last, confusion[-1])


def test_images_are_measured_one_mini_batch_after_another(program, scenes, trained, monkeypatch):
    # several at once can block each other where devices share the cores
    sent, count = [], program.evaluator._confusion

    def watched(*arguments):
        assert all(matrix.is_ready() for matrix in sent)
        sent.append(count(*arguments))
        return sent[-1]

    monkeypatch.setattr(program.evaluator, "_confusion", watched)
    for _ in range(10):
        program.evaluator.confusion(trained.now, scenes.splits["train"])
    assert len(sent) == 30


def test_confusion_is_that_of_each_image_also_of_fewer_than_a_batch(program, scenes, trained):
    whole = program.evaluator.confusion(trained.now, scenes.splits["train"])
    labels = scenes.splits["train"].labels
    assert whole.shape == (48, 11, 11)
    assert np.array_equal(whole.sum((1, 2)), (labels < 11).sum((1, 2)))
    few = scenes.splits["train"].only(np.arange(21, 24))  # of one drive
    assert np.array_equal(program.evaluator.confusion(trained.now, few), whole[21:24])
    # in a table beside those of each drive
    found = program.evaluator.by_sequence(trained.now, scenes.splits["train"])
    assert list(found) == ["all", "0001TP", "0006R0"]
    assert np.array_equal(found["0001TP"] + found["0006R0"], found["all"])
    assert list(program.evaluator.by_sequence(trained.now, few)) == ["all"]


def check_statistics(found, params, batches):
    """Mean and variance of the first convolution's channels, averaged over mini-batches."""

    @jax.jit
    def of_batch(images):
        x = model.local_response_normalisation(images.astype(jnp.float32))
        kernel = params["encoders"][0]["conv"]["kernel"]
        y = jax.lax.conv_general_dilated(x, kernel, **SAME_SIZE)
        return {"mean": y.mean((0, 1, 2)), "var": y.var((0, 1, 2))}

    first = found.stats["encoders"][0]["norm"]
    each = list(map(of_batch, batches))
    for name in ("mean", "var"):
        expected = np.mean([one[name] for one in each], 0)
        np.testing.assert_allclose(first[name], expected, rtol=1e-3, atol=1e-4)


def draw_epoch(program, epoch, images, labels):
    steps = range(epoch * program.steps, (epoch + 1) * program.steps)
    return [np.asarray(program._draw(i, images, labels, jnp.uint32(0))[0]) for i in steps]


def test_statistics_of_batches_are_those_of_what_the_next_epoch_would_train_on(
    scenes, trained, cropped
):
    batches = draw_epoch(cropped, 2, *scenes.splits["train"][:2])
    assert {images.shape for images in batches} == {(20, 8, 10, 3)}
    check_statistics(cropped.measured(trained.now, 2), trained.now.params, batches)


def test_an_epoch_has_every_image_and_later_ones_another_order(scenes, cropped):
    images, labels, _ = scenes.splits["train"]
    numbered = np.broadcast_to(np.arange(48, dtype=np.uint8)[:, None, None, None], images.shape)
    first, second = (draw_epoch(cropped, epoch, numbered, labels) for epoch in (0, 1))
    for batches in (first, second):
        assert set(np.stack(batches)[..., 0, 0, 0].ravel()) == set(range(48))
    assert not np.array_equal(first[0], second[0])


@pytest.mark.parametrize("stop_after", [1, 4])  # inside the first epoch, and inside the second
def test_an_interrupted_training_goes_on_bit_for_bit(program, trained, stop_after):
    memory, said = Memory(), []
    with pytest.raises(Interrupted):
        run(program, stop_after, checkpoints=memory)
    assert int(memory.state.step) == stop_after
    again = run(program, checkpoints=memory, say=said.append)
    assert "going on after epoch" in said[0]
    jax.tree.map(np.testing.assert_array_equal, again, trained)


def test_every_update_has_the_same_start_and_batches(small, scenes, program):
    programs = program, make_program(small, scenes, "b-sgd")
    starts = [p.start() for p in programs]
    jax.tree.map(np.testing.assert_array_equal, *(start.now for start in starts))
    after = [p.take(p.advance(start)) for p, start in zip(programs, starts, strict=True)]
    assert float(after[0].loss) == float(after[1].loss)  # the same images, changes and weights
    kernels = [state.now.params["encoders"][0]["conv"]["kernel"] for state in after]
    assert not np.array_equal(*kernels)
    # B-SGD steps along the tangent, so norms only grow
    assert (unitnorm.filter_norms(kernels[1]) > 1 + 1e-6).all()


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


def test_weight_decay_shrinks_all_but_the_filters(small, scenes, trained):
    params = trained.now.params
    optimiser = make_program(small, scenes, weight_decay=0.1)._optimiser(0.5, params)
    zero = jax.tree.map(jnp.zeros_like, params)
    steps, _ = jax.jit(optimiser.update)(zero, optimiser.init(params), params)
    trees = map(jax.tree.leaves, (model.filter_mask(params), params, steps))
    for filters, old, step in zip(*trees, strict=True):
        np.testing.assert_allclose(step, 0 if filters else -0.5 * 0.1 * old, atol=1e-6)


def test_stages_train_and_measure_at_a_part_of_the_size(small, scenes):
    staged = make_program(small, scenes, scales=(0.5, 1.0))
    state = run(staged)
    half = scenes.splits["val"].scaled(0.5)
    assert half.labels.shape == (16, 10, 13)
    pixels = [(labels < 11).sum() for labels in (half.labels, scenes.splits["val"].labels)]
    assert list(state.figures.confusion.sum((1, 2))) == pixels
    assert int(state.best_epoch) == 2  # the only one at full size
    assert staged.final_size == (19, 26)
    stages = [config.Stage(epochs=2, scale=0.25), config.Stage(epochs=1, scale=0.5)]
    for epochs, expected in ((5, [0.25, 0.25, 0.5, 1.0, 1.0]), (1, [0.25])):
        assert config.SegmentTraining(stages=stages, epochs=epochs).scales() == expected


def test_a_loss_that_is_not_finite_gives_no_result_also_in_the_last_epoch(small, scenes, trained):
    loss, deviation, confusion = trained.figures
    figures = training.EpochFigures(
        np.array([loss[0], np.nan], np.float32), deviation, confusion * [[[1]], [[0]]]
    )
    broken = trained._replace(figures=figures, best_epoch=np.int32(1))
    sweep = config.SegmentSweep(rates=[0.5, 1e6, 2.0], epochs=2)
    chosen = small.model_copy(update={"updates": ["un"], "sweep": sweep})
    memory = Memory()

    def compute(experiment):
        (group,) = experiment.missing(records.Records.empty(SCHEMA))
        return experiment.compute(group, scenes, loop.Session(checkpoints=memory))

    memory.state = broken
    with pytest.raises(UserError, match=r"epoch 2; take a smaller rate, --set learning_rates\.un"):
        compute(Segmentation(chosen))
    # both rates that end give the same
    states = [state._replace(step=np.int32(4)) for state in (trained, broken)]
    memory.restore = lambda part, like: states["1e+06" in part.title]
    found = compute(Segmentation(chosen, sweep_only=True)).rows["sweep"]
    assert list(found["base_lr"]) == [1e6, 2.0, 0.5]
    assert list(found["chosen"]) == [False, True, False]  # the larger of equals
    for column in ("train_loss", "mean_iou"):
        assert found[column].isna().tolist() == [True, False, False]


# ---------------------------------------------------------------- configs and weights


def test_records_go_with_older_names_of_values_and_with_rates_of_other_updates():
    def read(**changes):
        return load(None, {"train.statistics": "images"} | changes, config.SegmentConfig)

    new, recorded = read(), json.loads(json.dumps(read().protocol()))
    assert read(**{"train.statistics": "anew"}) == new
    recorded["train"]["statistics"] = "anew"
    assert new.conflict(recorded) is None
    assert read(learning_rates={"sm": 2.0}).conflict(recorded) is None
    assert "un: 1.0 there, 2.0 here" in read(learning_rates={"un": 2.0}).conflict(recorded)
    recorded["train"]["statistics"] = "running"
    assert "train.statistics: running there, images here" in new.conflict(recorded)
    assert new.conflict({**recorded, "train": 3}) is not None
    with pytest.raises(UserError, match="kernel_size = 4: expected an odd number"):
        load(None, {"network.kernel_size": 4}, config.SegmentConfig)
    with pytest.raises(UserError, match="each rate may stand once"):
        load(None, {"sweep.rates": [0.3, 1.0, 0.3]}, config.SegmentConfig)


@pytest.fixture(scope="module")
def weights_file(small, trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "un.safetensors"
    known = weights.TrainedSegNet(small.network, trained.best, "un", (19, 26))
    path.write_bytes(weights.pack_weights(known))
    return path


def test_weights_come_back_whole(weights_file, small, trained):
    found = weights.read_weights(weights_file)
    assert (found.network, found.update, found.size) == (small.network, "un", (19, 26))
    jax.tree.map(np.testing.assert_array_equal, found.weights, trained.best)
    for _ in range(8):  # the same bytes each time
        assert weights.pack_weights(found) == weights_file.read_bytes()


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
    found = predict(Image.fromarray(image))
    network = model.segnet(trained.network)
    logits, _ = network.apply(*trained.weights, image[None].astype(np.float32), False)
    assert np.array_equal(found, np.argmax(logits[0], -1))
    # the same up to interpolation at borders between classes
    large = Image.fromarray(image).resize((26 * 4, 19 * 4), Image.Resampling.NEAREST)
    stretched = predict(large)
    assert stretched.shape == (76, 104)
    assert (stretched[2::4, 2::4] == found).mean() > 0.8


# ---------------------------------------------------------------- commands


def segment(*words, code=0):
    with pytest.MonkeyPatch.context() as patch:
        # the devices of this process are set up already
        patch.setattr("unitnorm.run.devices.prepare", lambda *_, **options: None)
        return call("segment", *words, code=code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A results folder of the command, one update."""
    out = tmp_path_factory.mktemp("segment") / "out"
    segment("train", "--out", out, "--update", "un", "--runs", 2, *OPTIONS)
    return out


def test_train_writes_records_weights_and_provenance(folder):
    known = records.read(folder, SCHEMA)
    assert list(known.files) == ["un.safetensors"]
    runs, table = known["runs"], known["metrics"]
    named = runs[["update", "run", "seed", "epochs"]].values.tolist()
    assert named == [["un", 0, 0, 2], ["un", 1, 1, 2]]
    first = table[table["run"] == 0]
    assert list(first[first["split"] == "val"]["epoch"]) == [1, 2]
    test = first[(first["split"] == "test") & (first["epoch"] == 2)]
    assert set(test["sequence"]) == {"all", "0001TP", "0006R0"}
    assert table["mean_iou"].between(0, 1).all()
    assert known["history"].groupby("run")["train_loss"].first().nunique() == 2  # other seeds
    assert known.provenance["data"]["images"] == synthetic.COUNTS


def test_recorded_runs_are_not_trained_again_and_other_settings_refused(folder):
    again = ("train", "--out", folder, "--update", "un", *OPTIONS)
    assert "every selected run is recorded; --fresh starts over" in segment(*again)
    found = segment(*again, "--set", "train.epochs=3", code=2)
    assert "holds records of another config (train.epochs: 2" in found


def test_an_update_without_a_rate_is_swept_on_the_held_out_sequence(tmp_path):
    text = segment(
        "train", "--out", tmp_path, "--update", "un", *OPTIONS,
        "--set", "learning_rates={b-sgd=1.0}", "--set", "sweep.rates=[0.4]",
        "--set", "sweep.epochs=1",
    )  # fmt: skip
    assert "un: no learning rate yet, sweeping first" in text
    known = records.read(tmp_path, SCHEMA)
    for table in ("sweep", "runs"):
        assert list(known[table]["base_lr"]) == [0.4]
    text = segment("sweep", "--out", tmp_path / "x", *OPTIONS, "--set", "sweep.held_out=x", code=2)
    assert "the training images are of the sequences 0001TP, 0006R0" in text


def test_evaluate_gives_the_recorded_numbers_side_by_side_and_saves_the_table(folder, tmp_path):
    one, saved = folder / "un.safetensors", tmp_path / "tables" / "test.md"
    alone = segment("evaluate", "--weights", one, "--synthetic")
    best = tables.select_best(records.read(folder, SCHEMA))
    row = best[(best["run"] == 0) & (best["sequence"] == "all")].iloc[0]
    text = f"{100 * row['mean_iou']:.1f}"
    (line,) = (line for line in alone.splitlines() if line.startswith("mean IoU"))
    assert text in line.split()
    # another file, and one of the same name in a folder of the same name: its path tells it
    for place, names in (("copy", "{0.parent.name}/un"), (folder.name, "{0}")):
        other = tmp_path / place / one.name
        other.parent.mkdir()
        other.write_bytes(one.read_bytes())
        segment("evaluate", "--weights", one, "--weights", other, "--synthetic", "--save", saved)
        table = saved.read_text()
        for path in (one, other):
            assert f" {names.format(path)} |" in table
        (line,) = (line for line in table.splitlines() if line.startswith("| mean IoU "))
        assert line.split()[-4:] == [text, "|", text, "|"]


def test_renew_writes_the_weights_with_recomputed_statistics(folder, scenes, tmp_path):
    old, new = folder / "un.safetensors", tmp_path / "new" / "un.safetensors"
    words = ("renew", "--weights", old, "--synthetic", "--out", new, *OPTIONS[-4:])
    assert str(new) in segment(*words, "--set", "train.statistics=images")
    before, after = weights.read_weights(old), weights.read_weights(new)
    assert (after.network, *after[2:]) == (before.network, *before[2:])
    jax.tree.map(np.testing.assert_array_equal, before.weights.params, after.weights.params)
    images = scenes.splits["train"].images  # 48, 20 at a time; then the first ones again
    batches = images[:20], images[20:40], np.concatenate([images[40:], images[:12]])
    check_statistics(after.weights, before.weights.params, batches)
    assert "nothing to average" in segment(*words, code=2)


def test_report_makes_table_curves_and_figure_2(folder):
    segment("report", "--out", folder, "--synthetic")
    text = (folder / "table.md").read_text()
    assert "| UN " in text
    assert "0006R0" in text
    assert (folder / "figures" / "curves.svg").stat().st_size > 1000
    figure = np.asarray(opened(folder / "figures" / "figure2.png").convert("RGB"))
    for colour in palette.COLOURS[[0, 3]]:
        assert (figure == colour).all(-1).sum() > 1000  # sky and road, in CamVid's colours


def test_predict_writes_labels_of_the_photos_size(folder, tmp_path):
    photos = [tmp_path / "wide.jpg", tmp_path / "tall.png"]
    for path, size, mode in zip(photos, ((401, 50), (7, 90)), ("RGB", "RGBA"), strict=True):
        Image.effect_noise(size, 80).convert(mode).save(path)
    out, trained = tmp_path / "out", ("--weights", folder / "un.safetensors")
    text = segment("predict", *photos, *trained, "--out", out, "--overlay")
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


def test_predict_takes_folders_and_goes_on_after_a_bad_file(folder, tmp_path):
    photos, out, gone = tmp_path / "photos", tmp_path / "out", tmp_path / "gone.png"
    photos.mkdir()

    def refused(*paths):
        trained = folder / "un.safetensors"
        said = segment("predict", *paths, "--weights", trained, "--out", out, code=2)
        return said.splitlines()[-1]

    assert f"{photos}: holds no image" in refused(photos)
    for name in ("a.png", "c.png"):
        Image.effect_noise((26, 19), 80).save(photos / name)
    (photos / "b.jpg").write_bytes(b"no image")
    (photos / "notes.txt").write_bytes(b"not meant")
    bad = f"{photos / 'b.jpg'}: cannot be read as an image"
    assert refused(photos / "b.jpg").startswith(f"error: {bad}")
    assert not out.exists()
    text = refused(photos, gone)
    assert {path.name for path in out.glob("*_labels.png")} == {"a_labels.png", "c_labels.png"}
    assert text.startswith(f"error: 2 of 4 images failed: {bad}")
    assert f"{gone}: cannot be read as an image (No such file" in text
    Image.new("RGB", (9, 9)).save(photos / "a.jpg")
    collide = f"{photos / 'a.png'} and {photos / 'a.jpg'}: their predictions would collide"
    assert collide in refused(photos)


def test_weights_and_results_are_published():
    published = weights.read_weights(PUBLISHED)
    assert (published.update, published.size) == ("un", (360, 480))
    for kernel in model.segnet(published.network).filters(published.weights.params):
        np.testing.assert_allclose(unitnorm.filter_norms(kernel), 1, atol=1e-5)
    known = records.read(ROOT / "results" / "segnet", SCHEMA)
    assert set(tables.select_best(known)["update"]) == {"b-sgd", "un"}
    assert {"un.safetensors", "b-sgd.safetensors"} <= set(known.files)
