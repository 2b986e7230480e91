"""Kernels and bytes of a training step, and the time that a GPU would need for them.

XLA says what it has compiled. Where JAX's CUDA plugin is installed (`unitnorm[cuda]`), it compiles
for a GPU that is not there; elsewhere the program of this machine's devices stands for the GPU's,
though a CPU's has more kernels.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from unitnorm.bench import roofline
from unitnorm.bench.contestants import make_epoch, seconds_of
from unitnorm.bench.measure import Contestant, Found
from unitnorm.bench.survey import Device, Survey
from unitnorm.data import load_dataset
from unitnorm.run import provenance
from unitnorm.run.devices import prepare

IMAGES = {"cpu": 400_000, "gpu": 5_000_000}  # of an epoch, over all runs
RUNS = (10, 100, 1000)
LAUNCH_US = (2.0, 5.0)  # of a kernel, until the next one can begin
GPUS = {"h100": (67e12, 3.35e12), "h200": (67e12, 4.8e12)}  # float32 FLOP/s and bytes/s (NVIDIA)
# what XLA has to know of an H100 to compile for it
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# instructions that are no kernel of their own
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}


class Work(NamedTuple):
    """Of a loop's step."""

    kernels: int
    bytes: int  # that its kernels read and write


def count_work(program: str) -> Work:
    """The step of the loop that has the most kernels, which in an epoch is that over mini-batches.

    Args:
      program: what XLA has compiled, as it prints it.
    """
    parts = dict(re.findall(r"^%(\S+) \(.*?\{\n(.*?)^\}", program, re.DOTALL | re.MULTILINE))
    return max(count_kernels(parts[name]) for name in re.findall(r"body=%([\w.-]+)", program))


def count_kernels(body: str) -> Work:
    """The kernels of a computation, and what they move: every array once for each kernel.

    Of a table of whole numbers, such as the images, it is what is picked that counts.
    """
    instruction = r"^\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*?)\)"
    arrays: dict[str, list[tuple[str, int]]] = {}
    kernels = moved = 0
    for name, shape, kind, operands in re.findall(instruction, body, re.MULTILINE):
        arrays[name] = [
            (dtype, math.prod(map(int, filter(None, sizes.split(",")))))
            for dtype, sizes in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
        ]
        if kind in FREE:
            continue
        kernels += 1
        written = sum(count for _, count in arrays[name])
        read = [array for name in re.findall(r"%([\w.-]+)", operands) for array in arrays[name]]
        picked = [(d, min(count, written) if d[0] in "su" else count) for d, count in read]
        moved += sum(_SIZES.get(dtype, 4) * count for dtype, count in [*arrays[name], *picked])
    return Work(kernels, moved)


def compile_for_h100(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str | None:
    """What XLA makes of a function on an H100 that need not be there; None without the plugin."""
    with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
        found = topologies.get_topology_desc(
            "", platform="cuda", target_config=H100, topology="1x1x1"
        )
        there = SingleDeviceSharding(found.devices[0])
        traced = jax.jit(function, in_shardings=there, out_shardings=there).trace(
            *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        )
        return str(traced.lower(lowering_platforms=("cuda",)).compile().as_text())
    return None


def kernels(platform: str, depth: int, update: str, runs: int) -> Iterator[dict[str, Any]]:
    """An epoch of many runs at once, without its evaluation."""
    if platform == "cpu":  # CUDA's plugin, asked for as well, would look for a driver
        jax.config.update("jax_platforms", platform)
    prepare(1)
    images = IMAGES.get(platform, IMAGES["gpu"]) // runs
    function, fixed, state = make_epoch(depth, update, runs, images, load_dataset())
    program = jax.jit(function).lower(*fixed, state).compile()
    there = compile_for_h100(function, (*fixed, state)) if platform == "cpu" else None
    yield {
        "steps": images // roofline.BATCH,
        "compiled_for": "H100" if there else provenance.device()["kind"],
        "work": count_work(there or str(program.as_text())),
    }
    state = program(*fixed, state)
    while True:
        yield {"epoch_s": seconds_of(lambda: program(*fixed, state))}


def predict_us(work: Work, flops: float, launch_us: float, gpu: str) -> float:
    """Microseconds of a step: its launches, and its products or its traffic, the slower of them."""
    flops_per_s, bytes_per_s = GPUS[gpu]
    return work.kernels * launch_us + 1e6 * max(flops / flops_per_s, work.bytes / bytes_per_s)


def rows(found: list[Found]) -> Iterator[dict[str, Any]]:
    """Of each point: its work, microseconds of a step predicted for GPUs, and measured here."""
    for each in found:
        work = Work(*each.about["work"])
        flops = float(
            roofline.training_flops(each.row["depth"]) * roofline.BATCH * each.row["runs"]
        )
        yield {
            **each.row, "compiled_for": each.about["compiled_for"], **work._asdict(),
            "flops": flops,
            **{
                f"{gpu}_{end}_us": predict_us(work, flops, us, gpu)
                for gpu in GPUS for end, us in zip(("low", "high"), LAUNCH_US, strict=True)
            },
            **each.range_of("epoch_s", 1e6 / each.about["steps"]).named("here_us"),
        }  # fmt: skip


def survey(device: Device, quick: bool) -> Survey:
    """Every point; `quick`: 10 runs alone."""
    points = itertools.product((2, 4), ("b-sgd", "un"), RUNS[:1] if quick else RUNS)
    named = [dict(zip(("depth", "update", "runs"), point, strict=True)) for point in points]
    return Survey(
        name="{device}-kernels",
        title="A training step of all runs at once",
        groups=[
            [Contestant("kernels.kernels", {"platform": device["platform"], **point}, row=point)]
            for point in named
        ],
        rows=rows,
        columns={
            **{name: f"{{{name}}}" for name in ("depth", "update", "runs", "kernels")},
            "of": "{compiled_for}", "bytes": "{bytes:,}",
            **{f"{g.upper()} µs": f"{{{g}_low_us:,.0f}}–{{{g}_high_us:,.0f}}" for g in GPUS},
            "here µs": "{here_us:,.0f}", "(range)": "{low:,.0f}–{high:,.0f}",
        },
        note=[
            "kernels: of the program that XLA compiles for the device beside them; bytes: that "
            "they read and write.",
            f"H100, H200: predicted, {LAUNCH_US[0]:g} to {LAUNCH_US[1]:g} µs a kernel, and the "
            "time of the bytes or of the products, whichever is longer.",
            "here: measured, on one device; without evaluation.",
        ],
        facts={"launch_us": LAUNCH_US, "flops_per_s and bytes_per_s": GPUS},
    )  # fmt: skip
