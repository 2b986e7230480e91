"""The benchmark: the contestants do the same work, and what is measured is told as it is.

No test looks at a time.
"""

import functools
import json
import math
import os
import re
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from tests.common import call
from unitnorm import build, data
from unitnorm.archbn.config import Config
from unitnorm.archbn.evaluation import cross_entropy
from unitnorm.archbn.model import FILTER_AXIS, archbn, filter_mask
from unitnorm.bench import (
    compare,
    contestants,
    convolution,
    figures,
    kernels,
    measure,
    roofline,
    scaling,
    startup,
    updates,
    worker,
)
from unitnorm.bench.measure import Contestant
from unitnorm.errors import UserError
from unitnorm.run.config import parse

DEVICE = {"kind": "AMD EPYC", "platform": "cpu", "count": 2, "machine": "x86_64"}
NAME = "amd-epyc-2-cores"


@pytest.fixture
def fake(monkeypatch):
    """Workers that answer with numbers we know. `fake(answer)` takes what a contestant tells of
    itself, and its answers, from a function of the contestant; and gives what was asked for."""
    asked = []

    def install(answer):
        class Worker:
            def __init__(self, contestant, stack):
                if contestant.kind == "contestants.nothing":
                    about, answers = {"device": DEVICE}, []
                else:
                    asked.append(contestant)
                    about, answers = answer(contestant)
                self.answers = lambda: [about] * contestant.processes
                self.repeat = iter([*answers[:1] * contestant.warm_up, *answers]).__next__

        monkeypatch.setattr(measure, "Worker", Worker)
        return asked

    return install


@pytest.fixture
def bench(tmp_path):
    """`bench(*options)` is what `unitnorm bench` prints."""
    return functools.partial(call, "bench", "--out", tmp_path)


# ---------------------------------------------------------------- what a sample costs


def test_operations_are_those_that_xla_counts_and_bytes_those_counted_by_hand():
    network = archbn(Config().model, 784, 10, 2)
    x, y = np.ones((100, 784), np.float32), np.zeros(100, np.int32)

    def loss(params, stats):
        return cross_entropy(network.apply(params, stats, x, True)[0], y).sum()

    start = jax.eval_shape(network.init, jax.random.key(0))
    counted = jax.jit(jax.grad(loss)).lower(*start).cost_analysis()["flops"] / 100
    weights, products = 784 * 64 + 32 * 64 + 32 * 10, roofline.training_flops(2)
    assert products < counted < 1.1 * products  # the rest is not made of products
    assert roofline.work_of(2, ours=False) == (products, 3_136 + 8 * (weights + 2 * 2 * 64) / 100)
    # evaluation counts as work of ours alone
    flops, moved = roofline.work_of(2, ours=True)
    assert flops == pytest.approx(products + 2 * weights / 5)
    assert moved == pytest.approx(784 + 8 * (weights + 2 * 2 * 64) / 100 + 784 / 5)


PROGRAM = """
%short (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  ROOT %t = (s32[]) fusion(%p), kind=kLoop, calls=%f
}

%steps.1 (p: (f32[10,4], u8[60000,784], s32[])) -> (f32[10,4]) {
  %p = (f32[10,4]{1,0}, u8[60000,784]{1,0}) parameter(0)
  %w = f32[10,4]{1,0} get-tuple-element(%p), index=0
  %images = u8[60000,784]{1,0} get-tuple-element(%p), index=1
  %x = f32[10,3]{1,0} fusion(%images), kind=kLoop, calls=%f, metadata={op_name="x(y)"}
  %g = (f32[10,4]{1,0}, pred[10]{0}) custom-call(%w, %x), custom_call_target="gemm"
  %one = f32[10,4]{1,0} get-tuple-element(%g), index=0
  ROOT %t = (f32[10,4]{1,0}) tuple(%one)
}

ENTRY %main (a: f32[10,4]) -> f32[10,4] {
  %a = f32[10,4] parameter(0)
  %first = (s32[]) while(%a), condition=%c, body=%short
  ROOT %second = (f32[10,4]) while(%first), condition=%c, body=%steps.1
}
"""


