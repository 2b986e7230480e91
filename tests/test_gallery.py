"""What people copy from: the gallery, and what the docs show."""

import doctest
import importlib
import inspect
import operator
import re

import jax
import jax.numpy as jnp
import pytest

import unitnorm
from unitnorm.updates.parts import leaf_name

SLOW = pytest.mark.slow
LAYERS = ["layers/0/weight", "layers/4/weight"]


def selected(selection):
    """The names of the leaves that a selection calls filters, in order."""
    return [leaf_name(path) for path, leaf in jax.tree.leaves_with_path(selection) if leaf]


@pytest.mark.parametrize(
    ("example", "needs", "kernels"),
    [
        pytest.param("plain_dict", "jax", ["hidden"], marks=SLOW),
        ("flax_nnx", "flax", ["conv1/kernel", "conv2/kernel"]),
        pytest.param("flax_linen", "flax", ["Conv_0/kernel", "Conv_1/kernel"], marks=SLOW),
        pytest.param("equinox_module", "equinox", LAYERS, marks=SLOW),
    ],
)
def test_an_example_learns_with_its_kernels_at_unit_norm(
    example, needs, kernels, monkeypatch, capsys, hurried
):
    pytest.importorskip(needs, reason=f"needs {needs}: pip install unitnorm[dev]")
    module = importlib.import_module(f"unitnorm.examples.{example}")
    built = []

    def build_and_note(name, learning_rate, filters, **options):
        built.append((name, selected(filters)))
        return unitnorm.build(name, learning_rate, filters, **options)

    monkeypatch.setattr(module, "build", build_and_note)
    error = module.main(40)
    assert built == [("un", kernels)]
    assert error < 0.35  # nine in ten are wrong before training
    assert capsys.readouterr().out == f"test error {error:.4f}\n"


@pytest.mark.slow
def test_the_transformer_learns_with_its_kernels_at_unit_norm(monkeypatch, capsys, hurried):
    from unitnorm.examples import transformer

    models = []

    class Noted(transformer.Transformer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            models.append(self)

    monkeypatch.setattr(transformer, "Transformer", Noted)
    for name, size in {"CONTEXT": 32, "WIDTH": 32, "BATCH": 16, "BLOCKS": 1}.items():
        monkeypatch.setattr(transformer, name, size)
    loss = transformer.main(20)
    assert capsys.readouterr().out == f"test loss {loss:.4f} nats a letter\n"
    (plain,) = transformer.train([0], "adamw", 0.0, 3e-3, 0.0, 20)
    assert 2 < loss < 4  # log(100) is 4.6
    assert 2 < plain < 4
    for model, unit in zip(models, (True, False), strict=True):
        (block,) = model.blocks
        query, value = block.query.kernel[...], block.value.kernel[...]
        norms = [*jnp.sqrt(jnp.sum(query**2, (0, 2))), jnp.linalg.norm(value)]
        norms += [jnp.linalg.norm(layer.kernel[...]) for layer in (block.up, block.down)]
        assert all(abs(norm - 1) < 1e-5 for norm in norms) == unit


# --- What the documentation shows -----------------------------------------------------------------


FUNCTIONS = [name for name in unitnorm.__all__ if inspect.isfunction(getattr(unitnorm, name))]


@pytest.mark.parametrize("public", [*FUNCTIONS, "ArchBN", "geometry.filter_axes"])
def test_every_public_function_has_an_example_and_it_says_what_comes_out(public):
    thing = operator.attrgetter(public)(unitnorm)
    (found,) = doctest.DocTestFinder(recurse=False).find(thing, public)
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
