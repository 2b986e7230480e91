"""The benchmark: the contestants do the same work, and what is measured is told as it is.

No test looks at a time.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from click.testing import CliRunner
from rich.console import Console

from unitnorm import build, cli, data
from unitnorm.archbn import training
from unitnorm.archbn.config import Config
from unitnorm.archbn.model import FILTER_AXIS, filter_mask
from unitnorm.bench import (
    compare,
    contestants,
    convolution,
    figures,
    measure,
    roofline,
    scaling,
    startup,
    updates,
    worker,
)
from unitnorm.bench.measure import Contestant, Spread
from unitnorm.errors import UserError
from unitnorm.report.style import encode
from unitnorm.report.tables import Fitting
from unitnorm.run.config import parse

# ---------------------------------------------------------------- what a sample costs


def test_operations_and_bytes_of_a_sample_are_those_counted_by_hand():
    shape = roofline.Shape(depth=2)
    assert shape.parameters() == 784 * 64 + 32 * 64 + 32 * 10 + 2 * 2 * 64 == 52_800
    assert roofline.forward_flops(shape) == 2 * (50_176 + 2_048 + 320) == 105_088
    # forwards, weights' gradients, and the gradients of what enters all layers but the first
    assert roofline.training_flops(shape) == 105_088 + 105_088 + 2 * (2_048 + 320)
    assert roofline.training_bytes(shape, pixel_bytes=1) == 784 + 8 * 52_800 / 100
    assert roofline.training_bytes(shape, pixel_bytes=4) == 3_136 + 8 * 52_800 / 100


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_operations_are_those_that_xla_counts(depth):
    network = training.archbn(Config().model, 784, 10, depth)
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
    flops, moved = compare.work_of(2, ours=True)
    assert flops == pytest.approx(214_912 + 105_088 / 5)
    assert moved == pytest.approx(784 + 4_224 + 784 / 5)
    assert compare.work_of(2, ours=False) == (214_912, 3_136 + 4_224)


# ---------------------------------------------------------------- the same work


@pytest.fixture(scope="module")
def images(idx_folder):
    return data.load_dataset(data_dir=str(idx_folder))


@pytest.fixture
def config():
    return parse({"loss": {"batch_size": 20}}, "test", Config)


@pytest.mark.parametrize(
    ("optimiser", "package"),
    [
        ("SGD", "torch"),
        ("RiemannianSGD", "geoopt"),
        ("ObliqueSGD", "emerging_optimizers"),
    ],
)
def test_the_peers_loops_are_ours_step_by_step(images, config, optimiser, package, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip(package)
    riemannian = optimiser != "SGD"
    from unitnorm.bench import peers

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    theirs = peers.Loop(2, images, config, optimiser)

    def un(params):
        filters = filter_mask(params)
        return build("un", worker.RATE, filters=filters, axis=FILTER_AXIS)

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
        self.samples = about.get("samples", 0)
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
        ({"kind": "AMD EPYC, AVX-512", "platform": "cpu", "count": 2}, "amd-epyc-avx-512-2-cores"),
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


STUB = """
import json, os, sys
options = json.loads(sys.argv[2])
threads = [os.environ.get(name) for name in ("PJRT_NPROC", "OMP_NUM_THREADS")]
number = options.get("process", 0)
print(json.dumps({"ready": {"samples": 50, "threads": threads, "options": options}}), flush=True)
for line in sys.stdin:
    print(json.dumps({"seconds": 1.0 + number, "peak_memory_mb": 10.0}), flush=True)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Workers that measure nothing and say how they were started."""
    (tmp_path / "stub.py").write_text(STUB)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{tmp_path}/stub.py" "$@"\n')
    python.chmod(0o700)
    monkeypatch.setattr(measure.sys, "executable", str(python))
    for name in measure.ONE_THREAD:
        monkeypatch.delenv(name, raising=False)


def test_copies_add_up_their_samples_and_have_a_thread_each(stub):
    one = {"geoopt": Contestant("geoopt", {"depth": 2})}
    with measure.started(one) as (workers, _):
        assert workers["geoopt"].samples == 50
        assert workers["geoopt"].about["threads"] == [None, None]
    copies = {"geoopt": Contestant("geoopt", {"depth": 2}, 3)}
    with measure.started(copies) as (workers, _):
        assert workers["geoopt"].samples == 150
        assert workers["geoopt"].about["threads"] == ["1", "1"]
        assert workers["geoopt"].about["options"] == {"depth": 2}
        assert workers["geoopt"].repeat() == {"seconds": 1.0, "peak_memory_mb": 30.0}


def test_processes_that_work_together_are_as_slow_as_the_slowest(stub):
    with measure.started({"ours": Contestant("program", {}, 2, joint=True)}) as (workers, _):
        assert workers["ours"].samples == 50
        assert workers["ours"].about["threads"] == [None, None]
        assert workers["ours"].about["options"]["processes"] == 2
        assert workers["ours"].repeat() == {"seconds": 2.0, "peak_memory_mb": 20.0}


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
SECONDS = {  # by name and runs
    ("unitnorm", 20): [2.0, 4.0, 5.0],
    ("unitnorm", 1): [0.5, 0.5, 0.5],
    ("geoopt", 1): [1.0, 0.5, 0.4],
    ("geoopt", 2): [0.8, 0.8, 0.8],
    ("optax-loop", 1): [0.25, 0.25, 0.25],
    ("optax-loop", 2): [1.0, 1.0, 1.0],
}
MISSING = {"torch_sgd": "torch", "oblique_sgd": "emerging_optimizers"}
COSTS = {"without": [1.0, 2.0, 1.0], "with": [1.1, 2.0, 1.05]}  # in each of two starts


@pytest.fixture
def measured(monkeypatch):
    """A comparison of numbers that we know, on two cores; two peers are not installed."""

    @contextlib.contextmanager
    def started(chosen):
        workers, missing = {}, {}
        for key, contestant in chosen.items():
            if contestant.kind == "machine":
                answer = {"flops_per_s": 240e9, "bytes_per_s": 20e9, "seconds": 1.0}
                workers[key] = Fake(key, [], {}, [answer] * 3)
            elif contestant.kind in MISSING:
                missing[key] = MISSING[contestant.kind]
            else:
                times = COSTS[key] if key in COSTS else SECONDS[key[:2]]
                runs = 10 if key in COSTS else key.runs
                about = {"samples": runs * contestant.options["images"], "device": DEVICE}
                workers[key] = Fake(key, [], about, [{"seconds": s} for s in times])
        yield workers, missing

    monkeypatch.setattr(measure, "started", started)
    monkeypatch.setattr(compare, "count_cores", lambda: 2)


def test_the_comparison_is_medians_and_ratios_round_by_round(measured, tmp_path):
    done = CliRunner().invoke(
        cli.main, ["bench", "--out", str(tmp_path), "--depth", "2", "--rounds", "3"]
    )
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "amd-epyc-2-cores.csv")
    assert list(table.columns) == compare.COLUMNS
    rows = {tuple(row[:3]): row[3:] for row in table.to_numpy().tolist()}
    assert list(rows) == [
        ("unitnorm", 20, 1), ("unitnorm", 1, 1), ("geoopt", 1, 1),
        ("geoopt", 2, 2), ("optax-loop", 1, 1), ("optax-loop", 2, 2), ("bound", 20, 1),
    ]  # fmt: skip
    assert rows["unitnorm", 20, 1] == [2, 250_000, 200_000, 500_000, 1, 1, 1]
    # rounds: 500,000 / 50,000, 250,000 / 100,000, 200,000 / 125,000
    assert rows["geoopt", 1, 1] == [2, 100_000, 50_000, 125_000, 2.5, 1.6, 10.0]
    assert rows["geoopt", 2, 2] == [2, 125_000, 125_000, 125_000, 2.0, 1.6, 4.0]
    bound = 240e9 / (214_912 + 105_088 / 5)
    assert rows["bound", 20, 1][1:4] == pytest.approx([bound] * 3, rel=1e-6)
    facts = json.loads((tmp_path / "amd-epyc-2-cores.json").read_text())
    assert facts["missing"] == {"torch-sgd": "torch", "oblique-sgd": "emerging_optimizers"}
    assert facts["command"].startswith("unitnorm")
    assert facts["versions"]["jax"] == jax.__version__
    costs = pd.read_csv(tmp_path / "amd-epyc-2-cores-costs.csv")
    assert list(costs["what"]) == ["UN instead of B-SGD", "a checkpoint after every epoch"]
    assert costs.drop(columns="what").to_dict("records") == 2 * [
        {
            "depth": 2, "runs": 10, "without_s": 1.0, "with_s": 1.1,
            "median": 1.05, "low": 1.0, "high": 1.1, "rounds": 6,
        }
    ]  # fmt: skip
    text = (tmp_path / "amd-epyc-2-cores.md").read_text()
    for said in (
        "- torch-sgd is left out: torch is not installed (pip install 'unitnorm[bench]').",
        "UN instead of B-SGD takes 1.050 times as long (median of 6 pairs; 1.000–1.100).",
        # the headline is against the better row of each
        "- Depth 2: 2.0 times as fast as geoopt in 2 processes, its best.",
        "- Depth 2: 1.2 times as fast as optax-loop in one process, its best.",
        "oblique-sgd is left out: emerging_optimizers is not installed (pip install 'git+https:",
    ):
        assert said in text
        assert said in " ".join(done.output.split())
    assert re.search(r"2 +geoopt +1 +100k +50k–125k +2\.50 +1\.60–10\.00 +10%", done.output)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"amd-epyc-2-cores-roofline.png", "amd-epyc-2-cores-roofline.svg"} < names


def test_a_quick_look_says_each_step_and_leaves_out_what_takes_long(measured, tmp_path):
    done = CliRunner().invoke(cli.main, ["bench", "--quick", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "depth 2, starting 15 processes"
    assert "depth 2, round 2 of 2: geoopt, runs 2, processes 2" in lines
    assert not any("depth 4" in line or "instead of B-SGD" in line for line in lines)
    facts = json.loads((tmp_path / "amd-epyc-2-cores.json").read_text())
    assert (facts["rounds"], facts["images"]) == (2, 5_000)
    assert not (tmp_path / "amd-epyc-2-cores-costs.csv").exists()


def test_one_core_needs_no_second_row():
    peers = [entry for entry in compare.list_contestants(2, 100, 1) if entry.name == "geoopt"]
    assert peers == [("geoopt", 1, 1)]


def test_the_roofline_has_both_roofs_and_every_contestant(measured):
    figure = compare.measure_speed([2], 3).figures["-roofline"]
    axis = figure.axes[0]
    roof = axis.lines[0].get_xydata()
    np.testing.assert_allclose(roof[:, 1], np.minimum(240.0, 20.0 * roof[:, 0]))
    assert roof[0, 1] < 240.0 == roof[-1, 1]
    found = {}
    for bars in axis.containers:
        marker = bars.lines[0].get_marker()
        found.setdefault(marker, []).append(tuple(bars.lines[0].get_xydata()[0]))
    flops, moved = compare.work_of(2, ours=True)
    assert found["o"][0] == pytest.approx((flops / moved, 250_000 * flops / 1e9))
    peer = [(214_912 / 7_360, speed * 214_912 / 1e9) for speed in (100_000, 125_000)]
    np.testing.assert_allclose(found["s"], peer)
    once, again = encode(figure), encode(figure)
    assert once == again
    svg = ElementTree.fromstring(once["svg"].decode())
    assert svg.tag.endswith("svg")


def test_scaling_measures_each_point_alone_and_tells_how_it_grows(monkeypatch, tmp_path):
    asked = []

    @contextlib.contextmanager
    def started(chosen):
        ((name, contestant),) = chosen.items()
        asked.append(contestant)
        options = contestant.options
        runs = options["seeds"] * options["variants"] * len(options["updates"])
        count = (options["devices_used"] or 2) * contestant.processes
        about = {"samples": runs * options["images"], "device": {**DEVICE, "count": count}}
        seconds = runs * options["depth"] / count
        answer = {"seconds": seconds, "peak_memory_mb": 500.0 + runs}
        yield {name: Fake(name, [], about, [answer] * 2)}, {}

    monkeypatch.setattr(measure, "started", started)
    monkeypatch.setattr(scaling, "count_cores", lambda: 2)
    arguments = ["bench", "--scaling", "--rounds", "2", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.main, arguments)
    assert done.exit_code == 0, done.output
    frame = pd.read_csv(tmp_path / "scaling.csv")
    assert list(frame.columns) == scaling.COLUMNS
    assert set(frame["images"]) == {50_000}
    places = frame[["runs", "variants", "depth", "devices", "processes"]].to_numpy().tolist()
    assert places == [
        [10, 2, 2, 2, 1], [20, 2, 2, 2, 1], [50, 2, 2, 2, 1], [100, 2, 2, 2, 1],
        [200, 2, 2, 2, 1], [20, 2, 4, 2, 1], [20, 2, 8, 2, 1], [20, 2, 16, 2, 1],
        *([4 * each, each, 2, 2, 1] for each in (1, 2, 4, 8, 16, 32, 64)),
        [20, 2, 2, 1, 1], [20, 2, 2, 2, 2],
    ]  # fmt: skip
    assert list(frame["way"]) == ["table 2"] * 8 + ["study"] * 7 + ["table 2"] * 2
    table2, alone, many, together = (asked[i] for i in (1, 8, 14, -1))
    assert table2.options["updates"] == ("b-sgd", "un")
    assert (alone.options["updates"], alone.options["variants"]) == (("un",), 1)
    assert (many.options["seeds"], many.options["variants"]) == (4, 32)
    assert (together.processes, together.joint) == (2, True)
    row = frame.iloc[3]
    assert (row["epoch_s"], row["samples_per_s"], row["peak_memory_mb"]) == (100.0, 50_000.0, 600.0)
    assert row["runs_per_hour"] == 50_000 * 3600 / (25 * 50_000)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} >= {
        f"scaling.{ending}" for ending in ("csv", "json", "md", "png", "svg")
    }
    text = (tmp_path / "scaling.md").read_text()
    assert "| 100 | 2 | 2 | 2 | 1 | 100.00 | 50,000 | 144 | 600 |" in re.sub(" +", " ", text)
    for remark in (
        "Table 2's way: 144 runs an hour at depth 2, each of 25 epochs of 50,000 images.",
        "runs × 20: time × 20.0, memory × 1.4",
        "depth × 8: time × 8.0, memory × 1.0",
        "variants × 64: time × 64.0, memory × 1.5",
    ):
        assert f"- {remark}" in text
    assert re.search(r"- With the best number of variants .*: 144 runs an hour", text)
    axes = figures.draw_scaling(frame).axes
    assert [axis.get_title(loc="left") for axis in axes[:3]] == [
        "depth 2", "20 runs", "as in a study, depth 2"
    ]  # fmt: skip
    drawn = [[tuple(xy) for xy in line.get_xydata()] for line in axes[0].lines]
    assert [(10, 10), (20, 20), (50, 50), (100, 100), (200, 200)] in drawn
    np.testing.assert_allclose(axes[2].lines[0].get_xydata()[:, 1], 144)


def test_few_points_have_a_figure_too():
    rows = [["table 2", 20, 2, 2, 1, 1, 1_000, 1.0, 0.9, 1.1, 20_000.0, 57.6, 500.0, None]]
    frame = pd.DataFrame(rows, columns=scaling.COLUMNS)
    assert len(figures.draw_scaling(frame).axes) == 2
    assert [line[:12] for line in scaling.list_remarks(frame)] == ["Table 2's wa"]


def test_a_quick_look_at_scaling_has_few_points():
    quick = scaling.list_points(2, quick=True)
    assert set(quick) < set(scaling.list_points(2))
    assert {point.variants for point in quick if point.way == scaling.STUDY} == {1, 8, 64}
    assert len(quick) == 6


# ---------------------------------------------------------------- the convolution


def test_both_convolutions_are_measured_and_give_the_same(monkeypatch, tmp_path):
    x, kernel = jax.random.normal(jax.random.key(0), (1, 45, 46, 16)), jnp.ones((7, 7, 16, 16))
    ways = (convolution.layer("direct"), convolution.layer("fourier"))
    direct, fourier = (convolution.with_derivatives(way, x, kernel, x) for way in ways)
    assert not np.array_equal(direct[0], fourier[0])  # the way was another
    for one, other in zip(direct, fourier, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())
    monkeypatch.setattr(convolution, "SIZES", ((9, 12), (10, 12)))
    answers = [{"direct": seconds, "fourier": 1.0} for seconds in (3.0, 5.0)]

    @contextlib.contextmanager
    def started(chosen):
        ((name, contestant),) = chosen.items()
        assert contestant.options == {"height": 9, "width": 12}
        yield {name: Fake(name, [], {"device": DEVICE}, answers)}, {}

    monkeypatch.setattr(measure, "started", started)
    arguments = ["bench", "--convolution", "--quick", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.main, arguments)
    assert done.exit_code == 0, done.output
    (table,) = tmp_path.glob("*-convolution.csv")
    row = pd.read_csv(table).iloc[0]
    assert (row["direct_s"], row["fourier_s"], row["times"]) == (4.0, 1.0, 4.0)
    assert (row["low"], row["high"]) == (3.0, 5.0)
    assert re.search(r"9×12 +4.000 +1.000 +4.0 +3.0–5.0", done.output)


# ---------------------------------------------------------------- each update


@pytest.mark.parametrize("shape", [(4, 6), (3, 3, 2, 4)], ids=["dense", "convolution"])
def test_the_steps_that_are_measured_are_those_of_the_update(shape):
    w, g = jax.random.normal(jax.random.key(0), (2, *shape))
    for update in (optax.adam(0.1), updates.list_transformations(shape)["UN"]):
        state, expected = update.init(w), w
        for _ in range(3):
            displacement, state = update.update(g, state, expected)
            expected = optax.apply_updates(expected, displacement)
        program = updates.compile_steps(update, 3, w, g)
        found, _ = program((jnp.copy(w), update.init(w)), g)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_updates_are_told_beside_the_memory(tmp_path, monkeypatch):
    shapes = []

    @contextlib.contextmanager
    def started(chosen):
        ((name, contestant),) = chosen.items()
        shape = contestant.options["shape"]
        shapes.append(shape)
        size = math.prod(shape)
        about = {
            "parameters": size, "device": {**DEVICE, "count": 1},
            "compile_s": {"optax.sgd": 0.25, "UN": 0.5}, "bytes": {"optax.sgd": 12 * size,
            "UN": 12 * size},
        }  # fmt: skip
        answers = [
            {"optax.sgd": 1e-9 * size, "UN": ns * 1e-9 * size, "bytes_per_s": 24e9}
            for ns in (2.0, 4.0, 3.0)
        ]
        yield {name: Fake(name, [], about, answers)}, {}

    monkeypatch.setattr(measure, "started", started)
    monkeypatch.setattr(updates, "count_cores", lambda: 2)
    done = CliRunner().invoke(cli.main, ["bench", "--updates", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    frame = pd.read_csv(tmp_path / "amd-epyc-2-cores-updates.csv")
    assert list(frame.columns) == updates.COLUMNS
    assert tuple(shapes) == updates.SHAPES
    assert frame.iloc[1].tolist() == ["64×784", "UN", 50_176, 3.0, 2.0, 4.0, 0.5, 0.5]
    text = (tmp_path / "amd-epyc-2-cores-updates.md").read_text()
    assert "| UN | 3.00 | 3.00 | 3.00 | 3.00 | 3.00 | 0.50 | 0.50 |" in re.sub(" +", " ", text)
    shapes.clear()
    updates.measure_updates(1, quick=True, say=lambda _: None)
    assert shapes == [(64, 784), (3, 3, 64, 64)]


def test_every_update_and_rival_is_served(monkeypatch):
    sent, lines = [], iter(["again\n", ""])
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"readline": lambda _: next(lines)})())
    monkeypatch.setattr(updates, "memory_rate", lambda _: 1e10)
    every = updates.list_transformations((3, 3, 2, 4))
    assert {"optax.sgd", "UN", "B-SGD", "un-adam"} < set(every)
    some = {name: every[name] for name in ("weight-norm", "optax.adam", "optax muon", "UN")}
    monkeypatch.setattr(updates, "list_transformations", lambda _: some)
    updates.updates(worker.Orders(sent.append), (3, 3, 2, 4))
    about, answer = sent[0]["ready"], sent[1]
    assert about["parameters"] == 72
    assert about["bytes"]["UN"] == 3 * 4 * 72
    assert about["bytes"]["optax.adam"] == 3 * 4 * 72 + 2 * (2 * 4 * 72 + 4)  # two moments, a count
    assert all(answer[name] > 0 and about["compile_s"][name] > 0 for name in some)


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
    frame = startup.time_starts(2)
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
        startup.seconds_to_first_epoch(tmp_path, "cold")
    with pytest.raises(UserError, match="--help failed: no disk"):
        startup.seconds_of_help()


def test_tables_fit_a_narrow_terminal(measured):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(Fitting(compare.measure_speed([2, 4], 3).cells))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("200k–500k" in line for line in lines) == 2  # not broken into two lines
    names = [*updates.list_transformations((64, 784))]
    shapes = ["×".join(map(str, shape)) for shape in updates.SHAPES]
    rows = [[shape, name, 1, 1.0, 1.0, 1.0, 1.0, 1.0] for shape in shapes for name in names]
    cells = updates.make_cells(pd.DataFrame(rows, columns=updates.COLUMNS))
    console.print(Fitting(cells))
    assert f"{names[-1]}  " in console.export_text()