def test_kernels_and_bytes_are_those_of_the_loop_over_mini_batches():
    work = kernels.count_work(PROGRAM)
    # 30 floats from as many bytes of the images; then w and x to a float's 40 and 10 truth values
    assert work == (2, 30 * 4 + 30 + 4 * (40 + 30) + 40 * 4 + 10)
    assert kernels.predict_us(work, 1.0, 3.0, "h100") == pytest.approx(6.0, abs=0.01)
    assert kernels.predict_us(work, 67e6, 3.0, "h100") == pytest.approx(7.0)


@pytest.mark.usefixtures("hurried")
def test_kernels_are_counted_in_the_epoch():
    images = data.load_dataset()
    function, fixed, state = contestants.make_epoch(1, "un", 2, 400, images)
    program = jax.jit(function).lower(*fixed, state).compile()
    assert 10 < kernels.count_work(program.as_text()).kernels < 500
    state = program(*fixed, program(*fixed, state))
    np.testing.assert_array_equal(state.epoch, 2)
    assert kernels.compile_for_h100(function, (*fixed, state)) is None  # without its plugin


# ---------------------------------------------------------------- the same work


@pytest.mark.parametrize(
    ("optimiser", "package"),
    [("SGD", "torch"), ("RiemannianSGD", "geoopt"), ("ObliqueSGD", "emerging_optimizers")],
)
def test_the_peers_loops_are_ours_step_by_step(idx_folder, optimiser, package, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip(package)
    riemannian = optimiser != "SGD"
    from unitnorm.bench import peers

    images = data.load_dataset(data_dir=str(idx_folder))
    config = parse({"loss": {"batch_size": 20}}, "test", Config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    theirs = peers.Loop(2, images, config, optimiser)
    linears = [*theirs.network.linear, theirs.network.theta]

    network = archbn(config.model, images.train_images.shape[1], images.classes, 2)
    params, stats = network.init(jax.random.key(0))
    filters, rate = filter_mask(params), worker.RATE
    un = build("un", rate, filters=filters, axis=FILTER_AXIS)
    ours = un if riemannian else optax.sgd(rate)

    def weights(params):
        return [*network.filters(params), params["theta"]["W"]]

    with torch.no_grad():
        for linear, weight in zip(linears, weights(params), strict=True):
            linear.weight.copy_(torch.tensor(np.asarray(weight)))
    order = np.random.default_rng(0).permutation(600)[:100]
    theirs.train(torch.tensor(order))
    step, state = contestants.make_optax_step(network, ours), (params, stats, ours.init(params))
    x, y = images.train_images.astype(np.float32), images.train_labels.astype(np.int32)
    for batch in order.reshape(5, 20):
        state = step(state, x, y, batch)
    found = [linear.weight.detach().numpy() for linear in linears]
    for w, mine, other in zip(weights(params), weights(state[0]), found, strict=True):
        moved = np.abs(mine - w).max()
        assert moved > 1e-3
        np.testing.assert_allclose(other, mine, atol=1e-3 * moved)
    norms = np.linalg.norm(found[0], axis=1)
    assert (np.abs(norms - 1).max() < 1e-5) == riemannian


@pytest.mark.parametrize("shape", [(4, 6), (3, 3, 2, 4)], ids=["dense", "convolution"])
@pytest.mark.usefixtures("hurried")
def test_the_steps_that_are_measured_are_those_of_the_update(shape, monkeypatch):
    w, g = jax.random.normal(jax.random.key(0), (2, *shape))
    every = updates.list_transformations(shape)
    assert {"optax.sgd", "UN", "B-SGD", "un-adam"} < set(every)
    for update in (optax.adam(0.1), every["UN"]):
        state, expected = update.init(w), w
        for _ in range(3):
            displacement, state = update.update(g, state, expected)
            expected = optax.apply_updates(expected, displacement)
        program = updates.compile_steps(update, 3, w, g)
        found, _ = program((jnp.copy(w), update.init(w)), g)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    some = {name: every[name] for name in ("optax.adam", "optax muon", "UN")}
    monkeypatch.setattr(updates, "list_transformations", lambda _: some)
    monkeypatch.setattr(updates, "memory_rate", lambda _: 1e10)
    answers = worker.answers("updates.updates", {"shape": shape})
    about, answer, size = next(answers), next(answers), math.prod(shape)
    assert about["parameters"] == size
    assert about["bytes"]["UN"] == 3 * 4 * size
    assert about["bytes"]["optax.adam"] == 3 * 4 * size + 2 * (2 * 4 * size + 4)  # and a count
    assert all(answer[name] > 0 and about["compile_s"][name] > 0 for name in some)


@pytest.mark.usefixtures("hurried")
def test_both_convolutions_give_the_same():
    x, kernel = jax.random.normal(jax.random.key(0), (1, 45, 46, 16)), jnp.ones((7, 7, 16, 16))
    layers = [jax.jit(convolution.make_layer(way)) for way in convolution.WAYS]
    direct, fourier = (layer(x, kernel, x) for layer in layers)
    assert not np.array_equal(direct[0], fourier[0])  # the way was another
    for one, other in zip(direct, fourier, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())


# ---------------------------------------------------------------- workers


def test_contestants_take_turns_after_warming_up(fake):
    log = []
    fake(lambda c: ({"samples": 5}, [{"n": 1}, {"n": 2}, {"n": 3}]))
    three = [Contestant("x", processes=2, row={"name": name}) for name in "abc"]
    found = measure.in_turns(three, 3, log.append)
    assert log[0] == "starting 6 processes"
    assert "".join(line[-1] for line in log[1:]) == "aabbcc" + "abc" + "bca" + "cab"
    assert found[1] == ({"name": "b"}, {"samples": 5}, 10, [{"n": 1}, {"n": 2}, {"n": 3}])


def test_a_device_names_its_files():
    for kind, platform, count, name in (
        ("AMD EPYC, AVX-512", "cpu", 2, "amd-epyc-avx-512-2-cores"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "cpu", 1, "intel-xeon-1-cores"),
        ("NVIDIA H200", "gpu", 1, "nvidia-h200"),
        ("TPU v4", "tpu", 4, "tpu-v4-4-devices"),
        ("../..", "cpu", 8, "cpu-8-cores"),
    ):
        assert measure.slug({"kind": kind, "platform": platform, "count": count}) == name


def test_our_program_is_served_by_epochs_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("UNITNORM_CACHE", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles sooner
    options = {"depth": 1, "seeds": 2, "updates": ["un"], "images": 100, "devices_used": 1}
    program = Contestant("contestants.program", {**options, "save_every_s": 0.0})
    [small] = measure.in_turns([program], 2)
    assert small.samples == 2 * 100
    assert (small.about["device"]["platform"], small.about["device"]["count"]) == ("cpu", 1)
    assert all(answer["seconds"] > 0 for answer in small.answers)
    peaks = [answer["peak_memory_mb"] for answer in small.answers]
    assert 47 < peaks[0] <= peaks[1] < 4_000  # the 60,000 training images alone are 47 MB


def test_what_is_not_installed_is_named_and_what_fails_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "unitnorm.bench.peers", raising=False)
    assert list(worker.answers("peers.geoopt", {})) == [{"missing": "torch"}]
    for kind, why in (("contestants.machine", "TypeError"), (f"{HERE}.killed", "its process was")):
        with pytest.raises(UserError, match=rf"bench: \w+ failed while it was measured: {why}"):
            measure.in_turns([Contestant(kind, {"x": 1})], 1)


HERE = "tests.test_bench"  # where a worker finds these contestants


def killed(x):
    os.kill(os.getpid(), signal.SIGKILL)
    yield


def copy(seconds):
    """One of several; the second process to ask takes longer."""
    print("noise")  # of a library
    yield {"samples": 50, "threads": [os.environ.get(name) for name in measure.ONE_THREAD]}
    while True:
        yield {"seconds": seconds, "peak_memory_mb": 10.0}


@pytest.mark.parametrize(("copies", "threads"), [(1, None), (3, "1")])
def test_copies_add_up_and_have_a_thread_each(copies, threads, monkeypatch, capfd):
    for name in measure.ONE_THREAD:
        monkeypatch.delenv(name, raising=False)
    [found] = measure.in_turns([Contestant(f"{HERE}.copy", {"seconds": 2.0}, copies)], 1)
    assert found.about["threads"] == [threads] * 2
    assert found.samples == 50 * copies
    assert found.answers == [{"seconds": 2.0, "peak_memory_mb": 10.0 * copies}]
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- what is told

SECONDS = {  # by kind, runs and processes
    ("program", 20, 1): [2.0, 4.0, 5.0],
    ("program", 1, 1): [0.5, 0.5, 0.5],
    ("geoopt", 1, 1): [1.0, 0.5, 0.4],
    ("geoopt", 1, 2): [0.8, 0.8, 0.8],
    ("optax_loop", 1, 1): [0.25, 0.25, 0.25],
    ("optax_loop", 1, 2): [1.0, 1.0, 1.0],
}
MISSING = {"torch_sgd": "torch", "oblique_sgd": "emerging_optimizers"}


def compared(contestant):
    """A comparison of numbers that we know, on two cores; two peers are not installed."""
    kind, options = contestant.kind.partition(".")[2], contestant.options
    if kind in MISSING:
        return {"missing": MISSING[kind]}, []
    if kind == "machine":
        return {}, [{"flops_per_s": 240e9, "bytes_per_s": 20e9, "seconds": 1.0}] * 3
    runs = options.get("seeds", 1) * len(options.get("updates", "x"))
    save = options.get("save_every_s")
    added = save == 0.0 if save is not None else options.get("updates") == ["un"]
    costs = [1.1, 2.0, 1.05] if added else [1, 2, 1]
    seconds = SECONDS.get((kind, runs, contestant.processes), costs)
    return {"samples": runs * options["images"]}, [{"seconds": s} for s in seconds]


def test_the_comparison_is_medians_and_ratios_round_by_round(fake, bench, tmp_path):
    fake(compared)
    said = bench("--depth", "2", "--rounds", "3")
    table = pd.read_csv(tmp_path / f"{NAME}.csv")
    rows = {tuple(row[:3]): row[3:] for row in table.to_numpy().tolist()}
    assert list(rows) == [
        ("unitnorm", 20, 1), ("unitnorm", 1, 1), ("geoopt", 1, 1),
        ("geoopt", 2, 2), ("optax-loop", 1, 1), ("optax-loop", 2, 2), ("bound", 20, 1),
    ]  # fmt: skip
    assert rows["unitnorm", 20, 1] == [2, 250_000, 200_000, 500_000, 1, 1, 1]
    # rounds: 500,000 / 50,000, 250,000 / 100,000, 200,000 / 125,000
    assert rows["geoopt", 1, 1] == [2, 100_000, 50_000, 125_000, 2.5, 1.6, 10.0]
    assert rows["geoopt", 2, 2] == [2, 125_000, 125_000, 125_000, 2.0, 1.6, 4.0]
    bound = 240e9 / roofline.work_of(2, ours=True)[0]
    assert rows["bound", 20, 1][1:4] == pytest.approx([bound] * 3, rel=1e-6)
    facts = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert facts["missing"] == {"torch-sgd": "torch", "oblique-sgd": "emerging_optimizers"}
    assert facts["command"].startswith("unitnorm")
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["device"] == DEVICE
    costs = pd.read_csv(tmp_path / f"{NAME}-costs.csv").to_numpy().tolist()
    numbers = [2, 10, 1.0, 1.1, 1.05, 1.0, 1.1, 6]
    saved = "a checkpoint after every epoch"
    assert costs == [[what, *numbers] for what in ("UN instead of B-SGD", saved)]
    assert re.search(r"2 +geoopt +1 +100k +50k–125k +2\.50 +1\.60–10\.00 +10%", said)
    assert re.search(rf"2 +{saved} +10 +1\.050 +1\.000–1\.100 +6", said)
    text = (tmp_path / f"{NAME}.md").read_text()
    assert "**Times as long as an epoch without**" in text
    assert "pip install 'unitnorm[bench]'; oblique-sgd is not on PyPI" in text
    assert (tmp_path / f"{NAME}-roofline.svg").exists()


def test_a_quick_look_says_each_step_and_leaves_out_what_takes_long(fake, bench, tmp_path):
    assert "--depth 4 is of the comparison" in bench("--scaling", "--depth", 4, code=2)
    fake(compared)
    said = bench("--quick")
    assert "round 2 of 2: name geoopt, runs 2, processes 2, depth 2\n" in said
    assert not re.search("depth 4|instead of B-SGD", said)
    facts = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert (facts["rounds"], facts["images"]) == (2, 5_000)
    names = [contestant.row["name"] for contestant in compare.list_contestants(2, 100, 1)]
    assert names.count("geoopt") == 1  # one core needs no second row


def test_the_roofline_has_both_roofs_and_every_contestant(fake):
    fake(compared)
    [survey] = compare.surveys(DEVICE, True, [2])
    found = measure.in_turns(next(iter(survey.groups)), 3)
    speeds = pd.DataFrame(survey.rows(found))
    axis = survey.conclude(speeds, found)[1]["-roofline"].axes[0]
    roof = axis.lines[0].get_xydata()
    np.testing.assert_allclose(roof[:, 1], np.minimum(240.0, 20.0 * roof[:, 0]))
    assert roof[0, 1] < 240.0 == roof[-1, 1]
    points = [bars.lines[0] for bars in axis.containers]
    speeds = speeds.query("name != 'bound'")
    assert len(points) == len(speeds) == 6
    for point, row in zip(points, speeds.itertuples(), strict=True):
        flops, moved = roofline.work_of(2, ours=row.name == "unitnorm")
        expected = flops / moved, row.samples_per_s * flops / 1e9
        assert tuple(point.get_xydata()[0]) == pytest.approx(expected)


def test_scaling_measures_each_point_alone_and_draws_how_it_grows(fake, bench, tmp_path):
    def answer(contestant):
        options = contestant.options
        runs = options["seeds"] * options["variants"] * len(options["updates"])
        count = options["devices_used"] or 2
        about = {"samples": runs * options["images"], "device": {**DEVICE, "count": count}}
        seconds = runs * options["depth"] / count
        return about, [{"seconds": seconds, "peak_memory_mb": 500.0 + runs}] * 2

    asked = fake(answer)
    bench("--scaling", "--rounds", "2")
    frame = pd.read_csv(tmp_path / "scaling.csv")
    places = frame[["way", "runs", "variants", "depth", "devices"]].to_numpy().tolist()
    assert places == [
        *(["table 2", runs, 2, 2, 2] for runs in (10, 20, 50, 100, 200)),
        *(["table 2", 20, 2, depth, 2] for depth in (4, 8, 16)),
        *(["study", 4 * each, each, 2, 2] for each in (1, 2, 4, 8, 16, 32, 64)),
        ["table 2", 20, 2, 2, 1],
    ]
    alone, many = asked[8].options, asked[14].options
    assert (alone["updates"], alone["variants"]) == (("un",), 1)
    assert (many["updates"], many["seeds"], many["variants"]) == (("b-sgd", "un"), 4, 32)
    text = (tmp_path / "scaling.md").read_text()
    assert "| 100 | 2 | 2 | 2 | 100.00 | 50,000 | 144 | 600 |" in re.sub(" +", " ", text)
    axes = figures.draw_scaling(frame).axes
    titles = [axis.get_title(loc="left") for axis in axes[:3]]
    assert titles == ["depth 2", "20 runs", "as in a study, depth 2"]
    drawn = [line.get_xydata().tolist() for line in axes[0].lines]
    assert [[runs, runs] for runs in (10, 20, 50, 100, 200)] in drawn


@pytest.mark.parametrize(
    ("flag", "about", "answers", "options", "line", "row"),
    [
        ("--kernels", {"steps": 50, "compiled_for": "H100", "work": (50, 67_000_000)},
         [{"epoch_s": 0.01}, {"epoch_s": 0.02}],
         {"platform": "cpu", "depth": 4, "update": "un", "runs": 10},
         "4 +un +10 +50 +H100 +67,000,000 +120–270 +114–264 +300 +200–400",
         "4,un,10,H100,50,67000000,2.39488e+08,120,270,113.9583,263.9583,300,200,400"),
        ("--convolution", {}, [{"direct": 3.0, "fourier": 1.0}, {"direct": 5.0, "fourier": 1.0}],
         {"height": 90, "width": 120}, "90×120 +4.000 +1.000 +4.0 +3.0–5.0", "90,120,4,1,4,3,5"),
        ("--updates", {"parameters": 10**9, "compile_s": {"UN": 0.5}, "bytes": {"UN": 12 * 10**9}},
         [{"UN": ns, "bytes_per_s": 24e9} for ns in (2.0, 4.0, 3.0)], {"shape": (3, 3, 64, 64)},
         "UN +3.00 +3.00 +0.50 +0.50", "3×3×64×64,UN,1000000000,3,2,4,0.5,0.5"),
        ("--startup", {}, [{"seconds": 2.0}, {"seconds": 4.0}], {"cache": "warm"},
         "unitnorm train +warm +3.00 +2.00 – 4.00", "unitnorm train,warm,3,2,4"),
    ],
    ids=["kernels", "convolution", "updates", "startup"],
)  # fmt: skip
def test_what_is_asked_is_written_and_told(
    flag, about, answers, options, line, row, fake, bench, tmp_path
):
    asked = fake(lambda _: (about, answers))
    said = bench(flag, "--quick", "--rounds", len(answers))
    assert asked[-1].options == options
    assert re.search(line, said)
    [table] = tmp_path.glob("*.csv")
    assert table.read_text().splitlines()[-1] == row


def test_a_quick_look_has_fewer_points():
    kinds = (updates, kernels, convolution, startup, scaling)
    counts = [[len(list(k.survey(DEVICE, quick).groups)) for quick in (0, 1)] for k in kinds]
    assert counts == [[5, 2], [12, 4], [3, 2], [1, 1], [16, 6]]


TRAINS = """
import pathlib, os, sys, time
folder = pathlib.Path(os.environ["UNITNORM_CACHE"])
folder.mkdir()
(folder / "program").touch()
print("first line", flush=True)
print("sweep depth 2: epoch 1/50, 80/80 runs active", flush=True)
time.sleep(600)
"""


def test_a_start_is_cold_or_warm_and_each_is_ended(monkeypatch):
    [starts] = startup.survey(DEVICE, True).groups
    assert [contestant.warm_up for contestant in starts] == [0, 0, 1]
    # a folder that is there already would be refused
    monkeypatch.setattr(startup, "COMMAND", [sys.executable, "-c", TRAINS])
    cold, warm = startup.start("cold"), startup.start("warm")
    assert next(cold) == {}
    assert next(cold)["seconds"] > 0 < next(cold)["seconds"]
    assert next(warm) == {}
    assert next(warm)["seconds"] > 0
    with pytest.raises(UserError, match=r"train ended without an epoch: .*FileExistsError"):
        next(warm)
    monkeypatch.setattr(startup, "COMMAND", [sys.executable, "-c", "raise SystemExit('no disk')"])
    with pytest.raises(UserError, match="--help failed: no disk"):
        startup.seconds_until("", ["--help"])
