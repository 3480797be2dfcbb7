"""How delta, B and C follow from the map: the matrices of their projections, read off by sending unit vectors through.

A step's delta, B and C must be affine in the channels of the position that the step visits, and in nothing else. The
nodes on the way are affine by their operators; which matrix they are is seen by running them in float64 on maps that
have one channel at each position, and that nothing else matters is checked on random maps.

The time step of most models goes through few numbers, its rank R. Wherever the graph has it written, the matrix of
delta then has that rank, and R rows of it, chosen as a pivoted factorisation chooses them, make all the others.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.passes.recovery.concrete import Concrete
from quartermap_deploy.passes.recovery.group import GroupSizes, ScanGroup
from quartermap_deploy.passes.recovery.operators import is_affine
from quartermap_deploy.passes.recovery.programs import nodes_between, program
from quartermap_deploy.passes.recovery.refusal import Refused
from quartermap_deploy.passes.recovery.unrolling import Unrolling
from quartermap_deploy.pruning.orders import OUTSIDE

Matrix = NDArray[np.float64]

LINEAR = 1e-9
"""How far a projection may depart from its matrix, of its largest value: float64 rounds to 1e-16, and a thousand
channels are added up, while a term that is not in the matrix is far larger."""
RANK = 1e-6
"""Part of the largest row below which what is left of a row is rounding: weights are float32, rounded to 6e-8, so that
a product of two of them, folded into one matrix before the export, has its rank only up to that. delta may depart by
as much from its low rank."""


@dataclass(frozen=True)
class Projections:
    """What the projections of a group compute at one position x (d_inner,): dt·x, B·x + B_offset, C·x + C_offset.

    Attributes:
        dt: (K, R, d_inner), or (K, d_inner, d_inner) where the time step has no low rank.
        dt_weight: (K, d_inner, R), with delta = dt_weight·dt·x + dt_offset, or None.
        dt_offset: (K, d_inner), to be added to the scan's delta_bias.
        B: (K, N, d_inner).
        B_offset: (K, N).
        C: (K, N, d_inner).
        C_offset: (K, N).
    """

    dt: Matrix
    dt_weight: Matrix | None
    dt_offset: Matrix
    B: Matrix
    B_offset: Matrix
    C: Matrix
    C_offset: Matrix

    @property
    def rank(self) -> int | None:
        """R, or None where the time step has no low rank."""
        return None if self.dt_weight is None else self.dt_weight.shape[2]

    def of(self, direction: int) -> Projections:
        """Those of one direction, counted from 0."""
        own: dict[str, Any] = {
            item.name: None if (matrix := getattr(self, item.name)) is None else matrix[direction, None]
            for item in fields(self)
        }
        return Projections(**own)

    def delta(self, x: Matrix) -> Matrix:
        """(…, K, d_inner, L) → delta of the same shape."""
        steps = self.dt @ x
        if self.dt_weight is not None:
            steps = self.dt_weight @ steps
        return np.asarray(steps + self.dt_offset[:, :, None])


def read_projections(group: ScanGroup, unrolling: Unrolling, concrete: Concrete) -> Projections:
    """Read the matrices of delta, B and C.

    Raises:
        Refused: if one of them is not affine in one position of the map.
    """
    run = _Projected(group, unrolling, concrete)
    offset = {name: found[0, :, :, 0] for name, found in run.on(run.nothing()).items()}
    chosen, weights = _low_rank(run, offset["delta"])
    matrices = _matrices(run, offset, chosen)
    projections = Projections(
        matrices["delta"], weights, offset["delta"], matrices["B"], offset["B"], matrices["C"], offset["C"]
    )
    check_projections(projections, group, unrolling, concrete)
    return projections


def check_projections(
    projections: Projections, group: ScanGroup, unrolling: Unrolling, concrete: Concrete
) -> None:
    """Compare delta, B and C of random maps with what the matrices give, at the sizes of `concrete`.

    Raises:
        Refused: if they differ.
    """
    run = _Projected(group, unrolling, concrete)
    x = run.random(seed=1)
    visited = run.visited(x)
    expected = {
        "delta": projections.delta(visited),
        "B": projections.B @ visited + projections.B_offset[:, :, None],
        "C": projections.C @ visited + projections.C_offset[:, :, None],
    }
    for name, found in run.on(x).items():
        error = np.abs(found - expected[name]).max()
        tolerance = 2 * RANK if name == "delta" and projections.dt_weight is not None else LINEAR
        if not error <= tolerance * np.abs(expected[name]).max():
            raise Refused(
                f"{name} is not affine in one position of {unrolling.source}, or is of another one than u"
            )


class _Projected:
    """The graph from a group's map to its delta, B and C, in the order of the steps."""

    def __init__(self, group: ScanGroup, unrolling: Unrolling, concrete: Concrete) -> None:
        self.sizes = GroupSizes.of(group, concrete)
        self.unrolling = unrolling
        names = [name for kind in ("delta", "B", "C") for name in group.inputs(kind)]
        for place in nodes_between(concrete, [unrolling.source], names):
            node = concrete.index.nodes[place]
            if not is_affine(node, concrete):
                raise Refused(
                    f"its projections go through {node.op_type} {node.name}, which is not affine in one position"
                )
        self._run = program(concrete, [unrolling.source], names)
        self._scans = len(group.places)

    @property
    def positions(self) -> int:
        """How many positions the map has."""
        return self.unrolling.form.positions

    def on(self, x: Matrix) -> dict[str, Matrix]:
        """A map (batch, d_inner, positions) → delta, B and C, each (batch, K, rows, L)."""
        found = self._run(self.unrolling.form.write(x))
        kinds = [found[start : start + self._scans] for start in range(0, len(found), self._scans)]
        return dict(zip(("delta", "B", "C"), map(self.sizes.by_direction, kinds), strict=True))

    def nothing(self) -> Matrix:
        """A map of zeros."""
        return np.zeros((self.sizes.batch, self.sizes.d_inner, self.positions))

    def random(self, seed: int) -> Matrix:
        """A random map."""
        return np.random.default_rng(seed).standard_normal(self.nothing().shape)

    def visited(self, x: Matrix) -> Matrix:
        """A map → what its steps visit, (batch, K, d_inner, L), with zeros outside of it."""
        padded = np.concatenate([x, np.zeros_like(x[:, :, :1])], axis=2)
        return np.moveaxis(padded[:, :, self.unrolling.order], 1, 2)


