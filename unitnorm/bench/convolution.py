"""What SegNet's Fourier convolution gains over XLA's own, at the sizes of its layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax import Array

from unitnorm.bench import measure
from unitnorm.bench.contestants import seconds_of
from unitnorm.bench.measure import Contestant, Measurement, Say, Spread
from unitnorm.bench.worker import Orders
from unitnorm.report.tables import Cells
from unitnorm.run.devices import count_cores
from unitnorm.run.provenance import device
from unitnorm.segment.convolution import fourier_convolution

# rows and columns of pixels of layers with 64 channels in and out: of images of 90×120, of crops of
# 180×240, and of whole images
SIZES = ((45, 60), (90, 120), (180, 240))
BATCH, CHANNELS = 4, 64
COLUMNS = ["height", "width", "direct_s", "fourier_s", "times", "low", "high"]


def convolution(
    orders: Orders, height: int, width: int, batch: int = BATCH, channels: int = CHANNELS
) -> None:
    """A layer's convolution of 7 × 7 with its two derivatives, both ways in each repetition."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(7, 7, channels, channels)).astype(np.float32)
    x, back = rng.normal(size=(2, batch, height, width, channels)).astype(np.float32)
    arguments = jax.device_put((x, kernel, back))
    programs = {
        name: jax.jit(partial(with_derivatives, f)).lower(*arguments).compile()
        for name, f in (("direct", convolve_directly), ("fourier", fourier_convolution))
    }
    orders.serve(
        lambda: {name: seconds_of(partial(f, *arguments)) for name, f in programs.items()},
        device=device(),
    )


def convolve_directly(x: Array, kernel: Array) -> Array:
    """XLA's convolution, as the Fourier one: (N, H, W, in), (h, w, in, out) → (N, H, W, out)."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def with_derivatives(
    function: Callable[[Array, Array], Array], x: Array, kernel: Array, back: Array
) -> tuple[Any, ...]:
    """function(x, kernel), and what it makes of the derivative `back` by its result."""
    y, transpose = jax.vjp(function, x, kernel)
    return y, *transpose(back)


def measure_convolution(rounds: int, *, quick: bool, say: Say) -> Measurement:
    """Both convolutions at every size, with the files and the table; `quick`: the smaller sizes.

    Raises:
      UserError: a worker fails.
    """
    rows, about = [], {}
    for height, width in SIZES[:-1] if quick else SIZES:
        name = f"{height}×{width}"
        contestant = Contestant("convolution", {"height": height, "width": width})
        say(f"{name}: compiling")
        with measure.started({name: contestant}) as (workers, _):
            about = workers[name].about["device"]
            answers = measure.take_turns(workers, rounds, say)[name]
        seconds = [Spread.of([a[way] for a in answers]).median for way in ("direct", "fourier")]
        times = Spread.of([answer["direct"] / answer["fourier"] for answer in answers])
        rows.append([height, width, *seconds, *times])
    frame = pd.DataFrame(rows, columns=COLUMNS)
    if about["platform"] == "cpu":  # one device of all cores
        about = {**about, "count": count_cores()}
    facts = {"device": about, "rounds": rounds, "batch": BATCH, "channels": CHANNELS}
    return Measurement(f"{measure.slug(about)}-convolution", {"": frame}, make_cells(frame), facts)


def make_cells(frame: pd.DataFrame) -> Cells:
    """A row for each size."""
    rows = [
        [f"{height}×{width}", f"{direct:.3f}", f"{fourier:.3f}", f"{times:.1f}",
         f"{low:.1f}–{high:.1f}"]
        for height, width, direct, fourier, times, low, high in frame.itertuples(index=False)
    ]  # fmt: skip
    header = ["pixels", "XLA s", "Fourier s", "times as fast", "(range)"]
    note = (
        f"- A convolution of 7 × 7 with {CHANNELS} channels in and out for {BATCH} images, with "
        "its two derivatives; medians of the rounds."
    )
    title = "Seconds of a layer of SegNet, by XLA's convolution and by Fourier transforms"
    return Cells(title, pd.DataFrame(rows, columns=header), note)
