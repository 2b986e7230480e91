"""The package as users install it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WEIGHTS = "results/segnet/un.safetensors"


def test_a_wheel_holds_mnist_and_the_published_weights(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE", WEIGHTS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    # symlinks as they are: the weights in the package are one
    shutil.copytree(ROOT / "unitnorm", tmp_path / "unitnorm", symlinks=True)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run([sys.executable, "-m", "pip", *words], cwd=tmp_path, check=True, timeout=120)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        assert wheel.read("unitnorm/segment/un.safetensors") == (ROOT / WEIGHTS).read_bytes()
    assert {f"unitnorm/{name}" for name in ("cli.py", "py.typed", "segment/cli.py")} <= names
    assert sum(name.startswith("unitnorm/data/mnist/") for name in names) == 4
    assert not any(name.startswith(("tests/", "results/")) for name in names)
