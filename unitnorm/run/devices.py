"""This machine: which devices JAX computes on, how exactly, and what its processor is.

`prepare` must run before anything asks JAX for a device; the command line calls it first thing.
Several processes then meet in `processes.join`.
Linux and macOS are supported; what only one of them has is asked for here.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax

from unitnorm.run.compiled import keep_compiled

VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}  # flags of x86 processors, the widest first


def prepare(cpu_devices: int | None = None) -> None:
    """Set up JAX for an experiment, with products of float32 in float32 on every device.

    On CPUs, XLA gains little from several threads inside one small program, so each core becomes a
    device of its own and the runs are shared among them.

    Args:
      cpu_devices: how many CPU devices; None: one per core this process may use. Without effect
        on GPUs and TPUs.
    """
    jax.config.update("jax_num_cpu_devices", count_cores() if cpu_devices is None else cpu_devices)
    # By default JAX rounds the factors of float32 products, to TF32 on recent NVIDIA GPUs and to
    # bfloat16 on TPUs: figures of one device would then not be those of another.
    jax.config.update("jax_default_matmul_precision", "highest")
    keep_compiled()


def count_cores() -> int:
    """How many cores this process may use; where the system does not tell, how many there are."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name where the system tells it, else its architecture.

    Virtual machines often hide the model; on x86 the widest vectors are told as well, as they
    decide the speed of products and the last bits of sums.
    """
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        told = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
        if name := told.get("model name"):
            flags = told.get("flags", "").split()
            widest = next((text for flag, text in VECTORS.items() if flag in flags), "")
            return f"{name}, {widest}" if widest else name
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"],
                capture_output=True, text=True, check=True, timeout=10,
            )  # fmt: skip
            return told.stdout.strip()
    return platform.processor() or platform.machine()
