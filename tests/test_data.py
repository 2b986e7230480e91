"""Data: the bundled MNIST, IDX files and their faults, TFDS by name."""

import gzip
import hashlib
import io
import os
import shutil
import tracemalloc
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

import unitnorm.data
from tests.common import a_line, python
from tests.idx import idx_bytes, idx_of
from unitnorm.data import idx, load_dataset
from unitnorm.errors import UserError

NAMES = idx.FILES
# Of the uncompressed files, as published with them.
MNIST_HASHES = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)


PARTS = ("train", "test")


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # names of cases must not hold the time


IMAGES, TEST_IMAGES = (
    idx_bytes(np.random.default_rng(n).bytes(n * 24), shape=(n, 4, 6)) for n in (12, 6)
)
LABELS, TEST_LABELS = (idx_bytes(bytes([0, 1, 2] * (n // 3)), shape=(n,)) for n in (12, 6))
SMALL = dict(zip(NAMES, (IMAGES, LABELS, TEST_IMAGES, TEST_LABELS), strict=True))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def sha256_of(*hashes: str) -> str:
    """What `sha256sum FILES | cut -c-64 | sha256sum` gives."""
    return hashlib.sha256("".join(f"{part}\n" for part in hashes).encode()).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", SMALL)


# --- The bundled MNIST -------------------------------------------------------------------------


def test_the_devices_of_a_cpu_share_the_images():
    images = load_dataset().train_images
    assert not images.flags.writeable
    mesh = jax.sharding.Mesh(np.asarray(jax.devices("cpu")), ("run",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shards = jax.device_put(images, everywhere).addressable_shards
    assert len(shards) > 1
    assert {shard.data.unsafe_buffer_pointer() for shard in shards} == {images.ctypes.data}


def test_mnist_needs_neither_tfds_nor_network_nor_a_place_to_write(tmp_path):
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.getaddrinfo = socket.socket.connect = refuse
from unitnorm.data import load_dataset
d = load_dataset()
assert "tensorflow_datasets" not in sys.modules
assert d.train_images.shape == (60000, 784) and d.test_images.shape == (10000, 784)
print(d.describe())
print(d.sha256, d.train_labels[:5].tolist(), int(d.train_images[0].sum()))
"""
    done = python(code, HOME=tmp_path, TMPDIR=tmp_path, PYTHONWARNINGS="error")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "mnist: 60,000 + 10,000 images, 28×28, 10 classes",
        f"{sha256_of(*MNIST_HASHES)} [5, 0, 4, 1, 9] 27525",
    ]
    assert not list(tmp_path.iterdir())


def test_bundled_files_that_are_not_mnist_are_refused(tmp_path, monkeypatch):
    # Well formed, but not the data that we promise.
    write(tmp_path / "mnist", {f"{n}.gz": packed(c) for n, c in SMALL.items()})
    monkeypatch.setattr(unitnorm.data, "_MNIST", tmp_path / "mnist")
    with pytest.raises(UserError, match=r"expected MNIST, found other.*install unitnorm again"):
        load_dataset()
    (tmp_path / "mnist" / f"{NAMES[3]}.gz").unlink()
    with pytest.raises(UserError, match=r"t10k-labels.*install unitnorm again"):
        load_dataset()


# --- IDX files ---------------------------------------------------------------------------------

HALF = len(IMAGES) // 2
FORMS = {
    "dots": (lambda name: name.replace("-idx", ".idx"), bytes),
    "members": (lambda name: f"{name}.gz", lambda c: packed(c[:HALF]) + packed(c[HALF:])),
    "padded": (lambda name: f"{name}.GZ", lambda c: packed(c) + bytes(512)),
    "emnist": (lambda name: f"emnist-balanced-{name.replace('t10k', 'test')}.gz", packed),
}


@pytest.mark.parametrize("form", FORMS)
def test_own_idx_files(form, tmp_path):
    rename, pack = FORMS[form]
    on_disk = {rename(name): pack(content) for name, content in SMALL.items()}
    dataset = load_dataset(data_dir=write(tmp_path / "mine", on_disk))
    found = [vars(dataset)[f"{part}_{kind}"] for part in PARTS for kind in ("images", "labels")]
    for array, name in zip(found, NAMES, strict=True):
        header = 16 if "images" in name else 8
        assert array.astype(np.uint8).tobytes() == SMALL[name][header:]
    assert [array.dtype for array in found] == [np.uint8, np.int32, np.uint8, np.int32]
    assert dataset.train_images.flags.c_contiguous
    assert dataset.describe() == "mine: 12 + 6 images, 4×6, 3 classes"
    assert dataset.sha256 == sha256_of(*(hashlib.sha256(c).hexdigest() for c in SMALL.values()))
    assert load_dataset("shapes", data_dir=tmp_path / "mine").name == "shapes"


def test_images_in_colour_have_four_dimensions(source):
    for name, count in ((NAMES[0], 12), (NAMES[2], 6)):
        (source / name).unlink()
        images = np.arange(count * 24, dtype=np.uint32).reshape(count, 2, 4, 3) % 256
        (source / name.replace("idx3", "idx4")).write_bytes(idx_of(images))
    dataset = load_dataset(data_dir=source)
    assert dataset.image_shape == (2, 4, 3)
    assert dataset.train_images[1].tolist() == [*range(24, 48)]


def test_two_files_of_one_part_must_be_copies(source):
    (source / f"{NAMES[1]}.gz").write_bytes(packed(LABELS))
    assert load_dataset(data_dir=source).train_labels.tolist() == [*LABELS[8:]]
    other = LABELS[:8] + LABELS[:7:-1]
    (source / f"{NAMES[1]}.gz").write_bytes(packed(other))
    with pytest.raises(UserError, match=rf"{NAMES[1]}\.gz: expected the data of {NAMES[1]}.*keep"):
        load_dataset(data_dir=source)


FAULTS = {  # the file, what it holds, what is said of it
    "header cut": (0, IMAGES[:10], r"expected an IDX header of 16 bytes, found 10 bytes"),
    "truncated": (0, IMAGES[:-1], r"expected 288 bytes .* 12 x 4 x 6, found only 287"),
    "too long": (0, IMAGES + b"x", r"expected 288 bytes .*, found more"),
    "labels": (0, LABELS, r"magic number 2051, found 2049 .*, a labels file"),
    "signed bytes": (0, b"\0\0\x09\x03" + IMAGES[4:], r"2051, found 2307 \(bytes 00 00 09"),
    "web page": (0, b"\n<!DOCTYPE html><html>", r"found a web page; download"),
    "zip": (0, b"PK\x03\x04" + IMAGES[4:], r"found a zip archive; unpack it"),
    "git lfs": (0, b"version https://git-lfs.github.com/spec/v1\n", r"found a pointer of Git LFS"),
    "header lies without measure": (
        0, idx_bytes(IMAGES[16:], shape=(2**32 - 1,) * 3),
        r"expected at most 1073741824 values, found a header that announces 4294967295 x",
    ),
    "no pixels": (0, idx_bytes(shape=(12, 0, 6)), r"expected at least one image"),
    "label missing": (1, idx_bytes(LABELS[8:-1], shape=(11,)), r"expected 12 labels.*found 11"),
    "other image size": (
        2, idx_bytes(TEST_IMAGES[16:], shape=(6, 6, 4)), r"images of 4×6 pixels .*, found 6×4",
    ),
    "new class in test": (
        3, idx_bytes(TEST_LABELS[8:-1], b"\x03", shape=(6,)),
        r"expected labels 0 to 2, .* found 3 at position 5",
    ),
    "stray label": (
        1, idx_bytes(LABELS[8:-1], b"\xff", shape=(12,)),
        r"highest label, 255, which stands 1 times, first at position 11, found none of class 3",
    ),
    "one class": (1, idx_bytes(bytes(12), shape=(12,)), r"2 to 256 classes, found 1"),
    "gzip damaged": (0, packed(IMAGES)[:-8] + bytes(8), r"a damaged one \(CRC check"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_expected_and_found(fault, source):
    number, content, message = FAULTS[fault]
    (source / NAMES[number]).write_bytes(content)
    with a_line(message) as raised:
        load_dataset(data_dir=source)
    assert str(source / NAMES[number]) in str(raised.value)


@pytest.mark.parametrize("name", NAMES)
def test_missing_file(name, source):
    (source / name).unlink()
    (source / name).mkdir()
    with pytest.raises(UserError, match=f"expected the file {name} or {name}.gz, found neither"):
        load_dataset(data_dir=source)


@pytest.mark.parametrize("folder", ["missing", "a\0b", "~nobody-of-this-name/x", "x" * 5000])
def test_missing_folder(folder):
    with pytest.raises(UserError, match=r"folder|null character"):
        load_dataset(data_dir=folder)


@pytest.mark.parametrize(
    "content",
    [
        idx_bytes(b"x", shape=(2**10, 2**10, 2**10)),  # announces 1 GB
        packed(idx_bytes(bytes(10**8), shape=(1, 1, 1))),  # unpacks to 100 MB
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


# --- Data sets prepared by TFDS ----------------------------------------------------------------


def tfds_image(split: str, i: int) -> np.ndarray:
    return np.arange(20, dtype=np.uint8).reshape(5, 4) + i * 20 + (100 if split == "test" else 0)


def as_png(array: np.ndarray) -> io.BytesIO:
    """TFDS would pack an array with tensorflow."""
    PIL.Image.fromarray(array).save(png := io.BytesIO(), "png")
    png.seek(0)
    return png


def make_builder(version: str = "1.0.0", **changes) -> type:
    """A builder `shapes`: PNG images of 5 × 4, 3 classes, and an extra feature."""
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
        url_infos = None

        def _info(self):
            kept = tfds.features.FeaturesDict({k: v for k, v in features.items() if v})
            return tfds.core.DatasetInfo(builder=self, features=kept, disable_shuffling=True)

        def _split_generators(self, downloads):
            return {split: self._generate_examples(split, n) for split, n in splits.items()}

        def _generate_examples(self, split, n):
            for i in range(n):
                example = {"image": as_png(tfds_image(split, i)), "label": label(i), "id": f"{i}"}
                yield i, {key: value for key, value in example.items() if features[key]}

    return Shapes


def prepare_tfds(root: Path, version: str = "1.0.0", **changes) -> None:
    builder = make_builder(version, **changes)(data_dir=root, file_format="array_record")
    builder.download_and_prepare()


def test_prepared_data_set(tmp_path, monkeypatch):
    root = tmp_path / "prepared"
    prepare_tfds(root)
    for name, given, elsewhere in (
        ("shapes", None, root), ("shapes:1.0.0", None, root),
        (str(root / "shapes" / "1.0.0"), None, root), ("shapes", root, tmp_path),
    ):  # fmt: skip
        monkeypatch.setenv("TFDS_DATA_DIR", str(elsewhere))
        dataset = load_dataset(name, data_dir=given)
        assert dataset.describe() == f"{name}: 7 + 4 images, 5×4, 3 classes"
    assert dataset.train_labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    for split, images in (("train", dataset.train_images), ("test", dataset.test_images)):
        expected = [tfds_image(split, i).ravel().tolist() for i in range(len(images))]
        assert images.tolist() == expected


def test_highest_version_is_taken_and_unfinished_ones_are_not(tmp_path):
    prepare_tfds(tmp_path, "9.0.0", splits={"train": 5, "test": 4})
    prepare_tfds(tmp_path, "10.0.0")
    highest = tmp_path / "shapes" / "10.0.0"
    assert len(load_dataset("shapes", data_dir=tmp_path).train_labels) == 7
    highest.rename(highest.with_name("incomplete.ABC_10.0.0"))
    assert len(load_dataset("shapes", data_dir=tmp_path).train_labels) == 5
    shutil.rmtree(highest.with_name("9.0.0"))
    with pytest.raises(UserError, match="found none"):
        load_dataset("shapes", data_dir=tmp_path)


def test_configuration_must_be_clear(tmp_path):
    prepare_tfds(tmp_path / "once")
    for name in ("small", "large"):
        shutil.copytree(tmp_path / "once" / "shapes", tmp_path / "shapes" / name)
        assert len(load_dataset(f"shapes/{name}", data_dir=tmp_path).train_labels) == 7
    with pytest.raises(UserError, match="expected one configuration, found large, small"):
        load_dataset("shapes", data_dir=tmp_path)


UNFIT = {
    "no label": (lambda f: {"features": {"label": None}}, "expected the features image and label"),
    "no test": (lambda f: {"splits": {"train": 7}}, "found no test"),
    "text": (lambda f: {"features": {"label": f.Text()}, "label": str}, "one integer"),
    "unlabelled": (
        lambda f: {"features": {"label": f.Scalar(np.int64)}, "label": lambda _: -1},
        r"expected labels 0 to 255, found \[-1\]",
    ),
    "sizes differ": (
        lambda f: {"features": {"image": f.Image(shape=(None, None, 1))}}, "of one shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNFIT)
def test_unfit_prepared_data_set(fault, tmp_path):
    import tensorflow_datasets as tfds

    changes, message = UNFIT[fault]
    prepare_tfds(tmp_path, **changes(tfds.features))
    with pytest.raises(UserError, match=message) as raised:
        load_dataset("shapes", data_dir=tmp_path)
    assert str(tmp_path / "shapes") in str(raised.value)


def test_damaged_or_otherwise_prepared_data_set(tmp_path):
    prepare_tfds(tmp_path)
    (path,) = tmp_path.rglob("*train.array_record*")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"cannot be read .*prepare it again"):
        load_dataset("shapes", data_dir=tmp_path)
    info = tmp_path / "shapes" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="expected the file format array_record, found tfrecord"):
        load_dataset("shapes", data_dir=tmp_path)


# --- Data sets that TFDS downloads and prepares ------------------------------------------------


@pytest.fixture(scope="module")
def catalogue():
    """A builder that TFDS knows, as `known_shapes`."""

    class KnownShapes(make_builder()):
        pass

    return KnownShapes


def test_what_tfds_knows_is_prepared_once(catalogue, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    first = load_dataset("known_shapes")
    assert first.train_images[4].tolist() == tfds_image("train", 4).ravel().tolist()
    (record,) = caplog.records
    assert f"TFDS downloads and prepares it in {tmp_path / 'sets'}" in record.getMessage()
    assert load_dataset("known_shapes").sha256 == first.sha256
    assert len(caplog.records) == 1
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("obstacle", ["no route to host", "it needs the module tensorflow", "404"])
def test_what_cannot_be_prepared_here_says_where_it_can(obstacle, catalogue, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise faults[obstacle]

    faults = {
        "no route to host": urllib.error.URLError("no route to host"), "404": RuntimeError("404"),
        "it needs the module tensorflow": ImportError("", name="tensorflow"),
    }  # fmt: skip
    monkeypatch.setattr(catalogue, "_split_generators", fail)
    if obstacle == "no route to host":
        monkeypatch.setattr(catalogue, "url_infos", {"http://shapes.invalid/a": None})
        monkeypatch.setattr(urllib.request, "urlopen", fail)
    with a_line() as raised:
        load_dataset("known_shapes", data_dir=tmp_path)
    message = str(raised.value)
    assert message.startswith("known_shapes: TFDS cannot prepare it here (")
    assert obstacle in message.partition(");")[0]
    build = f"tfds build known_shapes --file_format=array_record --data_dir={tmp_path};"
    assert f"pip install tensorflow tensorflow-datasets array_record && {build}" in message


def test_data_dir_must_be_there_before_anything_is_prepared(catalogue, tmp_path):
    with pytest.raises(UserError, match="missing: expected a folder of data sets"):
        load_dataset("known_shapes", data_dir=tmp_path / "missing")
    assert not list(tmp_path.iterdir())
