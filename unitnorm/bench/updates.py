"""What a step of each update costs by itself, beside optax's own optimisers and the memory.

The steps run in a loop of one compiled program on one device, without any network: weights,
gradient and state in, weights and state out, as an update does within a training step.
"""

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pandas as pd
from jax.sharding import SingleDeviceSharding

from unitnorm.bench.contestants import memory_rate, seconds_of
from unitnorm.bench.measure import Contestant, Found
from unitnorm.bench.survey import Device, Survey
from unitnorm.geometry import retraction
from unitnorm.report.style import label
from unitnorm.updates import UPDATES

# (filters, inputs) of a dense layer and (height, width, inputs, filters) of a convolution's kernel
SHAPES = ((64, 784), (1024, 1024), (4096, 4096), (3, 3, 64, 64), (3, 3, 512, 512))
LEFT_OUT = {"muon", "manifold-muon"}  # the first is optax's; the second decomposes matrices, slowly
SMALL = 1 << 17  # parameters of the larger ones that a quick look leaves out
RATE = 1e-6  # so small that the weights stay what they are through all steps


def filter_axis(shape: Sequence[int]) -> int | None:
    """The axes over which a filter runs: a row of a matrix, all but the last of a kernel."""
    return -1 if len(shape) == 2 else None


def list_transformations(shape: Sequence[int]) -> dict[str, optax.GradientTransformation]:
    """The registry's updates and optax's own, for filters of a shape."""
    reduced = tuple(range(len(shape) - 1))  # Muon's matrix: filters by their inputs
    numbers = optax.contrib.MuonDimensionNumbers(reduced, len(shape) - 1)
    made = {
        "optax.sgd": optax.sgd(RATE),
        "optax.adam": optax.adam(RATE),
        "optax muon": optax.contrib.muon(RATE, muon_weight_dimension_numbers=numbers),
    }
    for name, update in UPDATES.items():
        if name not in LEFT_OUT:
            made[label(name)] = update.filters(RATE, axis=filter_axis(shape))
    return made


def updates(shape: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Every update's step at a shape, all of them in each repetition; JAX as after its import."""
    size = math.prod(shape)
    on_cpu = jax.default_backend() == "cpu"
    steps = min(max((10_000_000 if on_cpu else 2_000_000_000) // size, 1), 200 if on_cpu else 2_000)
    w, g = jax.random.normal(jax.random.key(0), (2, *shape))
    w = retraction(w, filter_axis(shape))
    programs, compile_s, moved = {}, {}, {}
    made = list_transformations(shape)
    for name, update in made.items():
        start = time.perf_counter()
        programs[name] = compile_steps(update, steps, w, g)
        compile_s[name] = time.perf_counter() - start
        held = sum(x.nbytes for x in jax.tree.leaves(update.init(w)))
        moved[name] = 3 * w.nbytes + 2 * held  # w and state in and out, the gradient in
    yield {"parameters": size, "compile_s": compile_s, "bytes": moved}
    while True:
        found = {"bytes_per_s": memory_rate(SingleDeviceSharding(w.devices().pop()))}
        for name, update in made.items():
            # copies, as some states hold the weights themselves, which would be used up
            taken = jax.block_until_ready(jax.tree.map(jnp.copy, (w, update.init(w))))
            found[name] = seconds_of(partial(programs[name], taken, g)) / steps
        yield found


def compile_steps(
    update: optax.GradientTransformation, steps: int, w: jax.Array, g: jax.Array
) -> Any:
    """So many steps, compiled: of (weights, state), which are used up, and the gradient."""

    def many(taken: tuple[jax.Array, Any], g: jax.Array) -> tuple[jax.Array, Any]:
        def step(_: int, taken: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            w, state = taken
            # a gradient that seems to depend on the step: none of its work can leave the loop
            w, fresh = jax.lax.optimization_barrier((w, g))
            displacement, state = update.update(fresh, state, w)
            return optax.apply_updates(w, displacement), state

        return jax.lax.fori_loop(0, steps, step, taken)

    return jax.jit(many, donate_argnums=0).lower((w, update.init(w)), g).compile()


def rows(found: list[Found]) -> Iterator[dict[str, Any]]:
    """Of each shape and update, with what the memory needs for it."""
    for each in found:
        size = each.about["parameters"]
        ns, rate = 1e9 / size, each.range_of("bytes_per_s").median
        for update, seconds in each.about["compile_s"].items():
            yield {
                **each.row, "update": update, "parameters": size,
                **each.range_of(update, ns).named("ns_per_parameter"),
                "memory_ns_per_parameter": ns * each.about["bytes"][update] / rate,
                "compile_s": seconds,
            }  # fmt: skip


def by_update(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each update: what it costs at every shape; medians of the rest."""
    wide = frame.pivot(index="update", columns="shape", values="ns_per_parameter")
    others = frame.groupby("update", sort=False)[["memory_ns_per_parameter", "compile_s"]].median()
    return others.join(wide).reset_index()


def survey(device: Device, quick: bool) -> Survey:
    """Every update at every shape; `quick`: the smaller shapes."""
    shapes = {
        "×".join(map(str, shape)): {"shape": shape}
        for shape in SHAPES
        if not quick or math.prod(shape) <= SMALL
    }
    return Survey(
        name="{device}-updates",
        title="Nanoseconds of a step per parameter",
        groups=[
            [Contestant("updates.updates", shape, row={"shape": name})]
            for name, shape in shapes.items()
        ],
        rows=rows,
        read=by_update,
        columns={
            "update": "{update}", **{name: f"{{{name}:.2f}}" for name in shapes},
            "memory": "{memory_ns_per_parameter:.2f}", "compile s": "{compile_s:.2f}",
        },
        note=[
            "medians of the rounds; in the CSV file low and high: the fastest and the slowest.",
            "memory: the time that its bandwidth needs for weights and state, read and written, "
            "and the gradient, read; what fits into the caches can be faster.",
            "n×m: n dense filters of m inputs; h×w×n×m: a convolution's kernel of m filters.",
            "optax muon: optax.contrib.muon, filters by inputs; all with their defaults.",
            "compile s: seconds to trace and compile a step, nothing cached; median of the shapes.",
        ],
    )  # fmt: skip
