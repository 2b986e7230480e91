"""Training samples per second of ours, of the peers and of the machine; and what UN costs.

Every peer has two rows: one process, and an independent one for each core, as anybody would start
them who has several runs to train. The better one is what we compare with.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd

from unitnorm.bench import figures, measure, roofline
from unitnorm.bench.contestants import VALIDATION_SHARE
from unitnorm.bench.measure import Contestant, Measurement, Say, Spread
from unitnorm.report.tables import Cells
from unitnorm.run.devices import count_cores

UPDATES = ("b-sgd", "un")
SEEDS = 10  # of each update, as in Table 2
IMAGES = 50_000  # training images of an epoch, as in Table 2
UN_COST, SAVE_COST = "UN instead of B-SGD", "a checkpoint after every epoch"
COST_STARTS = 2  # where the memory of a process comes to lie makes a percent or two
PEERS = {
    "geoopt": "geoopt",
    "oblique-sgd": "oblique_sgd",
    "torch-sgd": "torch_sgd",
    "optax-loop": "optax_loop",
}
COLUMNS = [
    "name", "runs", "processes", "depth", "samples_per_s", "low", "high",
    "times", "times_low", "times_high",
]  # fmt: skip
WHAT = {
    "unitnorm": "an epoch of `unitnorm train` for all runs of a depth, or for one, with its "
    "evaluation on a fifth as many images (10,000 in Table 2), its report and its checkpoint",
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
SINGLE = Entry("unitnorm", 1)
BOUND = Entry("bound", OURS.runs)


def list_contestants(depth: int, images: int, cores: int) -> dict[Entry, Contestant]:
    """Everything that is compared at a depth; each of a peer's processes trains one run."""
    table2 = {"depth": depth, "seeds": SEEDS, "updates": UPDATES, "images": images}
    loop = {"depth": depth, "images": images}
    peers = {
        Entry(name, count, count): Contestant(kind, loop, count)
        for name, kind in PEERS.items()
        for count in sorted({1, cores})
    }
    return {
        OURS: Contestant("program", table2),
        SINGLE: Contestant("program", {**table2, "seeds": 1, "updates": ["un"]}),
        **peers,
        BOUND: Contestant("machine"),
    }


def measure_speed(
    depths: Sequence[int],
    rounds: int,
    images: int = IMAGES,
    *,
    quick: bool = False,
    say: Say = lambda _: None,
) -> Measurement:
    """Measure everything, depth after depth.

    Args:
      depths: of the network.
      rounds: repetitions of each, after those to warm up; at least 1.
      images: training images of an epoch.
      quick: leave out what UN and checkpoints cost.
      say: told what is being done.

    Returns:
      Table "" has `COLUMNS`, low and high are the slowest and the fastest repetition, `times` how
      many times as fast ours is with all runs, round by round; "-costs" those of `measure_costs`.

    Raises:
      UserError: a contestant fails.
    """
    rows: list[list[Any]] = []
    costs: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    device: dict[str, Any] = {}
    limits: dict[str, list[float]] = {"flops_per_s": [], "bytes_per_s": []}
    for depth in depths:

        def told(text: str, depth: int = depth) -> None:
            say(f"depth {depth}, {text}")

        chosen = list_contestants(depth, images, count_cores())
        told(f"starting {sum(c.processes for c in chosen.values())} processes")
        with measure.started(chosen) as (workers, lacking):
            found = measure.take_turns(workers, rounds, told)
        missing |= {entry.name: package for entry, package in lacking.items()}
        device = workers[OURS].about["device"]
        rates = {
            entry: [workers[entry].samples / answer["seconds"] for answer in answers]
            for entry, answers in found.items()
        }
        work = work_of(depth, ours=True)
        rates[BOUND] = [
            roofline.bound(*work, *(answer[name] for name in limits)) for answer in found[BOUND]
        ]
        for name, values in limits.items():
            values += [answer[name] for answer in found[BOUND]]
        for entry, values in rates.items():
            times = [ours / theirs for ours, theirs in zip(rates[OURS], values, strict=True)]
            rows.append([*entry, depth, *Spread.of(values), *Spread.of(times)])
        if not quick:
            costs += measure_costs(depth, rounds, images, told)
    speeds, cost_frame = pd.DataFrame(rows, columns=COLUMNS), pd.DataFrame(costs)
    machine = {name: Spread.of(values) for name, values in limits.items()}
    facts = {
        "device": device,
        "rounds": rounds,
        "images": images,
        "low and high": "the slowest and the fastest of the rounds",
        "what": WHAT,
        "missing": missing,
        "machine": {name: spread._asdict() for name, spread in machine.items()},
        "flops and bytes of a sample": {
            f"{name}, depth {depth}": work_of(depth, ours=name == OURS.name)
            for name in ("peers", OURS.name)
            for depth in depths
        },
    }
    return Measurement(
        measure.slug(device),
        {"": speeds} | ({} if quick else {"-costs": cost_frame}),
        make_cells(speeds, rounds, list_remarks(speeds, cost_frame, missing)),
        facts,
        {"-roofline": figures.draw_roofs(place_points(speeds), machine)},
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
        SAVE_COST: ({**un, "save_every_s": None}, {**un, "save_every_s": 0.0}),
    }
    for what, (without, added) in pairs.items():
        both = {"without": Contestant("program", without), "with": Contestant("program", added)}
        seconds: dict[str, list[float]] = {name: [] for name in both}
        for start in range(COST_STARTS):
            say(f"{what}, start {start + 1} of {COST_STARTS}")
            with measure.started(both) as (workers, _):
                for name, answers in measure.take_turns(workers, rounds).items():
                    seconds[name] += [answer["seconds"] for answer in answers]
        old, new = seconds["without"], seconds["with"]
        ratio = Spread.of([one / other for one, other in zip(new, old, strict=True)])
        yield {
            "what": what,
            "depth": depth,
            "runs": SEEDS,
            "without_s": Spread.of(old).median,
            "with_s": Spread.of(new).median,
            **ratio._asdict(),
            "rounds": len(old),
        }


