"""Training samples per second of ours, of the peers and of the machine; and what UN costs.

Every peer has two rows: one process, and several independent ones, as anybody would start them who
has several runs to train: one for each core, or a few that share a GPU. The better one is what we
compare with.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from unitnorm.bench import figures, measure
from unitnorm.bench.measure import Contestant, Measurement, Range, Say
from unitnorm.bench.roofline import work_of

UPDATES = ("b-sgd", "un")
SEEDS = 10  # of each update, as in Table 2
IMAGES = 50_000  # training images of an epoch, as in Table 2
UN_COST, SAVE_COST = "UN instead of B-SGD", "a checkpoint after every epoch"
COST_STARTS = 2  # where the memory of a process comes to lie makes a percent or two
GPU_COPIES = 4  # processes of a peer on one GPU
LIMITS = ("flops_per_s", "bytes_per_s")
PEERS = {
    "geoopt": "peers.geoopt",
    "oblique-sgd": "peers.oblique_sgd",
    "torch-sgd": "peers.torch_sgd",
    "optax-loop": "contestants.optax_loop",
}
COLUMNS = [
    "name", "runs", "processes", "depth", "samples_per_s", "low", "high",
    "times", "times_low", "times_high",
]  # fmt: skip
WHAT = {
    "unitnorm": "an epoch of `unitnorm train` for all runs of a depth, or for one, with its "
    "evaluation on a fifth as many images (10,000 in Table 2), its status and its checkpoint",
    "geoopt": "PyTorch, geoopt.RiemannianSGD on Sphere",
    "oblique-sgd": "PyTorch, ObliqueSGD of NVIDIA's Emerging-Optimizers, torch.optim.SGD for the "
    "rest",
    "torch-sgd": "PyTorch, torch.optim.SGD",
    "optax-loop": "Flax and optax, one jitted step per mini-batch",
    "bound": "the rate of float32 matrix products over the operations of a sample, or that of the "
    "memory over its bytes, whichever is lower",
}
INSTALL = {  # what is not in `unitnorm[bench]`
    "emerging_optimizers": "'git+https://github.com/NVIDIA-NeMo/Emerging-Optimizers'; not on PyPI, "
    "Python 3.12 or later",
}


class Entry(NamedTuple):
    """What is compared: a row of the table, at each depth."""

    name: str
    runs: int
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.name}, runs {self.runs}, processes {self.processes}"


OURS = Entry("unitnorm", SEEDS * len(UPDATES))
BOUND = Entry("bound", OURS.runs)


def list_contestants(depth: int, images: int, copies: int) -> dict[Entry, Contestant]:
    """Everything that is compared at a depth; each of a peer's processes trains one run."""
    loop = {"depth": depth, "images": images}
    table2 = {**loop, "seeds": SEEDS, "updates": UPDATES}
    peers = {
        Entry(name, count, count): Contestant(kind, loop, count)
        for name, kind in PEERS.items()
        for count in sorted({1, copies})
    }
    return {
        OURS: Contestant("contestants.program", table2),
        Entry("unitnorm", 1): Contestant(
            "contestants.program", {**table2, "seeds": 1, "updates": ["un"]}
        ),
        **peers,
        BOUND: Contestant("contestants.machine"),
    }


