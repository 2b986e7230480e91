"""Groups computed by other processes, on this machine or many, through Dask distributed.

A group is a task: data travel once to a worker, one group at a time runs there on all of its
devices, and a worker that dies costs the group that it was at, which another one then computes. Of
`unitnorm` and the libraries a worker must have what this process has. Needs `unitnorm[cluster]`;
nothing else imports this module.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from typing import Any

from unitnorm.errors import Interrupted, UserError, one_line
from unitnorm.run import devices, provenance
from unitnorm.run.loop import Session
from unitnorm.run.planner import Done, Experiment, Found, Group

PATIENCE_S = 60.0  # for the scheduler, and for a first worker
LOOK_S = 0.2  # between two looks at whether somebody has asked to stop
REFUSALS = 16  # a restarted worker counts again
ATTEMPTS = 3  # a group whose workers have died so often is not tried again


class Workers:
    """The workers that a scheduler has; they may come and go."""

    def __init__(self, client: Any, cpu_devices: int | None):
        self.client = client
        self.sent: dict[int, Any] = {}  # data sets, by their identity here
        self._cpu_devices = cpu_devices
        self._running: dict[Any, tuple[Experiment, Group, Any]] = {}
        self._waiting: list[tuple[Experiment, Group, Any]] = []  # for a worker to be there
        self._refused: set[str] = set()
        self._look()

    def _look(self) -> None:
        """Count the workers, which is a message to the scheduler and back."""
        self._count = len(self.client.scheduler_info(n_workers=-1)["workers"])

    def has_room(self) -> bool:
        """A worker has nothing to do, or one group waits for each at most."""
        return len(self._running) + len(self._waiting) < 2 * max(self._count, 1)

    def give(self, experiment: Experiment, group: Group, data: Any) -> None:
        """Have a group computed by whichever worker is free."""
        self._waiting.append((experiment, group, data))
        self._send()

    def _send(self) -> None:
        """What waits, once a worker is there: data cannot be sent to none."""
        while self._waiting and self._count:
            experiment, group, data = self._waiting[0]
            try:
                if id(data) not in self.sent:
                    self.sent[id(data)] = self.client.scatter(data, hash=False)
            except TimeoutError:  # the worker that was there has gone
                return
            sent = self.sent[id(data)]
            future = self.client.submit(
                compute, experiment, group, sent, identity(), self._cpu_devices, pure=False
            )
            self._running[future] = self._waiting.pop(0)

    def next(self, session: Session) -> list[Done]:
        """The groups that are done, as soon as there is one.

        It is `Interrupted` if somebody has asked to stop, and gives up what is being computed.
        """
        since = time.monotonic()
        while True:
            self._look()
            if session.interrupted():
                self.client.cancel(list(self._running))
                raise Interrupted
            self._send()
            ended = [future for future in self._running if future.done()]
            done = [mine for future in ended for mine in self._take(future, session)]
            if done:
                return done
            if self._count:
                since = time.monotonic()
            elif time.monotonic() - since > PATIENCE_S:
                raise UserError(
                    f"no worker is left at {self.client.scheduler.address}; what is recorded "
                    "stays. Start workers and repeat the command to go on"
                )
            time.sleep(LOOK_S)

    def _take(self, future: Any, session: Session) -> Iterator[Done]:
        """What a task gave; it is given again where it was lost, or its worker is refused."""
        from distributed import CancelledError, KilledWorker

        experiment, group, data = self._running.pop(future)
        try:
            found, worker, other = future.result()
        except CancelledError:  # the worker that had the data has died with them
            self.sent.pop(id(data), None)
            self.give(experiment, group, data)
            return
        except KilledWorker:
            raise UserError(
                f"{group.title}: too many workers have died of it; what is recorded stays. "
                "Give workers more memory, or compute it here, without --scheduler or --workers"
            ) from None
        if not other:
            session.say(f"{group.title}: done by {worker}")
            yield Done(group, found, worker)
            return
        if len(self._refused) == REFUSALS:  # the others, if there are any, are like them
            raise UserError(f"{REFUSALS} workers were refused, the last for its {other}")
        if worker not in self._refused:
            self._refused.add(worker)
            session.say(f"{worker} is refused: {other}; give it what this process has")
            self.client.retire_workers([worker], close_workers=True)
        self.give(experiment, group, data)


@contextlib.contextmanager
def connect(
    scheduler: str | None, workers: int | None, cpu_devices: int | None
) -> Iterator[Workers]:
    """The workers of a scheduler, an address such as tcp://host:8786, or so many of one's own here.

    Each has `cpu_devices`; None: all cores, which workers of one's own share.
    """
    if scheduler is not None and workers is not None:
        raise UserError("--scheduler and --workers: give one; the scheduler has its own workers")
    try:
        import dask
        from distributed import Client
    except ImportError:
        raise UserError(
            "--workers and --scheduler need Dask: pip install 'unitnorm[cluster]'"
        ) from None
    # a scheduler that takes groups for short ones lets a worker wait beside the queue of another
    durations = {"distributed.scheduler.default-task-durations": {compute.__name__: "30s"}}
    dask.config.set({"distributed.scheduler.allowed-failures": ATTEMPTS - 1, **durations})
    with contextlib.ExitStack() as stack:
        address: Any = scheduler
        if workers is not None:
            address = stack.enter_context(own_workers(workers))
            cpu_devices = cpu_devices or max(devices.count_cores() // workers, 1)
        try:
            client = stack.enter_context(Client(address, timeout=PATIENCE_S, set_as_default=False))
            client.wait_for_workers(workers or 1, timeout=PATIENCE_S)
        except (OSError, ValueError, TimeoutError) as error:
            if workers is not None:
                missing = f"--workers {workers}: not all came up within {PATIENCE_S:g} s"
                start = "ask for fewer"
            else:
                missing = f"--scheduler {scheduler}: no scheduler with a worker answers"
                start = "start `dask scheduler` and `dask worker ADDRESS --nthreads 1`"
            raise UserError(f"{missing} ({one_line(error)[:200]}); {start}") from None
        yield Workers(client, cpu_devices)


def own_workers(count: int) -> contextlib.AbstractContextManager[Any]:
    """A scheduler and worker processes on this machine, a GPU for each where there are several."""
    from distributed import Nanny, Scheduler, SpecCluster

    gpus, workers = visible_gpus(), {}
    for number in range(count):
        env = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        options = {"nthreads": 1, "host": "127.0.0.1", "silence_logs": 50, "env": env}
        workers[number] = {"cls": Nanny, "options": options}
    options = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    scheduler = {"cls": Scheduler, "options": options}
    return SpecCluster(workers=workers, scheduler=scheduler, silence_logs=50)


def visible_gpus() -> list[str]:
    """The GPUs of this machine by number, [] where there are fewer than two."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        named = [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    else:
        folder = "/proc/driver/nvidia/gpus"
        named = [str(k) for k in range(len(os.listdir(folder)))] if os.path.isdir(folder) else []
    return named if len(named) > 1 else []


