"""The config: the defaults are the paper's protocol, and every fault is one clear line."""

import json
import re
import tomllib

import pytest

from tests.common import python
from unitnorm.archbn.config import Config
from unitnorm.errors import UserError
from unitnorm.run.config import PRESETS, find_config, load, parse, parse_override, presets
from unitnorm.segment.config import SegmentConfig
from unitnorm.study.config import Plan


def test_the_defaults_are_table2_which_names_every_key():
    assert load("table2", None, Config) == load(None, None, Config) == Config()
    defaults = Config().model_dump()
    defaults["data"].pop("data_dir")  # no value in TOML means none
    assert tomllib.loads((PRESETS / "table2.toml").read_text()) == defaults


def test_the_protocol_is_the_papers():
    c = Config()
    assert (c.runs, c.depths, c.updates, c.model.width) == (10, [2, 4], ["b-sgd", "un"], 64)
    assert c.sweep.rates == [1e-2, 1e-3, 1e-4, 1e-5]
    assert (c.sweep.train_images, c.sweep.validation_images, c.sweep.epochs) == (1000, 500, 50)
    assert (c.train.train_images, c.train.validation_images) == (50_000, 10_000)
    assert (c.train.min_epochs, c.train.max_epochs) == (25, 60)
    assert (c.stopping.train_error, c.stopping.lookback, c.stopping.flat) == (1e-5, 5, 1e-5)


def test_every_preset_is_valid():
    assert {"table2", "quick", "segnet", "segnet_small"} <= set(presets())
    for name in presets():
        if "/" not in name:
            load(name, None, SegmentConfig if name.startswith("segnet") else Config)


def test_presets_are_found_by_name_from_anywhere_and_no_file_that_nobody_has_named(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    # by the path in a checkout, too, where there is none
    assert find_config("quick") == find_config("configs/quick.toml") == PRESETS / "quick.toml"
    with pytest.raises(UserError, match=r"config quack: no file .* there are .*quick.*table2"):
        load("quack", None, Config)
    for folder in (tmp_path, tmp_path / "configs"):
        folder.mkdir(exist_ok=True)
        (folder / "table2.toml").write_text("seed = 7")
    names = None, "table2", "table2.toml", "configs/table2.toml"
    assert [load(name, None, Config).seed for name in names] == [0, 0, 7, 7]


def test_configs_are_read_without_jax(tmp_path):
    """`unitnorm config` and a fault of a config come at once; only updates are looked up."""
    code = (
        "import sys\n"
        "from unitnorm.run.config import load\n"
        "from unitnorm.archbn import config\n"
        "import unitnorm.table2.schema, unitnorm.segment.config\n"
        "load('quick', {'seed': 3}, config.Config)\n"
        "from unitnorm.cli import main\n"
        "main(['config', 'table2'], standalone_mode=False)\n"
        "print([name for name in ('jax', 'optax', 'flax') if name in sys.modules])"
    )
    done = python(code, cwd=tmp_path)
    assert done.stdout == (PRESETS / "table2.toml").read_text() + "[]\n", done.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("depths = [0]", "depths.0 = 0: expected at least 1"),
        ("depths = []", "depths = []: expected at least 1 item, found 0"),
        ("depths = 2", "depths = 2: expected a list"),
        ("runs = 2.5", "runs = 2.5: expected a whole number"),
        ('updates = ["sgd"]', "'sgd' is not an update"),
        ("learning_rate = 1", "unknown key learning_rate; allowed: seed, "),
        ("[loss]\nbatch = 10", "unknown key loss.batch; allowed: batch_size, "),
        ('[loss]\nreduction = "max"', "loss.reduction = 'max': expected 'sum' or 'mean'"),
        ("[sweep]\nrates = [0.0]", "sweep.rates.0 = 0.0: expected more than 0"),
        ("[sweep]\nrates = [nan]", "sweep.rates.0 = nan: expected a finite number"),
        ("[sweep]\nrates = [0.1, 0.1000000001]", "each rate may stand once"),
        ("[model]\nwidth = 7", "model.width = 7: expected a multiple of 2"),
        ("[train]\nmin_epochs = 9\nmax_epochs = 8", "min_epochs = 9 is above max_epochs = 8"),
        ("[train]\ntrain_images = 50", "loss.batch_size = 100 is above train.train_images = 50"),
        ("[bold_driver]\ndown = 1.5", "bold_driver.down = 1.5: expected at most 1"),
        ('[data]\ndataset = ""', "data.dataset = '': expected at least 1 character"),
        ("model = 3", "model = 3: expected a section"),
        ("runs = ", "not valid TOML: "),
        ("\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_a_fault_names_key_value_and_what_is_allowed_in_plain_words(tmp_path, text, says):
    path = tmp_path / "faulty.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"config {re.escape(str(path))}: ") as caught:
        load(path, None, Config)
    message = str(caught.value)
    assert says in message
    assert not re.search("\n|Input|should|valid (list|integer)|validation, ", message)


def test_what_a_plan_lacks_is_said_without_all_that_it_has():
    with pytest.raises(UserError, match=r"^x: question: missing; the config needs it \(and 2 more"):
        parse({"depths": [1]}, "x", Plan)


def test_an_override_reaches_its_key_and_beats_the_file(tmp_path):
    for text, key, value in (
        ("sweep.rates=[0.1, 1e-3]", "sweep.rates", [0.1, 1e-3]),
        ("loss.reduction=mean", "loss.reduction", "mean"),
        ('data.dataset="fashion"', "data.dataset", "fashion"),
        ("seed = 3", "seed", 3),
        ("data.data_dir=a=b", "data.data_dir", "a=b"),
    ):
        assert parse_override(text) == (key, value)
    path = tmp_path / "c.toml"
    path.write_text("[loss]\nbatch_size = 20")
    assert load(path, {"loss.batch_size": 30}, Config).loss.batch_size == 30
    with pytest.raises(UserError, match="is a value, not a section"):
        load(path, {"loss.batch_size.x": 1}, Config)
    for bad in ("seed", "=3"):
        with pytest.raises(UserError, match="KEY=VALUE"):
            parse_override(bad)


def test_more_images_than_there_are():
    with pytest.raises(UserError, match=r"train\..* = 60000.*has 59999"):
        Config().check_images(59_999)
    Config().check_images(60_000)


def test_updates_are_known_by_either_spelling_and_stand_once():
    assert parse({"updates": ["un_adam", "un", "un-adam"]}, "", Config).updates == ["un-adam", "un"]


def test_a_protocol_that_differs_is_told_by_its_first_key_and_the_selection_is_none():
    base, recorded = Config(), json.loads(json.dumps(Config().protocol()))
    selection = {"runs": 3, "depths": [7], "updates": ["un"], "data": {"data_dir": "x"}}
    same = parse(selection, "", Config)
    assert same.conflict(recorded) is None
    assert same.fingerprint() == base.fingerprint()
    for changes, told in (
        ({"loss": {"batch_size": 50}, "seed": 1}, " (seed: 0 there, 1 here)"),
        ({"loss": {"batch_size": 50}}, " (loss.batch_size: 100 there, 50 here)"),
    ):
        other = parse(changes, "", Config)
        assert other.conflict(recorded) == told
        assert other.fingerprint() != base.fingerprint()
    for damaged in ({}, {"loss": 3}, None, [], {**recorded, "extra": 1}):
        assert base.conflict(damaged) is not None