def measure_speed(depths: Sequence[int], rounds: int, *, quick: bool, say: Say) -> Measurement:
    """Measure everything, depth after depth; `quick`: with a tenth of the images, and without what
    UN and checkpoints cost.

    Low and high are the slowest and the fastest repetition, `times` how many times as fast ours is
    with all runs, round by round.
    """
    device, images = measure.find_device(), IMAGES // 10 if quick else IMAGES
    copies = device["count"] if device["platform"] == "cpu" else GPU_COPIES
    rows: list[list[Any]] = []
    costs: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    machine: list[dict[str, float]] = []
    for depth in depths:

        def say_depth(text: str, depth: int = depth) -> None:
            say(f"depth {depth}, {text}")

        found, lacking = measure.in_turns(
            list_contestants(depth, images, copies), rounds, say_depth
        )
        missing |= {entry.name: package for entry, package in lacking.items()}
        rates = {
            entry: [each.samples / answer["seconds"] for answer in each.answers]
            for entry, each in found.items()
        }
        flops, moved = work_of(depth, ours=True)
        limits = found[BOUND].answers
        rates[BOUND] = [min(a["flops_per_s"] / flops, a["bytes_per_s"] / moved) for a in limits]
        machine += limits
        for entry, values in rates.items():
            times = [ours / theirs for ours, theirs in zip(rates[OURS], values, strict=True)]
            rows.append([*entry, depth, *Range.of(values), *Range.of(times)])
        if not quick:
            costs += measure_costs(depth, rounds, images, say_depth)
    speeds = pd.DataFrame(rows, columns=COLUMNS)
    spreads = {name: Range.of([answer[name] for answer in machine]) for name in LIMITS}
    facts = {
        "device": device,
        "rounds": rounds,
        "images": images,
        "low and high": "the slowest and the fastest of the rounds",
        "what": WHAT,
        "missing": missing,
        "machine": {name: spread._asdict() for name, spread in spreads.items()},
        "flops and bytes of a sample": {
            f"{name}, depth {depth}": work_of(depth, ours=name == OURS.name)
            for name in ("peers", OURS.name)
            for depth in depths
        },
    }
    bounds = speeds[speeds["name"] == BOUND.name].set_index("depth")["samples_per_s"]
    shown = speeds.assign(share=speeds["samples_per_s"] / speeds["depth"].map(bounds))
    shown[["speed", "slow", "fast"]] = shown[["samples_per_s", "low", "high"]] / 1e3
    columns = {
        "depth": "{depth}", "what": "{name}", "runs": "{runs}", "samples/s": "{speed:,.0f}k",
        "(range)": "{slow:,.0f}k–{fast:,.0f}k", "ours ×": "{times:.2f}",
        "(range) ": "{times_low:.2f}–{times_high:.2f}", "of bound": "{share:.0%}",
    }  # fmt: skip
    title = f"Training samples per second: medians and ranges of {rounds} rounds"
    remarks = list_remarks(set(speeds["name"]), costs, missing)
    return Measurement(
        measure.slug(device),
        {"": speeds} | ({} if quick else {"-costs": pd.DataFrame(costs)}),
        measure.make_cells(title, shown, columns, remarks),
        facts,
        {"-roofline": figures.draw_roofs(place_points(speeds), spreads)},
    )


def measure_costs(depth: int, rounds: int, images: int, say: Say) -> Iterator[dict[str, Any]]:
    """What UN's epoch costs beside B-SGD's, and what it costs to save the state after every epoch.

    Each is measured as two programs of 10 runs that take turns, in several starts of both.
    (`unitnorm train` saves at most every five seconds, so that it pays less.)
    """
    options = {"depth": depth, "seeds": SEEDS, "images": images}
    b_sgd, un = ({**options, "updates": [name]} for name in UPDATES)
    pairs = {
        UN_COST: (b_sgd, un),
        SAVE_COST: ({**un, "save_every_s": math.inf}, {**un, "save_every_s": 0.0}),
    }
    for what, pair in pairs.items():
        both = {
            name: Contestant("contestants.program", each)
            for name, each in zip(("without", "with"), pair, strict=True)
        }
        seconds: dict[str, list[float]] = {name: [] for name in both}
        for start in range(COST_STARTS):
            say(f"{what}, start {start + 1} of {COST_STARTS}")
            for name, found in measure.in_turns(both, rounds)[0].items():
                seconds[name] += [answer["seconds"] for answer in found.answers]
        old, new = seconds["without"], seconds["with"]
        yield {
            "what": what, "depth": depth, "runs": SEEDS,
            "without_s": Range.of(old).median, "with_s": Range.of(new).median,
            **Range.of([one / other for one, other in zip(new, old, strict=True)])._asdict(),
            "rounds": len(old),
        }  # fmt: skip


def place_points(speeds: pd.DataFrame) -> pd.DataFrame:
    """Every contestant's place under the roofs: name, runs, depth, operations per byte
    (`intensity`) and a second (`flops_per_s`, `low`, `high`)."""
    points = speeds[speeds["name"] != BOUND.name]
    each = zip(points["name"], points["depth"], strict=True)
    flops, moved = np.array([work_of(depth, ours=name == OURS.name) for name, depth in each]).T
    points = points.rename(columns={"samples_per_s": "flops_per_s"})
    points[["flops_per_s", "low", "high"]] *= flops[:, None]
    return points.assign(intensity=flops / moved)


def list_remarks(
    names: set[str], costs: list[dict[str, Any]], missing: dict[str, str]
) -> Iterator[str]:
    """What stands below the table."""
    yield f"ours ×: how many times as fast unitnorm is with {OURS.runs} runs, round by round."
    yield from (f"{name}: {what}." for name, what in WHAT.items() if name in names)
    yield (
        "Peers: one run in each process, an epoch without evaluation; several processes have data "
        "and one thread each, and count all their samples over the seconds of the slowest."
    )
    for cost in costs:
        yield (
            "An epoch of {runs} runs at depth {depth} with {what} takes {median:.3f} times as long "
            "(median of {rounds} pairs; {low:.3f}–{high:.3f})."
        ).format(**cost)
    for name, package in missing.items():
        what = INSTALL.get(package, "'unitnorm[bench]'")
        yield f"{name} is left out: {package} is not installed (pip install {what})."
