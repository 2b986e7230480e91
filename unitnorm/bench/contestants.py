"""What one repetition is, for everything written in JAX.

Each function serves one kind of contestant in a worker: it sets up, tells that it is ready and
repeats. To add one, write a function here and name it in `worker.KINDS`.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unitnorm.archbn import training
from unitnorm.archbn.config import Config
from unitnorm.bench.worker import RATE, Orders
from unitnorm.data import Dataset, load_dataset
from unitnorm.run import checkpoints, devices
from unitnorm.run.config import parse
from unitnorm.run.loop import Interrupted, Session, train
from unitnorm.run.processes import is_first_process, join
from unitnorm.run.provenance import device

VALIDATION_SHARE = 0.2  # validation images over training images, as in Table 2
MOST_EPOCHS = 60  # a program serves so many repetitions
TRIES = 5  # the quickest of them: a limit is what can be reached


def config_of(images: int, seeds: int) -> Config:
    """The paper's protocol, without an early stop and with so many training images."""
    epochs = {"min_epochs": MOST_EPOCHS, "max_epochs": MOST_EPOCHS}
    validation = max(1, round(VALIDATION_SHARE * images))
    sizes = {"train_images": images, "validation_images": validation}
    values = {"runs": seeds, "train": {**sizes, **epochs}}
    return parse(values, "bench", Config)


def program(
    orders: Orders,
    depth: int,
    seeds: int,
    updates: Sequence[str],
    images: int,
    variants: int = 1,
    devices_used: int | None = None,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    save_every_s: float | None = checkpoints.EVERY_S,
) -> None:
    """An epoch of `unitnorm train`: every run, its evaluation, the report and the checkpoint.

    Args:
      variants: of each seed and update, as a study has them.
      save_every_s: of the checkpoints; None: there are none.
    """
    devices.prepare(devices_used)
    join(coordinator, processes, process)
    config = config_of(images, seeds)
    runs = np.repeat(np.arange(seeds), variants)
    settings = training.Settings(runs, np.full(len(runs), RATE))
    arms = [(training.Arm(update), settings) for update in updates]
    task = training.Program(
        "bench", config, depth, training.train_phase(config), arms, load_dataset()
    )
    part = checkpoints.Part("bench", "bench")
    orders.ready(samples=task.samples, device=device())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        keep = checkpoints.Checkpoints()
        if is_first_process() and save_every_s is not None:
            place = Path(folder) / "checkpoints"
            kept = checkpoints.Folder(place, every_s=save_every_s, say=lambda _: None)
            stack.callback(kept.finish)
            keep = kept
        epochs = 0

        def is_over() -> bool:  # asked before the first epoch and after each
            nonlocal epochs
            if epochs:
                orders.done(**device_memory())
            epochs += 1
            return not orders.wait()

        session = Session(checkpoints=keep, interrupted=is_over)
        with contextlib.suppress(Interrupted):
            train(part, task, session)


def device_memory() -> dict[str, float]:
    """The most memory that any one device has had, where it is not the computer's own."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    return {"device_memory_mb": max(peaks) / 1e6} if peaks else {}


class OptaxLoop:
    """The plain way in JAX: one run, one jitted step for each mini-batch, all data on the device.

    Without any of our set-up: JAX as it is after `import jax`.

    Args:
      depth: of the network.
      mnist, config: what it is trained on, and how it is made.
      make: from the parameters to the optimiser.
    """

    def __init__(
        self,
        depth: int,
        mnist: Dataset,
        config: Config,
        make: Callable[[Any], optax.GradientTransformation] = lambda _: optax.sgd(RATE),
    ):
        network = training.archbn(config.model, mnist.train_images.shape[1], mnist.classes, depth)
        self.batch = config.loss.batch_size
        self.x = jnp.asarray(mnist.train_images, jnp.float32)
        self.y = jnp.asarray(mnist.train_labels, jnp.int32)
        self.params, self.stats = network.init(jax.random.key(0))
        optimiser = make(self.params)
        self.opt_state = optimiser.init(self.params)

        @jax.jit
        def step(
            params: Any, stats: Any, opt_state: Any, x: Any, y: Any, index: Any
        ) -> tuple[Any, Any, Any]:
            def loss(params: Any) -> tuple[Any, Any]:
                logits, new = network.apply(params, stats, x[index], True)
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[index])
                return losses.sum(), new

            gradient, new = jax.grad(loss, has_aux=True)(params)
            displacement, opt_state = optimiser.update(gradient, opt_state, params)
            return optax.apply_updates(params, displacement), new, opt_state

        self._step = step

    def train(self, order: np.ndarray) -> None:
        """One step for each mini-batch of `order`, int (images,)."""
        for start in range(0, len(order), self.batch):
            index = order[start : start + self.batch]
            self.params, self.stats, self.opt_state = self._step(
                self.params, self.stats, self.opt_state, self.x, self.y, index
            )
        jax.block_until_ready(self.params)

    def weights(self) -> list[np.ndarray]:
        """Every W and θ, one filter per row, first layer first."""
        found = [*training.filters(self.params), self.params["theta"]["W"]]
        return [np.asarray(w) for w in found]


def optax_loop(orders: Orders, depth: int, images: int) -> None:
    """`OptaxLoop` over so many images in a new order."""
    mnist = load_dataset()
    loop = OptaxLoop(depth, mnist, Config())
    rng = np.random.default_rng(0)
    orders.serve(
        lambda: loop.train(rng.permutation(len(mnist.train_labels))[:images].astype(np.int32)),
        samples=images,
    )


def machine(orders: Orders) -> None:
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

    stack = jnp.ones((len(found), side, side), jnp.float32) / side
    stack = jax.device_put(stack, by_device)

    def repetition() -> dict[str, float]:
        seconds = min(seconds_of(lambda: multiply(stack, stack)) for _ in range(TRIES))
        return {
            "flops_per_s": 2.0 * side**3 * times * len(found) / seconds,
            "bytes_per_s": memory_rate(by_device),
        }

    orders.serve(repetition)


def memory_rate(sharding: jax.sharding.Sharding) -> float:
    """Bytes a second of reading an array larger than the caches once and writing it once.

    It is negated in its place, so that no line of the caches is fetched only to be overwritten.
    """
    length = 1 << (25 if jax.default_backend() == "cpu" else 29)
    count = len(sharding.device_set)
    array = jax.device_put(jnp.ones((count, length // count), jnp.float32), sharding)

    def negate_in_place() -> jax.Array:
        nonlocal array
        array = negate(array)
        return array

    return 2.0 * array.nbytes / min(seconds_of(negate_in_place) for _ in range(TRIES))


@partial(jax.jit, donate_argnums=0)
def negate(x: jax.Array) -> jax.Array:
    """−x, in the memory of x."""
    return -x


def seconds_of(compute: Callable[[], Any]) -> float:
    """Until what is computed is there."""
    start = time.perf_counter()
    jax.block_until_ready(compute())
    return time.perf_counter() - start
