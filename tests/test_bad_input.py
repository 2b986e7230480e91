"""Any config, flag or data file: exit code 0 or 2, one line, no traceback, nothing written.

The same cases every time; UNITNORM_RANDOM_CASES=1 in the environment draws new ones.
"""

import gzip
import re

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.idx import idx_of
from unitnorm.archbn.config import Config
from unitnorm.cli import main, on_one_line
from unitnorm.data import idx, load_dataset
from unitnorm.errors import UserError
from unitnorm.run.config import Section, load, parse
from unitnorm.updates import UPDATES

SECTIONS = {name: vars(value) for name, value in Config() if isinstance(value, Section)}
KEYS = [*Config.model_fields, *(f"{name}.{key}" for name in SECTIONS for key in SECTIONS[name])]
CASES = settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
numbers = (
    st.integers(-3, 12)
    | st.integers()
    | st.floats()
    | st.sampled_from([0, 1, 2, 60_000, 2**31 - 1, 2**31, 2**64, 1e-300, 1e300])
)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(list(UPDATES))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
letters = st.characters(codec="utf-8", exclude_characters="\0")
keys = st.sampled_from([*KEYS, "a.b.c", ".", "", "seed.x"]) | st.text(letters, max_size=6)


def one_line(error: UserError) -> None:
    text = on_one_line(str(error))
    assert text.strip()
    assert len(text.splitlines()) == 1
    text.encode()  # can be printed


# ---------------------------------------------------------------- configs


@CASES
@given(st.dictionaries(keys, values, max_size=4))
def test_any_values_are_a_config_or_a_line(overrides):
    try:
        found = load(None, overrides, Config)
    except UserError as error:
        one_line(error)
        return
    assert parse(found.model_dump(), "", Config) == found
    assert len(found.fingerprint()) == 64


toml_lines = st.builds(
    "{} = {}".format,
    st.sampled_from([key for key in KEYS if "." not in key]) | st.text("abcd.\"' ", max_size=5),
    scalars.map(repr) | st.sampled_from(["true", "[1, 2]", "[]", "{}", "1979-05-27", '"""', "[["]),
)
toml = st.lists(
    toml_lines
    | st.sampled_from(["[sweep]", "[train]", "[train]", "[a.b]", "[[updates]]", "[", "# x", "="]),
    max_size=5,
).map("\n".join)


@CASES
@given(toml.map(str.encode) | st.text().map(lambda text: text.encode("utf-8")) | st.binary())
def test_any_file_is_a_config_or_a_line(tmp_path, content):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    try:
        load(path, None, Config)
    except UserError as error:
        one_line(error)
        assert str(path) in str(error)  # noqa: PT017
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_names_that_no_file_has_and_toml_too_deep_are_a_line(tmp_path):
    path = tmp_path / "deep.toml"
    path.write_text("seed = " + "[" * 100_000)
    for name in ("a\0b", "\ud800", "", ".", "x" * 300, path):
        with pytest.raises(UserError) as caught:
            load(name, None, Config)
        one_line(caught.value)


# ---------------------------------------------------------------- flags


# no argument of a process can hold a null character
words = st.text(letters, max_size=8) | st.sampled_from(
    ["none.toml", ".", "/dev/null", "/proc/self/mem", "a/../b", "x" * 300, "-", "--", "\udc80"]
)
number_words = numbers.map(str) | words
flags = st.one_of(
    *(
        st.tuples(st.just(f"--{name}"), number_words)
        for name in ("depth", "runs", "seed", "run", "devices", "checkpoint-every")
    ),
    *(st.tuples(st.just(f"--{name}"), words) for name in ("config", "dataset", "data-dir")),
    st.tuples(st.just("--update"), st.sampled_from(list(UPDATES)) | words),
    st.tuples(st.just("--set"), st.builds("{}={}".format, keys, numbers | words) | words),
    st.tuples(words, words),
    st.sampled_from([("--fresh",), ("--json",), ("--quiet",)]),
)


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    def accept(*_: object, **__: object) -> None:
        raise SystemExit(0)  # all options are in order: the data would be read next

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unitnorm.run.devices.prepare", lambda *_, **__: None)
    monkeypatch.setattr("unitnorm.data.load_dataset", accept)
    return tmp_path


