"""Timing that can be believed: everything that is compared runs in turns, in one process.

A shared machine changes its speed from one second to the next, so two medians that were taken one after the other
cannot be compared. `interleave` runs one call of each function per round, in an order that is shuffled anew for every
round, and `Timing.ratio` compares calls of the same round only. Before each call it rests: worker threads spin for some
milliseconds after their work, in case more comes, and would take the cores from whatever runs next. Without the rest,
on two cores, a session of ONNX Runtime that followed another one took 1.8 times as long as alone.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quartermap_deploy.errors import InputError
from quartermap_deploy.progress import SILENT, Progress

__all__ = ["Timing", "interleave", "measured", "scatter"]

SCATTERED = 1.25
"""How many times the lower quartile of a ratio the upper one may be; on a quiet machine it is 1.02 or so."""


@dataclass(frozen=True)
class Timing:
    """How long the calls of one function took.

    Attributes:
        samples: seconds of each call, one per round, in order.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the calls, in seconds."""
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        """Shortest call, in seconds."""
        return min(self.samples)

    @property
    def maximum(self) -> float:
        """Longest call, in seconds."""
        return max(self.samples)

    def ratio(self, other: Timing) -> float:
        """Return how many times as long as `other` this takes: the median over the rounds, 2 for twice as slow.

        Raises:
            InputError: if the two were not timed in the same rounds.
        """
        return statistics.median(self._ratios(other))

    def ratio_spread(self, other: Timing) -> tuple[float, float]:
        """Return the lower and the upper quartile of the ratios, between which half of the rounds lie.

        Raises:
            InputError: if the two were not timed in the same rounds.
        """
        ratios = self._ratios(other)
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        return lower, upper

    def _ratios(self, other: Timing) -> list[float]:
        if len(self.samples) != len(other.samples):
            raise InputError(
                f"timings of {len(self.samples)} and {len(other.samples)} rounds cannot be compared; time both in one "
                "call of interleave"
            )
        return [mine / theirs for mine, theirs in zip(self.samples, other.samples, strict=True)]


def interleave(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 2,
    progress: Progress = SILENT,
    clock: Callable[[], float] = time.perf_counter,
    rest: float = 0.02,
) -> dict[str, Timing]:
    """Time functions in turns.

    Each round calls every function once. The order is shuffled, so that none always runs after the same other one, and
    the garbage collector waits until the last round is over.

    Args:
        functions: what to time, by name.
        repeats: rounds that are timed, at least 1.
        warmup: rounds before them that are not.
        progress: shows the rounds.
        clock: seconds since any fixed moment.
        rest: seconds to wait before each call, until the threads of the one before it have stopped spinning.

    Returns:
        The timings, by the names and in the order of `functions`.

    Raises:
        InputError: if repeats or warmup is too small, or there is nothing to time.
    """
    if repeats < 1 or warmup < 0:
        raise InputError(
            f"repeats = {repeats} and warmup = {warmup}; repeats must be at least 1, warmup at least 0"
        )
    if not functions:
        raise InputError("there is nothing to time")
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    collecting = gc.isenabled()
    with progress.step(f"timing {len(names)} in turns", total=warmup + repeats) as advance:
        gc.collect()
        gc.disable()
        try:
            for round_number in range(warmup + repeats):
                for name in order.sample(names, len(names)):
                    time.sleep(rest)
                    start = clock()
                    functions[name]()
                    end = clock()
                    if round_number >= warmup:
                        seconds[name].append(end - start)
                advance(1)
        finally:
            if collecting:
                gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def scatter(result: Mapping[str, Any]) -> str | None:
    """Say what the rounds of a result of `measured` are too scattered to tell, or None where they agree well enough."""
    low, high = result["speed_quartiles"]
    if high <= SCATTERED * low:
        return None
    return f"{'whether' if low <= 1 <= high else 'by how much'} it is {'slower' if high < 1 else 'faster'}"


def measured(timing: Timing, first: Timing, batch: int) -> dict[str, Any]:
    """Return the numbers of one function as plain values for JSON.

    Args:
        timing: its calls.
        first: those of the function that its speed is relative to; 2 is twice as fast.
        batch: images per call.
    """
    # The ratio of speeds is the ratio of times the other way round, and so are its quartiles.
    low, high = first.ratio_spread(timing)
    return {
        "median_ms": timing.median * 1e3,
        "minimum_ms": timing.minimum * 1e3,
        "maximum_ms": timing.maximum * 1e3,
        "images_per_second": batch / timing.median,
        "speed": first.ratio(timing),
        "speed_quartiles": [low, high],
    }
