"""What SegNet's Fourier convolution gains over XLA's own, at the sizes of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unitnorm.bench import measure
from unitnorm.bench.contestants import seconds_of
from unitnorm.bench.measure import Contestant, Measurement, Say, Spread
from unitnorm.run.devices import prepare
from unitnorm.run.provenance import device

# rows and columns of pixels of layers with 64 channels in and out: of images of 90×120, of crops of
# 180×240, and of whole images
SIZES = ((45, 60), (90, 120), (180, 240))
BATCH, CHANNELS = 4, 64  # images on each device
COLUMNS = ["height", "width", "direct_s", "fourier_s", "times", "low", "high"]


def convolution(
    height: int, width: int, batch: int = BATCH, channels: int = CHANNELS
) -> Iterator[dict[str, Any]]:
    """A layer's convolution of 7 × 7 with its two derivatives, both ways in each repetition.

    As in training, the images are shared among the devices.
    """
    from unitnorm.segment.evaluation import make_mesh

    prepare()
    rng, mesh = np.random.default_rng(0), make_mesh()
    kernel = rng.normal(size=(7, 7, channels, channels)).astype(np.float32)
    size = 2, batch * mesh.size, height, width, channels
    x, back = rng.normal(size=size).astype(np.float32)
    by_image = NamedSharding(mesh, PartitionSpec("image"))
    arguments = jax.device_put(
        (x, kernel, back), (by_image, NamedSharding(mesh, PartitionSpec()), by_image)
    )
    programs = {
        way: jax.jit(partial(with_derivatives, layer(way, mesh))).lower(*arguments).compile()
        for way in ("direct", "fourier")
    }
    yield {"device": device()}
    while True:
        yield {name: seconds_of(partial(f, *arguments)) for name, f in programs.items()}


def layer(way: str, mesh: Mesh | None = None) -> Callable[[Array, Array], Array]:
    """A layer's convolution in one of SegNet's ways: (N, H, W, in), (h, w, in, out) → as x."""
    from unitnorm.segment.config import SegNetConfig
    from unitnorm.segment.model import choose_convolution

    compute = choose_convolution(SegNetConfig.model_validate({"convolution": way}), mesh)
    numbers = ("NHWC", "HWIO", "NHWC")
    return partial(compute, window_strides=(1, 1), padding="SAME", dimension_numbers=numbers)


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
    chosen = {
        (height, width): Contestant("convolution", {"height": height, "width": width})
        for height, width in (SIZES[:-1] if quick else SIZES)
    }
    rows, about = [], {}
    for size, found in measure.one_by_one(chosen, rounds, say):
        about = found.about["device"]
        times = Spread.of([answer["direct"] / answer["fourier"] for answer in found.answers])
        seconds = [found.spread(way).median for way in ("direct", "fourier")]
        rows.append([*size, *seconds, *times])
    frame = pd.DataFrame(rows, columns=COLUMNS)
    columns = {
        "pixels": "{height:.0f}×{width:.0f}", "XLA s": "{direct_s:.3f}",
        "Fourier s": "{fourier_s:.3f}", "times as fast": "{times:.1f}",
        "(range)": "{low:.1f}–{high:.1f}",
    }  # fmt: skip
    remark = (
        f"A convolution of 7 × 7 with {CHANNELS} channels in and out for {BATCH} images on each "
        "device (core), with its two derivatives; medians of the rounds."
    )
    title = "Seconds of a layer of SegNet, by XLA's convolution and by Fourier transforms"
    cells = measure.make_cells(title, frame, columns, [remark])
    facts = {"device": about, "rounds": rounds, "batch": BATCH, "channels": CHANNELS}
    return Measurement(f"{measure.slug(about)}-convolution", {"": frame}, cells, facts)
