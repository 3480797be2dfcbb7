"""The timing core: turns, ratios within a round, and what it refuses."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from quartermap_deploy.bench import Timing, interleave, measured, scatter
from quartermap_deploy.errors import InputError


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: Callable[[], float]) -> Callable[[], None]:
        """Return a function that takes this long."""

        def run() -> None:
            self.now += seconds()

        return run


class Steps:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.titles: list[tuple[str, int | None]] = []
        self.units = 0

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        self.titles.append((title, total))

        def advance(units: int) -> None:
            self.units += units

        yield advance


def test_warm_up_rounds_run_but_do_not_count() -> None:
    clock = Clock()
    seconds = itertools.chain([100.0, 100.0], itertools.count(1.0))
    timing = interleave({"a": clock.work(lambda: next(seconds))}, 3, warmup=2, clock=clock)["a"]
    assert timing.samples == (1.0, 2.0, 3.0)
    assert (timing.median, timing.minimum, timing.maximum) == (2.0, 1.0, 3.0)


def test_functions_run_in_turns_and_the_order_is_shuffled() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleave(functions, 20, warmup=0, rest=0)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(order) == list("abc") for order in rounds)
    followers = {pair for order in rounds for pair in itertools.pairwise(order)}
    assert len(followers) == 6, "some function never ran right after some other one"
    assert list(timings) == ["a", "b", "c"]


def test_worker_threads_get_time_to_stop_before_each_call() -> None:
    waits: list[float] = []
    ended = time.perf_counter()

    def call() -> None:
        nonlocal ended
        waits.append(time.perf_counter() - ended)
        ended = time.perf_counter()

    interleave({"a": call, "b": call}, 3, warmup=0, rest=0.01)
    assert min(waits) >= 0.01


def test_a_machine_that_slows_down_does_not_change_the_ratio() -> None:
    clock = Clock()
    pace = itertools.count(1)

    def slowing(factor: float) -> Callable[[], None]:
        # Each round is slower than the one before, as on a machine that others use too.
        return clock.work(lambda: factor * (1 + next(pace) // 2))

    timings = interleave({"a": slowing(1.0), "b": slowing(2.0)}, 9, warmup=0, clock=clock)
    assert timings["b"].ratio(timings["a"]) == pytest.approx(2.0, rel=0.2)
    assert timings["b"].maximum / timings["a"].minimum > 8


def test_ratio_compares_calls_of_the_same_round() -> None:
    ours, theirs = Timing((2.0, 30.0, 8.0)), Timing((1.0, 10.0, 2.0))
    assert ours.ratio(theirs) == 3.0
    assert theirs.ratio(ours) == pytest.approx(1 / 3)
    assert ours.ratio_spread(theirs) == (2.5, 3.5)
    assert ours.ratio(ours) == 1.0
    assert Timing((2.0,)).ratio_spread(Timing((1.0,))) == (2.0, 2.0)


def test_the_speed_of_a_function_is_the_median_of_its_rounds_and_not_a_ratio_of_medians() -> None:
    first = Timing((1.0, 4.0, 9.0))
    other = Timing((2.0, 1.0, 3.0))
    # Rounds: 1/2, 4, 3. Medians: 4 and 2.
    assert first.ratio(other) == 3.0
    values = measured(other, first, batch=6)
    assert values["speed"] == 3.0
    assert values["speed_quartiles"] == [1.75, 3.5]
    assert (values["median_ms"], values["minimum_ms"], values["maximum_ms"]) == (2000.0, 1000.0, 3000.0)
    assert values["images_per_second"] == 3.0


def test_progress_sees_every_round() -> None:
    steps = Steps()
    interleave({"a": lambda: None, "b": lambda: None}, 4, warmup=1, progress=steps)
    assert steps.titles == [("timing 2 in turns", 5)] and steps.units == 5


def test_the_garbage_collector_waits_and_comes_back_even_after_an_error() -> None:
    collecting: list[bool] = []

    def fail() -> None:
        collecting.append(gc.isenabled())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave({"a": fail}, 1)
    assert collecting == [False] and gc.isenabled()


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 0), (-1, 2), (1, -1)])
def test_too_few_rounds_are_refused(repeats: int, warmup: int) -> None:
    with pytest.raises(InputError, match="must be at least"):
        interleave({"a": lambda: None}, repeats, warmup)


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to time"):
        interleave({}, 3)


def test_timings_of_different_rounds_are_not_compared() -> None:
    with pytest.raises(InputError, match="in one call of interleave"):
        Timing((1.0,)).ratio(Timing((1.0, 2.0)))


@pytest.mark.parametrize(
    ("quartiles", "said"),
    [
        ((0.99, 1.02), None),
        ((1.3, 1.6), None),
        ((0.61, 2.03), "whether it is faster"),
        ((1.3, 2.03), "by how much it is faster"),
        ((0.4, 0.7), "by how much it is slower"),
    ],
)
def test_rounds_that_scatter_tell_little(quartiles: tuple[float, float], said: str | None) -> None:
    assert scatter({"speed_quartiles": list(quartiles)}) == said


def test_a_scattered_speed_is_told_and_not_shown_as_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A table that is as narrow as a terminal breaks its cells.
    monkeypatch.delenv("COLUMNS", raising=False)
    from quartermap_deploy.cli.bench import tell_scatter
    from quartermap_deploy.cli.results import show
    from quartermap_deploy.tables.timing import result_table

    times = {
        "median_ms": 1,
        "minimum_ms": 1,
        "maximum_ms": 1,
        "images_per_second": 1,
        "target": "onnxruntime",
    }
    results = [
        {"name": "a", "speed": 1.0, "speed_quartiles": [1.0, 1.0], **times},
        {"name": "b", "speed": 0.97, "speed_quartiles": [0.61, 2.03], **times},
    ]
    show(result_table({"batch": 1, "threads": 1, "repeats": 3, "unit": "images", "bundles": results}))
    tell_scatter(results)
    shown = capsys.readouterr()
    assert "1.00 × [1.00 – 1.00]" in shown.out and "? [0.61 – 2.03]" in shown.out and "0.97" not in shown.out
    (line,) = shown.err.splitlines()
    assert "the rounds of b are too scattered to tell whether it is faster" in line
    assert "more --repeats" in line
