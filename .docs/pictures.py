"""The two drawings of the first page, into pictures/ beside this file: `make readme` draws them."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
ANGLE = np.radians(28)


def _arrow(ax: Axes, start: np.ndarray, end: np.ndarray, colour: str, **style: object) -> None:
    ax.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2.2, "shrinkA": 0, "shrinkB": 0}
        | style,
    )


def _direction(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle)])


def symmetry(path: Path) -> None:
    """The loss over a filter of two weights is constant along rays; a step of SGD is not."""
    fig, ax = plt.subplots(figsize=(7, 4.3))
    x, y = np.meshgrid(np.linspace(0, 2.9, 500), np.linspace(0, 1.95, 400))
    angle = np.arctan2(y, x)
    ax.contourf(x, y, np.cos(2 * (angle - np.radians(68))), 18, cmap="Greys_r", alpha=0.35)
    u, side = _direction(ANGLE), _direction(ANGLE + np.pi / 2)
    ax.plot(*np.outer(u, [0, 2.9]), color=GREY, lw=1, ls="--")
    for length, colour, at in ((2.0, ORANGE, (1.1, 0.42)), (1.0, BLUE, (0.34, 0.6))):
        start, step = length * u, 0.7 / length * side  # the gradient falls as 1/length
        _arrow(ax, np.zeros(2), start, colour, zorder=3)
        _arrow(ax, start, start + step, GREEN)
        ax.plot(*np.outer(start + step, [0, 1]), color=colour, lw=1.2, ls=":")
        turned = np.arctan2(*(start + step)[::-1])
        arc = np.linspace(ANGLE, turned, 40)
        ax.plot(*(0.6 * length * np.array([np.cos(arc), np.sin(arc)])), color=colour, lw=1.5)
        ax.annotate(f"turns {np.degrees(turned - ANGLE):.0f}°", at, color=colour, fontsize=11)
    ax.annotate("w", u + np.array([0.0, -0.17]), color=BLUE, fontsize=14, weight="bold")
    ax.annotate("2w", 2 * u + (0.0, -0.17), color=ORANGE, fontsize=14, weight="bold")
    ax.annotate("step of SGD from w", u + 0.7 * side + (-0.15, 0.05), color=GREEN, fontsize=11)
    ax.annotate(
        "from 2w: half of it", 2 * u + 0.35 * side + (-0.15, 0.05), color=GREEN, fontsize=11
    )
    ax.annotate("the same loss\nall along this line", 2.62 * u + (-0.5, -0.3), fontsize=10)
    ax.annotate("less loss", (0.1, 1.8), color=GREY, fontsize=10)
    ax.annotate("more loss", (2.45, 0.08), color=GREY, fontsize=10)
    ax.set(xlim=(0, 2.9), ylim=(0, 1.95), xlabel="first weight of the filter", ylabel="second")
    ax.set_aspect("equal")
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(fig)


def step(path: Path) -> None:
    """One update of UN: the tangent part of the gradient, a step along it, back to length one."""
    fig, ax = plt.subplots(figsize=(7, 4.3))
    arc = np.linspace(np.radians(8), np.radians(115), 200)
    ax.plot(np.cos(arc), np.sin(arc), color=GREY, lw=1.5)
    w, side = _direction(ANGLE), _direction(ANGLE + np.pi / 2)
    tangent, radial = 0.75 * side, 0.28 * w
    end = (w + tangent) / np.linalg.norm(w + tangent)
    ax.plot(*(w[:, None] + np.outer(side, [-0.35, 0.95])), color=GREY, lw=1, ls="--")
    _arrow(ax, np.zeros(2), w, BLUE)
    _arrow(ax, w, w + tangent + radial, GREY, lw=1.5)
    ax.plot(*np.array([w + tangent + radial, w + tangent]).T, color=GREY, lw=1.2, ls=":")
    _arrow(ax, w, w + tangent, GREEN)
    _arrow(ax, w + tangent, end, ORANGE)
    _arrow(ax, np.zeros(2), end, BLUE)
    ax.annotate("w", 0.5 * w + (0.02, -0.09), color=BLUE, fontsize=14, weight="bold")
    ax.annotate("new w", 0.5 * end + (-0.33, 0.0), color=BLUE, fontsize=14, weight="bold")
    ax.annotate(
        "−λ times the gradient", w + tangent + radial + (0.03, 0.0), color=GREY, fontsize=11
    )
    leader = {"arrowstyle": "-", "color": GREEN, "lw": 0.8}
    middle = w + 0.5 * tangent
    ax.annotate(
        "1. its tangent part", middle, (1.0, 0.8), color=GREEN, fontsize=11, arrowprops=leader
    )
    ax.annotate("2. back to length one", end + np.array([-0.62, 0.17]), color=ORANGE, fontsize=11)
    ax.annotate("all filters of length one", (1.03, 0.13), color=GREY, fontsize=10)
    ax.plot(0, 0, "o", color=BLUE)
    ax.set(xlim=(-0.3, 1.75), ylim=(-0.05, 1.4))
    ax.set_aspect("equal")
    ax.axis("off")
    fig.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(fig)


if __name__ == "__main__":
    for picture in (symmetry, step):
        picture(Path(__file__).parent / "pictures" / f"{picture.__name__}.png")
