"""The batcher by itself: what goes together, who gets which answer, and what happens to those that wait."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartermap_deploy.errors import InputError
from quartermap_deploy.serving.batcher import LONELY, Batcher
from quartermap_deploy.serving.refusal import Refusal
from quartermap_deploy.serving.statistics import ModelStatistics, Timings, prometheus

Array = np.ndarray[Any, Any]


class Session:
    """A session whose logits tell which image they belong to; it can be held, slowed down, or made to fail."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.sizes: list[int] = []
        self.free = threading.Event()
        self.free.set()
        self.seconds = seconds
        self.fails: Callable[[Array], Exception | None] = lambda images: None

    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        (images,) = feeds.values()
        self.free.wait(30)
        time.sleep(self.seconds)
        self.sizes.append(len(images))
        if (error := self.fails(images)) is not None:
            raise error
        first = images.reshape(len(images), -1)[:, 0]
        return {"logits": np.stack([first, -first], axis=1)}


def images(*values: float, side: int = 2) -> Array:
    return np.stack([np.full((1, side, side), value, np.float32) for value in values])


async def ask(batcher: Batcher, batch: Array) -> tuple[Array, Timings]:
    """Run images, and return their logits and where the time went."""
    outputs, timings = await batcher.run({"images": batch}, len(batch))
    return outputs["logits"], timings


def run(work: Callable[[Batcher], Coroutine[Any, Any, Any]], *sessions: Session, **settings: Any) -> Any:
    """Run a coroutine with a batcher, and stop that afterwards."""

    async def inside() -> Any:
        wanted = {"max_batch": 4, "max_delay": 0.0, "queue": 64, **settings}
        batcher = Batcher(sessions, wanted.pop("statistics", ModelStatistics("m", "1")), **wanted)
        try:
            return await asyncio.wait_for(work(batcher), 30)
        finally:
            for session in (*sessions, settings.get("wide")):
                if session is not None:
                    session.free.set()
            assert await batcher.stop(10)

    return asyncio.run(inside())


async def held(batcher: Batcher, session: Session) -> asyncio.Task[Any]:
    """Keep the worker busy with one image, and return its task."""
    session.free.clear()
    task = asyncio.ensure_future(ask(batcher, images(0)))
    while batcher.waiting or not task.get_coro():
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    return task


def test_what_waits_goes_together_and_everyone_gets_their_own() -> None:
    session = Session()

    async def work(batcher: Batcher) -> None:
        first = await held(batcher, session)
        calls = [
            asyncio.ensure_future(ask(batcher, images(*values))) for values in ((1,), (2, 3), (4,), (5, 6, 7))
        ]
        await asyncio.sleep(0.02)
        assert batcher.waiting == 7
        session.free.set()
        await first
        found = [(await call)[0][:, 0].tolist() for call in calls]
        assert found == [[1], [2, 3], [4], [5, 6, 7]]

    run(work, session)
    assert session.sizes == [1, 4, 3]


def test_a_delay_lets_others_join_and_a_full_batch_does_not_wait() -> None:
    session = Session()

    async def work(batcher: Batcher) -> float:
        start = time.monotonic()
        one = asyncio.ensure_future(ask(batcher, images(1)))
        await asyncio.sleep(0.05)
        await asyncio.gather(one, ask(batcher, images(2, 3, 4)))
        return time.monotonic() - start

    assert run(work, session, max_delay=10.0) < 5
    assert session.sizes == [4]


def test_an_image_does_not_wait_longer_than_the_delay() -> None:
    session = Session()

    async def work(batcher: Batcher) -> Timings:
        timings: Timings = (await ask(batcher, images(1)))[1]
        return timings

    assert 0.2e9 <= run(work, session, max_delay=0.2).queue < 5e9


def test_who_has_long_come_alone_does_not_wait_until_others_come() -> None:
    delay = 0.03

    async def work(batcher: Batcher) -> list[int]:
        waited = []
        for value in range(LONELY + 2):
            waited.append((await ask(batcher, images(value)))[1].queue)
            # Later than the delay, whether this one waited or not.
            await asyncio.sleep(1.5 * delay)
        await asyncio.gather(*(ask(batcher, images(value)) for value in range(2)))
        return [*waited, (await ask(batcher, images(0)))[1].queue]

    *waited, after = run(work, Session(), max_delay=delay)
    assert min(waited[:LONELY]) >= 1e9 * delay and after >= 1e9 * delay
    # The machine may be busy once.
    assert min(waited[LONELY:]) < 0.5e9 * delay


