"""Training samples per second of ours, of the peers and of the machine; and what UN costs.

`compare` measures, `files` makes the files of the results folder of it, `table` and `remarks`
what is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from unitnorm.bench import figures, measure, roofline
from unitnorm.bench.measure import Contestant, Spread
from unitnorm.report.tables import Cells

UPDATES = ("b-sgd", "un")
SEEDS = 10  # of each update, as in Table 2
IMAGES = 50_000  # training images of an epoch, as in Table 2
VALIDATION_IMAGES = 10_000
UN_COST, SAVE_COST = "UN instead of B-SGD", "a checkpoint after every epoch"
COST_STARTS = 5  # where the memory of a process comes to lie makes a percent or two
COLUMNS = ["name", "depth", "runs", "samples_per_s", "low", "high"]
WHAT = {
    "unitnorm": "an epoch of `unitnorm train` for all runs of a depth, with its evaluation on "
    "10,000 images, its report and its checkpoint",
    "geoopt": "PyTorch, geoopt.RiemannianSGD on Sphere: one run, an epoch without evaluation",
    "torch-sgd": "PyTorch, torch.optim.SGD: one run, an epoch without evaluation",
    "optax-loop": "Flax and optax, one jitted step per mini-batch: one run, an epoch without "
    "evaluation",
    "bound": "the rate of float32 matrix products over the operations of a sample, or that of the "
    "memory over its bytes, whichever is lower",
}


@dataclass(frozen=True)
class Comparison:
    """All that was measured.

    Attributes:
      samples: columns `COLUMNS`; low and high are the slowest and the fastest repetition.
      ratios: (name, depth) → how many times as fast ours is, round by round.
      costs: columns what, depth, runs, without_s, with_s (medians of an epoch), of the rounds'
        ratios median, low, high, and the rounds.
      missing: name → the package that it needs.
      machine: the roofs: flops_per_s and bytes_per_s.
      about: (name, depth) → what the worker said of itself.
      rounds, images: of the measurement.
    """

    samples: pd.DataFrame
    ratios: dict[tuple[str, int], Spread]
    costs: pd.DataFrame
    missing: dict[str, str]
    machine: dict[str, Spread]
    about: dict[tuple[str, int], dict[str, Any]]
    rounds: int
    images: int


def contestants(depth: int, images: int, seeds: int = SEEDS) -> dict[str, Contestant]:
    """Everything that is compared at a depth."""
    ours = {"depth": depth, "seeds": seeds, "updates": UPDATES, "images": images}
    loop = {"depth": depth, "images": images}
    return {
        "unitnorm": Contestant("program", ours),
        "geoopt": Contestant("geoopt", loop),
        "torch-sgd": Contestant("torch_sgd", loop),
        "optax-loop": Contestant("optax_loop", loop),
        "bound": Contestant("machine"),
    }


def compare(
    depths: Sequence[int],
    rounds: int,
    images: int = IMAGES,
    *,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Measure everything, depth after depth.

    Args:
      depths: of the network.
      rounds: repetitions of each, after those to warm up; at least 1.
      images: training images of an epoch.
      only: names of the contestants beside ours, the bound and UN's cost; empty: all.
      say: told what is being done.

    Raises:
      UserError: a contestant fails.
    """
    rows: list[list[Any]] = []
    costs: list[dict[str, Any]] = []
    ratios: dict[tuple[str, int], Spread] = {}
    missing: dict[str, str] = {}
    about: dict[tuple[str, int], dict[str, Any]] = {}
    machine: dict[str, list[float]] = {"flops_per_s": [], "bytes_per_s": []}
    for depth in depths:

        def told(text: str, depth: int = depth) -> None:
            say(f"depth {depth}, {text}")

        kinds = contestants(depth, images)
        chosen = {n: c for n, c in kinds.items() if not only or n in {*only, "unitnorm", "bound"}}
        with measure.started(chosen) as (workers, lacking):
            missing |= lacking
            found = measure.take_turns(workers, rounds, told)
        for name in machine:
            machine[name] += [answer[name] for answer in found["bound"]]
        rates = {
            name: [workers[name].about["samples"] / answer["seconds"] for answer in answers]
            for name, answers in found.items()
            if name != "bound"
        }
        rates["bound"] = [
            roofline.bound(
                *work_of("unitnorm", depth, images), answer["flops_per_s"], answer["bytes_per_s"]
            )
            for answer in found["bound"]
        ]
        for name in chosen:
            if name in rates:
                runs = SEEDS * len(UPDATES) if name in ("unitnorm", "bound") else 1
                rows.append([name, depth, runs, *Spread.of(rates[name])])
                about[name, depth] = workers[name].about
        for name, values in rates.items():
            pairs = zip(rates["unitnorm"], values, strict=True)
            ratios[name, depth] = Spread.of([ours / theirs for ours, theirs in pairs])
        costs += costs_of(depth, rounds, images, told)
    return Comparison(
        pd.DataFrame(rows, columns=COLUMNS),
        ratios,
        pd.DataFrame(costs),
        missing,
        {name: Spread.of(values) for name, values in machine.items()},
        about,
        rounds,
        images,
    )


