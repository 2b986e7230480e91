"""This machine: which devices JAX computes on, how exactly, and what its processor is.

`prepare` must run before anything asks JAX for a device; the command line calls it first thing.
Linux and macOS are supported; what only one of them has is asked for here.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import filelock
import jax

from unitnorm.errors import UserError

VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}  # flags of x86 processors, the widest first
CACHE_BYTES = 1 << 30  # of compiled programs; beyond that, what was not used for longest goes
CACHE_PATIENCE_S = 10.0  # for another process that is reading or writing a program
# People set these in their shell for programs of their own. An experiment must give the same
# numbers there, and must not be stopped: where a run has no value, or has blown up, NaN is meant.
SETTINGS = {
    # By default JAX rounds the factors of float32 products, to TF32 on recent NVIDIA GPUs and to
    # bfloat16 on TPUs: figures of one device would then not be those of another.
    "jax_default_matmul_precision": "highest",
    "jax_default_prng_impl": "threefry2x32",
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_disable_jit": False,
    "jax_no_tracing": False,
    "jax_check_tracer_leaks": False,
    "jax_transfer_guard": "allow",
}


def prepare(cpu_devices: int | None = None) -> None:
    """Set up JAX for an experiment: see `SETTINGS`.

    On CPUs, XLA gains little from several threads inside one small program, so each core becomes a
    device of its own and the runs are shared among them.

    Args:
      cpu_devices: how many CPU devices; None: one per core this process may use. Without effect
        on GPUs and TPUs.

    Raises:
      UserError: JAX finds no device of the kind that JAX_PLATFORMS names.
    """
    jax.config.update("jax_num_cpu_devices", count_cores() if cpu_devices is None else cpu_devices)
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    keep_compiled()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as problem:
        raise UserError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX finds no such device here; "
            "name others, or unset JAX_PLATFORMS"
        ) from problem


def count_cores() -> int:
    """How many cores this process may use; where the system does not say, how many there are."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name where the system tells it, else its architecture.

    Virtual machines often hide the model; on x86 the widest vectors are named as well, as they
    decide the speed of products and the last bits of sums.
    """
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
        if name := facts.get("model name"):
            flags = facts.get("flags", "").split()
            return ", ".join([name, *(VECTORS[flag] for flag in VECTORS if flag in flags)][:2])
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            words = ["sysctl", "-n", "machdep.cpu.brand_string"]
            done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10)
            return done.stdout.strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------- compiled programs


def keep_compiled() -> None:
    """Have JAX keep compiled programs in the folder `programs` of the cache, where there is one."""
    try:
        folder = cache_folder() / "programs"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    if not os.access(folder, os.W_OK):
        return
    with contextlib.suppress(OSError):  # another process holds the lock: no harm, only a warning
        remove_unfinished(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have half written.

    JAX writes NAME-cache, in place, and then NAME-atime, while it holds `.lockfile`. It leaves what
    a killed process has half written: it would warn and compile anew each time, and could keep no
    further program, for it asks every one for its NAME-atime.
    """
    with filelock.FileLock(folder / ".lockfile", timeout=CACHE_PATIENCE_S):
        for program in folder.glob("*-cache"):
            if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
                program.unlink()


def cache_folder() -> Path:
    """UNITNORM_CACHE, else XDG_CACHE_HOME/unitnorm, else ~/.cache/unitnorm; a RuntimeError where
    none of them is set and there is no home folder."""
    if own := os.environ.get("UNITNORM_CACHE"):
        return Path(own)
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG standard says that a relative path is to be ignored
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "unitnorm"
