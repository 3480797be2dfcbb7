"""Count the machine instructions of the kernels of several states: that on tensor cores, and the general one.

What is counted is a warp's walk over a chunk, with 16 states, at most 8 ranks, and 8 warps in a team that scans its
segments in turns. What blocks tell each other where a direction is divided is left out. Of the general kernel the loop
over the states alone is counted, without the time step and without staging B and C, for maps of 56 × 56.
"""

from __future__ import annotations

from collections.abc import Iterator

from machine_code import Loop, walk

STATES = 16
WARPS = 8
RANKS_AT_ONCE = 4
"""That a lane stages in one turn of the loop."""
RANKS = 8
SEGMENTS_AT_ONCE = 4
GENERAL_ELEMENTS = 14
"""Of a thread: 7 positions of 2 channels."""
SHUFFLES = 5
GENERAL_WARPS = 7
GENERAL_WARPS_AT_ONCE = 4


def count_states(function: Loop, tiles: int) -> dict[str, float]:
    """Count instructions for each element over all states, and special functions; the mean of the four directions."""
    elements = 4 * tiles
    chunks = [loop for loop in _loops(function) if any(_is_state(each, tiles) for each in loop.inside)]
    if len(chunks) != 4:
        raise ValueError(f"{len(chunks)} walks over chunks; expected one for each direction")
    totals = {"instructions": 0.0, "each state": 0.0, "special functions": 0.0}
    for chunk in chunks:
        state = next(loop for loop in chunk.inside if _is_state(loop, tiles))
        one = _state(state, tiles)
        # The other loops are that over blocks of ranks, run once, and that which stages ranks.
        others = [loop for loop in chunk.inside if loop is not state]
        once = len(chunk.own) + sum(_times(loop) * len(loop.own) for loop in others)
        totals["each state"] += one / elements / 4
        totals["instructions"] += (once + STATES * one) / elements / 4
        special = chunk.kinds["MUFU"] + STATES * state.kinds["MUFU"]
        totals["special functions"] += special / elements / 4
    return totals


def count_general(function: Loop) -> dict[str, float]:
    """Count instructions of the general kernel for each element and state, in its loop over the states alone."""
    (state,) = [
        loop
        for loop in _loops(function)
        if loop.kinds["SHFL"] and any(each.kinds["SHFL"] for each in loop.inside)
    ]
    shuffles = sum(len(loop.own) for loop in state.inside if loop.kinds["SHFL"])
    warps = sum(len(loop.own) for loop in state.inside if loop.kinds["FSEL"] and not loop.kinds["SHFL"])
    own = len(state.own) - state.side_branch() + SHUFFLES * shuffles
    own += warps * GENERAL_WARPS / GENERAL_WARPS_AT_ONCE
    return {
        "each state": own / GENERAL_ELEMENTS,
        "instructions": STATES * own / GENERAL_ELEMENTS,
        "special functions": STATES * state.kinds["MUFU"] / GENERAL_ELEMENTS,
    }


def _loops(function: Loop) -> Iterator[Loop]:
    return (loop for loop, _ in walk(function, lambda _: 1.0))


def _is_state(loop: Loop, tiles: int) -> bool:
    """Whether a loop is that over the states: powers of two for a task and its segments, and a team's two barriers."""
    return loop.kinds["MUFU"] > 4 * tiles and loop.kinds["BAR"] == 2


def _state(loop: Loop, tiles: int) -> float:
    """Return what a warp issues for a state; of the walk over the segments its share."""
    chains = loop.kinds["MUFU"] - 4 * tiles
    segments = 2 * chains * WARPS
    told = next(each for each in loop.inside if each.kinds["STS"] and each.kinds["LDS"])
    scan = loop.side_branch() + len(told.own) * segments / SEGMENTS_AT_ONCE
    return len(loop.own) - loop.side_branch() + scan / WARPS


def _times(loop: Loop) -> float:
    return RANKS / RANKS_AT_ONCE if loop.kinds["LDG"] >= RANKS_AT_ONCE and loop.kinds["STS"] else 1.0
