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

from unitnorm.bench import measure
from unitnorm.bench.contestants import memory_rate, seconds_of
from unitnorm.bench.measure import Contestant, Measurement, Say
from unitnorm.geometry import retraction
from unitnorm.report.style import label
from unitnorm.report.tables import Cells
from unitnorm.updates import UPDATES

# (filters, inputs) of a dense layer and (height, width, inputs, filters) of a convolution's kernel
SHAPES = ((64, 784), (1024, 1024), (4096, 4096), (3, 3, 64, 64), (3, 3, 512, 512))
LEFT_OUT = {"muon", "manifold-muon"}  # the first is optax's; the second decomposes matrices, slowly
SMALL = 1 << 17  # parameters of the larger ones that a quick look leaves out
RATE = 1e-6  # so small that the weights stay what they are through all steps
COLUMNS = [
    "shape", "update", "parameters", "ns_per_parameter", "low", "high", "memory_ns_per_parameter",
    "compile_s",
]  # fmt: skip


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


def measure_updates(rounds: int, *, quick: bool, say: Say) -> Measurement:
    """Every update at every shape; `quick`: the smaller shapes."""
    device = measure.find_device()
    chosen = {
        "×".join(map(str, shape)): Contestant("updates.updates", {"shape": shape})
        for shape in SHAPES
        if not quick or math.prod(shape) <= SMALL
    }
    rows = []
    for shape, found in measure.one_by_one(chosen, rounds, say):
        size = found.about["parameters"]
        ns, rate = 1e9 / size, found.range_of("bytes_per_s").median
        for name, seconds in found.about["compile_s"].items():
            memory = ns * found.about["bytes"][name] / rate
            rows.append([shape, name, size, *found.range_of(name, ns), memory, seconds])
    frame = pd.DataFrame(rows, columns=COLUMNS)
    facts = {
        "device": device,
        "rounds": rounds,
        "what": "nanoseconds of a step per parameter, medians of the rounds; low and high the "
        "fastest and the slowest; what the memory needs for weights and state, read and written, "
        "and the gradient, read; compile_s: tracing and compiling, nothing cached",
    }
    return Measurement(f"{measure.slug(device)}-updates", {"": frame}, show(frame), facts)


def show(frame: pd.DataFrame) -> Cells:
    """A row for each update: what it costs at every shape, beside the memory's time."""
    wide = frame.pivot(index="update", columns="shape", values="ns_per_parameter")
    by_update = frame.groupby("update", sort=False)
    others = by_update[["memory_ns_per_parameter", "compile_s"]].median()
    shapes = frame["shape"].unique()
    columns = {
        "update": "{update}", **{shape: f"{{{shape}:.2f}}" for shape in shapes},
        "memory": "{memory_ns_per_parameter:.2f}", "compile s": "{compile_s:.2f}",
    }  # fmt: skip
    remarks = [
        "memory: the time that its bandwidth needs for weights and state, read and written, and "
        "the gradient, read; what fits into the caches can be faster.",
        "n×m: n dense filters of m inputs; h×w×n×m: a convolution's kernel of m filters.",
        "optax muon: optax.contrib.muon, filters by inputs; all with their defaults.",
        "compile s: seconds to trace and compile a step, median of the shapes.",
    ]
    title = "Nanoseconds of a step per parameter"
    return measure.make_cells(title, others.join(wide).reset_index(), columns, remarks)
