"""What one repetition is, for everything written in JAX; the one file that knows our training.

Each generator serves one kind of contestant in a worker.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unitnorm.archbn.batches import Images, draw_split
from unitnorm.archbn.config import Config
from unitnorm.archbn.model import START, Network, archbn
from unitnorm.archbn.protocol import BOLD_DRIVER
from unitnorm.archbn.run_many import Program
from unitnorm.archbn.training import Arm, Settings, Task, make_training
from unitnorm.bench.roofline import VALIDATION_SHARE
from unitnorm.bench.worker import RATE
from unitnorm.data import Dataset, load_dataset
from unitnorm.run import checkpoints, devices
from unitnorm.run.config import parse
from unitnorm.run.provenance import device

MOST_EPOCHS = 60  # a program serves so many repetitions
TRIES = 5  # the quickest of them: a limit is what can be reached


def make_task(depth: int, images: int, data: Dataset, validation_share: float) -> Task:
    """The paper's protocol, without an early stop and with so many training images."""
    epochs = {"min_epochs": MOST_EPOCHS, "max_epochs": MOST_EPOCHS}
    validation = max(2, round(validation_share * images))
    sizes = {"train_images": images, "validation_images": validation}
    config = parse({"train": {**sizes, **epochs}}, "bench", Config)
    return Task(config, archbn(config.model, data.train_images.shape[1], data.classes, depth))


def make_epoch(
    depth: int, update: str, runs: int, images: int, data: Dataset
) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """An epoch of many runs of one update, all of them together, as a GPU computes them.

    Hardly anything is evaluated in it: its time is that of its steps.

    Returns:
      A function that can be traced, what it takes in every epoch, and its last argument: the state
      of the runs, which it gives anew.
    """
    task = make_task(depth, images, data, validation_share=0.0)
    trained = make_training(task, Arm(update))
    given = Settings(
        np.arange(runs, dtype=np.uint32), np.full(runs, RATE, np.float32),
        schedule=np.full(runs, BOLD_DRIVER, np.int32), spread=np.zeros((runs, len(START))),
    )  # fmt: skip
    state = jax.jit(jax.vmap(trained.init))(given)
    sizes = images, task.config.train.validation_images
    split = partial(draw_split, "train", sizes, len(data.train_labels))
    splits = jax.jit(jax.vmap(split))(given.seed)
    train = Images(data.train_images, data.train_labels)
    test = Images(data.test_images, data.test_labels)
    together = jax.vmap(trained.epoch, in_axes=(None, None, None, 0, 0))
    fixed = jax.device_put((train, test, np.int32(0)))
    return together, (*fixed, splits), state


def nothing() -> Iterator[dict[str, Any]]:
    """Which devices there are."""
    devices.prepare()
    yield {"device": device()}


def program(
    depth: int,
    seeds: int,
    updates: Sequence[str],
    images: int,
    variants: int = 1,
    devices_used: int | None = None,
    save_every_s: float = checkpoints.EVERY_S,
) -> Iterator[dict[str, Any]]:
    """An epoch of `unitnorm train`: every run, its evaluation, its status and its checkpoint; with
    variants of each seed and update, as a study has them."""
    devices.prepare(devices_used)
    data = load_dataset()
    runs = np.repeat(np.arange(seeds), variants)
    arms = [(Arm(update), Settings(runs, np.full(len(runs), RATE))) for update in updates]
    trained = Program("bench", make_task(depth, images, data, VALIDATION_SHARE), arms, data)
    yield {"samples": trained.samples, "device": device()}
    part = checkpoints.Part("bench", "bench")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        keep = checkpoints.Folder(Path(folder), every_s=save_every_s, say=lambda _: None)
        stack.callback(keep.finish)
        state = trained.start()
        while True:  # as `run.loop.train` does
            state = trained.advance(state)
            trained.status(state)
            if keep.due():
                keep.save(part, trained.take(state), wait=False)
            yield device_memory()


