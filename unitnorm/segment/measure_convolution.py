"""What the Fourier convolution gains over XLA's own, on this machine, at the sizes of SegNet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from unitnorm.segment.convolution import fourier_convolution

# rows and columns of pixels of layers with 64 channels in and out: of images of 90×120, of crops of
# 180×240, and of whole images
SIZES = ((45, 60), (90, 120), (180, 240))


def measure_convolution(
    rounds: int = 3,
    sizes: Sequence[tuple[int, int]] = SIZES,
    batch: int = 4,
    channels: int = 64,
    say: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """Times of a layer's convolution of 7 × 7 with its two derivatives, on one device.

    Returns:
      Per size: height, width, seconds of both (the median of the rounds, which take turns) and
      their ratio, XLA's over ours.
    """
    rows = []
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(7, 7, channels, channels)), jnp.float32)
    for height, width in sizes:
        say(f"convolution of {height}×{width}")
        shape = (batch, height, width, channels)
        x, back = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
        compiled = {
            name: jax.jit(_with_derivatives(f)).lower(x, kernel, back).compile()
            for name, f in (("direct", _direct), ("fourier", fourier_convolution))
        }
        seconds: dict[str, list[float]] = {name: [] for name in compiled}
        for number in range(rounds + 1):  # the first warms up
            for name, run in compiled.items():
                started = time.perf_counter()
                jax.block_until_ready(run(x, kernel, back))
                if number:
                    seconds[name].append(time.perf_counter() - started)
        direct, fourier = (float(np.median(seconds[name])) for name in ("direct", "fourier"))
        rows.append(
            {"height": height, "width": width, "direct_s": direct, "fourier_s": fourier,
             "ratio": direct / fourier}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _direct(x: Array, kernel: Array) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def _with_derivatives(convolution: Callable[[Array, Array], Array]) -> Callable[..., Any]:
    def run(x: Array, kernel: Array, back: Array) -> tuple[Array, ...]:
        y, transpose = jax.vjp(convolution, x, kernel)
        return y, *transpose(back)

    return run
