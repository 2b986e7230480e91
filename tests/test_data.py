"""Data: the bundled MNIST, IDX files and their faults, prepared copies and theirs, TFDS by name."""

import fcntl
import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import unitnorm.data
from tests.idx import idx_bytes
from unitnorm.data import Dataset, arrays, cache, idx, load
from unitnorm.errors import UserError

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# Of the uncompressed files, as published with them.
MNIST_HASHES = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)


def small_set(train: int = 12, test: int = 6, classes: int = 3) -> dict[str, bytes]:
    """The four files of a small data set: images of 4 x 6 pixels."""
    random = np.random.default_rng(0)
    files = {}
    for images, labels, n in ((NAMES[0], NAMES[1], train), (NAMES[2], NAMES[3], test)):
        files[images] = idx_bytes(random.bytes(n * 24), shape=(n, 4, 6))
        files[labels] = idx_bytes(bytes(i % classes for i in range(n)), shape=(n,))
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))  # here
    monkeypatch.setenv("TMPDIR", str(folder))  # and in the processes that we start
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", small_set())


def assert_is_small_set(dataset: Dataset) -> None:
    files = small_set()
    for found, name in (
        (dataset.train_images, NAMES[0]),
        (dataset.train_labels, NAMES[1]),
        (dataset.test_images, NAMES[2]),
        (dataset.test_labels, NAMES[3]),
    ):
        header = 16 if "images" in name else 8
        assert found.astype(np.uint8).tobytes() == files[name][header:]


def run(code: str, *args: object) -> subprocess.Popen[str]:
    """A Python process of its own, in which warnings are errors."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LOAD = """
import sys
from unitnorm.data import load
print(load(data_dir=sys.argv[1], cache_dir=sys.argv[2]).sha256)
"""


# --- The bundled MNIST -------------------------------------------------------------------------


def test_bundled_files_are_mnist():
    folder = Path(unitnorm.data.__file__).parent / "mnist"
    for name, expected in zip(NAMES, MNIST_HASHES, strict=True):
        content = gzip.decompress((folder / f"{name}.gz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == expected


def test_mnist_loads_quickly_without_tensorflow_or_network_or_noise(tmp_path, temporary_folder):
    code = """
