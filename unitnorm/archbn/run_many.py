"""Many runs at once: `training`'s functions of one run, mapped over runs and devices, and compiled.

The runs of an arm are the leading axis of every array of its `Run`. They go in blocks, the blocks
are placed on the devices, and each device computes its own; nothing moves between host and device
inside an epoch. A run's bits do not depend on what is trained along, nor on the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from unitnorm.archbn import protocol
from unitnorm.archbn.batches import Images, Split, draw_split
from unitnorm.archbn.evaluation import find_wrong
from unitnorm.archbn.model import START
from unitnorm.archbn.training import Arm, Run, Settings, Task, Training, make_training
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
        self._settings = self._placed(settings, "rate", np.float32(np.nan))
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
        return jax.device_put(
            self._placed(saved, "reason", np.int32(protocol.NO_RATE)), self._by_run
        )

    def _placed(self, arms: Sequence[Any], field: str, ended: np.generic) -> tuple[Any, ...]:
        """Each arm's runs at their places; where there is none, one whose `field` says `ended`."""
        placed = zip(map(_rows, arms, self._runs_at), self._runs_at, strict=True)
        return tuple(
            runs._replace(**{field: np.where(index < 0, ended, getattr(runs, field))})
            for runs, index in placed
        )

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

    def in_blocks(functions: Iterable[Callable[..., Any]], *arms: Any) -> tuple[Any, ...]:
        """A function of many runs for each arm, on one block of the arm's runs after another.

        XLA compiles batches of other sizes to code with other rounding, so it is the block alone
        that decides a run's bits, and not how many runs there are.
        """
        done = []
        for function, block, *runs in zip(functions, blocks, *arms, strict=True):
            each = jax.tree.map(lambda x, b=block: x.reshape(-1, b, *x.shape[1:]), tuple(runs))
            found = jax.lax.map(lambda given, call=function: call(*given), each)
            done.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found))
        return tuple(done)

    def init(settings: tuple[Settings, ...]) -> Any:
        return in_blocks([jax.vmap(mine.init) for mine in trainings], settings)

    def advance(splits: Any, state: Any, number: Array, images: Images, test: Images) -> Any:
        def unless_ended(training: Training, split: Split, runs: Run) -> Run:
            """An epoch; a block that has ended costs nothing."""
            epoch = jax.vmap(partial(training.epoch, images, test, number))
            going = jnp.any(runs.reason == protocol.RUNNING)
            return jax.lax.cond(going, epoch, lambda _, same: same, split, runs)

        return in_blocks([partial(unless_ended, mine) for mine in trainings], splits, state)

    def wrong(state: Any, test: Images) -> Any:
        everything = jnp.arange(len(test.labels), dtype=jnp.int32)

        def of_run(run: Run) -> tuple[Array, Array]:
            wrong, losses = find_wrong(task.network, run.params, run.stats, test, everything)
            return wrong, losses.mean()

        return in_blocks([jax.vmap(of_run)] * len(blocks), state)

    runs, everywhere = PartitionSpec("run"), PartitionSpec()

    def over_devices(function: Callable[..., Any], *specs: PartitionSpec, **options: Any) -> Any:
        """Compiled, each device computing its own runs."""
        # by default JAX rounds the factors of float32 products on recent GPUs and on TPUs
        exact = jax.default_matmul_precision("highest")(function)
        sharded = jax.shard_map(exact, mesh=mesh, in_specs=specs, out_specs=runs, check_vma=False)
        return jax.jit(sharded, **options)

    return (
        jax.jit(partial(jax.lax.map, drawn)),
        over_devices(init, runs),
        # the memory of the state may be reused
        over_devices(advance, runs, runs, everywhere, everywhere, everywhere, donate_argnums=(1,)),
        over_devices(wrong, runs, everywhere),
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


def _fill(given: Settings) -> Settings:
    """Settings with every array as long as `seed`."""

    def filled(name: str, values: Any) -> np.ndarray | None:
        dtype = {"seed": np.uint32, "schedule": np.int32}.get(name, np.float32)
        shape = (len(given.seed), len(START)) if name == "spread" else (len(given.seed),)
        return None if values is None else np.broadcast_to(np.asarray(values, dtype), shape)

    return Settings(**{name: filled(name, values) for name, values in given._asdict().items()})


def _rows(tree: Any, index: np.ndarray) -> Any:
    """These rows of every array."""
    return jax.tree.map(lambda x: x[index], tree)
