"""What SegNet's Fourier convolution gains over XLA's own, at the sizes of its layers."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unitnorm.bench.contestants import seconds_of
from unitnorm.bench.measure import Contestant, Found, Range
from unitnorm.bench.survey import Device, Survey
from unitnorm.run.devices import prepare
from unitnorm.segment.config import SegNetConfig
from unitnorm.segment.evaluation import make_mesh
from unitnorm.segment.model import choose_convolution

# rows and columns of pixels of layers with 64 channels in and out: of images of 90×120, of crops of
# 180×240, and of whole images
SIZES = ((45, 60), (90, 120), (180, 240))
BATCH, CHANNELS = 4, 64  # images on each device
WAYS = ("direct", "fourier")


def convolution(height: int, width: int) -> Iterator[dict[str, Any]]:
    """A layer's convolution of 7 × 7 with its two derivatives, both ways in each repetition.

    As in training, the images are shared among the devices.
    """
    prepare()
    rng, mesh = np.random.default_rng(0), make_mesh()
    kernel = rng.normal(size=(7, 7, CHANNELS, CHANNELS)).astype(np.float32)
    size = 2, BATCH * mesh.size, height, width, CHANNELS
    x, back = rng.normal(size=size).astype(np.float32)
    by_image = NamedSharding(mesh, PartitionSpec("image"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    arguments = jax.device_put((x, kernel, back), (by_image, everywhere, by_image))
    programs = {way: jax.jit(make_layer(way, mesh)).lower(*arguments).compile() for way in WAYS}
    yield {}
    while True:
        yield {name: seconds_of(partial(f, *arguments)) for name, f in programs.items()}


def make_layer(way: str, mesh: Mesh | None = None) -> Callable[..., tuple[Array, Array, Array]]:
    """A convolution in one of SegNet's ways: x (N, H, W, in), kernel (h, w, in, out) and the
    derivative `back` by its result → the result, and the derivatives by x and kernel."""
    compute = choose_convolution(SegNetConfig.model_validate({"convolution": way}), mesh)
    numbers = ("NHWC", "HWIO", "NHWC")
    convolve = partial(compute, window_strides=(1, 1), padding="SAME", dimension_numbers=numbers)

    def layer(x: Array, kernel: Array, back: Array) -> tuple[Array, Array, Array]:
        y, transpose = jax.vjp(convolve, x, kernel)
        return y, *transpose(back)

    return layer


def rows(found: list[Found]) -> Iterator[dict[str, Any]]:
    """Of each size, and how many times as fast the Fourier transforms are, round by round."""
    for each in found:
        seconds = {f"{way}_s": each.range_of(way).median for way in WAYS}
        times = Range.of([answer["direct"] / answer["fourier"] for answer in each.answers])
        yield {**each.row, **seconds, **times.named("times")}


def survey(device: Device, quick: bool) -> Survey:
    """Both convolutions at every size; `quick`: the smaller sizes."""
    sizes = [{"height": height, "width": width} for height, width in SIZES]
    return Survey(
        name="{device}-convolution",
        title="Seconds of a layer of SegNet, by XLA's convolution and by Fourier transforms",
        groups=[
            [Contestant("convolution.convolution", size, row=size)]
            for size in (sizes[:-1] if quick else sizes)
        ],
        rows=rows,
        columns={
            "pixels": "{height:.0f}×{width:.0f}", "XLA s": "{direct_s:.3f}",
            "Fourier s": "{fourier_s:.3f}", "times as fast": "{times:.1f}",
            "(range)": "{low:.1f}–{high:.1f}",
        },
        note=[
            f"A convolution of 7 × 7 with {CHANNELS} channels in and out for {BATCH} images on "
            "each device (core), with its two derivatives; medians of the rounds.",
        ],
        facts={"batch": BATCH, "channels": CHANNELS},
    )  # fmt: skip
