"""Shared set-up: two CPU devices, so that sharding is always on, and small data and configs."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

from tests.idx import write_blobs

# Before any test asks for a device. Some results must not depend on it: see tests/test_devices.py.
jax.config.update("jax_num_cpu_devices", 2)

# The same generated cases every time; UNITNORM_RANDOM_CASES=1 in the environment draws new ones.
hypothesis.settings.register_profile(
    "unitnorm", derandomize=not os.environ.get("UNITNORM_RANDOM_CASES"), deadline=None
)
hypothesis.settings.load_profile("unitnorm")


# Of tests with a case for each update or each network, those that `make test` runs: one of a kind.
# `make slow`, and so CI, runs the others.
QUICK = {
    *("b-sgd", "un", "un-adam", "weight-norm", "muon"),
    *("haiku-mobilenet", "nnx-transformer", "unet-ensemble"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.networks import NETWORKS
    from unitnorm.updates import UPDATES

    others = {*UPDATES, *NETWORKS} - QUICK
    for item in items:
        case = getattr(getattr(item, "callspec", None), "params", {}).get("name")
        if isinstance(case, str) and case in others:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def two_cores() -> Iterator[None]:
    """A command in this process finds as many cores as it has devices, on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unitnorm.run.devices.count_cores", lambda: 2)
        yield


@pytest.fixture
def hurried() -> Iterator[None]:
    """Compiles without optimising, in half the time, what runs a few times only. Not where bits
    are compared: it is the optimised code that may round with what is trained along."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 training and 200 test images of four classes."""
    return write_blobs(tmp_path_factory.mktemp("blobs"), 600, 200)


@pytest.fixture(scope="session")
def small_toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that trains in a moment on `idx_folder`."""
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(
        "runs = 3\ndepths = [1, 2]\n"
        "[model]\nwidth = 8\nbn_momentum = 0.9\n"
        "[loss]\nbatch_size = 20\n"
        "[sweep]\nrates = [1e-2, 1e-3]\ntrain_images = 100\nvalidation_images = 50\nepochs = 3\n"
        "[train]\ntrain_images = 410\nvalidation_images = 150\nmin_epochs = 3\nmax_epochs = 6\n"
    )
    return path