def test_images_of_other_sizes_are_no_part_of_a_batch() -> None:
    session = Session()

    async def work(batcher: Batcher) -> list[list[float]]:
        first = await held(batcher, session)
        calls = [asyncio.ensure_future(ask(batcher, images(side, side=side))) for side in (2, 2, 3, 2)]
        await asyncio.sleep(0.02)
        session.free.set()
        await first
        return [(await call)[0][:, 0].tolist() for call in calls]

    assert run(work, session) == [[2], [2], [3], [2]]
    assert session.sizes == [1, 2, 1, 1]


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    session = Session()

    async def work(batcher: Batcher) -> None:
        first = await held(batcher, session)
        waiting = [asyncio.ensure_future(ask(batcher, images(value))) for value in (1, 2, 3, 4)]
        await asyncio.sleep(0.02)
        with pytest.raises(Refusal) as caught:
            await ask(batcher, images(5))
        assert (caught.value.status, caught.value.retry_after) == (503, 1)
        session.free.set()
        await asyncio.gather(first, *waiting)
        assert (await ask(batcher, images(5)))[0][0, 0] == 5

    run(work, session, queue=4)


def test_a_request_that_is_given_up_is_not_run() -> None:
    session = Session()

    async def work(batcher: Batcher) -> None:
        first = await held(batcher, session)
        gone, stays = (asyncio.ensure_future(ask(batcher, images(value))) for value in (1, 2))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.sleep(0.02)
        assert batcher.waiting == 1
        first.cancel()  # runs already, and its answer is for nobody
        session.free.set()
        assert (await stays)[0][0, 0] == 2

    run(work, session)
    assert session.sizes == [1, 1]


def test_one_that_fails_does_not_take_others_along() -> None:
    session, told = Session(), []
    session.fails = lambda batch: RuntimeError("not this one") if (batch == 2).any() else None

    async def work(batcher: Batcher) -> list[Any]:
        first = await held(batcher, session)
        calls = [asyncio.ensure_future(ask(batcher, images(value))) for value in (1, 2, 3)]
        await asyncio.sleep(0.02)
        session.free.set()
        await first
        return await asyncio.gather(*calls, return_exceptions=True)

    one, two, three = run(work, session, on_error=told.append)
    assert one[0][0, 0] == 1 and three[0][0, 0] == 3
    assert two.status == 500 and "not this one" in two.message
    assert [str(error) for error in told] == ["not this one"]


def test_what_the_session_refuses_is_the_clients_fault() -> None:
    session = Session()
    session.fails = lambda batch: InputError("too wide")

    async def work(batcher: Batcher) -> None:
        await ask(batcher, images(1))

    with pytest.raises(Refusal, match="too wide") as caught:
        run(work, session)
    assert caught.value.status == 400


def test_logits_that_are_no_numbers_are_an_error_of_their_own_request() -> None:
    session = Session()

    async def work(batcher: Batcher) -> list[Any]:
        first = await held(batcher, session)
        calls = [asyncio.ensure_future(ask(batcher, images(value))) for value in (1, np.inf, 3)]
        await asyncio.sleep(0.02)
        session.free.set()
        await first
        return await asyncio.gather(*calls, return_exceptions=True)

    one, two, three = run(work, session)
    assert one[0][0, 0] == 1 and three[0][0, 0] == 3 and "NaN or infinite" in two.message


class Joint:
    """A session of two inputs and two outputs, which says what it was given."""

    def __init__(self) -> None:
        self.given: list[dict[str, tuple[int, ...]]] = []
        self.free = threading.Event()
        self.free.set()

    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        self.free.wait(30)
        self.given.append({name: values.shape for name, values in feeds.items()})
        left, right = feeds["left"], feeds["right"]
        return {"sum": left.sum(axis=(1, 2)) + right.sum(axis=1), "right": right.astype(np.int64)}


def pair(value: float, count: int = 1, side: int = 2) -> dict[str, Array]:
    left = np.full((count, side, side), value, np.float32)
    return {"left": left, "right": np.full((count, 3), 10 * value, np.float32)}


