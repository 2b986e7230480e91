"""SegNet's images: CamVid in each of its forms, photos of any mode, random changes, drawings."""

import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.common import ROOT, a_line
from tests.test_segment import _quick_to_compile, opened  # noqa: F401
from unitnorm.errors import UserError
from unitnorm.run.config import load
from unitnorm.segment import data, palette, predicting, synthetic
from unitnorm.segment.augment import augment
from unitnorm.segment.config import Augmentation, SegmentConfig

CAMVID = ROOT.parent / "shared" / "data" / "CamVid"


# ---------------------------------------------------------------- augmentation


def changed(image, labels, size, count, **options):
    """The image and labels changed by so many keys: arrays of all images and of all labels."""
    options = Augmentation(**{"flip": False} | options)
    keys = jax.random.split(jax.random.key(0), count)
    change = jax.jit(jax.vmap(lambda key: augment(key, image, labels, size, options)))
    return map(np.asarray, change(keys))


def test_a_crop_is_a_part_of_the_image_and_everywhere_in_it_and_half_are_flipped():
    labels = np.random.default_rng(0).integers(0, 11, (12, 15)).astype(np.uint8)
    image = np.repeat(labels[..., None], 3, -1)
    windows = {labels[r : r + 5, c : c + 6].tobytes(): (r, c) for r in range(8) for c in range(10)}
    pictures, found = changed(image, labels, (5, 6), 200)
    assert np.array_equal(pictures[..., 1], found)
    places = [windows[part.tobytes()] for part in found.astype(np.uint8)]
    assert [set(axis) for axis in zip(*places, strict=True)] == [set(range(8)), set(range(10))]
    pictures, found = changed(image, labels, labels.shape, 20, flip=True)
    assert np.array_equal(pictures[..., 0], found)
    seen = {whole.tobytes() for whole in found.astype(np.uint8)}
    assert seen == {labels.tobytes(), labels[:, ::-1].tobytes()}