def _low_rank(run: _Projected, offset: Matrix) -> tuple[list[NDArray[np.int64]], Matrix | None]:
    """For each direction, the rows of delta that make all its rows, and the weights by which they do.

    All rows and no weights where that would save nothing.
    """
    d_inner = run.sizes.d_inner
    # Of a random map every column is a random mixture of the matrix's columns: as many as the rank tell all about it.
    wanted = d_inner // 2 + 8
    columns: list[Matrix] = []
    while sum(part.shape[2] for part in columns) < wanted:
        delta = run.on(run.random(seed=2 + len(columns)))["delta"] - offset[:, :, None]
        columns.append(_visiting(delta, run.unrolling.order, wanted))
    sketch = np.concatenate(columns, axis=2)[:, :, :wanted]
    rows = [_independent_rows(part, d_inner // 2) for part in sketch]
    whole = [np.arange(d_inner)] * len(rows)
    if any(found is None for found in rows):
        return whole, None
    rank = max(1, *(len(found) for found in rows if found is not None))
    weights = np.zeros((len(rows), d_inner, rank))
    chosen = []
    for direction, found in enumerate(rows):
        assert found is not None
        if len(found):
            solved = np.linalg.lstsq(sketch[direction][found].T, sketch[direction].T, rcond=None)[0]
            weights[direction, :, : len(found)] = solved.T
        # A direction of a smaller rank takes a row twice, and gives it no weight the second time.
        chosen.append(np.concatenate([found, np.zeros(rank - len(found), np.int64)]))
    return chosen, weights


def _visiting(delta: Matrix, order: NDArray[np.int64], most: int) -> Matrix:
    """Delta (batch, K, d_inner, L) at steps on the map, as many for each direction: (K, d_inner, steps of all images).

    Raises:
        Refused: if a direction has no step there.
    """
    steps = [np.flatnonzero(one != OUTSIDE)[:most] for one in order]
    fewest = min(map(len, steps))
    if not fewest:
        raise Refused("a direction visits no position of its map")
    own = np.stack([delta[:, place][..., found[:fewest]] for place, found in enumerate(steps)])
    return np.moveaxis(own, 1, 2).reshape(len(order), delta.shape[2], -1)


def _independent_rows(matrix: Matrix, most: int) -> NDArray[np.int64] | None:
    """Rows of a matrix that make all of its rows, largest first; None if it takes more than `most`."""
    rest = matrix.copy()
    norms = np.einsum("ij,ij->i", rest, rest)
    smallest = RANK**2 * norms.max()
    chosen: list[int] = []
    while norms.max() > smallest:
        if len(chosen) == most:
            return None
        row = int(norms.argmax())
        chosen.append(row)
        unit = rest[row] / np.sqrt(norms[row])
        rest -= np.outer(rest @ unit, unit)
        norms = np.einsum("ij,ij->i", rest, rest)
        norms[chosen] = 0
    return np.array(chosen, np.int64)


def _matrices(
    run: _Projected, offset: dict[str, Matrix], chosen: list[NDArray[np.int64]]
) -> dict[str, Matrix]:
    """The matrices of delta (of the chosen rows alone), B and C, column by column."""
    sizes, order = run.sizes, run.unrolling.order
    rows = {name: np.arange(len(found[0])) for name, found in offset.items() if name != "delta"}
    by_direction = [{"delta": found, **rows} for found in chosen]
    matrices = {name: np.zeros((sizes.count, len(by_direction[0][name]), sizes.d_inner)) for name in offset}
    for members in _same_positions(order):
        positions = np.unique(order[members[0]][order[members[0]] != OUTSIDE])
        slots = sizes.batch * len(positions)
        for start in range(0, sizes.d_inner, slots):
            channels = np.arange(start, min(start + slots, sizes.d_inner))
            image, slot = np.divmod(channels - start, len(positions))
            x = run.nothing()
            x[image, channels, positions[slot]] = 1
            found = run.on(x)
            for k in members:
                step = np.argsort(order[k], kind="stable")[-len(positions) :][slot]
                for name, values in found.items():
                    part = values[image, k, :, step][:, by_direction[k][name]]
                    matrices[name][k][:, channels] = (part - offset[name][k][by_direction[k][name]]).T
    return matrices


def _same_positions(order: NDArray[Any]) -> list[list[int]]:
    """The directions, grouped by the positions that they visit."""
    groups: dict[bytes, list[int]] = {}
    for k, steps in enumerate(order):
        groups.setdefault(np.sort(steps).tobytes(), []).append(k)
    return list(groups.values())
