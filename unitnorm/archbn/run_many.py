"""Many runs at once: `training`'s functions of one run, mapped over runs and devices, and compiled.

The runs of an arm are the leading axis of every array of its `Run`. They go in blocks, the blocks
are placed on the devices, and each device computes its own; nothing moves between host and device
inside an epoch. A run's bits do not depend on what is trained along, nor on the devices.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from unitnorm.archbn import protocol
from unitnorm.archbn.batches import Images, draw_split
from unitnorm.archbn.evaluation import find_wrong
from unitnorm.archbn.model import START
from unitnorm.archbn.training import Arm, Run, Settings, Task, make_training
from unitnorm.data import Dataset
from unitnorm.run.loop import Status


class Program:
    """The training of runs to their end: a `loop.Trainable`. A state has a `Run` for each arm.

    Where the runs do not divide evenly among the devices, runs that have ended are added and never
    reported. `title` is what the user calls it; each arm comes with its runs.
    """

    def __init__(self, title: str, task: Task, arms: Sequence[tuple[Arm, Settings]], data: Dataset):
        sizes = getattr(task.config, task.part)
        self.title, self.epochs = title, sizes.max_epochs
        settings = [_fill(given) for _, given in arms]
        counts = [len(given.seed) for given in settings]
        self.samples = sum(counts) * sizes.train_images
        block = task.network.together
        devices = jax.devices()[: sum(-(-count // block) for count in counts)]
        # a GPU or TPU computes all of its runs together
        on_cpu = devices[0].platform == "cpu"
        blocks = [block if on_cpu else -(-count // len(devices)) for count in counts]
        self._runs_at = place_runs(counts, blocks, len(devices))
        self._places = [np.argsort(index)[np.sum(index < 0) :] for index in self._runs_at]
        self._settings = tuple(
            # where there is no run, one that has ended
            mine._replace(rate=np.where(index < 0, np.float32(np.nan), mine.rate))
            for mine, index in zip(map(_rows, settings, self._runs_at), self._runs_at, strict=True)
        )
        mesh = Mesh(np.asarray(devices), ("run",), axis_types=(AxisType.Auto,))
        self._by_run = NamedSharding(mesh, PartitionSpec("run"))
        images = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
        self._images, self._test = jax.device_put(
            tuple(Images(*pair) for pair in images), NamedSharding(mesh, PartitionSpec())
        )
        self._split, self._init, self._epoch, self._wrong = _compile(
            task, tuple(arm for arm, _ in arms), tuple(blocks), mesh, len(data.train_labels)
        )
        self._leaders: list[np.ndarray] = []
        if any(np.any(given.schedule == protocol.FOLLOW) for given in settings):
            # of each place, that of its seed's first run in the first arm
            first = dict(zip(settings[0].seed[::-1], self._places[0][::-1], strict=True))
            self._leaders = [np.array([first[s] for s in mine.seed]) for mine in self._settings]
        self._epochs_done = 0

    def start(self) -> tuple[Run, ...]:
        """The runs at their start."""
        # a seed's split is drawn once: for each run, it would be a third of the start
        seeds = np.unique(np.concatenate([given.seed for given in self._settings]))
        drawn = self._split(seeds)
        state: tuple[Run, ...] = self._init(self._settings)  # is traced while splits are drawn
        splits = jax.device_get(drawn)
        index = [np.searchsorted(seeds, given.seed) for given in self._settings]
        self._splits = jax.device_put([_rows(splits, mine) for mine in index], self._by_run)
        self._epochs_done = 0
        return state

    def put(self, saved: Any) -> tuple[Run, ...]:
        """Saved runs at their places, which depend on the devices."""
        self._epochs_done = max(int(np.max(runs.epoch)) for runs in saved)
        ended = np.int32(protocol.NO_RATE)
        state = tuple(
            runs._replace(reason=np.where(index < 0, ended, runs.reason))
            for runs, index in zip(map(_rows, saved, self._runs_at), self._runs_at, strict=True)
        )
        return jax.device_put(state, self._by_run)

    def take(self, state: Any) -> Any:
        """The runs of a state, or what else there is of each, in their order and on the host."""
        return tuple(map(_rows, jax.device_get(state), self._places))

    def advance(self, state: tuple[Run, ...]) -> tuple[Run, ...]:
        """An epoch. The state given is used up."""
        number = np.int32(self._epochs_done)
        self._epochs_done += 1
        state = self._epoch(self._splits, state, number, self._images, self._test)
        if not self._leaders:
            return state
        leading = np.asarray(state[0].rate)
        rates = [
            np.where(run.schedule == protocol.FOLLOW, leading[mine], run.rate)
            for run, mine in zip(state, self._leaders, strict=True)
        ]
        placed = zip(state, jax.device_put(rates, self._by_run), strict=True)
        return tuple(run._replace(rate=rate) for run, rate in placed)

    def status(self, state: tuple[Run, ...]) -> Status:
        """How far the runs are."""
        found = self.take(tuple((r.reason, r.epoch, r.history.val_error) for r in state))
        reasons, epochs, errors = map(np.concatenate, zip(*found, strict=True))
        now = last(errors, epochs)
        known = now[np.isfinite(now)]
        active = int((reasons == protocol.RUNNING).sum())
        error = float(known.mean()) if known.size else np.nan
        shown = f"{error:.2%}" if known.size else "–"
        text = f"{active}/{reasons.size} runs active, val error {shown}"
        return Status(int(epochs.max()), bool(active), text, val_error=error)

    def find_wrong(self, state: tuple[Run, ...]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Of each arm, which test images its runs get wrong, bool (runs, test images), and the mean
        cross-entropy over all, float32 (runs,)."""
        return self.take(self._wrong(state, self._test))


