"""The benchmark: the contestants do the same work, and what is measured is told as it is.

No test looks at a time.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from rich.console import Console

from unitnorm import build, cli, data
from unitnorm.bench import (
    compare,
    contestants,
    figures,
    measure,
    roofline,
    scaling,
    startup,
    worker,
)
from unitnorm.bench.measure import Contestant, Spread
from unitnorm.errors import UserError
from unitnorm.report.tables import Fitting
from unitnorm.table2 import training
from unitnorm.table2.config import Config, parse
from unitnorm.table2.model import FILTER_AXIS, filter_mask

# ---------------------------------------------------------------- what a sample costs


def test_operations_and_bytes_of_a_sample_are_those_counted_by_hand():
    shape = roofline.Shape(depth=2)
    assert shape.parameters() == 784 * 64 + 32 * 64 + 32 * 10 + 2 * 2 * 64 == 52_800
    assert roofline.forward_flops(shape) == 2 * (50_176 + 2_048 + 320) == 105_088
    # forwards, weights' gradients, and the gradients of what enters all layers but the first
    assert roofline.training_flops(shape) == 105_088 + 105_088 + 2 * (2_048 + 320)
    assert roofline.training_bytes(shape, pixel_bytes=1, sharing=2) == 392 + 8 * 52_800 / 100
    assert roofline.training_bytes(shape, pixel_bytes=4) == 3_136 + 8 * 52_800 / 100


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_operations_are_those_that_xla_counts(depth):
    network = training.archbn(Config(), 784, 10, depth)
    params, stats = network.init(jax.random.key(0))
    x, y = np.ones((100, 784), np.float32), np.zeros(100, np.int32)

    def loss(params):
        logits, _ = network.apply(params, stats, x, True)
        return training.cross_entropy(logits, y).sum()

    counted = jax.jit(jax.grad(loss)).lower(params).cost_analysis()["flops"] / 100
    products = roofline.training_flops(roofline.Shape(depth))
    assert products < counted < 1.1 * products  # the rest is not made of products


def test_the_bound_is_the_lower_roof():
    assert roofline.bound(10.0, 1.0, flops_per_s=200.0, bytes_per_s=50.0) == 20.0
    assert roofline.bound(10.0, 5.0, flops_per_s=200.0, bytes_per_s=50.0) == 10.0


def test_evaluation_counts_as_work_of_ours_alone():
    flops, moved = compare.work_of("unitnorm", 2, 50_000)
    assert flops == pytest.approx(214_912 + 105_088 / 5)
    assert moved == pytest.approx(392 + 4_224 + 784 / 5)
    assert compare.work_of("geoopt", 2, 50_000) == (214_912, 3_136 + 4_224)


# ---------------------------------------------------------------- the same work


@pytest.fixture(scope="module")
def images(idx_folder):
    return data.load_dataset(data_dir=str(idx_folder))


@pytest.fixture
def config():
    return parse({"loss": {"batch_size": 20}})


@pytest.mark.parametrize("riemannian", [False, True], ids=["torch-sgd", "geoopt"])
def test_the_peers_loops_are_ours_step_by_step(images, config, riemannian, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("geoopt")
    from unitnorm.bench import peers

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    theirs = peers.Loop(2, images, config, riemannian)

    def un(params):
        filters = filter_mask(params)
        return build("un", contestants.RATE, filters=filters, axis=FILTER_AXIS)

    ours = contestants.OptaxLoop(2, images, config, *([un] if riemannian else []))
    start = ours.weights()
    with torch.no_grad():
        for linear, weight in zip([*theirs.model.linear, theirs.model.theta], start, strict=True):
            linear.weight.copy_(torch.tensor(weight))
    order = np.random.default_rng(0).permutation(600)[:100]
    ours.train(order.astype(np.int32))
    theirs.train(torch.tensor(order))
    for w, mine, other in zip(start, ours.weights(), theirs.weights(), strict=True):
        moved = np.abs(mine - w).max()
        assert moved > 1e-3
        np.testing.assert_allclose(other, mine, atol=1e-3 * moved)
    norms = np.linalg.norm(theirs.weights()[0], axis=1)
    assert (np.abs(norms - 1).max() < 1e-5) == riemannian


# ---------------------------------------------------------------- workers


class Fake:
    """A worker that answers with the numbers it was given, again and again."""

    def __init__(self, name, log, about, answers):
        self.name, self.log, self.about = name, log, about
        self.answers = iter([*answers[:1] * measure.WARM_UP, *answers])

    def repeat(self):
        self.log.append(self.name)
        return next(self.answers)


def test_contestants_take_turns_after_warming_up():
    log = []
    workers = {name: Fake(name, log, {}, [{"n": 1}, {"n": 2}, {"n": 3}]) for name in "abc"}
    found = measure.take_turns(workers, 3)
    assert "".join(log) == "aabbcc" + "abc" + "bca" + "cab"
    assert found == {name: [{"n": 1}, {"n": 2}, {"n": 3}] for name in "abc"}


def test_a_spread_is_median_lowest_and_highest():
    assert Spread.of([5.0, 1.0, 2.0, 100.0]) == (3.5, 1.0, 100.0)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ({"kind": "AMD EPYC", "platform": "cpu", "count": 2}, "amd-epyc-2-cores"),
        (
            {"kind": "Intel(R) Xeon(R) CPU @ 2.20GHz", "platform": "cpu", "count": 1},
            "intel-xeon-1-cores",
        ),
        ({"kind": "NVIDIA H200", "platform": "gpu", "count": 1}, "nvidia-h200"),
        ({"kind": "TPU v4", "platform": "tpu", "count": 4}, "tpu-v4-4-devices"),
        ({"kind": "../..", "platform": "cpu", "count": 8}, "cpu-8-cores"),
    ],
)
def test_a_device_names_its_files(device, name):
    assert measure.slug(device) == name


def test_our_program_is_served_by_epochs_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("UNITNORM_CACHE", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles sooner
    options = {"depth": 1, "seeds": 2, "updates": ["un"], "images": 100, "devices_used": 1}
    with measure.started({"small": Contestant("program", options)}) as (workers, missing):
        assert not missing
        small = workers["small"]
        assert small.about["samples"] == 2 * 100
        assert (small.about["device"]["platform"], small.about["device"]["count"]) == ("cpu", 1)
        answers = [small.repeat(), small.repeat()]
    assert all(answer["seconds"] > 0 for answer in answers)
    # the 60,000 training images alone are 47 MB
    assert 47 < answers[0]["peak_memory_mb"] <= answers[1]["peak_memory_mb"] < 4_000


def test_what_is_not_installed_is_named_and_what_fails_says_why(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('none here', name='torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *filter(None, sys.path)]))
    peer = Contestant("geoopt", {"depth": 1, "images": 100})
    with measure.started({"geoopt": peer}) as (workers, missing):
        assert workers == {}
        assert missing == {"geoopt": "torch"}
    (tmp_path / "torch.py").write_text("import a_part_that_is_missing")
    with pytest.raises(UserError, match=r"bench: geoopt failed .*'a_part_that_is_missing'"):
        measure.started({"geoopt": peer}).__enter__()


def test_a_worker_answers_each_order_with_one_line(monkeypatch):
    lines = iter(["again\n", "again\n", ""])
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"readline": lambda _: next(lines)})())
    sent, done = [], []
    worker.Orders(sent.append).serve(lambda: done.append(1) or {"found": 7.0}, samples=5)
    assert sent[0] == {"ready": {"samples": 5}}
    assert [answer["found"] for answer in sent[1:]] == [7.0, 7.0]
    assert len(done) == 2


# ---------------------------------------------------------------- what is told

DEVICE = {"kind": "AMD EPYC", "platform": "cpu", "count": 2, "processes": 1, "machine": "x86_64"}
SECONDS = {"unitnorm": [2.0, 4.0, 5.0], "geoopt": [1.0, 0.5, 0.4], "optax-loop": [0.5, 0.5, 0.5]}
COSTS = {"without": [1.0, 2.0, 1.0], "with": [1.1, 2.0, 1.05]}  # in each of five starts


@pytest.fixture
def measured(monkeypatch):
    """A comparison of numbers that we know; PyTorch is not installed."""

    @contextlib.contextmanager
    def started(chosen):
        workers, missing = {}, {}
        for name, contestant in chosen.items():
            if name == "bound":
                answer = {"flops_per_s": 240e9, "bytes_per_s": 20e9}
                workers[name] = Fake(name, [], {}, [answer] * 3)
            elif name == "torch-sgd":
                missing[name] = "torch"
            else:
                times = COSTS[name] if name in COSTS else SECONDS[name]
                about = {"samples": 1_000_000 if name == "unitnorm" else 50_000, "device": DEVICE}
                assert contestant.options["images"] == 50_000
                workers[name] = Fake(name, [], about, [{"seconds": s} for s in times])
        yield workers, missing

    monkeypatch.setattr(measure, "started", started)


def test_the_comparison_is_medians_and_ratios_round_by_round(measured, tmp_path):
    done = CliRunner().invoke(
        cli.main, ["bench", "--out", str(tmp_path), "--depth", "2", "--rounds", "3"]
    )
    assert done.exit_code == 0, done.output
    folder = tmp_path / "bench"
    table = pd.read_csv(folder / "amd-epyc-2-cores.csv").set_index("name")
    assert list(table.columns) == ["depth", "runs", "samples_per_s", "low", "high"]
    assert list(table.index) == ["unitnorm", "geoopt", "optax-loop", "bound"]
    assert list(table.loc["unitnorm"]) == [2, 20, 250_000, 200_000, 500_000]
    assert list(table.loc["geoopt"]) == [2, 1, 100_000, 50_000, 125_000]
    bound = round(240e9 / (214_912 + 105_088 / 5))
    assert list(table.loc["bound"]) == [2, 20, bound, bound, bound]
    facts = json.loads((folder / "amd-epyc-2-cores.json").read_text())
    # rounds: 500,000 / 50,000, 250,000 / 100,000, 200,000 / 125,000
    assert facts["times as fast"]["geoopt, depth 2"] == pytest.approx(
        {"median": 2.5, "low": 1.6, "high": 10.0}
    )
    assert facts["missing"] == {"torch-sgd": "torch"}
    assert facts["command"].startswith("unitnorm")
    assert facts["versions"]["jax"] == jax.__version__
    costs = pd.read_csv(folder / "amd-epyc-2-cores-costs.csv")
    assert list(costs["what"]) == ["UN instead of B-SGD", "a checkpoint after every epoch"]
    assert costs.drop(columns="what").to_dict("records") == 2 * [
        {
            "depth": 2, "runs": 10, "without_s": 1.0, "with_s": 1.1,
            "median": 1.05, "low": 1.0, "high": 1.1, "rounds": 15,
        }
    ]  # fmt: skip
    assert "torch-sgd is left out: torch is not installed (pip install" in done.output
    said = "UN instead of B-SGD takes 1.050 times as long (median of 15 pairs; 1.000–1.100)."
    assert said in done.output
    assert said in (folder / "amd-epyc-2-cores.md").read_text()
    assert re.search(r"2 +geoopt +1 +100k +50k–125k +2\.50 +1\.60–10\.00 +10%", done.output)
    names = {path.name for path in folder.iterdir()}
    assert {"amd-epyc-2-cores-roofline.png", "amd-epyc-2-cores-roofline.svg"} < names


def test_the_roofline_has_both_roofs_and_every_contestant(measured):
    compared = compare.compare([2], 3)
    figure = figures.roofs(compare.points(compared), compared.machine)
    axis = figure.axes[0]
    roof = axis.lines[0].get_xydata()
    np.testing.assert_allclose(roof[:, 1], np.minimum(240.0, 20.0 * roof[:, 0]))
    assert roof[0, 1] < 240.0 == roof[-1, 1]
    found = {
        bars.lines[0].get_marker(): tuple(bars.lines[0].get_xydata()[0]) for bars in axis.containers
    }
    flops, moved = compare.work_of("unitnorm", 2, 50_000)
    assert found["o"] == pytest.approx((flops / moved, 250_000 * flops / 1e9))
    assert found["s"] == pytest.approx((214_912 / 7_360, 100_000 * 214_912 / 1e9))
    once, again = figures.encode(figure), figures.encode(figure)
    assert once == again
    svg = ElementTree.fromstring(once["svg"].decode())
    assert svg.tag.endswith("svg")


def test_scaling_measures_each_point_alone_and_tells_how_it_grows(monkeypatch):
    asked = []

    @contextlib.contextmanager
    def started(chosen):
        ((name, contestant),) = chosen.items()
        asked.append((contestant.options, contestant.processes))
        runs = contestant.options["seeds"] * 2
        count = (contestant.options["devices_used"] or 2) * contestant.processes
        about = {"samples": runs * 1_000, "device": {**DEVICE, "count": count}}
        answer = {
            "seconds": runs * contestant.options["depth"] / count,
            "peak_memory_mb": 500.0 + runs,
        }
        yield {name: Fake(name, [], about, [answer] * 2)}, {}

    monkeypatch.setattr(measure, "started", started)
    frame, device = scaling.scaling(scaling.points(2), 2, images=1_000)
    assert device == {**DEVICE, "count": 2}
    places = frame[["runs", "depth", "devices", "processes"]].to_numpy().tolist()
    assert places == [
        [10, 2, 2, 1], [20, 2, 2, 1], [50, 2, 2, 1], [100, 2, 2, 1], [200, 2, 2, 1],
        [20, 4, 2, 1], [20, 8, 2, 1], [20, 16, 2, 1], [20, 2, 1, 1], [20, 2, 2, 2],
    ]  # fmt: skip
    assert asked[0][0]["updates"] == ("b-sgd", "un")
    assert asked[-1][1] == 2
    row = frame.iloc[3]
    assert (row["epoch_s"], row["samples_per_s"], row["peak_memory_mb"]) == (100.0, 1_000.0, 600.0)
    assert scaling.growth(frame) == [
        "runs × 20: time × 20.0, memory × 1.4",
        "depth × 8: time × 8.0, memory × 1.0",
    ]
    files = scaling.files(frame, device, 2, {"command": "unitnorm bench --scaling"})
    written = pd.read_csv(io.BytesIO(files["bench/scaling.csv"]))
    assert list(written.columns) == scaling.COLUMNS
    assert set(written["images"]) == {1_000}
    endings = "csv", "json", "md", "png", "svg"
    assert set(files) == {f"bench/scaling.{ending}" for ending in endings}
    assert b"| 100 | 2 | 2 | 1 | 100.00 | 1,000 | 600 |" in files["bench/scaling.md"]
    assert b"- runs \xc3\x97 20: time" in files["bench/scaling.md"]
    axes = figures.scaling(frame).axes
    assert axes[0].lines[0].get_xydata().tolist() == [
        [10, 10], [20, 20], [50, 50], [100, 100], [200, 200]
    ]  # fmt: skip
    assert axes[3].lines[0].get_xydata()[:, 1].tolist() == [0.52] * 4


def test_few_points_have_a_figure_too():
    rows = [[20, 2, 1, 1, 1_000, 1.0, 0.9, 1.1, 20_000.0, 500.0, None]]
    frame = pd.DataFrame(rows, columns=scaling.COLUMNS)
    assert len(figures.scaling(frame).axes) == 2
    assert scaling.growth(frame) == []


# ---------------------------------------------------------------- start-up

TRAINS = """
import pathlib, os, sys, time
pathlib.Path(os.environ["UNITNORM_CACHE"]).mkdir(exist_ok=True)
if "train" in sys.argv:
    folder = pathlib.Path(os.environ["UNITNORM_CACHE"])
    with open({log!r}, "a") as log:
        print(len(list(folder.iterdir())), sys.argv[sys.argv.index("--out") + 1], file=log)
    (folder / "program").touch()
    print("first line", flush=True)
    print("sweep depth 2: epoch 1/50, 80/80 runs active", flush=True)
    time.sleep(600)