def identity() -> dict[str, str]:
    """What a worker must share with the process that plans: libraries and the code of unitnorm."""
    return provenance.versions() | {"code of unitnorm": provenance.code_identity(".")}


@functools.cache
def prepare(cpu_devices: int | None, number: int | None) -> None:
    """What a worker does once; those of `own_workers`, by their number, take cores of their own.

    With all cores for each, XLA would have as many threads as there are cores in every worker.
    """
    if number is not None and cpu_devices and hasattr(os, "sched_setaffinity"):  # not on macOS
        cores = sorted(os.sched_getaffinity(0))
        mine = {cores[(number * cpu_devices + k) % len(cores)] for k in range(cpu_devices)}
        os.sched_setaffinity(0, mine)
    devices.prepare(cpu_devices)


def compute(
    experiment: Experiment,
    group: Group,
    data: Any,
    expected: dict[str, str],
    cpu_devices: int | None,
) -> tuple[Found, str, str]:
    """The task of a worker: what a group gives, its name, and in what it differs, "" if not."""
    from distributed import get_worker

    worker, here = get_worker(), identity()
    other = ", ".join(
        f"{name} {here.get(name):.12}, here {value:.12}"
        for name, value in expected.items()
        if here.get(name) != value
    )
    if other:
        return Found(), worker.address, other
    prepare(cpu_devices, worker.name if isinstance(worker.name, int) else None)
    found = experiment.compute(group, data, Session())
    return found, f"{worker.address} {provenance.device()['kind']}", ""