import socket, sys, time
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.getaddrinfo = socket.socket.connect = refuse
from unitnorm.data import load
d = load(cache_dir=sys.argv[1])
assert "tensorflow" not in sys.modules
assert d.train_images.shape == (60000, 784) and d.test_images.shape == (10000, 784)
assert d.image_shape == (28, 28) and d.classes == 10 and d.name == "mnist"
print(d.sha256, d.train_labels[:5].tolist(), int(d.train_images[0].sum()), time.process_time())
"""
    expected_hash = hashlib.sha256("".join(f"{h}\n" for h in MNIST_HASHES).encode()).hexdigest()
    # CPU seconds, as other processes may share the machine. Promised are 15 s and 2.5 s; reading
    # with TFDS's own decoder would take more than 4.
    for limit in (15, 4):
        out, err = (process := run(code, tmp_path / "cache")).communicate()
        assert (process.returncode, err) == (0, "")
        sha256, *facts, seconds = out.split()
        assert sha256 == expected_hash
        assert facts == ["[5,", "0,", "4,", "1,", "9]", "27525"]
        assert float(seconds) < limit
    copy_in(tmp_path / "cache")
    assert not list(temporary_folder.iterdir())


def test_bundled_file_that_is_not_mnist_is_named(tmp_path, monkeypatch):
    # Well formed, but not the data that we promise.
    write(tmp_path / "mnist", {f"{n}.gz": gzip.compress(c) for n, c in small_set().items()})
    monkeypatch.setattr(unitnorm.data, "_MNIST", tmp_path / "mnist")
    with pytest.raises(UserError, match=r"train-images.*ba891046.*found.*install unitnorm again"):
        load(cache_dir=tmp_path / "cache")
    (tmp_path / "mnist" / f"{NAMES[3]}.gz").unlink()
    with pytest.raises(UserError, match=r"t10k-labels.*install unitnorm again"):
        load(cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# --- IDX files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_own_idx_files(tmp_path, packed):
    files = small_set()
    on_disk = {f"{n}.gz": gzip.compress(c) for n, c in files.items()} if packed else files
    dataset = load(data_dir=write(tmp_path / "mine", on_disk), cache_dir=tmp_path / "cache")
    assert_is_small_set(dataset)
    assert dataset.name == "mine"
    assert dataset.image_shape == (4, 6)
    assert dataset.classes == 3
    assert dataset.train_images.shape == (12, 24)
    assert dataset.test_images.shape == (6, 24)
    assert dataset.train_images.dtype == np.uint8
    assert dataset.train_images.flags.c_contiguous
    assert dataset.train_labels.dtype == np.int32
    assert dataset.train_labels.shape == (12,)
    # What `sha256sum FILES | cut -c-64 | sha256sum` gives, packed or not.
    lines = "".join(f"{hashlib.sha256(files[name]).hexdigest()}\n" for name in NAMES)
    assert dataset.sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_name_of_own_idx_files(source, tmp_path):
    assert load("shapes", data_dir=source, cache_dir=tmp_path / "cache").name == "shapes"


def test_256_classes(tmp_path):
    folder = write(tmp_path / "source", small_set(train=256, classes=256))
    dataset = load(data_dir=folder, cache_dir=tmp_path / "cache")
    assert dataset.classes == 256
    assert dataset.train_labels.max() == 255


IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = small_set().values()
FAULTS = {
    "empty": (NAMES[0], b"", r"expected an IDX header of 16 bytes, found 0 bytes"),
    "header cut": (NAMES[0], IMAGES[:10], r"expected an IDX header of 16 bytes, found 10 bytes"),
    "truncated": (NAMES[0], IMAGES[:-1], r"expected 288 bytes .* 12 x 4 x 6, found only 287"),
    "too long": (NAMES[0], IMAGES + b"x", r"expected 288 bytes .*, found more"),
    "labels for images": (NAMES[0], LABELS, r"magic number 2051, found 2049 .*, a labels file"),
    "images for labels": (NAMES[3], IMAGES, r"magic number 2049, found 2051 .*, an images file"),
    "signed bytes": (NAMES[0], b"\0\0\x09\x03" + IMAGES[4:], r"2051, found 2307 \(bytes 00 00 09"),
    "other format": (NAMES[0], b"PK\x03\x04" + IMAGES[4:], r"found 1347093252"),
    "header lies": (
        NAMES[0],
        idx_bytes(IMAGES[16:], shape=(60000, 28, 28)),
        r"expected 47040000 bytes .*, found only 288",
    ),
    "header lies without measure": (
        NAMES[0],
        idx_bytes(IMAGES[16:], shape=(2**32 - 1,) * 3),
        r"expected at most 1073741824 values, found a header that announces 4294967295 x",
    ),
    "no images": (NAMES[0], idx_bytes(shape=(0, 4, 6)), r"expected at least one image"),
    "no pixels": (NAMES[0], idx_bytes(shape=(12, 0, 6)), r"expected at least one image"),
    "label missing": (
        NAMES[1],
        idx_bytes(LABELS[8:-1], shape=(11,)),
        r"expected 12 labels.*found 11",
    ),
    "test label missing": (
        NAMES[3],
        idx_bytes(TEST_LABELS[8:-1], shape=(5,)),
        r"expected 6 labels.*found 5",
    ),
    "other image size": (
        NAMES[2],
        idx_bytes(TEST_IMAGES[16:], shape=(6, 6, 4)),
        r"expected images of 4 x 6 pixels .*, found 6 x 4",
    ),
    "one class too many": (
        NAMES[3],
        idx_bytes(TEST_LABELS[8:-1], b"\x03", shape=(6,)),
        r"expected labels 0 to 2, .* found 3 at position 5",
    ),
    "one class": (NAMES[1], idx_bytes(bytes(12), shape=(12,)), r"2 to 256 classes, found 1"),
    "gzip damaged": (
        NAMES[0],
        gzip.compress(IMAGES)[:-8] + bytes(8),
        r"expected a whole gzip file, found a damaged one \(CRC check failed",
    ),
    "gzip truncated": (NAMES[0], gzip.compress(IMAGES)[:-20], r"found a damaged one"),
    "gzip of nonsense": (NAMES[0], b"\x1f\x8b\x08\x00" + bytes(40), r"found a damaged one"),
    "gzip bomb": (
        NAMES[0],
        gzip.compress(IMAGES + bytes(10**8)),
        r"expected 288 bytes .*, found more",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_expected_and_found(fault, source, tmp_path):
    name, content, message = FAULTS[fault]
    (source / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        load(data_dir=source, cache_dir=tmp_path / "cache")
    assert str(source / name) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "cache").exists()  # nothing is written on refusal


@pytest.mark.parametrize("name", NAMES)
def test_missing_file(name, source, tmp_path):
    (source / name).unlink()
    with pytest.raises(UserError, match=f"expected the file {name} or {name}.gz, found neither"):
        load(data_dir=source, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("folder", ["missing", "a\0b", "~nobody-of-this-name/x", "x" * 5000])
def test_missing_folder(folder, tmp_path):
    with pytest.raises(UserError, match=r"folder|null character"):
        load(data_dir=folder, cache_dir=tmp_path / "cache")


def test_folder_in_place_of_a_file(source, tmp_path):
    (source / NAMES[0]).unlink()
    (source / NAMES[0]).mkdir()
    with pytest.raises(UserError, match=f"expected the file {NAMES[0]}"):
        load(data_dir=source, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    "content",
    [
        idx_bytes(b"x", shape=(2**10, 2**10, 2**10)),  # announces 1 GB
        gzip.compress(idx_bytes(bytes(10**8), shape=(1, 1, 1))),  # unpacks to 100 MB
    ],
    ids=["lying header", "gzip bomb"],
)
def test_no_more_memory_than_the_file_deserves(content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            idx.read(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_parse_gives_the_values_in_order():
    stream = io.BytesIO(idx_bytes(bytes(range(12)), shape=(2, 3, 2)))
    parsed = idx.parse(stream, 3, "stream")
    assert parsed.tolist() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]


@given(
    start=st.sampled_from(
        [b"", IMAGES[:4], IMAGES[:16], IMAGES, b"\x1f\x8b", gzip.compress(IMAGES)]
    ),
    cut=st.integers(0, 400),
    rest=st.binary(max_size=40),
)
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_read_whole_or_refused(start, cut, rest, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(start[:cut] + rest)
    found, message = None, ""
    try:
        found = idx.read(path, 3)
    except UserError as error:
        message = str(error)
    if found is None:
        assert str(path) in message
        assert "\n" not in message
    else:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        assert idx_bytes(found.tobytes(), shape=found.shape) == content


# --- Prepared copies ---------------------------------------------------------------------------


def copy_in(folder: Path) -> Path:
    (copy,) = folder.iterdir()  # and nothing beside it
    return copy


def test_second_load_takes_the_copy(source, tmp_path, monkeypatch):
    first = load(data_dir=source, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(idx, "read", lambda *_: pytest.fail("the source was read again"))
    second = load(data_dir=source, cache_dir=tmp_path / "cache")
    assert_is_small_set(second)
    assert (second.sha256, second.classes, second.image_shape) == (
        first.sha256,
        first.classes,
        first.image_shape,
    )


def test_changed_source_is_prepared_anew(source, tmp_path):
    first = load(data_dir=source, cache_dir=tmp_path / "cache")
    pixels = bytearray(IMAGES)
    pixels[-1] ^= 1
    (source / NAMES[0]).write_bytes(pixels)
    second = load(data_dir=source, cache_dir=tmp_path / "cache")
    assert second.train_images[-1, -1] == first.train_images[-1, -1] ^ 1
    assert second.sha256 != first.sha256


def alter_classes(copy: Path) -> None:
    (path,) = copy.rglob("features.json")
    text = path.read_text()
    assert '"numClasses": "3"' in text
    path.write_text(text.replace('"numClasses": "3"', '"numClasses": "4"'))


def swap_splits(copy: Path) -> None:
    """Sound files with the wrong content, which only the hashes can tell."""
    (path,) = copy.rglob("dataset_info.json")
    text = path.read_text()
    assert text.count('"12"') == 1
    path.write_text(text.replace('"12"', '"11"'))


def truncate(copy: Path) -> None:
    (path,) = copy.rglob("*train.array_record*")
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(copy: Path) -> None:
    (path,) = copy.rglob("*train.array_record*")
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # within the first chunk of values; much of the rest is padding
    path.write_bytes(content)


def remove_records(copy: Path) -> None:
    next(copy.rglob("*test.array_record*")).unlink()


def remove_hashes(copy: Path) -> None:
    next(copy.rglob("metadata.json")).unlink()


def empty(copy: Path) -> None:
    for path in copy.rglob("*.*"):
        if path.is_file():
            path.unlink()


def file_in_its_place(copy: Path) -> None:
    copy.rename(copy.with_name("moved"))
    copy.write_bytes(b"")
    cache._remove(copy.with_name("moved"))


@pytest.mark.parametrize(
    "damage",
    [
        alter_classes,
        swap_splits,
        truncate,
        flip_bit,
        remove_records,
        remove_hashes,
        empty,
        file_in_its_place,
    ],
)
def test_damaged_copy_is_prepared_again_and_said_so(damage, source, tmp_path, caplog):
    folder = tmp_path / "cache"
    load(data_dir=source, cache_dir=folder)
    damage(copy_in(folder))
    dataset = load(data_dir=source, cache_dir=folder)
    assert_is_small_set(dataset)
    assert dataset.classes == 3
    (record,) = caplog.records
    assert "damaged and is prepared again" in record.getMessage()
    caplog.clear()
    assert_is_small_set(load(data_dir=source, cache_dir=folder))
    assert not caplog.records
    copy_in(folder)


def test_altered_mnist_copy_cannot_vouch_for_itself(tmp_path):
    """Where the hashes are known beforehand, those that a copy carries do not count."""
    made = arrays.Arrays(
        *(np.zeros((3, 2, 2), np.uint8), np.array([0, 1, 1], np.uint8)) * 2, classes=2
    )
    cache.fetch("name", lambda: made, tmp_path)
    with pytest.raises(cache.DamagedCopyError, match="not those that were prepared"):
        cache._read(tmp_path / "name", MNIST_HASHES)


@pytest.mark.parametrize("moment", ["writing", "reading back"])
def test_killed_preparation_is_never_taken(moment, source, tmp_path):
    folder = tmp_path / "cache"
    kill = {
        "writing": "builder.ImageClasses._generate_examples = die",
        "reading back": "builder.read = die",
    }[moment]
    code = f"""
