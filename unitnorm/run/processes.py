"""Several processes, on one or many hosts, that train together.

They meet in `join`, exchange what all must agree on, and end together: `together` makes sure that
none waits for one that has failed. With one process, each function does nothing or gives back what
it was given.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from unitnorm.errors import Interrupted, UserError

Result = TypeVar("Result")

MEETING_S = 120  # so long processes wait for each other at the start
SILENCE_S = 60  # a process not heard of for so long is taken for dead


def join(
    coordinator: str | None, processes: int | None, process: int | None, *, detect: bool = False
) -> None:
    """Meet the other processes, before anything asks JAX for a device; alone, without any option.

    Args:
      coordinator: host:port at which they meet, on the host of process 0.
      processes, process: how many there are and which this one is.
      detect: join those that Slurm, Kubernetes, Open MPI or a TPU pod has started, with what JAX
        finds out about them; the other arguments are None.

    Raises:
      UserError: arguments that do not fit together, or the processes do not meet.
    """
    given = [option for option in (coordinator, processes, process) if option is not None]
    if not given and not detect:
        return
    if detect and given:
        raise UserError(
            "--distributed finds the other processes itself; leave out --coordinator, --processes "
            "and --process, or leave out --distributed"
        )
    if not detect:
        if coordinator is None or processes is None or process is None:
            raise UserError("--coordinator, --processes and --process go together: give all three")
        if process >= processes:
            raise UserError(
                f"--process {process}: the processes are numbered 0 to {processes - 1} "
                f"with --processes {processes}"
            )
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(
                f"--coordinator {coordinator}: expected HOST:PORT, for example node1:12345"
            )
        if process == 0:
            _check_port(int(port))
    # Its handler would take SIGTERM away from the command line, which stops all processes alike.
    jax.config.update("jax_enable_preemption_service", False)
    if detect:
        where = "Slurm, Kubernetes, Open MPI or a TPU pod"
        hint = "start them there (srun, mpirun, a Job), or give --coordinator instead"
    else:
        where = str(coordinator)
        hint = "start every process with the same --coordinator and --processes"
    try:
        with _patience(MEETING_S, f"not all processes came to {where} in {MEETING_S} s; {hint}"):
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                cluster_detection_method=None if detect else "deactivate",
                initialization_timeout=MEETING_S + 30,
                heartbeat_timeout_seconds=SILENCE_S,
                shutdown_timeout_seconds=SILENCE_S,
            )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        detail = " ".join(str(error).split())
        raise UserError(
            f"the processes did not meet through {where}: {detail[:300]}; {hint}"
        ) from None
    with _library_lines_as_errors():
        counts = Counter(device.process_index for device in jax.devices())
        if len(set(counts.values())) > 1:
            listed = ", ".join(str(count) for _, count in sorted(counts.items()))
            raise UserError(
                f"the processes have different numbers of devices ({listed}); give all of them the "
                "same number, on CPUs with --devices"
            )
        any_process(True)  # all are there


@contextlib.contextmanager
def _patience(seconds: float, text: str) -> Iterator[None]:
    """End this process with a line of its own where JAX would abort it with a stack of C++."""

    def give_up() -> None:
        print(f"error: {text}", file=sys.stderr, flush=True)
        os._exit(UserError.exit_code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_port(port: int) -> None:
    """Refuse a port that is taken: JAX would abort the process."""
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("", port))
        except OSError as error:
            raise UserError(
                f"--coordinator: port {port} cannot be used ({error.strerror}); take another"
            ) from None


@contextlib.contextmanager
def _library_lines_as_errors() -> Iterator[None]:
    """Send to the error stream what a C++ library prints: process 0's output is for the user."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def several() -> bool:
    """True where several processes train together."""
    return jax.process_count() > 1


def is_first_process() -> bool:
    """True for the one process that reads and writes records."""
    return jax.process_index() == 0


def any_process(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set in any process: all decide alike, or some would wait."""
    if not several():
        return flags
    everyone = _gather(np.asarray(flags)).reshape(-1, len(flags))
    return tuple(bool(column.any()) for column in everyone.T)


def from_first(tree: Any | None, like: Any) -> Any | None:
    """The first process's tree of NumPy arrays, in all processes; None if it has none.

    Args:
      tree: what this process has; looked at in the first process only.
      like: a tree of that structure, of anything with a shape and a dtype.
    """
    if not several():
        return tree
    with _exchange():
        if not multihost_utils.broadcast_one_to_all(np.asarray(tree is not None)):
            return None
        if tree is None or not is_first_process():
            tree = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def to_host(tree: Any) -> Any:
    """Arrays as NumPy copies, whole, also where other processes hold parts of them."""
    if several():
        with _exchange():
            tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.array, jax.device_get(tree))


def text_from_first(text: str) -> str:
    """The first process's text, in all processes."""
    return _texts_of_all(text if is_first_process() else "")[0]


def in_all(stage: Callable[[], Result]) -> Result:
    """Do something that can fail in some processes: then all of them fail, with the same line.

    Raises:
      AgreedError: as `stage` in this process, or in another.
    """
    if not several():
        return stage()
    fault, result = "", None
    try:
        result = stage()
    except UserError as error:
        fault = str(error)
    faults = [(number, text) for number, text in enumerate(_texts_of_all(fault)) if text]
    if faults:
        number, text = faults[0]
        raise AgreedError(text if number == 0 else f"process {number}: {text}")
    return cast(Result, result)


def check_same(what: str, value: str) -> None:
    """Refuse to go on together with a process that has another value.

    Raises:
      AgreedError: in all processes.
    """
    values = _texts_of_all(value)
    others = [str(number) for number, found in enumerate(values) if found != values[0]]
    if others:
        raise AgreedError(
            f"process {', '.join(others)}: another {what} than process 0; start every process "
            "with the same options and code"
        )


class AgreedError(UserError):
    """All processes raise it: none waits for another."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Make sure that no process waits for one that has failed.

    With several processes, one that leaves in here by an exception that not all of them raise (all
    but `AgreedError` and `Interrupted`) ends without a farewell, which would wait for the others.
    These then fail in their next exchange, with a UserError.
    """
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized() and not isinstance(error, AgreedError | Interrupted):
            codes = {KeyboardInterrupt: 130, UserError: UserError.exit_code}
            # as soon as Python has told the user what it has to say; the last of these comes first
            atexit.register(os._exit, codes.get(type(error), 1))
            atexit.register(sys.stderr.flush)
            atexit.register(sys.stdout.flush)
        raise


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    """What fails in here fails because of another process: its arguments are sound.

    Raises:
      UserError: for what JAX raises then, of which only the types are told, and not even its own.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise UserError(
            "another process has ended or cannot be reached; what is saved stays. Start all of "
            f"them again to go on ({detail[:200]})"
        ) from None


def _gather(array: np.ndarray) -> np.ndarray:
    """Every process's array, all of one shape."""
    with _exchange():
        return np.asarray(multihost_utils.process_allgather(array))


def _texts_of_all(text: str) -> list[str]:
    """Every process's text, in order."""
    if not several():
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = _gather(np.asarray([len(mine)])).ravel()
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: len(mine)] = mine
    texts = _gather(padded).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(texts, sizes, strict=True)]