def work_of(depth: int, *, ours: bool) -> tuple[float, float]:
    """Floating-point operations and bytes of a training sample, as `roofline` counts them.

    Args:
      ours: which keeps images as bytes and is evaluated; or a peer.
    """
    shape = roofline.Shape(depth)
    flops: float = roofline.training_flops(shape)
    if not ours:
        return flops, roofline.training_bytes(shape, pixel_bytes=4)
    # every run is evaluated after the epoch: its logits alone
    share = VALIDATION_SHARE
    moved = roofline.training_bytes(shape, pixel_bytes=1)
    return (
        flops + share * roofline.forward_flops(shape),
        moved + share * shape.features,
    )


def place_points(speeds: pd.DataFrame) -> pd.DataFrame:
    """Every contestant's place under the roofs.

    Returns:
      Columns name, runs, depth, intensity (operations per byte), flops_per_s, low, high.
    """
    rows = []
    for name, runs, _, depth, *spread in speeds.to_numpy().tolist():
        if name != BOUND.name:
            flops, moved = work_of(depth, ours=name == OURS.name)
            rows.append([name, runs, depth, flops / moved, *(flops * x for x in spread[:3])])
    columns = ["name", "runs", "depth", "intensity", "flops_per_s", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def make_cells(speeds: pd.DataFrame, rounds: int, remarks: Iterable[str]) -> Cells:
    """Speeds, and how many times as fast ours is."""
    found = speeds.to_dict("records")
    bounds = {row["depth"]: row["samples_per_s"] for row in found if row["name"] == BOUND.name}
    rows = []
    for row in found:
        ours = (row["name"], row["runs"]) == (OURS.name, OURS.runs)
        rows.append(
            {
                "depth": str(row["depth"]),
                "what": row["name"],
                "runs": str(row["runs"]),
                "samples/s": f"{row['samples_per_s'] / 1e3:,.0f}k",
                "(range)": f"{row['low'] / 1e3:,.0f}k–{row['high'] / 1e3:,.0f}k",
                "ours ×": "" if ours else f"{row['times']:.2f}",
                "(range) ": "" if ours else f"{row['times_low']:.2f}–{row['times_high']:.2f}",
                "of bound": f"{row['samples_per_s'] / bounds[row['depth']]:.0%}",
            }
        )
    return Cells(
        f"Training samples per second: medians and ranges of {rounds} rounds",
        pd.DataFrame(rows),
        measure.list_remarks(remarks),
    )


def list_remarks(
    speeds: pd.DataFrame, costs: pd.DataFrame, missing: dict[str, str]
) -> Iterator[str]:
    """What stands below the table: the better row of each peer first."""
    best: dict[tuple[int, str], dict[Hashable, Any]] = {}
    for row in speeds.to_dict("records"):
        old = best.setdefault((row["depth"], row["name"]), row)
        if row["samples_per_s"] > old["samples_per_s"]:
            best[row["depth"], row["name"]] = row
    for (depth, name), row in best.items():
        if name in PEERS:
            way = f"{row['processes']} processes" if row["processes"] > 1 else "one process"
            yield f"Depth {depth}: {row['times']:.1f} times as fast as {name} in {way}, its best."
    yield f"ours ×: how many times as fast unitnorm is with {OURS.runs} runs, round by round."
    for name, what in WHAT.items():
        if name in {shown for _, shown in best}:
            yield f"{name}: {what}."
    yield (
        "Peers: one run in each process, an epoch without evaluation; several processes have data "
        "and one thread each, and count all their samples over the seconds of the slowest."
    )
    for cost in costs.to_dict("records"):
        yield (
            f"An epoch of {cost['runs']} runs at depth {cost['depth']} with {cost['what']} takes "
            f"{cost['median']:.3f} times as long (median of {cost['rounds']} pairs; "
            f"{cost['low']:.3f}–{cost['high']:.3f})."
        )
    for name, package in missing.items():
        what = INSTALL.get(package, "'unitnorm[bench]'")
        yield f"{name} is left out: {package} is not installed (pip install {what})."