@lru_cache(maxsize=16)
def _compile(
    task: Task, arms: tuple[Arm, ...], blocks: tuple[int, ...], mesh: Mesh, images: int
) -> tuple[Callable[..., Any], ...]:
    """What is compiled of a program: its splits, its start, an epoch, what its runs get wrong.

    Of each arm so many runs as `blocks` says are computed together. A study trains program after
    program of other seeds: the same functions spare it the tracing, a twentieth of its time.
    """
    trainings = [make_training(task, arm) for arm in arms]
    sizes = getattr(task.config, task.part)
    drawn = partial(draw_split, task.part, (sizes.train_images, sizes.validation_images), images)

    def init(settings: tuple[Settings, ...]) -> Any:
        each = zip(trainings, blocks, settings, strict=True)
        return tuple(
            _joined(jax.lax.map(jax.vmap(mine.init), _blocked(block, given)))
            for mine, block, given in each
        )

    def advance(splits: Any, state: Any, number: Array, images: Images, test: Images) -> Any:
        done = []
        for mine, block, *runs in zip(trainings, blocks, splits, state, strict=True):
            epoch = jax.vmap(partial(mine.epoch, images, test, number))
            # a block that has ended costs nothing
            ended = jax.lax.map(
                lambda pair, epoch=epoch: jax.lax.cond(
                    jnp.any(pair[1].reason == protocol.RUNNING), epoch, lambda _, same: same, *pair
                ),
                _blocked(block, tuple(runs)),
            )
            done.append(_joined(ended))
        return tuple(done)

    def wrong(state: Any, test: Images) -> Any:
        everything = jnp.arange(len(test.labels), dtype=jnp.int32)

        def of_block(runs: Run) -> tuple[Array, Array]:
            of_runs = jax.vmap(partial(find_wrong, task.network), (0, 0, None, None))
            wrong, losses = of_runs(runs.params, runs.stats, test, everything)
            return wrong, losses.mean(-1)

        each = zip(blocks, state, strict=True)
        return tuple(_joined(jax.lax.map(of_block, _blocked(block, runs))) for block, runs in each)

    return (
        jax.jit(partial(jax.lax.map, drawn)),
        _over_devices(mesh, init, by_run=1),
        _over_devices(mesh, advance, by_run=2, donate=(1,)),
        _over_devices(mesh, wrong, by_run=1),
    )


