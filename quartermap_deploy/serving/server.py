"""Starting the server, being ready, and stopping without losing a request.

The ports answer from the first moment on, and readiness is refused until the sessions are open and have been proved on
the golden inputs. On SIGTERM or SIGINT readiness goes first. Requests that were taken on are answered, others are
refused with 503, or UNAVAILABLE over gRPC, and then the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from quartermap_deploy import __version__
from quartermap_deploy.bundle import Bundle
from quartermap_deploy.errors import MissingDependencyError, ServeError
from quartermap_deploy.serving.batcher import Batcher
from quartermap_deploy.serving.bodies import Budget
from quartermap_deploy.serving.callers import Callers
from quartermap_deploy.serving.decoders import Decoders
from quartermap_deploy.serving.grpc_api import CONCURRENT, GrpcApi
from quartermap_deploy.serving.http_api import HttpApi
from quartermap_deploy.serving.images import MOST_HELD
from quartermap_deploy.serving.logs import EventLog
from quartermap_deploy.serving.memory import give_back_large_blocks
from quartermap_deploy.serving.models import VERSION, ImageModel, ServedModel, TensorModel
from quartermap_deploy.serving.options import ServeOptions
from quartermap_deploy.serving.startup import (
    Plan,
    Sessions,
    check_golden,
    make_plan,
    note_form,
    open_sessions,
    without_waste,
)
from quartermap_deploy.serving.state import State
from quartermap_deploy.serving.statistics import ModelStatistics
from quartermap_deploy.targets.onnxruntime.threads import default_threads

Result = TypeVar("Result")

SWITCH_INTERVAL = 0.001
"""Seconds after which a thread hands Python on: a worker that has its result would wait five times as long."""


def check_dependencies() -> None:
    """Check that what serving needs is installed.

    Raises:
        MissingDependencyError: if it is not.
    """
    # Read when gRPC is imported. What its core has to say comes as an error of Python, too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        import aiohttp  # noqa: F401
        import grpc  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError.for_extra("serving needs", error.name, "serve") from error


def serve(
    bundle: Bundle,
    options: ServeOptions,
    log: EventLog,
    started: Callable[[dict[str, Any]], None] = lambda addresses: None,
    leave: Callable[[ServeError | None], None] = lambda error: None,
) -> None:
    """Serve a bundle until a signal ends it.

    Args:
        bundle: what to serve; its files were checked when it was loaded.
        options: how.
        log: told what happens.
        started: told the addresses once the server is ready.
        leave: called when the server has stopped, with the error that comes of it, if any: at once where requests are
            left, and where threads still load or run a model or decode an image. They cannot be ended; Python waits for
            decoders as it exits, and a runtime that it takes the threads from aborts the process. So a program calls
            `os._exit` here. Where this returns, the server ends as usual.

    Raises:
        MissingDependencyError: if what serving needs is not installed.
        ServeError: if the options do not fit the bundle, a port is taken, or requests were still open when the time for
            stopping was over.
        ParityError: if the target departs from the golden outputs.
        BundleError: if the target's runtime refuses the bundle.
    """
    check_dependencies()
    plan = make_plan(bundle, options)
    from PIL import Image

    give_back_large_blocks()
    before = sys.getswitchinterval(), Image.MAX_IMAGE_PIXELS
    sys.setswitchinterval(SWITCH_INTERVAL)
    # The limit of `serving.images` is lower, and says so.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with log.libraries():
            asyncio.run(_Server(plan, log, started, leave).run())
    finally:
        sys.setswitchinterval(before[0])
        Image.MAX_IMAGE_PIXELS = before[1]


class _Server:
    """One run of the server."""

    def __init__(
        self,
        plan: Plan,
        log: EventLog,
        started: Callable[[dict[str, Any]], None],
        leave: Callable[[ServeError | None], None],
    ) -> None:
        self.plan, self.options, self.log, self.started, self.leave = plan, plan.options, log, started, leave
        self.loading = False
        self.batcher: Batcher | None = None
        decoded = MOST_HELD if plan.images is not None else 0
        self.budget = Budget(self.options.max_body, self.options.queue * plan.image_bytes, decoded)
        self.decoders = Decoders(self.budget)

    async def run(self) -> None:
        """Serve until a signal comes."""
        self.state = State()
        self.signalled = asyncio.Event()
        self.insistent = asyncio.Event()
        begin = time.monotonic()
        error: ServeError | None = None
        with self._signals():
            async with contextlib.AsyncExitStack() as stack:
                stack.callback(self.decoders.close)
                http_port = await self._listen_http(stack)
                grpc_port = await self._listen_grpc(stack)
                addresses = {
                    "http": f"http://{_host(self.options.host)}:{http_port}",
                    "grpc": f"{_host(self.options.host)}:{grpc_port}",
                }
                self.log.info("listening", **addresses, pid=os.getpid(), version=__version__)
                self._warn()
                if await self._load():
                    self.log.info("ready", seconds=round(time.monotonic() - begin, 3))
                    self.started({**addresses, "models": list(self.state.models)})
                    await self.signalled.wait()
                if left := await self._drain():
                    error = ServeError(
                        f"{left} requests were still open when the time for stopping was over; give them longer with "
                        "--shutdown-timeout, and do not send a second signal"
                    )
                    self.leave(error)
            # Only now, as the last answers were on their way.
            if self._busy:
                self.leave(error)
        if error is not None:
            raise error

    @property
    def _busy(self) -> bool:
        """Whether a thread does what nobody can end."""
        running = self.batcher is not None and self.batcher.busy
        return self.loading or running or self.decoders.busy

    async def _load(self) -> bool:
        """Open and check the sessions, and take requests; return whether no signal came before."""
        plan = self.plan
        loading = asyncio.ensure_future(_in_thread(self._sessions))
        waiting = asyncio.ensure_future(self.signalled.wait())
        await asyncio.wait({loading, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self.signalled.is_set():
            # Nobody was promised anything yet, and what it comes to does not matter any more.
            loading.add_done_callback(lambda done: done.cancelled() or done.exception())
            return False
        sessions = loading.result()
        statistics = ModelStatistics(plan.model.name, VERSION)
        self.batcher = Batcher(
            sessions.workers,
            statistics,
            max_batch=plan.model.max_batch,
            max_delay=self.options.max_delay,
            queue=self.options.queue,
            joins=plan.model.joins,
            wide=sessions.wide,
            on_error=lambda error: self.log.error("session_failed", error=repr(error)[:1000]),
        )
        model = TensorModel(plan.model, self.batcher, statistics)
        models: dict[str, ServedModel] = {plan.model.name: model}
        if plan.images is not None:
            images = plan.images
            models[images.description.name] = ImageModel(
                images.description,
                model,
                images.interface,
                self.decoders,
                images.activation if images.shows == "classes" else None,
            )
        self.state.become_ready(models)
        return True

    def _sessions(self) -> Sessions:
        self.loading = True
        try:
            return self._checked()
        finally:
            self.loading = False

    def _checked(self) -> Sessions:
        sessions = open_sessions(self.plan)
        for note in note_form(self.plan, sessions):
            self.log.warning("providers", note=note)
        self.log.info(
            "loaded",
            bundle=str(self.plan.bundle.path),
            **({} if self.plan.bundle.changed is None else {"file": str(self.plan.bundle.changed)}),
            target=self.plan.target,
            workers=len(sessions.workers),
            threads=self.plan.threads,
            wide=self.plan.wide,
            scans=self.plan.model.properties["scans"],
            providers=self.plan.model.properties["providers"],
            max_batch=self.plan.model.max_batch,
        )
        if self.signalled.is_set():
            return sessions
        worst = check_golden(self.plan, sessions.different())
        self.log.info("golden_inputs_passed", worst_relative_error=float(f"{worst:.3g}"))
        chosen = without_waste(self.plan, sessions)
        if chosen is not sessions:
            self.log.info("a_core_for_each_batch", reason="all cores are hardly faster for one")
        return chosen

    async def _drain(self) -> int:
        """Refuse what comes, and wait for what was taken on; return how many requests are left all the same."""
        self.state.stop()
        deadline = time.monotonic() + self.options.shutdown_timeout
        self.log.info("stopping", open_requests=self.state.open)
        ending = asyncio.ensure_future(self._end(deadline))
        hurry = asyncio.ensure_future(self.insistent.wait())
        await asyncio.wait({ending, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        ending.cancel()
        left = self.state.open
        self.log.info("stopped", requests=self.state.taken_on, answered=self.state.answered, still_open=left)
        return left

    async def _end(self, deadline: float) -> None:
        """Wait until all is answered and the workers have ended, or until a time of the monotonic clock."""
        await self.state.idle(deadline - time.monotonic())
        if self.batcher is not None:
            await self.batcher.stop(deadline - time.monotonic())

    async def _listen_http(self, stack: contextlib.AsyncExitStack) -> int:
        from quartermap_deploy.serving.http_listener import Listener

        api = HttpApi(
            self.state,
            self.log,
            self.plan,
            self.decoders,
            self.budget,
            Callers(self.options.host, self.options.allow_hosts),
            max_body=self.options.max_body,
            receive_timeout=self.options.receive_timeout,
        )
        listener = Listener(api.application(), self._malformed)
        stack.push_async_callback(listener.close)
        try:
            return await listener.start(self.options.host, self.options.port)
        except OSError as error:
            raise self._cannot_listen(self.options.port, error) from error

    def _malformed(self, status: int, reason: str) -> None:
        self.log.seldom("malformed", "warning", "refused", status=status, reason=reason)

    async def _listen_grpc(self, stack: contextlib.AsyncExitStack) -> int:
        import grpc

        server = grpc.aio.server(
            maximum_concurrent_rpcs=CONCURRENT,
            options=[
                # Two servers must not share a port without a word.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self.options.max_body),
                ("grpc.max_send_message_length", -1),
                # Windows that grow with the speed of the network would hold what nobody has asked for yet.
                ("grpc.http2.bdp_probe", 0),
            ],
        )
        api = GrpcApi(
            self.state,
            self.log,
            self.budget,
            max_body=self.options.max_body,
            receive_timeout=self.options.receive_timeout,
        )
        server.add_generic_rpc_handlers(api.handlers())
        try:
            port: int = server.add_insecure_port(f"{_host(self.options.host)}:{self.options.grpc_port}")
        except RuntimeError as error:
            raise self._cannot_listen(self.options.grpc_port, error) from error
        await server.start()
        stack.push_async_callback(server.stop, 1.0)
        return port

    def _cannot_listen(self, port: int, error: Exception) -> ServeError:
        taken = isinstance(error, RuntimeError) or getattr(error, "errno", None) == errno.EADDRINUSE
        reason = "something listens there already" if taken else str(error)
        return ServeError(
            f"cannot listen at {_host(self.options.host)}:{port}: {reason}; choose another port with --port and "
            "--grpc-port, or another address with --host"
        )

    def _warn(self) -> None:
        cores = default_threads()
        if (self.options.workers or 0) > cores:
            self.log.warning(
                "more_workers_than_cores",
                workers=self.options.workers,
                cores=cores,
                reason="each worker loads the model anew and gets one thread; they only take turns",
            )
        host = self.options.host
        if host not in ("localhost", "::1") and not host.startswith("127."):
            self.log.warning(
                "open_to_others",
                host=host,
                reason="there is neither encryption nor a check of who asks; put a proxy before the server",
            )

    @contextlib.contextmanager
    def _signals(self) -> Any:
        """While open, the first SIGTERM or SIGINT asks the server to stop, and a second one not to wait."""
        loop = asyncio.get_running_loop()

        def received() -> None:
            (self.insistent if self.signalled.is_set() else self.signalled).set()

        numbers = [signal.SIGTERM, signal.SIGINT]
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            if platform.system() == "Windows":
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(received))
            else:
                loop.add_signal_handler(number, received)
        try:
            yield
        finally:
            for number in numbers:
                if platform.system() != "Windows":
                    loop.remove_signal_handler(number)
                signal.signal(number, before[number] or signal.SIG_DFL)


async def _in_thread(function: Callable[[], Result]) -> Result:
    """Run a function in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def work() -> None:
        result: Result | None = None
        error: BaseException | None = None
        try:
            result = function()
        except BaseException as problem:
            error = problem
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="startup", daemon=True).start()
    return await future


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