def costs_of(
    depth: int, rounds: int, images: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
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
            with measure.started(both) as (workers, _):
                say(f"{what}, start {start + 1} of {COST_STARTS}")
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


def work_of(name: str, depth: int, images: int) -> tuple[float, float]:
    """Floating-point operations and bytes of a training sample, as `roofline` counts them."""
    shape = roofline.Shape(depth)
    flops: float = roofline.training_flops(shape)
    if name not in ("unitnorm", "bound"):
        return flops, roofline.training_bytes(shape, pixel_bytes=4)
    # every run is evaluated after the epoch: its logits alone, and of few images
    share = VALIDATION_IMAGES / images
    moved = roofline.training_bytes(shape, pixel_bytes=1, sharing=len(UPDATES))
    return (
        flops + share * roofline.forward_flops(shape),
        moved + share * shape.features,
    )


def files(comparison: Comparison, done: dict[str, Any]) -> dict[str, bytes]:
    """The files of the results folder, by name.

    Args:
      comparison: what was measured.
      done: the command, as `measure.provenance` gives it.
    """
    ours = next(about for (name, _), about in comparison.about.items() if name == "unitnorm")
    depths = sorted({depth for _, depth in comparison.about})
    name = f"bench/{measure.slug(ours['device'])}"
    drawn = figures.encode(figures.roofs(points(comparison), comparison.machine))
    facts = {
        **done,
        "device": ours["device"],
        "rounds": comparison.rounds,
        "images": comparison.images,
        "low and high": "the slowest and the fastest of the rounds",
        "what": WHAT,
        "missing": comparison.missing,
        "peers": {
            f"{name}, depth {depth}": {key: about[key] for key in ("torch_device", "threads")}
            for (name, depth), about in comparison.about.items()
            if "torch_device" in about
        },
        "machine": {name: spread._asdict() for name, spread in comparison.machine.items()},
        "flops and bytes of a sample": {
            f"{name}, depth {depth}": work_of(name, depth, comparison.images)
            for name in ("unitnorm", "geoopt")
            for depth in depths
        },
        "times as fast": {
            f"{name}, depth {depth}": spread._asdict()
            for (name, depth), spread in comparison.ratios.items()
        },
    }
    return {
        f"{name}.csv": comparison.samples.to_csv(index=False, float_format="%.0f").encode(),
        f"{name}-costs.csv": comparison.costs.to_csv(index=False, float_format="%.4f").encode(),
        f"{name}.json": measure.as_json(facts),
        f"{name}.md": measure.as_markdown(table(comparison), remarks(comparison)),
        **{f"{name}-roofline.{ending}": content for ending, content in drawn.items()},
    }


def points(comparison: Comparison) -> pd.DataFrame:
    """Every contestant's place under the roofs.

    Returns:
      Columns name, depth, intensity (operations per byte), flops_per_s, low, high.
    """
    rows = []
    for name, depth, _, *speeds in comparison.samples.itertuples(index=False):
        if name != "bound":
            flops, moved = work_of(name, depth, comparison.images)
            rows.append([name, depth, flops / moved, *(speed * flops for speed in speeds)])
    columns = ["name", "depth", "intensity", "flops_per_s", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def table(comparison: Comparison) -> Cells:
    """Speeds, and how many times as fast ours is."""
    bounds = comparison.samples[comparison.samples["name"] == "bound"].set_index("depth")
    rows = []
    for name, depth, runs, speed, low, high in comparison.samples.itertuples(index=False):
        ratio = comparison.ratios[name, depth]
        ours = name == "unitnorm"
        rows.append(
            [
                str(depth),
                name,
                str(runs),
                f"{speed / 1e3:,.0f}k",
                f"{low / 1e3:,.0f}k–{high / 1e3:,.0f}k",
                "" if ours else f"{ratio.median:.2f}",
                "" if ours else f"{ratio.low:.2f}–{ratio.high:.2f}",
                f"{speed / bounds.loc[depth, 'samples_per_s']:.0%}",
            ]
        )
    header = ["depth", "what", "runs", "samples/s", "(range)", "ours ×", "(range) ", "of bound"]
    return Cells(
        f"Training samples per second: medians and ranges of {comparison.rounds} rounds",
        pd.DataFrame(rows, columns=header),
    )


def remarks(comparison: Comparison) -> list[str]:
    """What stands below the table, a line each."""
    shown = {*comparison.samples["name"]}
    lines = ["ours ×: how many times as fast unitnorm is, round by round."]
    lines += [f"{name}: {what}." for name, what in WHAT.items() if name in shown]
    lines += [
        f"An epoch of {cost.runs} runs at depth {cost.depth} with {cost.what} takes "
        f"{cost.median:.3f} times as long (median of {cost.rounds} pairs; "
        f"{cost.low:.3f}–{cost.high:.3f})."
        for cost in comparison.costs.itertuples()
    ]
    lines += [
        f"{name} is left out: {package} is not installed (pip install 'unitnorm[bench]')"
        for name, package in comparison.missing.items()
    ]
    return lines