"""


def test_a_start_is_cold_then_warm_and_each_is_ended(tmp_path, monkeypatch):
    log = tmp_path / "log"
    code = TRAINS.format(log=str(log))
    monkeypatch.setenv("UNITNORM_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(startup, "COMMAND", [sys.executable, "-c", code])
    frame = startup.startup(2)
    assert frame[["what", "cache"]].to_numpy().tolist() == [
        ["unitnorm --help", ""], ["unitnorm train", "cold"], ["unitnorm train", "warm"]
    ]  # fmt: skip
    assert (frame[["seconds", "low", "high"]] > 0).all(axis=None)
    cached = [line.split()[0] for line in log.read_text().splitlines()]
    assert cached == ["0", "1", "0", "1"]
    places = [Path(line.split()[1]) for line in log.read_text().splitlines()]
    assert len(set(places)) == 4
    assert not any(place.parent.exists() for place in places)


def test_a_start_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "COMMAND", [sys.executable, "-c", "raise SystemExit('no disk')"])
    with pytest.raises(UserError, match="ended without an epoch: no disk"):
        startup.seconds_to_first_epoch(tmp_path, "cold", ())
    with pytest.raises(UserError, match="--help failed: no disk"):
        startup.seconds_of_help()


def test_tables_fit_a_narrow_terminal(measured):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(Fitting(compare.table(compare.compare([2, 4], 3))))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("200k–500k" in line for line in lines) == 2  # not broken into two lines
