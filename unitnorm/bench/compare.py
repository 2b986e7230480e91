"""Training samples per second of ours, of the peers and of the machine; and what UN costs.

Every peer has two rows: one process, and several independent ones, as anybody would start them who
has several runs to train: one for each core, or a few that share a GPU. The better one is what we
compare with.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from unitnorm.bench import figures
from unitnorm.bench.measure import Contestant, Found, Range
from unitnorm.bench.roofline import work_of
from unitnorm.bench.survey import Device, Survey

UPDATES = ("b-sgd", "un")
SEEDS = 10  # of each update, as in Table 2
IMAGES = 50_000  # training images of an epoch, as in Table 2
COST_STARTS = 2  # where the memory of a process comes to lie makes a percent or two
GPU_COPIES = 4  # processes of a peer on one GPU
LIMITS = ("flops_per_s", "bytes_per_s")
OURS, BOUND = "unitnorm", "bound"
PEERS = {
    "geoopt": "peers.geoopt",
    "oblique-sgd": "peers.oblique_sgd",
    "torch-sgd": "peers.torch_sgd",
    "optax-loop": "contestants.optax_loop",
}
WHAT = {
    OURS: "an epoch of `unitnorm train` for all runs of a depth, or for one, with its "
    "evaluation on a fifth as many images (10,000 in Table 2), its status and its checkpoint",
    "geoopt": "PyTorch, geoopt.RiemannianSGD on Sphere",
    "oblique-sgd": "PyTorch, ObliqueSGD of NVIDIA's Emerging-Optimizers, torch.optim.SGD for the "
    "rest",
    "torch-sgd": "PyTorch, torch.optim.SGD",
    "optax-loop": "Flax and optax, one jitted step per mini-batch",
    BOUND: "the rate of float32 matrix products over the operations of a sample, or that of the "
    "memory over its bytes, whichever is lower",
}


def list_contestants(depth: int, images: int, copies: int) -> list[Contestant]:
    """Everything that is compared at a depth: ours first, the machine last; each of a peer's
    processes trains one run."""

    def entry(name: str, kind: str, runs: int, processes: int, **options: Any) -> Contestant:
        row = {"name": name, "runs": runs, "processes": processes, "depth": depth}
        return Contestant(kind, options, processes, row)

    loop = {"depth": depth, "images": images}
    return [
        *(
            entry(OURS, "contestants.program", seeds * len(updates), 1, **loop, seeds=seeds,
                  updates=updates)
            for seeds, updates in ((SEEDS, UPDATES), (1, UPDATES[-1:]))
        ),
        *(
            entry(name, kind, count, count, **loop)
            for name, kind in PEERS.items() for count in sorted({1, copies})
        ),
        entry(BOUND, "contestants.machine", SEEDS * len(UPDATES), 1),
    ]  # fmt: skip


def rows(found: list[Found]) -> Iterator[dict[str, Any]]:
    """Low and high are the slowest and the fastest repetition, `times` how many times as fast ours
    is with all runs, round by round."""
    flops, moved = work_of(found[0].row["depth"], ours=True)
    for each in found:
        if each.row["name"] == BOUND:
            rates = [min(a["flops_per_s"] / flops, a["bytes_per_s"] / moved) for a in each.answers]
        else:
            rates = [each.samples / answer["seconds"] for answer in each.answers]
        if each is found[0]:
            ours = rates
        if rates:  # it is installed
            times = Range.of([mine / its for mine, its in zip(ours, rates, strict=True)])
            speed = Range.of(rates).named("samples_per_s")
            yield {**each.row, **speed, **times.named("times", "times_")}


def beside_bound(frame: pd.DataFrame) -> pd.DataFrame:
    """Speeds in thousands, and as shares of the bound at their depth."""
    bounds = frame[frame["name"] == BOUND].set_index("depth")["samples_per_s"]
    frame = frame.assign(share=frame["samples_per_s"] / frame["depth"].map(bounds))
    names = ["samples_per_s", "low", "high"]
    return frame.assign(**frame[names] / 1e3)


def conclude(frame: pd.DataFrame, found: list[Found]) -> tuple[dict[str, Any], dict[str, Figure]]:
    """What is missing, the machine's limits, and everybody's place under these roofs."""
    machine = [each for each in found if each.row["name"] == BOUND]
    answers = [answer for each in machine for answer in each.answers]
    limits = {name: Range.of([answer[name] for answer in answers]) for name in LIMITS}
    points = frame[frame["name"] != BOUND].rename(columns={"samples_per_s": "flops_per_s"})
    each = zip(points["name"], points["depth"], strict=True)
    flops, moved = np.array([work_of(depth, ours=name == OURS) for name, depth in each]).T
    points[["flops_per_s", "low", "high"]] *= flops[:, None]
    facts = {
        "missing": {f.row["name"]: f.about["missing"] for f in found if "missing" in f.about},
        "machine": {name: limit._asdict() for name, limit in limits.items()},
        "flops and bytes of a sample": {
            f"{name}, depth {each.row['depth']}": work_of(each.row["depth"], ours=name == OURS)
            for name in ("peers", OURS)
            for each in machine
        },
    }
    roofs = figures.draw_roofs(points.assign(intensity=flops / moved), limits)
    return facts, {"-roofline": roofs}


def list_costs(depth: int) -> Iterator[list[Contestant]]:
    """Programs of 10 runs, without and with what is to cost; each is started several times.

    (`unitnorm train` saves at most every five seconds, so that it pays less.)
    """
    b_sgd, un = ({"updates": [update]} for update in UPDATES)
    pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "UN instead of B-SGD": (b_sgd, un),
        "a checkpoint after every epoch": (
            {**un, "save_every_s": math.inf}, {**un, "save_every_s": 0.0}
        ),
    }  # fmt: skip
    loop, kind = {"depth": depth, "seeds": SEEDS, "images": IMAGES}, "contestants.program"
    for what, pair in pairs.items():
        row = {"what": what, "depth": depth, "runs": SEEDS}
        yield [Contestant(kind, {**loop, **added}, row=row) for added in pair * COST_STARTS]


def cost_rows(found: list[Found]) -> Iterator[dict[str, Any]]:
    """Of what is to cost: how many times as long an epoch is with it as without, in pairs."""
    old, new = (
        [answer["seconds"] for each in found[first::2] for answer in each.answers]
        for first in (0, 1)
    )
    times = Range.of([one / other for one, other in zip(new, old, strict=True)])
    seconds = {"without_s": Range.of(old).median, "with_s": Range.of(new).median}
    yield {**found[0].row, **seconds, **times._asdict(), "rounds": len(old)}


def surveys(device: Device, quick: bool, depths: Sequence[int]) -> list[Survey]:
    """Everything at each depth, and what UN and checkpoints cost; `quick`: with a tenth of the
    images, and without the costs."""
    copies = device["count"] if device["platform"] == "cpu" else GPU_COPIES
    images = IMAGES // 10 if quick else IMAGES
    speeds = Survey(
        name="{device}",
        title="Training samples per second",
        groups=[list_contestants(depth, images, copies) for depth in depths],
        rows=rows,
        read=beside_bound,
        columns={
            "depth": "{depth}", "what": "{name}", "runs": "{runs}",
            "samples/s": "{samples_per_s:,.0f}k", "(range)": "{low:,.0f}k–{high:,.0f}k",
            "ours ×": "{times:.2f}", "(range) ": "{times_low:.2f}–{times_high:.2f}",
            "of bound": "{share:.0%}",
        },
        note=[
            "Medians and ranges of the rounds; ours ×: how many times as fast unitnorm is with "
            f"{SEEDS * len(UPDATES)} runs, round by round.",
            *(f"{name}: {what}." for name, what in WHAT.items()),
            "Peers: one run in each process, an epoch without evaluation; several processes have "
            "data and one thread each, and count all their samples over the seconds of the "
            "slowest.",
            "A peer without a row is not installed: pip install 'unitnorm[bench]'; oblique-sgd is "
            "not on PyPI and needs Python 3.12 or later: pip install "
            "'git+https://github.com/NVIDIA-NeMo/Emerging-Optimizers'.",
        ],
        facts={
            "images": images, "low and high": "the slowest and the fastest of the rounds",
            "what": WHAT,
        },
        conclude=conclude,
    )  # fmt: skip
    costs = Survey(
        name="{device}-costs",
        title="Times as long as an epoch without",
        groups=[group for depth in depths for group in list_costs(depth)],
        rows=cost_rows,
        columns={
            "depth": "{depth}", "with": "{what}", "runs": "{runs}",
            "times as long": "{median:.3f}", "(range)": "{low:.3f}–{high:.3f}", "pairs": "{rounds}",
        },
    )  # fmt: skip
    return [speeds] if quick else [speeds, costs]
