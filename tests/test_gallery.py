"""What people have: the gallery, networks that nobody here wrote, and what the docs show."""

import doctest
import importlib
import inspect
import operator
import re

import jax
import jax.numpy as jnp
import pytest

import unitnorm
from unitnorm.examples.mnist import mnist_arrays
from unitnorm.updates.parts import leaf_name


def selected(selection):
    """The names of the leaves that a selection calls filters, in order."""
    return [leaf_name(path) for path, leaf in jax.tree.leaves_with_path(selection) if leaf]


@pytest.mark.parametrize(
    ("example", "needs", "kernels"),
    [
        ("plain_dict", "jax", ["hidden"]),
        ("flax_nnx", "flax", ["conv1/kernel", "conv2/kernel"]),
        ("flax_linen", "flax", ["Conv_0/kernel", "Conv_1/kernel"]),
        ("equinox_module", "equinox", ["layers/0/weight", "layers/4/weight"]),
    ],
)
def test_an_example_learns_with_its_kernels_at_unit_norm(
    example, needs, kernels, monkeypatch, capsys
):
    pytest.importorskip(needs, reason=f"needs {needs}: pip install unitnorm[dev]")
    module = importlib.import_module(f"unitnorm.examples.{example}")
    built = []

    def build_and_note(name, learning_rate, filters, **options):
        built.append((name, selected(filters)))
        return unitnorm.build(name, learning_rate, filters, **options)

    monkeypatch.setattr(module, "build", build_and_note)
    error = module.main(60)
    assert built == [("un", kernels)]
    assert error < 0.25  # nine in ten are wrong before training
    assert capsys.readouterr().out == f"test error {error:.4f}\n"


def test_kernels_of_a_resnet_in_flax():
    jax_resnet = pytest.importorskip("jax_resnet", reason="needs jax-resnet")
    images = mnist_arrays(28, 28, 1)[0][:32]
    net = jax_resnet.ResNet50(stage_sizes=[1, 1], hidden_sizes=(2, 4), n_classes=10)
    statistics = dict(jax.jit(net.init)(jax.random.key(0), images))
    params = statistics.pop("params")

    @jax.jit
    def apply(params):
        return net.apply({"params": params, **statistics}, images, mutable=["batch_stats"])

    convolutions = [
        f"{block}/ConvBlock_{i}/Conv_0/kernel"
        for block in ("layers_2", "layers_3")
        for i in range(3)
    ]
    expected = ["layers_0/ConvBlock_0/Conv_0/kernel", *convolutions]
    expected += [
        f"{block}/ResNetSkipConnection_0/ConvBlock_0/Conv_0/kernel"
        for block in ("layers_2", "layers_3")
    ]
    assert selected(unitnorm.normalized_kernels(apply, params)) == sorted(expected)


# In the second version a block's sum is not normalised itself, so what ends in it is not chosen.
@pytest.mark.parametrize("version", [1, 2])
def test_kernels_of_a_resnet_in_haiku(version):
    hk = pytest.importorskip("haiku", reason="needs dm-haiku")
    images = mnist_arrays(28, 28, 1)[0][:32]

    def forward(images):
        net = hk.nets.ResNet(
            (1, 1, 1, 1), 10, resnet_v2=version == 2, bottleneck=False,
            channels_per_group=(8, 8, 16, 16), initial_conv_config={"output_channels": 8},
            strides=(1, 1, 2, 2),
        )  # fmt: skip
        return net(images, is_training=True)

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    params, running = jax.jit(net.init)(jax.random.key(0), images)
    apply = jax.jit(lambda params: net.apply(params, running, images))
    names = ["conv_0"] if version == 2 else ["conv_0", "conv_1", "shortcut_conv"]
    expected = ["res_net/~/initial_conv/w"] + [
        f"res_net/~/block_group_{group}/~/block_0/~/{name}/w"
        for group in range(4)
        for name in names
    ]
    assert sorted(selected(unitnorm.normalized_kernels(apply, params))) == sorted(expected)


# --- What the documentation shows -----------------------------------------------------------------


FUNCTIONS = [name for name in unitnorm.__all__ if inspect.isfunction(getattr(unitnorm, name))]


@pytest.mark.parametrize("name", [*FUNCTIONS, "ArchBN", "geometry.filter_axes"])
def test_every_public_function_has_an_example_and_it_says_what_comes_out(name):
    thing = operator.attrgetter(name)(unitnorm)
    (found,) = doctest.DocTestFinder(recurse=False).find(thing, name)
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0


def test_the_quickstart_runs_as_it_stands():
    """The code of the package docstring; the README's is tested with the README."""
    indented = re.search(r"(?:^    .*\n|^\n)+", inspect.cleandoc(unitnorm.__doc__) + "\n", re.M)
    code = inspect.cleandoc(indented[0])
    names = {}
    exec(compile(code, "quickstart", "exec"), names)
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    assert jnp.allclose(unitnorm.filter_norms(names["params"]["kernel"]), 1, atol=1e-6)
    assert not jnp.allclose(names["params"]["scale"], 1, atol=1e-6)
