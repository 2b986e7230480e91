"""Rows of a network's Jacobian: their sums over parts of leaves, and which of these cancel.

For parameters w and outputs f(w), factors exp(u) of the entries leave the outputs as they are if
r·u = 0 for every row r = w ∘ ∂⟨c, f⟩/∂w, whatever the point w and the cotangent c. So a common
factor of some entries is free where their sum in each row vanishes, and entries of several leaves
can share one (or take its inverse) where their sums cancel (or are the same).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_SUGGESTED = 0.05  # of sums over their sizes, where entries go their own ways: worth a trial
_WEAK = 0.3  # the same of one block among many, whose features may vary as little as an ε
_DEAD = 1e-4  # a block whose effect is this small beside that of the largest says nothing
FEW = 8  # leaves that may be scaled against one
FIRST_ROWS = 8


class Part(NamedTuple):
    """A leaf with one axis in equal parts: runs of neighbours, or every so-manieth entry."""

    leaf: int
    axis: int = 0
    parts: int = 1
    strided: bool = False


class Rows:
    """Sums of rows over all axes of a leaf but one, which is all that parts of an axis need.

    `draw` gives a row, an array for each leaf, and `progress` is told of it.
    """

    def __init__(
        self,
        shapes: Mapping[int, tuple[int, ...]],
        draw: Callable[[], Sequence[Any]],
        progress: Callable[[str], Any],
    ):
        self.shapes = {leaf: shape or (1,) for leaf, shape in shapes.items()}
        self._draw, self._progress, self._count = draw, progress, 0
        self._kept: dict[tuple[int, int], list[np.ndarray]] = {}
        self._folded: dict[Part, tuple[np.ndarray, np.ndarray]] = {}
        self.grow(FIRST_ROWS)

    def grow(self, to: int) -> None:
        """As many rows in all."""
        self._folded = {}
        for number in range(self._count, to):
            self._progress(f"row {number + 1} of {to}")
            for (leaf, shape), array in zip(self.shapes.items(), self._draw(), strict=True):
                r = np.asarray(array, np.float64).reshape(shape)
                for axis in range(r.ndim):
                    others = tuple(a for a in range(r.ndim) if a != axis)
                    pair = np.stack([r.sum(others), (r**2).sum(others)])
                    self._kept.setdefault((leaf, axis), []).append(pair)
        self._count = max(self._count, to)

    def sums(self, part: Part) -> np.ndarray:
        """(rows, parts)"""
        return self._fold(part)[0]

    def sizes(self, part: Part) -> np.ndarray:
        """(parts,): what the norm of `sums` over the rows is where entries go their own ways."""
        return self._fold(part)[1]

    def _fold(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        if part not in self._folded:
            kept = np.stack(self._kept[part.leaf, part.axis])  # (rows, 2, n)
            if part.strided:
                folded = kept.reshape(*kept.shape[:2], -1, part.parts).sum(2)
            else:
                folded = kept.reshape(*kept.shape[:2], part.parts, -1).sum(3)
            self._folded[part] = folded[:, 0], np.sqrt(folded[:, 1].sum(0))
        return self._folded[part]

    def effect(self, leaf: int) -> float:
        """How much the entries of a leaf matter."""
        return float(self.sizes(Part(leaf))[0])

    def divide(self, leaf: int, axis: int, count: int) -> list[Part]:
        """All ways to divide an axis in so many parts."""
        n = self.shapes[leaf][axis]
        strides = (False, True) if count < n else (False,)
        return [Part(leaf, axis, count, strided) for strided in strides if n % count == 0]

    def divisions(self, leaf: int, axis: int) -> list[Part]:
        """All ways to divide an axis in two parts or more, the finest first."""
        counts = range(self.shapes[leaf][axis], 1, -1)
        return [part for count in counts for part in self.divide(leaf, axis, count)]

    def parts(self, leaves: Sequence[int], count: int) -> list[Part]:
        """All ways to divide an axis of one of the leaves in so many parts."""
        if count == 1:
            return [Part(leaf) for leaf in leaves]
        axes = [(leaf, axis) for leaf in leaves for axis in range(len(self.shapes[leaf]))]
        return [part for leaf, axis in axes for part in self.divide(leaf, axis, count)]

    def vanishing(self, part: Part, tolerance: float = _SUGGESTED) -> tuple[np.ndarray, np.ndarray]:
        """(parts,) twice: whose sums vanish, and which are alive."""
        sizes = self.sizes(part)
        norms = np.linalg.norm(self.sums(part), axis=0)
        return norms <= tolerance * sizes, sizes > _DEAD * sizes.max()

    def free(self, part: Part) -> bool:
        """Whether all parts can be scaled: their sums vanish, but for a weak one's ε."""
        vanish, alive = self.vanishing(part, _WEAK)
        together = np.linalg.norm(self.sums(part)) <= _SUGGESTED * np.linalg.norm(self.sizes(part))
        return bool(together and (vanish | ~alive).all())

    def cancelling(
        self, target: Part, items: Sequence[Part], *, positive: bool = False, most: int = FEW
    ) -> dict[Part, float] | None:
        """Few items of other leaves that cancel the target: Σ x_j s_j = 0 with x = 1 for it.

        Orthogonal matching pursuit on the sums s of all rows and parts, then without what is not
        needed. No leaf is there twice, and none that is free. The coefficients x, with that of the
        target; None: nothing cancels it.
        """
        items = [p for p in items if p.leaf != target.leaf and not self.free(p)]
        goal = self.sums(target).ravel()
        norm = np.linalg.norm(goal)
        if not norm or not items or self.free(target):
            return None
        columns = np.stack([self.sums(p).ravel() for p in items], 1)
        norms = np.linalg.norm(columns, axis=0)
        columns, goal = columns / np.where(norms == 0, 1, norms), goal / norm
        leaves = np.array([p.leaf for p in items])
        usable, support = norms > 0, list[int]()

        def solve(support: list[int]) -> tuple[np.ndarray, np.ndarray]:
            x = np.linalg.lstsq(columns[:, support], -goal, rcond=None)[0]
            return x, goal + columns[:, support] @ x

        left = goal
        while np.linalg.norm(left) > _SUGGESTED:
            towards = -(columns.T @ left)
            score = np.where(usable, towards if positive else np.abs(towards), 0)
            best = int(np.argmax(score))
            if score[best] <= 1e-6 or len(support) == most:
                return None
            usable &= leaves != leaves[best]
            support.append(best)
            x, left = solve(support)
            if positive and (x <= 0).any():
                support = [j for j, value in zip(support, x, strict=True) if value > 0]
                x, left = solve(support)
        for j in sorted(support, key=lambda j: norms[j]):
            fewer = [i for i in support if i != j]
            if np.linalg.norm(solve(fewer)[1]) <= _SUGGESTED:
                support = fewer
        x = solve(support)[0] * norm / norms[support]
        return {target: 1.0, **{items[j]: float(c) for j, c in zip(support, x, strict=True)}}

    def signs(
        self, target: Part, items: Sequence[Part], *, positive: bool = False, most: int = FEW
    ) -> dict[Part, int] | None:
        """`cancelling`, if all coefficients are 1 or −1."""
        found = self.cancelling(target, items, positive=positive, most=most)
        if found is None or any(abs(abs(x) - 1) > 0.05 for x in found.values()):
            return None
        return {part: 1 if x > 0 else -1 for part, x in found.items()}

    def divide_alike(self, signs: Mapping[int, int], main: Part) -> dict[int, Part] | None:
        """How leaves that are scaled together divide where one does, so that all parts cancel."""
        others = [leaf for leaf in signs if leaf != main.leaf]
        if not others:
            return {main.leaf: main} if self.free(main) else None
        found = self.signs(main, self.parts(others, main.parts), most=len(others)) or {}
        alike = {part.leaf: sign * signs[main.leaf] for part, sign in found.items()}
        return {part.leaf: part for part in found} if alike == signs else None