def place_runs(counts: Sequence[int], blocks: Sequence[int], devices: int) -> list[np.ndarray]:
    """Place blocks of runs on devices in turn, arm after arm, so that all have as much to do.

    Args:
      counts, blocks: of each arm, its runs, and how many are a block.

    Returns:
      For each arm the run at each place, device after device, int (places,); −1 where there is
      none, since every device has as many places as the others.
    """
    found, placed = [], 0
    for count, block in zip(counts, blocks, strict=True):
        number = -(-count // block)
        runs = np.full((-(-number // devices), devices, block), -1)
        runs.flat[:count] = np.arange(count)
        found.append(np.roll(runs.swapaxes(0, 1), placed, axis=0).reshape(-1))
        placed += number
    return found


def at_end(run: Run, task: Task) -> dict[str, np.ndarray]:
    """`train_loss`, `val_error` and `diverged` of an arm's runs at their end, (runs,) each."""
    loss = last(run.history.train_loss, run.epoch)
    val_error = last(exact_history(run, task)["val_error"], run.epoch)
    first, limit = run.history.train_loss[:, 0], task.config.stopping.diverged_error
    diverged = protocol.has_diverged(loss, first, val_error, diverged_error=limit)
    return {"train_loss": loss, "val_error": val_error, "diverged": np.asarray(diverged)}


def exact_history(run: Run, task: Task) -> dict[str, np.ndarray]:
    """The history of an arm's runs, (runs, max_epochs, …), with errors as the fractions that they
    are: XLA multiplies by 1 / images, which rounds."""
    sizes, history = getattr(task.config, task.part), run.history._asdict()
    images = {"train_error": sizes.train_images, "val_error": sizes.validation_images}
    for name, count in images.items():
        history[name] = np.round(np.asarray(history[name], np.float64) * count) / count
    return history


def last(values: ArrayLike, epochs: ArrayLike) -> np.ndarray:
    """Each run's value after its last epoch: (…, max_epochs) and (…,) → (…,); NaN without any."""
    index = np.maximum(np.asarray(epochs) - 1, 0)
    return np.take_along_axis(np.asarray(values), index[..., None], -1)[..., 0]


def _blocked(block: int, tree: Any) -> Any:
    """Leaves (runs, …) as (blocks, block, …).

    XLA compiles batches of other sizes to code with other rounding, so it is the block alone that
    decides a run's bits, and not how many runs there are.
    """
    return jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), tree)


def _joined(tree: Any) -> Any:
    """Leaves (blocks, block, …) as (runs, …)."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _over_devices(
    mesh: Mesh, function: Callable[..., Any], *, by_run: int, donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Compile a function of many runs, each device computing its own.

    The first `by_run` arguments have runs as their leading axis, as the result has; the memory of
    those in `donate` may be reused.
    """
    runs, everywhere = PartitionSpec("run"), PartitionSpec()
    count = len(inspect.signature(function).parameters)
    specs = (runs,) * by_run + (everywhere,) * (count - by_run)
    # by default JAX rounds the factors of float32 products on recent GPUs and on TPUs
    exact = jax.default_matmul_precision("highest")(function)
    sharded = jax.shard_map(exact, mesh=mesh, in_specs=specs, out_specs=runs, check_vma=False)
    return jax.jit(sharded, donate_argnums=donate)


def _fill(given: Settings) -> Settings:
    """Settings with every array as long as `seed`."""

    def filled(values: Any, dtype: type = np.float32, *shape: int) -> Any:
        each = (len(given.seed), *shape)
        return None if values is None else np.broadcast_to(np.asarray(values, dtype), each)

    seed, rate, ratio, schedule, spread, decay = given
    return Settings(
        filled(seed, np.uint32), filled(rate), filled(ratio), filled(schedule, np.int32),
        filled(spread, np.float32, len(START)), filled(decay),
    )  # fmt: skip


def _rows(tree: Any, index: np.ndarray) -> Any:
    """These rows of every array."""
    return jax.tree.map(lambda x: x[index], tree)
