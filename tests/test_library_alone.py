"""The updates as other programs use them: alone, typed, extended from outside."""

import ast
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import optax
import pytest

import unitnorm
from tests.common import ROOT, python
from unitnorm import updates
from unitnorm.updates import UPDATES, Update, build, check_update_name, find_update

ABSENT = (
    "array_record click etils grain matplotlib orbax pandas PIL pydantic pyarrow rich safetensors "
    "scipy.stats tensorflow tensorflow_datasets tensorstore torch"
)


def test_the_updates_need_nothing_but_jax_and_optax():
    code = f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if any(name == a or name.startswith(a + ".") for a in hidden):
                    raise ModuleNotFoundError(f"hidden: {{name}}", name=name)

        hidden = {[*ABSENT.split(), "flax"]!r}
        sys.meta_path.insert(0, Absent())
        import jax, jax.numpy as jnp, optax, unitnorm

        params = {{"kernel": jnp.eye(3) + 0.1, "bias": jnp.zeros(3)}}
        batch = jnp.arange(36.0).reshape(12, 3) % 7

        def apply(params):
            h = batch @ params["kernel"] + params["bias"]
            return (h - h.mean(0)) / h.std(0)

        kernels = unitnorm.normalized_kernels(apply, params)
        for name in unitnorm.UPDATES:
            tx = unitnorm.build(name, 0.1, kernels)
            moved, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
            assert jax.tree.leaves(moved)
        print(kernels, len([name for name in sys.modules if name.split(".")[0] in hidden]))
    """
    done = python(textwrap.dedent(code), PYTHONWARNINGS="error::UserWarning")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'bias': False, 'kernel': True} 0"


@pytest.mark.slow
def test_a_type_checker_sees_the_signatures(tmp_path):
    pytest.importorskip("mypy", reason="needs mypy: pip install unitnorm[dev]")
    (tmp_path / "uses.py").write_text(
        "import unitnorm\n"
        "tx = unitnorm.un(3e-2, axis=0)\n"
        "reveal_type(unitnorm.build)\n"
        "reveal_type(unitnorm.retraction)\n"
        'unitnorm.un("not a rate", nonsense=3)\n'
    )
    words = ["-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "uses.py"]
    done = subprocess.run(
        [sys.executable, *words, f"--cache-dir={tmp_path}", "--config-file="], cwd=tmp_path,
        capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    shown = done.stdout.replace("builtins.", "")
    assert "def (name: str, learning_rate: " in shown
    assert "def (w: jax._src.basearray.Array, axis: int | " in shown
    errors = [line for line in shown.splitlines() if ": error: " in line]
    assert {line.split(":")[1] for line in errors} == {"5"}
    assert 'incompatible type "str"' in shown
    assert '"nonsense"' in shown


def test_every_public_name_is_there_for_people_and_for_type_checkers():
    for name in unitnorm.__all__:
        assert getattr(unitnorm, name) is not None
    assert set(updates.__all__) <= set(unitnorm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        unitnorm.nothing  # noqa: B018


def test_build_takes_injected_rates_beside_a_function():
    params = {"kernel": jnp.eye(3) + 0.1, "bias": jnp.ones(3)}
    mask = {"kernel": True, "bias": False}
    injected = optax.inject_hyperparams(build, static_args=("filters",))
    tx = injected("un-adam", learning_rate=0.1, filters=lambda params: mask, axis=0)
    state = jax.jit(tx.init)(params)
    state.hyperparams["learning_rate"] = jnp.float32(0.3)
    moved, _ = jax.jit(tx.update)(params, state, params)
    plain = build("un-adam", 0.3, mask, axis=0)
    expected, _ = plain.update(params, plain.init(params), params)
    assert jnp.allclose(moved["kernel"], expected["kernel"], atol=1e-6)
    assert jnp.allclose(moved["bias"], expected["bias"], atol=1e-4)


# --- Names ---------------------------------------------------------------------------------------


def un_from_outside(learning_rate, *, axis=None, off_manifold="normalize"):
    """UN at half the rate."""
    return updates.un(0.5 * learning_rate, axis=axis, off_manifold=off_manifold)


an_entry = Update("an-entry", un_from_outside, optax.adam, True, "with its own rest")


def no_update(learning_rate):
    return optax.sgd(learning_rate)


def test_names_are_forgiving_and_errors_name_what_is_near():
    assert check_update_name("un_adam") == check_update_name("UN-Adam ") == "un-adam"
    assert find_update("b_sgd") is UPDATES["b-sgd"]
    with pytest.raises(ValueError, match=r"'un-adams' is not an update \(did you mean un-adam"):
        check_update_name("un-adams")
    with pytest.raises(
        ValueError, match=r"'zzz' is not an update; expected one of b-sgd, un, .*package.module"
    ):
        build("zzz", 0.1, True)


def test_an_update_from_outside_is_used_by_its_path():
    name = f"{__name__}:un_from_outside"
    assert check_update_name(name) == name
    found = find_update(name)
    assert (found.constrained, found.summary) == (True, "UN at half the rate.")
    assert found.rest is optax.sgd
    w = jnp.eye(3) + 0.1
    tx, half = build(name, 0.2, True), updates.un(0.1)
    assert jnp.all(tx.update(w, tx.init(w), w)[0] == half.update(w, half.init(w), w)[0])
    assert find_update(f"{__name__}:an_entry") is an_entry


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("no_such_module:f", "cannot be imported.*no_such_module"),
        (f"{__name__}:nothing", "cannot be imported.*nothing"),
        (":f", "cannot be imported"),
        ("math:pi", "is a float, expected a function"),
        (f"{__name__}:no_update", "takes no axis="),
    ],
)
def test_what_is_no_update_is_refused(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        find_update(name)


def test_an_entry_point_is_a_name(tmp_path, monkeypatch):
    folder = tmp_path / "other-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        f"[unitnorm.updates]\nother-un = {__name__}:un_from_outside\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert check_update_name("other_un") == "other-un"
    assert find_update("other-un").filters is un_from_outside
    with pytest.raises(ValueError, match="other-un"):
        check_update_name("nothing")


def test_a_room_imports_from_rooms_above_it_alone():
    """The map in CONTRIBUTING: experiments know nothing of each other, `run` nothing of them."""
    experiments = ["table2", "study", "symmetry", "segment"]
    above = ["errors", "geometry", "updates", "data", "report", "run", "archbn"]
    allowed, total = {}, set()
    for k, room in enumerate(above):
        allowed[room] = above[:k]
    allowed |= dict.fromkeys([*experiments, "examples"], above)
    allowed["bench"] = [*above, "segment"]
    for room, others in allowed.items():
        path = ROOT / "unitnorm" / room
        for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            names = []
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert node.level == 0, file
                    names += [f"{node.module}.{name.name}" for name in node.names]
                elif isinstance(node, ast.Import):
                    names += [name.name for name in node.names]
            found = {name.split(".")[1] for name in names if name.startswith("unitnorm.")}
            assert found <= {room, *others}, file
            total |= found
    assert {"geometry", "run", "study"} <= total
