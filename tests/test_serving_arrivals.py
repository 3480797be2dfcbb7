"""Requests on their way in: who gives way to whom."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from quartermap_deploy.serving import arrivals
from quartermap_deploy.serving.arrivals import Turns
from quartermap_deploy.serving.bodies import BODIES, SMALL, Budget
from quartermap_deploy.serving.refusal import Refusal

MIB = 1 << 20
SOON = 0.05
"""Seconds of patience here."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "PATIENCE", SOON)


class Senders:
    """Tasks that send requests, the end of which the test determines."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[str]] = []
        self.ends: list[asyncio.Event] = []

    def add(self, count: int, send: Callable[[asyncio.Event], Coroutine[Any, Any, str]]) -> None:
        for _ in range(count):
            self.ends.append(asyncio.Event())
            self.tasks.append(asyncio.ensure_future(send(self.ends[-1])))

    def outcomes(self) -> list[str]:
        """What each has come to so far: `arrived`, `waits`, or why it was refused."""
        return [task.result() if task.done() else "waits" for task in self.tasks]

    async def finish(self) -> list[str]:
        """End them all."""
        for end in self.ends:
            end.set()
        return list(await asyncio.gather(*self.tasks))


def sending(turns: Turns, seconds: float = 30) -> Callable[[asyncio.Event], Coroutine[Any, Any, str]]:
    """A sender that takes a turn until its event is set."""

    async def send(end: asyncio.Event) -> str:
        try:
            async with turns.turn(seconds):
                await end.wait()
                return "arrived"
        except Refusal as refusal:
            assert refusal.status == 503 and refusal.retry_after
            return refusal.message

    return send


def test_slow_arrivals_give_way_only_to_those_who_wait() -> None:
    async def run() -> None:
        turns, senders = Turns(3), Senders()
        senders.add(3, sending(turns))
        await asyncio.sleep(4 * SOON)
        assert senders.outcomes() == ["waits"] * 3
        senders.add(1, sending(turns))
        senders.ends[3].set()
        assert await asyncio.wait_for(senders.tasks[3], 5) == "arrived"
        first, *others = senders.outcomes()[:3]
        # The one that has been there longest, and no other.
        assert first.startswith("the request was still on its way after 0.") and "send it faster" in first
        assert others == ["waits"] * 2
        assert await senders.finish() == [first, "arrived", "arrived", "arrived"]

    asyncio.run(run())


def test_quick_arrivals_do_not_give_way_however_many_wait() -> None:
    async def run() -> None:
        turns = Turns(4)

        async def send(_: asyncio.Event) -> str:
            async with turns.turn(30):
                await asyncio.sleep(SOON / 5)
                return "arrived"

        senders = Senders()
        senders.add(200, send)
        assert await asyncio.gather(*senders.tasks) == ["arrived"] * 200

    asyncio.run(run())


def test_a_network_that_is_slow_for_all_still_gets_requests_through() -> None:
    """All begin at once, and the first ends after three times what is put up with."""

    async def run() -> None:
        turns = Turns(8)

        async def send(_: asyncio.Event) -> str:
            try:
                async with turns.turn(30):
                    await asyncio.sleep(3 * SOON)
                    return "arrived"
            except Refusal:
                return "refused"

        senders = Senders()
        senders.add(16, send)
        outcomes = await asyncio.gather(*senders.tasks)
        assert outcomes.count("arrived") >= 8, outcomes

    asyncio.run(run())


def test_many_slow_senders_are_got_rid_of_faster_and_faster() -> None:
    async def run() -> float:
        turns, senders = Turns(16), Senders()
        senders.add(100, sending(turns))
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        begin = loop.time()
        senders.add(1, sending(turns))
        senders.ends[100].set()
        assert await asyncio.wait_for(senders.tasks[100], 60) == "arrived"
        await senders.finish()
        return loop.time() - begin

    # One after the other they would take 85 times the patience; the latest is let in before the others who wait.
    assert asyncio.run(run()) < 20 * SOON


def test_of_too_many_who_wait_the_longest_are_refused_and_the_latest_gets_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arrivals, "MOST_WAITING", 50)

    async def run() -> None:
        turns, senders = Turns(4), Senders()
        senders.add(300, sending(turns))
        await asyncio.sleep(0.01)
        outcomes = senders.outcomes()
        assert outcomes.count("waits") == 54 and outcomes[:4] == ["waits"] * 4
        assert "too many requests are being received" in outcomes[4]
        senders.add(1, sending(turns))
        senders.ends[300].set()
        assert await asyncio.wait_for(senders.tasks[300], 20 * SOON) == "arrived"
        await senders.finish()
        # Nothing is lost on the way: as many turns as at the beginning.
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                await stack.enter_async_context(turns.turn(0.1))
            with pytest.raises(Refusal):
                await stack.enter_async_context(turns.turn(SOON / 10))

    asyncio.run(run())


def test_who_waits_for_a_turn_in_vain_is_told_so() -> None:
    async def run() -> None:
        turns, senders = Turns(1), Senders()
        senders.add(1, sending(turns))
        await asyncio.sleep(0)
        senders.add(1, sending(turns, SOON / 5))
        assert "too many requests are being received" in await senders.tasks[1]
        assert await senders.finish() == ["arrived", senders.outcomes()[1]]

    asyncio.run(run())


@pytest.mark.parametrize("takes_turns", [True, False])
def test_clients_that_go_away_are_no_refusal_and_leave_their_place(takes_turns: bool) -> None:
    async def run() -> None:
        turns, budget = Turns(1), Budget(MIB, 0)

        async def send() -> None:
            with budget.share() as share:
                if takes_turns:
                    async with turns.turn(30):
                        await asyncio.sleep(30)
                with share.arriving():
                    share.add(1000)
                    await asyncio.sleep(30)

        task = asyncio.ensure_future(send())
        await asyncio.sleep(2 * SOON)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with turns.turn(0.1):
            assert budget.held == 0 and not budget.small.receiving

    asyncio.run(run())


async def _hold(budget: Budget, size: int, end: asyncio.Event) -> str:
    """Send so many bytes, and the rest when the event is set."""
    try:
        with budget.share() as share, share.arriving():
            share.add(size)
            await end.wait()
            return "arrived"
    except Refusal as refusal:
        assert refusal.status == 503 and refusal.retry_after
        return refusal.message


def test_large_bodies_that_do_not_come_to_their_end_make_room() -> None:
    async def run() -> None:
        budget = Budget(64 * MIB, 0)
        senders = Senders()
        senders.add(2, lambda end: _hold(budget, 60 * MIB, end))
        senders.add(1, lambda end: _hold(budget, 64 * MIB, end))
        await asyncio.sleep(0)
        # They are not slow yet, so the next one has to come later.
        with pytest.raises(Refusal, match="have too many bytes together"), budget.share() as share:
            share.add(30 * MIB)
        # Small ones are not concerned.
        with budget.share() as share:
            share.add(SMALL)
        await asyncio.sleep(2 * SOON)
        with budget.share() as share:
            share.add(30 * MIB)
            assert budget.held == 150 * MIB
            await asyncio.sleep(0)
            outcomes = senders.outcomes()
            # The one with the most bytes.
            assert outcomes[:2] == ["waits"] * 2 and outcomes[2].startswith(
                "the request was still on its way"
            )
        assert (await senders.finish())[:2] == ["arrived"] * 2
        assert budget.held == 0 and not budget.large.receiving and not budget.small.receiving

    asyncio.run(run())


def test_much_larger_bodies_give_way_at_once() -> None:
    async def run() -> None:
        budget, senders = Budget(4 * MIB, 0), Senders()
        senders.add(4, lambda end: _hold(budget, MIB, end))
        await asyncio.sleep(0)
        with budget.share() as share:
            share.add(MIB // 8)
            await asyncio.sleep(0)
            assert senders.outcomes().count("waits") == 3
        await senders.finish()
        assert budget.held == 0

    asyncio.run(run())


def test_requests_that_have_arrived_do_not_give_way() -> None:
    async def run() -> None:
        budget = Budget(4 * MIB, 0)
        with contextlib.ExitStack() as stack:
            for _ in range(BODIES - 1):
                share = stack.enter_context(budget.share())
                with share.arriving():
                    share.add(4 * MIB)
            await asyncio.sleep(2 * SOON)
            late = stack.enter_context(budget.share())
            with pytest.raises(Refusal, match="have too many bytes together"):
                late.add(2 * MIB)
        assert budget.held == 0

    asyncio.run(run())


def test_small_requests_that_do_not_come_to_their_end_make_room() -> None:
    async def run() -> None:
        budget = Budget(4 * MIB, MIB)
        senders = Senders()
        senders.add(10, lambda end: _hold(budget, MIB // 2, end))
        await asyncio.sleep(2 * SOON)
        with budget.share() as share:
            share.add(MIB // 2)
        outcomes = await senders.finish()
        assert outcomes.count("arrived") == 9 and budget.held == 0

    asyncio.run(run())
