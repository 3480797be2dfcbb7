"""Listening for HTTP: errors below the application, of which aiohttp would make pages of text, are JSON here, too."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from quartermap_deploy.serving.pace import Pace, PacedTransport

KEEPALIVE = 75.0
"""Seconds after which a connection that sends no request, or not all of its head, is closed."""
LINGERING = 2.0
"""Seconds in which the rest of a refused body is read and thrown away, as a client may send first and read then."""
OTHER_FILES, LEAST_CONNECTIONS = 64, 8
"""Files that the process needs beside its connections over HTTP, and connections that it takes in any case."""
Told = Callable[[int, str], None]


class _Connection(web.RequestHandler):
    """A connection."""

    __slots__ = ("_pace", "_paced", "_told")

    def __init__(self, told: Told, pace: Pace, manager: web.Server, **settings: Any) -> None:
        super().__init__(manager, **settings)
        self._told, self._pace = told, pace

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; where there are too many connections, the oldest that is not in use gives way."""
        assert self._manager is not None
        others = self._manager.connections
        self._paced = PacedTransport(cast(asyncio.Transport, transport), self._pace)
        super().connection_made(cast(asyncio.Transport, self._paced))
        if len(others) >= _most_connections():
            idle = next((other for other in others if other._current_request is None), self)
            idle.force_close()

    def data_received(self, data: bytes) -> None:
        """Read some bytes."""
        start = time.perf_counter()
        super().data_received(data)
        # Reading them from the system takes about as long again.
        self._paced.spend(2 * (time.perf_counter() - start))
        self._paced.received(len(data))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no request that the application could see."""
        if status >= 500:
            self.log_exception("Error handling request", exc_info=exc)
            message = None
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was begun already")
        reason = " ".join((message or "").split())[:200]
        text = (
            f"this is no HTTP request: {reason}"
            if status < 500
            else "a defect of the server; its log says more"
        )
        if status < 500:
            self._told(status, text)
        response = web.Response(
            status=status,
            body=json.dumps({"error": text}).encode("ascii"),
            headers={"Content-Type": "application/json"},
        )
        response.force_close()
        return response

    def log_exception(self, *arguments: Any, **settings: Any) -> None:
        """Write down what went wrong, if it was not the client who did it."""
        error = settings.get("exc_info")
        if isinstance(error, (HttpProcessingError, web.RequestPayloadError)):
            self._told(400, f"the body cannot be read: {' '.join(str(error).split())[:200]}")
            return
        super().log_exception(*arguments, **settings)


def _most_connections() -> int:
    """How many connections there may be: a process that has no file left takes none at all."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return 1 << 20
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(LEAST_CONNECTIONS, files - OTHER_FILES) if files != resource.RLIM_INFINITY else 1 << 20


class Listener:
    """The server of an application."""

    def __init__(self, application: web.Application, told: Told) -> None:
        """Describe it.

        Args:
            application: what answers requests.
            told: told the status and the reason when somebody sends what is no request.
        """
        # The answer of a client that has gone is not worth running the model for.
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=1.0)
        self._told, self._pace = told, Pace()
        self._server: asyncio.AbstractServer | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port.

        Raises:
            OSError: if that is not possible.
        """
        await self._runner.setup()
        manager, loop = self._runner.server, asyncio.get_running_loop()
        assert manager is not None

        def connection() -> _Connection:
            # Bodies are unpacked by the application, which knows when to stop.
            return _Connection(
                self._told,
                self._pace,
                manager,
                loop=loop,
                access_log=None,
                keepalive_timeout=KEEPALIVE,
                lingering_time=LINGERING,
                auto_decompress=False,
            )

        server = await loop.create_server(connection, host, port, backlog=128)
        self._server = server
        found: int = server.sockets[0].getsockname()[1]
        return found

    async def close(self) -> None:
        """Take no more connections, and end those that there are."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()
