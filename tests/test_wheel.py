"""The wheel that people install: what is in it, what it weighs, and that it works by itself."""

import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest

from tests.common import ROOT, python
from unitnorm.data import idx

WEIGHTS = "results/segnet/renewed/un.safetensors"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, for builds leave files behind; the package's links stay links."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", WEIGHTS):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "configs", source / "configs")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "unitnorm", source / "unitnorm", symlinks=True, ignore=ignored)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run([sys.executable, "-m", "pip", *words], cwd=source, check=True, timeout=300)
    (path,) = source.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {item.filename: item.compress_size for item in archive.infolist()}
        weights = archive.read("unitnorm/segment/un.safetensors")
    names = {name for name in sizes if not name.split("/")[0].endswith(".dist-info")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "unitnorm").rglob("*.py")}
    presets = {f"unitnorm/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/**/*.toml")}
    mnist = {f"unitnorm/data/mnist/{name}.gz" for name in idx.FILES}
    others = {f"unitnorm/{x}" for x in ("py.typed", "segment/un.safetensors", "study/page.html")}
    assert names == modules | presets | mnist | others
    assert weights == (ROOT / WEIGHTS).read_bytes()
    assert sum(sizes[name] for name in mnist) < 12e6
    assert sum(size for name, size in sizes.items() if name not in mnist) < 7e6


def test_the_unpacked_wheel_finds_its_updates_data_and_presets(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "there")
    code = """
        import jax.numpy as jnp, optax, unitnorm
        from unitnorm.run.config import PRESETS

        w = jnp.eye(3)
        tx = unitnorm.build("un", 0.1, filters=True)
        moved, _ = tx.update(jnp.ones((3, 3)), tx.init(w), w)
        print(unitnorm.__file__)
        print(unitnorm.filter_norms(optax.apply_updates(w, moved)).round(5).tolist())
        print(unitnorm.load_dataset().train_images.shape)
        print(len(list(PRESETS.glob("study/*.toml"))))
    """
    done = python(textwrap.dedent(code), cwd=tmp_path, PYTHONPATH=tmp_path / "there")
    assert done.returncode == 0, done.stderr
    studies = len(list(ROOT.glob("configs/study/*.toml")))
    place = str(tmp_path / "there" / "unitnorm" / "__init__.py")
    assert done.stdout.splitlines() == [place, "[1.0, 1.0, 1.0]", "(60000, 784)", str(studies)]
