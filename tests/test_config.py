"""The config: the defaults are the paper's protocol, and every fault is one clear line."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from unitnorm.errors import UserError
from unitnorm.table2 import config

CONFIGS = Path(__file__).parent.parent / "configs"


def test_the_defaults_are_table2():
    assert config.load(CONFIGS / "table2.toml") == config.Config()


def test_table2_names_every_key():
    written = tomllib.loads((CONFIGS / "table2.toml").read_text())
    defaults = config.Config().model_dump()
    defaults["data"].pop("data_dir")  # no value in TOML means none
    assert written == defaults


def test_the_protocol_is_the_papers():
    c = config.Config()
    assert (c.runs, c.depths, c.updates, c.model.width) == (10, [2, 4], ["b-sgd", "un"], 64)
    assert c.sweep.rates == [1e-2, 1e-3, 1e-4, 1e-5]
    assert (c.sweep.train_images, c.sweep.validation_images, c.sweep.epochs) == (1000, 500, 50)
    assert (c.train.train_images, c.train.validation_images) == (50_000, 10_000)
    assert (c.train.min_epochs, c.train.max_epochs) == (25, 60)
    assert (c.stopping.train_error, c.stopping.lookback, c.stopping.flat) == (1e-5, 5, 1e-5)


def test_quick_is_valid():
    assert config.load(CONFIGS / "quick.toml").runs == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("depths = [0]", ["depths.0 = 0", "greater than or equal to 1"]),
        ("depths = []", ["depths = []", "at least 1"]),
        ("depths = 2", ["depths = 2", "valid list"]),
        ("runs = 0", ["runs = 0", "greater than or equal to 1"]),
        ("runs = 2.5", ["runs = 2.5", "integer"]),
        ("runs = true", ["runs = True", "integer"]),
        ('updates = ["sgd"]', ["'sgd'", "allowed", "b-sgd", "un-adam"]),
        ("learning_rate = 1", ["unknown key learning_rate", "allowed", "seed"]),
        ("[loss]\nbatch = 10", ["unknown key loss.batch", "batch_size"]),
        ("[loss]\nbatch_size = 0", ["loss.batch_size = 0", "greater than or equal to 2"]),
        ('[loss]\nreduction = "max"', ["loss.reduction = 'max'", "'sum' or 'mean'"]),
        ("[sweep]\nrates = []", ["sweep.rates = []", "at least 1"]),
        ("[sweep]\nrates = [0.0]", ["sweep.rates.0 = 0.0", "greater than 0"]),
        ("[sweep]\nrates = [nan]", ["sweep.rates.0 = nan", "finite"]),
        ("[sweep]\nrates = [0.1, 0.1]", ["each rate may stand once"]),
        ("[model]\nwidth = 7", ["model.width = 7", "multiple of 2"]),
        ("[train]\nmin_epochs = 9\nmax_epochs = 8", ["min_epochs = 9", "max_epochs = 8"]),
        ("[train]\ntrain_images = 50", ["loss.batch_size = 100", "train.train_images = 50"]),
        ("[bold_driver]\ndown = 1.5", ["bold_driver.down = 1.5", "less than or equal to 1"]),
        ("runs = ", ["not valid TOML"]),
        ("model = 3", ["model = 3"]),
    ],
)
def test_a_fault_names_key_value_and_what_is_allowed(tmp_path, text, says):
    path = tmp_path / "faulty.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for part in says:
        assert part in message


def test_a_file_that_is_missing_or_not_text(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        config.load(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("loss.batch_size=50", "loss.batch_size", 50),
        ("sweep.rates=[0.1, 1e-3]", "sweep.rates", [0.1, 1e-3]),
        ("loss.reduction=mean", "loss.reduction", "mean"),
        ('data.dataset="fashion"', "data.dataset", "fashion"),
        ("seed = 3", "seed", 3),
        ("data.data_dir=a=b", "data.data_dir", "a=b"),
    ],
)
def test_overrides(text, key, value):
    assert config.parse_override(text) == (key, value)


def test_an_override_reaches_its_key_and_beats_the_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[loss]\nbatch_size = 20")
    assert config.load(path, {"loss.batch_size": 30}).loss.batch_size == 30
    with pytest.raises(UserError, match=r"unknown key loss\.size"):
        config.load(path, {"loss.size": 1})
    with pytest.raises(UserError, match="is a value, not a section"):
        config.load(path, {"loss.batch_size.x": 1})
    for bad in ("seed", "=3"):
        with pytest.raises(UserError, match="KEY=VALUE"):
            config.parse_override(bad)


def test_more_images_than_there_are():
    with pytest.raises(UserError, match=r"train\..* = 60000.*has 59999"):
        config.Config().check_images(59_999)
    config.Config().check_images(60_000)


def test_the_fingerprint_is_of_the_protocol_alone():
    base = config.Config()
    same = config.parse({"runs": 3, "depths": [7], "updates": ["un"], "data": {"data_dir": "x"}})
    assert same.fingerprint() == base.fingerprint()
    for other in ({"seed": 1}, {"loss": {"batch_size": 50}}, {"stopping": {"flat": 0.0}}):
        assert config.parse(other).fingerprint() != base.fingerprint()