import os, signal
from unitnorm.data import builder
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
{kill}
{LOAD}
"""
    process = run(code, source, folder)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert copy_in(folder).name.startswith(".preparing-")  # it was killed half-way
    assert_is_small_set(load(data_dir=source, cache_dir=folder))
    assert not copy_in(folder).name.startswith(".")  # and cleared away


def test_two_processes_on_an_empty_cache(source, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    # Holding the lock ourselves until both wait makes sure that they meet.
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    processes = [run(LOAD, source, folder) for _ in range(2)]
    lines = [process.stderr.readline() for process in processes]
    assert all("waiting for another process" in line for line in lines)
    assert not list(folder.iterdir())
    os.close(lock)
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert results[0][0] == results[1][0] != ""
    assert not copy_in(folder).name.startswith(".")


def test_unusable_cache_means_a_temporary_folder(source, tmp_path, caplog, temporary_folder):
    (tmp_path / "file").write_bytes(b"")
    assert_is_small_set(load(data_dir=source, cache_dir=tmp_path / "file" / "cache"))
    (record,) = caplog.records
    assert "Not a directory" in record.getMessage()
    assert "UNITNORM_CACHE" in record.getMessage()
    assert not list(temporary_folder.iterdir())


def test_no_home_folder(source, caplog, monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("UNITNORM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert_is_small_set(load(data_dir=source))
    assert "there is no home folder" in caplog.text


def test_full_disk(source, tmp_path, temporary_folder):
    """A limit on file sizes stands in for a full disk: array_record fails to write alike."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
        + f"""
from unitnorm.errors import UserError
try:
    {LOAD.strip().replace(chr(10), chr(10) + "    ")}
except UserError as error:
    print(error)
"""
    )
    process = run(code, source, tmp_path / "cache")
    out, err = process.communicate()
    assert "the data cache cannot be used (cannot write to" in err
    assert err.count("\n") == 1
    assert "neither in the cache nor in a temporary folder" in out
    assert "make room" in out
    assert out.count("\n") == 1
    assert not list((tmp_path / "cache").iterdir())
    assert not list(temporary_folder.iterdir())


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"UNITNORM_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/unitnorm"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/unitnorm"),
        ({"UNITNORM_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/unitnorm"),
        ({}, "/home/me/.cache/unitnorm"),
    ],
)
def test_place_of_the_cache(env, expected, monkeypatch):
    for name in ("UNITNORM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cache.default_folder() == Path(expected)


def test_import_is_light():
    code = "import sys, unitnorm.data; print('tensorflow_datasets' in sys.modules)"
    assert run(code).communicate() == ("False\n", "")


# --- Data sets prepared by TFDS ----------------------------------------------------------------


def prepare_tfds(root: Path, version: str = "1.0.0", **changes) -> None:
    """Prepares `shapes` under `root` with TFDS: PNG images of 5 x 4, 3 classes, and an extra."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(5, 4, 1)),
        "label": tfds.features.ClassLabel(num_classes=3),
        "id": tfds.features.Text(),
    } | changes.get("features", {})
    splits = changes.get("splits", {"train": 7, "test": 4})
    label = changes.get("label", lambda i: i % 3)

    class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({k: v for k, v in features.items() if v}),
                disable_shuffling=True,
            )

        def _split_generators(self, _):
            return {split: self._generate_examples(split, n) for split, n in splits.items()}

        def _generate_examples(self, split, n):
            for i in range(n):
                # As PNG: TFDS would pack an array with tensorflow.
                png = io.BytesIO()
                PIL.Image.fromarray(tfds_image(split, i)).save(png, "png")
                png.seek(0)
                example = {"image": png, "label": label(i), "id": f"{split} {i}"}
                yield i, {key: value for key, value in example.items() if features[key]}

    file_format = changes.get("file_format", "array_record")
    Shapes(data_dir=root, file_format=file_format).download_and_prepare()


def tfds_image(split: str, i: int) -> np.ndarray:
    return np.arange(20, dtype=np.uint8).reshape(5, 4) + i * 20 + (100 if split == "test" else 0)


@pytest.mark.parametrize("by", ["name", "version", "path", "data_dir"])
def test_prepared_data_set(by, tmp_path, monkeypatch):
    root = tmp_path / "prepared"
    prepare_tfds(root)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path if by == "data_dir" else root))
    name = {"version": "shapes:1.0.0", "path": str(root / "shapes" / "1.0.0")}.get(by, "shapes")
    dataset = load(name, data_dir=root if by == "data_dir" else None, cache_dir=tmp_path / "cache")
    assert dataset.name == name
    assert dataset.image_shape == (5, 4)
    assert dataset.classes == 3
    assert dataset.train_labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    for split, images in (("train", dataset.train_images), ("test", dataset.test_images)):
        expected = [tfds_image(split, i).ravel().tolist() for i in range(len(images))]
        assert images.tolist() == expected
    assert (len(dataset.train_images), len(dataset.test_images)) == (7, 4)


def test_highest_version_is_taken_and_unfinished_ones_are_not(tmp_path):
    prepare_tfds(tmp_path, "9.0.0", splits={"train": 5, "test": 4})
    prepare_tfds(tmp_path, "10.0.0")
    folder = tmp_path / "shapes"
    cache_dir = tmp_path / "cache"
    (folder / "9.0.0").rename(tmp_path / "9.0.0")
    (folder / "10.0.0").rename(folder / "incomplete.ABC_10.0.0")
    with pytest.raises(UserError, match="found none"):
        load("shapes", data_dir=tmp_path, cache_dir=cache_dir)
    (tmp_path / "9.0.0").rename(folder / "9.0.0")
    assert len(load("shapes", data_dir=tmp_path, cache_dir=cache_dir).train_labels) == 5
    (folder / "incomplete.ABC_10.0.0").rename(folder / "10.0.0")
    assert len(load("shapes", data_dir=tmp_path, cache_dir=cache_dir).train_labels) == 7


def test_configuration_must_be_clear(tmp_path):
    prepare_tfds(tmp_path / "made")
    made = tmp_path / "made" / "shapes"
    (tmp_path / "shapes").mkdir()
    made.rename(tmp_path / "shapes" / "small")
    dataset = load("shapes", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert len(dataset.train_labels) == 7
    prepare_tfds(tmp_path / "made")
    made.rename(tmp_path / "shapes" / "large")
    with pytest.raises(UserError, match="expected one configuration, found large, small"):
        load("shapes", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    named = load("shapes/small", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert named.sha256 == dataset.sha256


def unfit() -> dict[str, tuple[dict, str]]:
    import tensorflow_datasets as tfds

    scalar = tfds.features.Scalar(np.int64)
    return {
        "no label": ({"features": {"label": None}}, "expected the features image and label"),
        "no test": ({"splits": {"train": 7}}, "found no test"),
        "text label": ({"features": {"label": tfds.features.Text()}, "label": str}, "one integer"),
        "unlabelled": ({"features": {"label": scalar}, "label": lambda _: -1}, "found -1 to -1"),
        "257 classes": (
            {"features": {"label": tfds.features.ClassLabel(num_classes=257)}},
            "expected 2 to 256 classes, found 257",
        ),
        "label 256": (
            {"features": {"label": scalar}, "label": lambda i: 250 + i},
            "expected labels 0 to 255, found 250 to 256",
        ),
        "sizes differ": (
            {"features": {"image": tfds.features.Image(shape=(None, None, 1))}},
            "of one shape",
        ),
    }


@pytest.mark.parametrize(
    "fault",
    ["no label", "no test", "text label", "unlabelled", "257 classes", "label 256", "sizes differ"],
)
def test_unfit_prepared_data_set(fault, tmp_path):
    changes, message = unfit()[fault]
    prepare_tfds(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as raised:
        load("shapes", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert str(tmp_path / "shapes") in str(raised.value)
    assert not (tmp_path / "cache").exists()


def test_damaged_prepared_data_set(tmp_path):
    prepare_tfds(tmp_path)
    truncate(tmp_path / "shapes" / "1.0.0")
    with pytest.raises(UserError, match=r"cannot be read .*prepare it again"):
        load("shapes", data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_prepared_as_tfrecord(tmp_path):
    prepare_tfds(tmp_path)
    info = tmp_path / "shapes" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="expected the file format array_record, found tfrecord"):
        load("shapes", data_dir=tmp_path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["nothing-here", "", "a\0b", "x" * 5000, "*"])
def test_unknown_name(name, tmp_path):
    with pytest.raises(UserError, match=r"expected|too long"):
        load(name, data_dir=tmp_path, cache_dir=tmp_path / "cache")
