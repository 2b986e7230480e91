"""What `make gpu` does, at toy size on this machine."""

import importlib.util
import re
import sys

import pandas as pd
import pytest
from click.testing import CliRunner

from tests.common import ROOT
from tests.test_bench import DEVICE, NAME
from unitnorm.run.config import presets

spec = importlib.util.spec_from_file_location("gpu", ROOT / ".ci" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)

PLAN = """
question = "How?"
datasets = ["mnist"]
depths = [1]
compare = { first = 2000, count = 1 }
[training.train]
train_images = 200
validation_images = 100
min_epochs = 1
max_epochs = 1
[arms.un]
update = "un"
rates = [0.01]
"""


@pytest.mark.slow
def test_a_gpus_steps_are_done_once_and_told_with_what_failed(tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    (tmp_path / "study/toy").write_text(PLAN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setattr(gpu, "find_device", lambda: DEVICE)
    monkeypatch.setattr(gpu, "presets", lambda: ["toy", "study/toy"])
    monkeypatch.setattr(gpu, "STEPS", [gpu.Step("none", ("x",))])
    done = CliRunner().invoke(gpu.main, [])
    assert done.exit_code == 1
    out = tmp_path / "runs/gpu" / NAME
    rows = pd.read_csv(out / "gpu.csv", keep_default_na=False).set_index("step")
    assert rows["state"].to_dict() == {"none": "failed", "study/toy": "done"}
    assert "No such command 'x'" in rows["said"]["none"]
    assert re.search("study/toy .*done .*1", done.output)
    # what is complete in `results` is no step
    (out.parent / "study").mkdir()
    (out / "study-toy").rename(out.parent / "study/toy")
    assert list(gpu.list_studies(out.parent, {})) == []


LONG = """
import pathlib, signal, sys, time
name = sys.argv[1]
calls = pathlib.Path(sys.argv[-1] + ".calls")
done = calls.exists()
calls.touch()
print("study: 2 of 4 runs, about 1 min left" if name == "study" else "round 1", flush=True)
try:
    time.sleep(0 if done else 600)
except KeyboardInterrupt:
    print("interrupted; what is saved stays", flush=True)
    sys.exit(130)
"""


def test_a_step_that_is_stopped_goes_on_with_the_next_call(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "UNITNORM", (sys.executable, "-c", LONG))
    steps = [
        gpu.Step("bench", ("bench",), whole=True), gpu.Step("study/a", ("study",)),
        gpu.Step("study/b", ("study",), lacks="--data fashion=FOLDER"),
    ]  # fmt: skip
    first = gpu.work(steps, tmp_path, 3 / 60)
    assert first["state"].tolist() == ["goes on", "waiting", "skipped"]
    assert first["said"].tolist() == [
        "interrupted; what is saved stays", "", "needs --data fashion=FOLDER"
    ]  # fmt: skip
    second = gpu.work(steps, tmp_path, 3 / 60)  # the measurement did not fit, and waits
    assert second["state"].tolist() == ["goes on", "goes on", "skipped"]
    assert second["said"][1] == "study: 2 of 4 runs, about 1 min left"
    last = gpu.work(steps, tmp_path, 1.0)
    assert last["state"].tolist() == ["done", "done", "skipped"]
    assert last["calls"].tolist() == [2, 2, 0]
    assert last["seconds"][1] >= second["seconds"][1]  # added up; the measurement's are not
    assert last["seconds"][0] < first["seconds"][0]
    pd.testing.assert_frame_equal(last, pd.read_csv(tmp_path / "gpu.csv", keep_default_na=False))


def test_a_step_that_the_system_kills_has_failed(tmp_path, monkeypatch):
    killed = "import os, signal; print('0 of 4', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(gpu, "UNITNORM", (sys.executable, "-c", killed))
    assert gpu.run_step(gpu.Step("study/a", ()), tmp_path, 60.0) == ("failed", "0 of 4")


def test_the_studies_of_a_gpu_are_the_plans_without_records(tmp_path):
    steps = {step.name: step for step in gpu.list_studies(tmp_path, {})}
    plans = {name for name in presets() if name.startswith("study/")}
    assert set(steps) == plans - {"study/template"}
    assert steps["study/depth"].lacks == ""
    assert steps["study/rivals"].lacks == "--data fashion=FOLDER"
    given = {step.name: step for step in gpu.list_studies(tmp_path, {"fashion": "there"})}
    assert given["study/rivals"].lacks == ""
    assert given["study/rivals"].words[:4] == ("study", "study/rivals", "--data", "fashion=there")
