"""Which devices JAX computes on, in how many processes, and where compiled programs are kept.

`prepare` must run before anything asks JAX for a device; the command line calls it first thing.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

from unitnorm.errors import UserError


def prepare(
    cpu_devices: int | None = None,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Set up JAX for an experiment.

    On CPUs, XLA gains little from several threads inside one small program, so each core becomes a
    device of its own and the runs are shared among them.

    Args:
      cpu_devices: how many CPU devices; None: one per core this process may use. Without effect
        on GPUs and TPUs.
      coordinator: host:port at which several processes meet; None: this process alone, or JAX's
        own detection under Slurm, Kubernetes and on TPU pods if `processes` is given.
      processes, process: how many there are and which this one is.

    Raises:
      UserError: options that do not fit together, or the processes do not meet.
    """
    if cpu_devices is None:
        cpu_devices = len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    cache = compilation_cache()
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if coordinator is not None or processes is not None:
        _join(coordinator, processes, process)


def _join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator is not None and (processes is None or process is None):
        raise UserError("--coordinator needs --processes N and --process I as well")
    if processes is not None and process is not None and process >= processes:
        raise UserError(
            f"--process {process}: the processes are numbered 0 to {processes - 1} "
            f"with --processes {processes}"
        )
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=60)
    except (RuntimeError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"the processes did not meet at {coordinator}: {detail}") from None


def is_first_process() -> bool:
    """True for the one process that reads and writes records."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def compilation_cache() -> Path | None:
    """Where compiled programs are kept: the folder `xla` of the cache; None where it has none."""
    from unitnorm.data.cache import default_folder

    try:
        folder = default_folder() / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