def test_all_inputs_are_put_together_and_all_outputs_taken_apart() -> None:
    session = Joint()

    async def work(batcher: Batcher) -> None:
        session.free.clear()
        first = asyncio.ensure_future(batcher.run(pair(9), 1))
        await asyncio.sleep(0.05)
        wanted = [(1.0, 1, 2), (2.0, 2, 2), (3.0, 1, 3), (4.0, 1, 2)]
        calls = [
            asyncio.ensure_future(batcher.run(pair(value, count, side), count))
            for value, count, side in wanted
        ]
        await asyncio.sleep(0.02)
        session.free.set()
        await first
        for call, (value, count, side) in zip(calls, wanted, strict=True):
            outputs, _ = await call
            assert outputs["sum"].tolist() == [value * side * side + 30 * value] * count
            assert outputs["right"].tolist() == [[10 * value] * 3] * count
            assert outputs["right"].dtype == np.int64

    run(work, session)  # type: ignore[arg-type]
    # Of another size in one input is another batch.
    assert [given["left"] for given in session.given] == [(1, 2, 2), (3, 2, 2), (1, 3, 3), (1, 2, 2)]
    assert [given["right"] for given in session.given] == [(1, 3), (3, 3), (1, 3), (1, 3)]


def test_a_model_without_a_batch_runs_one_request_at_a_time() -> None:
    class Whole:
        """A session whose output belongs to no entry of a batch."""

        def __init__(self) -> None:
            self.calls = 0
            self.free = threading.Event()
            self.free.set()

        def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
            self.free.wait(30)
            self.calls += 1
            return {"total": np.asarray(feeds["images"].sum())}

    session = Whole()

    async def work(batcher: Batcher) -> list[float]:
        session.free.clear()
        calls = [
            asyncio.ensure_future(batcher.run({"images": images(*range(value))}, 1)) for value in range(1, 5)
        ]
        await asyncio.sleep(0.02)
        session.free.set()
        return [float((await call)[0]["total"]) for call in calls]

    # The delay is for others to join, and none can.
    start = time.monotonic()
    found = run(work, session, joins=False, max_delay=20.0)  # type: ignore[arg-type]
    assert time.monotonic() - start < 10
    assert found == [0, 4, 12, 24] and session.calls == 4


def test_an_output_that_is_shorter_than_its_batch_is_an_error() -> None:
    class Short:
        free = threading.Event()

        def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
            return {"logits": feeds["images"][:1], "more": feeds["images"]}

    async def work(batcher: Batcher) -> None:
        await ask(batcher, images(1, 2))

    with pytest.raises(Refusal, match="1 rows of 'logits' for 2 images"):
        run(work, Short())  # type: ignore[arg-type]


def test_stopping_answers_what_waits_and_takes_no_more() -> None:
    session = Session(seconds=0.02)

    async def work(batcher: Batcher) -> list[float]:
        calls = [asyncio.ensure_future(ask(batcher, images(value, value))) for value in range(6)]
        await asyncio.sleep(0)
        assert await batcher.stop(10)
        with pytest.raises(Refusal, match="stopping"):
            await ask(batcher, images(9))
        return [float((await call)[0][0, 0]) for call in calls]

    assert run(work, session, max_delay=60.0) == [0, 1, 2, 3, 4, 5]


def test_a_session_that_never_returns_does_not_hold_up_the_end_for_ever() -> None:
    session = Session()

    async def work(batcher: Batcher) -> None:
        first = await held(batcher, session)
        assert not await batcher.stop(0.05)
        session.free.set()
        await first

    run(work, session)


def test_a_batch_that_comes_alone_is_run_by_the_wide_session_and_many_side_by_side() -> None:
    """From one client to a crowd, and back."""
    wide, narrow = Session(), Session()
    together, most = 0, []

    def enter(batch: Array) -> None:
        nonlocal together
        together += 1
        most.append(together)
        time.sleep(0.01)
        together -= 1

    wide.fails = narrow.fails = enter  # type: ignore[assignment]

    async def work(batcher: Batcher) -> None:
        for value in range(3):
            assert (await ask(batcher, images(value, value)))[0][0, 0] == value
        assert (wide.sizes, narrow.sizes) == ([2, 2, 2], [])
        # While a batch has all cores, none is run beside it, whoever waits.
        calls = [await held(batcher, wide)]
        calls += [asyncio.ensure_future(ask(batcher, images(value, value))) for value in range(1, 9)]
        await asyncio.sleep(0.05)
        assert batcher.waiting == 16 and len(wide.sizes) == 3 and not narrow.sizes
        wide.free.set()
        found = await asyncio.gather(*calls)
        assert [logits[0, 0] for logits, _ in found] == list(range(9))
        assert (wide.sizes[3:], narrow.sizes) == ([1], [4, 4, 4, 4]) and max(most) == 2
        narrow.sizes.clear()
        await ask(batcher, images(1))
        assert (wide.sizes[-1], narrow.sizes) == (1, [])

    # One session for both workers, as ONNX Runtime's of one thread.
    run(work, narrow, narrow, wide=wide)