def device_memory() -> dict[str, float]:
    """The most memory that any one device has had, where it is not the computer's own."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    return {"device_memory_mb": max(peaks) / 1e6} if peaks else {}


def make_optax_step(
    network: Network, optimiser: optax.GradientTransformation
) -> Callable[..., Any]:
    """The plain way in JAX: (parameters, statistics, optimiser's state), all images, all labels and
    the indices of a mini-batch → the three after a step."""

    @jax.jit
    def step(state: tuple[Any, Any, Any], x: Any, y: Any, index: Any) -> tuple[Any, Any, Any]:
        params, stats, opt_state = state

        def loss(params: Any) -> tuple[Any, Any]:
            logits, new = network.apply(params, stats, x[index], True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[index])
            return losses.sum(), new

        gradient, new = jax.grad(loss, has_aux=True)(params)
        displacement, opt_state = optimiser.update(gradient, opt_state, params)
        return optax.apply_updates(params, displacement), new, opt_state

    return step


def optax_loop(depth: int, images: int) -> Iterator[dict[str, Any]]:
    """One run over so many images in a new order, one jitted step for each mini-batch.

    Without any of our set-up: JAX as it is after `import jax`, all data on the device.
    """
    config, mnist = Config(), load_dataset()
    network = archbn(config.model, mnist.train_images.shape[1], mnist.classes, depth)
    x = jnp.asarray(mnist.train_images, jnp.float32)
    y = jnp.asarray(mnist.train_labels, jnp.int32)
    params, stats = network.init(jax.random.key(0))
    optimiser = optax.sgd(RATE)
    step, state = make_optax_step(network, optimiser), (params, stats, optimiser.init(params))
    rng = np.random.default_rng(0)
    yield {"samples": images}
    while True:
        order = rng.permutation(len(y))[:images].astype(np.int32)
        for start in range(0, images, config.loss.batch_size):
            state = step(state, x, y, order[start : start + config.loss.batch_size])
        jax.block_until_ready(state)
        yield {}


def machine() -> Iterator[dict[str, Any]]:
    """The machine's two limits: the rate of matrix products and that of the memory, in float32.

    Products of square matrices, a stack on every device, as large as is quick.
    """
    devices.prepare()
    on_cpu = jax.default_backend() == "cpu"
    side, times = (1024, 4) if on_cpu else (8192, 16)
    found = jax.devices()
    mesh = jax.sharding.Mesh(np.asarray(found), ("device",))
    by_device = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))

    @jax.jit
    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        # each product needs the one before it, so that none can be left out
        return jax.lax.fori_loop(0, times, lambda _, c: jnp.matmul(a, c), b)

    stack = jax.device_put(jnp.full((len(found), side, side), 1 / side, jnp.float32), by_device)
    yield {}
    while True:
        seconds = min(seconds_of(lambda: multiply(stack, stack)) for _ in range(TRIES))
        flops = 2.0 * side**3 * times * len(found)
        yield {"flops_per_s": flops / seconds, "bytes_per_s": memory_rate(by_device)}


def memory_rate(sharding: jax.sharding.Sharding) -> float:
    """Bytes a second of reading an array larger than the caches once and writing it once.

    It is negated in its place, so that no line of the caches is fetched only to be overwritten.
    """
    length = 1 << (25 if jax.default_backend() == "cpu" else 29)
    count = len(sharding.device_set)
    array = jax.device_put(jnp.ones((count, length // count), jnp.float32), sharding)
    negate = jax.jit(jnp.negative, donate_argnums=0)

    def negate_in_place() -> jax.Array:
        nonlocal array
        array = negate(array)
        return array

    return 2.0 * array.nbytes / min(seconds_of(negate_in_place) for _ in range(TRIES))


def seconds_of(compute: Callable[[], Any]) -> float:
    """Until what is computed is there."""
    start = time.perf_counter()
    jax.block_until_ready(compute())
    return time.perf_counter() - start