@pytest.mark.parametrize("part", [(40, 30), (10, 25)])
def test_zoom_scales_image_and_label_alike_and_shows_nothing_but_the_image(part):
    labels = np.repeat(np.arange(10, dtype=np.uint8), 4)[:, None].repeat(50, 1)  # of the row
    rows = np.arange(40.0)[:, None].repeat(50, 1)
    image = 20 + np.stack([4 * rows, 4 * rows, 4 * np.arange(50.0) * np.ones((40, 1))], -1)
    zooms, (pictures, parts) = [], changed(image, labels, part, 60, zoom=2.0)
    assert pictures.shape == (60, *part, 3)
    assert parts.max() < 10  # no pixel without a label
    assert pictures.min() > 19.9  # none that is black
    for picture, found in zip(pictures, parts, strict=True):
        slopes = [np.diff(picture[3:-3, 3:-3, c], axis=c // 2).mean() for c in (0, 2)]
        assert slopes[0] == pytest.approx(slopes[1], rel=0.06)  # in its proportions
        source = (picture[..., 0] - 20) / 4  # a pixel's row, but at the edges
        assert np.abs(np.clip(source, 1, 38) // 4 - found).max() <= 1
        assert (source // 4 == found).mean() > 0.6
        zooms.append(4 / slopes[0])
    least = max(0.5, part[0] / 40, part[1] / 50)
    assert least * 0.97 < min(zooms) < least * 1.1
    assert 1.85 < max(zooms) < 2.05


@pytest.mark.parametrize(("name", "same"), [("brightness", True), ("colour", False)])
def test_light_and_colour_change_the_image_alone(name, same):
    image, labels = np.full((4, 4, 3), 100, np.uint8), np.ones((4, 4), np.uint8)
    image[0, 0] = 200  # becomes too bright
    pictures, found = changed(image, labels, (4, 4), 8, **{name: 0.5})
    assert (found == labels).all()
    factors = pictures[:, 1, 1] / 100
    assert np.allclose(pictures, np.minimum(image * factors[:, None, None], 255))
    logs = np.log(factors)
    assert np.abs(logs).max() <= 0.5 + 1e-5
    assert np.ptp(logs, axis=0).min() > 0.1
    assert (np.ptp(logs, axis=1) < 1e-5).all() == same
    assert np.max(logs) > np.log(255 / 200)


# ---------------------------------------------------------------- data


def test_scenes_have_all_classes_and_do_not_depend_on_the_count():
    images, labels = synthetic.scenes(4, 36, 48, seed=3)
    assert images.shape == (4, 36, 48, 3)
    assert set(np.unique(labels)) == set(range(12))
    assert np.array_equal(synthetic.scenes(2, 36, 48, seed=3)[1], labels[:2])
    assert not np.array_equal(synthetic.scenes(1, 36, 48, seed=4)[1], labels[:1])


@pytest.fixture
def camvid(tmp_path):
    """A CamVid of two images each, as PNG and JPEG: one colour, and labels of two halves."""
    rng = np.random.default_rng(0)
    for split in data.SPLITS:
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}annot").mkdir()
        for i, ending in enumerate(("png", "jpg")):
            colour = tuple(rng.integers(256, size=3).tolist())
            Image.new("RGB", (480, 360), colour).save(tmp_path / split / f"{i}.{ending}")
            label = np.full((360, 480), i * 11, np.uint8)
            label[:180] = 3
            Image.fromarray(label).save(tmp_path / f"{split}annot" / f"{i}.png")
    return tmp_path


def read(folder, height=9, width=12):
    given = {} if folder is None else {"data.data_dir": str(folder)}
    values = given | {"data.height": height, "data.width": width}
    return data.load_scenes(load(None, values, SegmentConfig).data)


def test_camvid_is_read_at_its_own_size_or_averaged_with_labels_that_are_labels(camvid):
    small, whole = read(camvid), read(camvid, 360, 480)
    assert small.size == (9, 12)
    assert small.sha256 == read(camvid).sha256 != whole.sha256
    assert "2 images in train; the whole of CamVid has 367" in small.notes
    for split in data.SPLITS:
        for i, ending in enumerate(("png", "jpg")):
            original = np.asarray(opened(camvid / split / f"{i}.{ending}"))
            label = np.asarray(opened(camvid / f"{split}annot" / f"{i}.png"))
            assert np.array_equal(whole.splits[split].images[i], original)
            assert np.array_equal(whole.splits[split].labels[i], label)
    image, label = np.zeros((360, 480, 3), np.uint8), np.zeros((360, 480), np.uint8)
    image[:, 1::2], label[:, ::2] = 200, 11
    Image.fromarray(image).save(camvid / "val" / "0.png")
    Image.fromarray(label).save(camvid / "valannot" / "0.png")
    val = read(camvid, 180, 240).splits["val"]
    assert (val.images[0] == 100).all()
    assert set(np.unique(val.labels[0])) <= {0, 11}


# CamVid's 32 colours by class, in the order of their names in label_colors.txt
PUBLISHED_COLOURS = """
pedestrian 64 128 64, building 192 0 128, bicyclist 0 128 192, building 0 128 64, building 128 0 0,
car 64 0 128, pedestrian 64 0 192, pedestrian 192 128 64, pole 192 192 128, fence 64 64 128,
road 128 0 192, road 192 0 64, sign 128 128 64, bicyclist 192 0 192, car 128 64 64,
pavement 64 192 128, pedestrian 64 64 0, road 128 64 128, pavement 128 128 192, pavement 0 0 192,
sign 192 128 128, sky 128 128 128, car 64 128 192, pole 0 0 64, sign 0 64 64, car 192 64 128,
tree 128 128 0, car 192 128 192, building 64 0 64, tree 192 192 0, unlabelled 0 0 0,
building 64 192 0
"""


@pytest.fixture
def full_camvid(tmp_path):
    """CamVid as its authors have it: 960×720, in one folder, labels in 32 colours."""
    images, labels = (tmp_path / "full" / name for name in data.UNSPLIT[0])
    images.mkdir(parents=True)
    labels.mkdir()
    words = [entry.split() for entry in PUBLISHED_COLOURS.split(",")]
    colours = np.array([[int(number) for number in numbers] for _, *numbers in words], np.uint8)
    picture = colours[np.arange(720 * 960).reshape(720, 960) // 30 % 32]  # 32 blocks in a row
    for name in ("0001TP_006690", "0006R0_f00930", "0016E5_07959", "Seq05VD_f00000"):
        Image.new("RGB", (960, 720), (9, 8, 7)).save(images / f"{name}.png")
        Image.fromarray(picture).save(labels / f"{name}_L.png")
    names = [*palette.NAMES, "unlabelled"]
    return tmp_path / "full", np.array([names.index(name) for name, *_ in words])


def test_camvids_32_colours_are_merged_into_eleven_classes(full_camvid):
    folder, expected = full_camvid
    found = read(folder, 720, 960)
    assert [len(found.splits[name].labels) for name in data.SPLITS] == [2, 1, 1]
    assert list(found.splits["train"].sequences) == ["0001TP", "0006R0"]
    assert np.array_equal(found.splits["val"].labels[0, 0, ::30], expected)
    assert "4 labels in CamVid's colours" in found.notes[-1]
    assert "pole = Column_Pole, TrafficCone; road = Road, LaneMkgsDriv" in found.notes[-1]
    smaller = read(folder, 360, 480)
    assert np.array_equal(smaller.splits["test"].labels[0, 0, ::15], expected)


def test_sorted_into_splits_as_palette_or_numbers_with_255_camvid_is_the_same(full_camvid):
    folder, expected = full_camvid
    image, label = (opened(next((folder / name).glob("0001*"))) for name in data.UNSPLIT[0])
    numbers = read(folder, 720, 960).splits["val"].labels[0]
    numbers = Image.fromarray(np.where(numbers == 11, np.uint8(255), numbers))
    other = folder.parent / "sorted"
    for split, saved in zip(data.SPLITS, (label, label.quantize(64), numbers), strict=True):
        for place, picture in ((split, image), (f"{split}_labels", saved)):
            (other / place).mkdir(parents=True)
            picture.save(other / place / f"0001TP_006690{'_L' * (place != split)}.png")
    for split in read(other, 720, 960).splits.values():
        assert np.array_equal(split.labels[0, 0, ::30], expected)


def test_a_palette_of_other_colours_is_one_of_numbers(camvid):
    before = read(camvid)
    for path in sorted(camvid.glob("*annot/*.png")):
        label = opened(path)
        label.putpalette([7 * i % 256 for i in range(768)] if path.stem == "0" else [0] * 768)
        label.save(path)
    assert read(camvid).sha256 == before.sha256


def cut_off(path):
    path.write_bytes(path.read_bytes()[:60])


def make_huge(path):
    content = bytearray(path.read_bytes())
    content[16:24] = (15000).to_bytes(4, "big") + (8000).to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def draw(*arguments):
    return lambda path: Image.new(*arguments).save(path)


def label_all_road(folder):
    for path in folder.glob("*.png"):
        Image.new("L", (480, 360), 3).save(path)


@pytest.mark.parametrize(
    ("place", "damage", "name", "text"),
    [
        ("val/0.png", draw("RGB", (48, 36)), "", "48×36 pixels; expected 480×360 or 960×720"),
        ("val/0.png", draw("L", (480, 360)), "", "mode L; expected colours"),
        ("valannot/0.png", draw("L", (480, 360), 12), "", "holds the label 12; expected 0 to 10"),
        ("valannot/0.png", draw("RGB", (480, 360), (1, 2, 3)), "", "has the colour (1, 2, 3)"),
        ("val/0.png", cut_off, "", "cannot be read as an image"),
        ("val/0.png", make_huge, "", "15000×8000 pixels"),
        ("trainannot", label_all_road, "", "classes of the training images: road; expected"),
        ("valannot/1.png", Path.unlink, "val/1.jpg", "has no label"),
        ("val/1.jpg", Path.unlink, "valannot/1.png", "has no image"),
        ("test", lambda path: path.rename(f"{path}s"), "", "expected CamVid's train/, trainannot"),
    ],
)
def test_a_faulty_folder_is_an_error_that_names_the_file(camvid, place, damage, name, text):
    damage(camvid / place)
    with a_line() as error:
        read(camvid)
    assert str(error.value).startswith(str(camvid / (name or place)))
    assert text in str(error.value)


def test_frames_of_no_drive_and_missing_data_are_errors_that_say_what_to_do(tmp_path, full_camvid):
    folder, _ = full_camvid
    for path in folder.glob("*/0006R0_f00930*"):
        path.rename(path.with_name(path.name.replace("0006R0_f00930", "street")))
    with pytest.raises(UserError, match=r"street\.png: not the name of a frame .* sort your"):
        read(folder)
    for given, text in ((None, "no folder"), (tmp_path / "nowhere", "no such")):
        with pytest.raises(UserError, match=rf"{text}.*https://github\.com/alexgkendall/SegNet-"):
            read(given)


@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs CamVid beside the checkout")
def test_the_real_camvid_has_its_counts_its_split_and_the_size_asked_for():
    found = read(CAMVID, 90, 120)
    assert not found.notes
    for name, pairs in data.find_pairs(CAMVID).items():
        assert {data.find_split(image) for image, _ in pairs} == {name}
        images, labels, _ = found.splits[name]
        assert len(labels) == data.COUNTS[name]
        assert (images.shape, labels.shape[1:]) == ((*labels.shape, 3), (90, 120))
        assert set(np.unique(labels)) == set(range(12))


def test_a_photo_of_any_mode_is_what_it_is_in_8_bits(tmp_path):
    grey = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)
    many = grey * np.uint16(257)
    plain = Image.fromarray(grey)
    for name, image in {
        "L.png": plain, "16.png": Image.fromarray(many), "16.tif": Image.fromarray(many),
        "16.pgm": Image.fromarray(many), "16b.tif": Image.fromarray(many.astype(">u2")),
        "float.tif": Image.fromarray(grey / np.float32(255)),
        **{f"{mode}.tif": plain.convert(mode) for mode in ("RGB", "P", "LA", "RGBA", "CMYK")},
    }.items():  # fmt: skip
        image.save(tmp_path / name)
        found = np.asarray(predicting.open_photo(tmp_path / name))
        assert np.array_equal(found, np.repeat(grey[..., None], 3, -1)), name
    for name, values, text in (
        ("int.tif", many.astype(np.int32), "mode I and values from 0 to 65535"),
        ("bright.tif", grey.astype(np.float32), "mode F and values from 0 to 255"),
        ("nan.tif", np.full((4, 4), np.nan, np.float32), "mode F and values from nan to nan"),
    ):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: has {text}; expected 8 or 16 bits"):
            predicting.open_photo(tmp_path / name)
