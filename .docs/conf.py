"""Sphinx: pages in Markdown beside this file, the reference from docstrings, figures from results/.

Whatever a command or the package can say is asked of it here, at each build, and put into the
pages as a substitution: nothing of it is typed by hand.
"""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from sphinx.util import logging  # noqa: E402

import unitnorm  # noqa: E402

project = "unitnorm"
author = copyright = "The unitnorm developers"
version = release = unitnorm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns: list[str] = []
html_theme = "furo"
html_title = f"unitnorm {version}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
myst_enable_extensions = ["substitution", "colon_fence"]
myst_heading_anchors = 3
default_role = "code"  # `name` in a docstring is code
smartquotes = False  # an option is --update
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 60
napoleon_custom_sections = [("Source", "returns_style")]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _updates() -> str:
    return _table(
        ("name", "function", "norms", "all else", "what it is"),
        [
            (
                f"`{update.name}`",
                f"{{py:func}}`~unitnorm.{update.filters.__name__}`",
                "unit" if update.constrained else "free",
                f"`{_rest(update.rest)}`",
                update.summary,
            )
            for update in unitnorm.UPDATES.values()
        ],
    )


def _rest(rest: Any) -> str:
    options = getattr(rest, "keywords", {})
    words = [f"{key}={value}" for key, value in options.items()]
    name = getattr(rest, "func", rest).__name__
    return f"optax.{name}" + (f"({', '.join(words)})" if words else "")


def _quickstart() -> str:
    text = (ROOT / "README.md").read_text()
    return text.partition("<!-- quickstart -->")[2].partition("<!-- end quickstart -->")[0].strip()


def _kernels() -> str:
    """What `examine_kernels` prints of a small network with every kind of leaf."""
    x = jax.random.normal(jax.random.key(0), (64, 6))
    shapes = {"hidden/kernel": (6, 5), "hidden/scale": (5,), "out/kernel": (5, 3), "out/bias": (3,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}

    def apply(p: dict[str, jax.Array]) -> jax.Array:
        h = x @ p["hidden/kernel"]
        h = jax.nn.relu(p["hidden/scale"] * (h - h.mean(0)) / h.std(0))
        return h @ p["out/kernel"] + p["out/bias"]

    return f"```text\n{unitnorm.examine_kernels(apply, params)}\n```"


_log = logging.getLogger(__name__)
myst_substitutions = {
    "quickstart": _quickstart(),
    "updates": _updates(),
    "kernels": _kernels(),
}

# Unions that autodoc spells out, by the names that the source gives them.
_ALIASES = (
    ("Array | ndarray | bool | number | bool | int | float | complex", "ArrayLike"),
    ("ArrayLike | Iterable[ArrayTree] | Mapping[Any, ArrayTree]", "Params"),
    ("Any | Callable[[Params], Any]", "Selection"),
    ("ArrayLike | Callable[[Any], Any]", "LearningRate"),
    ("int | Sequence[int] | None | Any | Callable[[str], int | Sequence[int] | None]", "AxisSpec"),
    ("Literal['normalize', 'raise', 'trust', 'keep']", "OffManifold"),
)


def _short_types(*about: Any) -> tuple[str | None, str | None]:
    *_, signature, returned = about

    def shortened(text: str | None) -> str | None:
        text = text and re.sub(r"~(?!unitnorm)(?:\w+\.)*(\w+)", r"\1", text)
        for long, short in _ALIASES:
            text = text and text.replace(long, short)
        return text

    return shortened(signature), shortened(returned)


def _as_rest(*about: Any) -> None:
    """Docstrings are written to be read as they are: what reST would take for markup is not.

    A deeper block below a blank line is code; elsewhere | and \\ are themselves, as is a star that
    emphasises nothing.
    """
    lines, rest, code, previous = about[-1], [], None, ""
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if code is not None and line.strip() and indent < code:
            code = None
        outer = len(previous) - len(previous.lstrip())
        below_blank = line.strip() and rest and not rest[-1].strip()
        if code is None and below_blank and indent > outer:
            code = indent
            rest[-1:] = ["", " " * outer + "::", ""]
        if code is None and not line.lstrip().startswith((">>>", "...")):
            parts = line.split("`")
            parts[::2] = [
                re.sub(r"\*\w[^*]*\w\*|[|\\*]", lambda m: m[0] if m[0][1:] else "\\" + m[0], part)
                for part in parts[::2]
            ]
            line = "`".join(parts)
        rest.append(line)
        previous = line if line.strip() else previous
    lines[:] = rest


def _complete(app: Any, env: Any) -> None:
    """A public function without its entry in the reference is a warning, and so an error."""
    documented = env.domaindata["py"]["objects"]
    for name in unitnorm.__all__:
        if f"unitnorm.{name}" not in documented and name != "__version__":
            _log.warning("unitnorm.%s has no entry in api.md", name)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _as_rest, priority=100)
    app.connect("autodoc-process-signature", _short_types)
    app.connect("env-check-consistency", _complete)