def test_less_than_a_batch_for_each_worker_goes_to_the_wide_session() -> None:
    wide, narrow = Session(), Session()

    async def work(batcher: Batcher) -> None:
        first = await held(batcher, wide)
        calls = [asyncio.ensure_future(ask(batcher, images(value))) for value in range(7)]
        await asyncio.sleep(0.02)
        wide.free.set()
        await asyncio.gather(first, *calls)
        assert (wide.sizes, narrow.sizes) == ([1, 4, 3], [])

    run(work, narrow, narrow, narrow, wide=wide)


def test_stopping_while_the_wide_session_runs_ends_all_workers() -> None:
    wide, narrow = Session(), Session()

    async def work(batcher: Batcher) -> None:
        calls = [await held(batcher, wide)]
        calls += [asyncio.ensure_future(ask(batcher, images(value))) for value in range(1, 6)]
        await asyncio.sleep(0.02)
        stopped = asyncio.ensure_future(batcher.stop(10))
        await asyncio.sleep(0.02)
        wide.free.set()
        assert await stopped and not batcher.busy
        assert [float((await call)[0][0, 0]) for call in calls] == list(range(6))

    run(work, narrow, narrow, narrow, wide=wide)


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=40),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.002]),
    st.booleans(),
)
def test_every_request_gets_its_own_answer_once(
    sizes: list[int], workers: int, delay: float, beside: bool
) -> None:
    sessions = [Session(seconds=0.0005) for _ in range(workers)]
    wide = Session(seconds=0.0005) if beside else None
    statistics = ModelStatistics("m", "1")

    async def work(batcher: Batcher) -> None:
        async def one(place: int, size: int) -> None:
            await asyncio.sleep(0.0003 * (place % 5))
            values = [100 * place + offset for offset in range(size)]
            start = time.perf_counter_ns()
            logits, timings = await ask(batcher, images(*values))
            spent = time.perf_counter_ns() - start
            assert logits[:, 0].tolist() == values
            # Each part is some of the time that the request took, and the session sleeps for half a millisecond.
            assert min(timings.queue, timings.input, timings.output) > 0 and timings.infer >= 500_000
            assert timings.queue + timings.input + timings.infer + timings.output <= spent

        await asyncio.gather(*(one(place, size) for place, size in enumerate(sizes)))
        assert batcher.waiting == 0 and statistics.pending == 0

    run(work, *sessions, max_delay=delay, queue=1000, statistics=statistics, wide=wide)
    ran = [size for session in [*sessions, *([wide] if wide else [])] for size in session.sizes]
    assert sum(ran) == sum(sizes) and max(ran) <= 4 and len(ran) == statistics.executions
    assert sum(size * batch.infer.count for size, batch in statistics.batches.items()) == sum(sizes)


def test_metrics_have_a_head_for_each_name_and_a_line_for_each_model() -> None:
    one, two = ModelStatistics("one", "1"), ModelStatistics("two", "1")
    one.succeeded(3, 5_000_000, Timings(1000, 2000, 3_000_000, 4000))
    lines = prometheus([one, two]).splitlines()
    assert 'nv_inference_count{model="one",version="1"} 3' in lines
    assert 'nv_inference_request_duration_us{model="one",version="1"} 5000' in lines
    assert 'nv_inference_compute_infer_duration_us{model="one",version="1"} 3000' in lines
    assert 'nv_inference_request_success{model="two",version="1"} 0' in lines
    assert sum(line.startswith("# TYPE") for line in lines) == sum(
        line.startswith("# HELP") for line in lines
    )
    assert len(lines) == 4 * sum(line.startswith("# TYPE") for line in lines)