def invoke(line: list[str]) -> int:
    done = CliRunner().invoke(main, line)
    unexpected = done.exception is not None and not isinstance(done.exception, SystemExit)
    assert not unexpected, (line, done.exc_info)
    assert done.exit_code in (0, 2), (line, done.output)
    assert "Traceback" not in done.output
    if done.exit_code == 2:
        lines = done.stderr.removesuffix("\n").split("\n")
        # click's own refusals have two lines of usage in front
        assert len(lines) == 1 or lines[0].startswith("Usage: "), (line, done.stderr)
        assert re.search("^error: ", done.stderr, re.M | re.I), (line, done.stderr)
    return done.exit_code


@CASES
@given(
    st.sampled_from(["sweep", "train", "reproduce", "report", "verify"]),
    st.lists(flags, max_size=4),
    st.none() | words,
)
def test_any_flags_are_accepted_or_refused_in_a_line(in_empty_folder, command, more, out):
    line = [command, *(word for flag in more for word in flag)]
    if out is not None and not out.startswith("/"):  # what is refused must write nothing anywhere
        line += ["--out", out]
    invoke(line)
    assert not list(in_empty_folder.iterdir()), line


@pytest.mark.usefixtures("in_empty_folder")
def test_good_flags_are_accepted():
    good = ["train", "--depth", "4", "--update", "un", "--runs", "3", "--set", "loss.batch_size=50"]
    assert invoke(good) == 0


# ---------------------------------------------------------------- data


NAMES = idx.FILES
rng = np.random.default_rng(0)


def noise(*shape: int) -> bytes:
    return idx_of(rng.integers(0, 3, shape))


GOOD = dict(zip(NAMES, (noise(12, 3, 4), noise(12), noise(6, 3, 4), noise(6)), strict=True))
SPOIL = {
    "kept": lambda content, at, byte: content,
    "cut": lambda content, at, byte: content[:at],
    "changed": lambda content, at, byte: content[:at] + byte + content[at + 1 :],
    "inserted": lambda content, at, byte: content[:at] + 3 * byte + content[at:],
    "longer": lambda content, at, byte: content + byte,
    "another": lambda content, at, byte: GOOD[NAMES[at % 4]],
}
spoilt = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.booleans(),
        st.sampled_from(sorted(SPOIL)),
        st.integers(0, 20) | st.integers(0, 170),
        st.binary(min_size=1, max_size=1),
    ),
    min_size=1,
    max_size=3,
)


@CASES
@given(spoilt)
def test_any_idx_files_are_sound_or_refused_in_a_line(tmp_path, faults):
    files, folder = dict(GOOD), tmp_path / "data"
    for name, packed, how, at, byte in faults:
        content = gzip.compress(files[name], mtime=0) if packed else files[name]
        files[name] = SPOIL[how](content, at, byte)
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        data = load_dataset(data_dir=folder)
    except UserError as error:
        one_line(error)
        assert any(name in str(error) for name in NAMES)  # noqa: PT017
    else:
        assert len(data.train_images) == len(data.train_labels) > 0
        assert set(data.test_labels) <= set(data.train_labels) == set(range(data.classes))
    assert list(tmp_path.iterdir()) == [folder]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize(
    "name", ["../escaped", "/etc", "..", "a/../../b", "~root/x", "*", "a\0b", "", "x" * 5000]
)
def test_names_of_data_sets_lead_nowhere_else(name, tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    before = {str(path) for path in tmp_path.rglob("*")}
    with pytest.raises(UserError) as caught:
        load_dataset(name, data_dir=tmp_path / "inner")
    one_line(caught.value)
    assert {str(path) for path in tmp_path.rglob("*")} == before
