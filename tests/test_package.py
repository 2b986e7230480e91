"""The package as users install it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from unitnorm.run.config import presets

ROOT = Path(__file__).parents[1]
WEIGHTS = "results/segnet/un.safetensors"


def test_a_wheel_holds_mnist_the_presets_and_the_published_weights(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE", WEIGHTS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    # symlinks as they are: the weights and the presets in the package are some
    shutil.copytree(ROOT / "unitnorm", tmp_path / "unitnorm", symlinks=True)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run([sys.executable, "-m", "pip", *words], cwd=tmp_path, check=True, timeout=120)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        assert wheel.read("unitnorm/segment/un.safetensors") == (ROOT / WEIGHTS).read_bytes()
    configs = {f"unitnorm/configs/{name}.toml" for name in presets()}
    assert {"unitnorm/cli/table2.py", "unitnorm/py.typed", *configs} <= names
    assert sum(name.startswith("unitnorm/data/mnist/") for name in names) == 4
    assert not any(name.startswith(("tests/", "results/")) for name in names)
