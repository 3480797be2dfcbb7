"""The protocol over HTTP, and beside it /metrics, /classify, /picture and the page."""

from __future__ import annotations

import asyncio
import http
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from quartermap_deploy import __version__
from quartermap_deploy.serving import grpc_codec, http_codec
from quartermap_deploy.serving.answers import (
    CLASSIFY,
    PICTURE,
    classes_answer,
    picture_answer,
    require_path,
)
from quartermap_deploy.serving.bodies import Budget, Share, Unpacker
from quartermap_deploy.serving.callers import Callers
from quartermap_deploy.serving.decoders import Decoders
from quartermap_deploy.serving.forms import FIELDS, FORM, FormFile, FormReader
from quartermap_deploy.serving.grpc_api import EXTENSIONS, SERVER_NAME
from quartermap_deploy.serving.logs import EventLog
from quartermap_deploy.serving.models import VERSION, ImageModel, ServedModel, infer
from quartermap_deploy.serving.pace import Pace, PacedTransport
from quartermap_deploy.serving.page import Page
from quartermap_deploy.serving.refusal import NOT_LOGGED, Refusal, invalid
from quartermap_deploy.serving.requests import InferRequest, RequestedOutput
from quartermap_deploy.serving.startup import Plan
from quartermap_deploy.serving.state import State
from quartermap_deploy.serving.statistics import RECENT, prometheus
from quartermap_deploy.serving.tensors import from_strings
from quartermap_deploy.serving.timeouts import timeout

if TYPE_CHECKING:
    from aiohttp import web

Handler = Callable[["web.Request"], Awaitable["web.StreamResponse"]]

TOP = 5
"""Classes in an answer of /classify where the request does not say how many."""
IMAGE_TYPES = ("image/jpeg", "image/png", "application/octet-stream")
REFUSAL, LONGEST_TURN = 0.005, 1.0
"""Seconds between uploads that are refused, and that one of them waits at most; one alone does not wait."""
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class HttpApi:
    """The paths that the server answers."""

    def __init__(
        self,
        state: State,
        log: EventLog,
        plan: Plan,
        decoders: Decoders,
        budget: Budget,
        callers: Callers,
        *,
        max_body: int,
        receive_timeout: float,
    ) -> None:
        """Describe the server.

        Args:
            state: what it is about.
            log: gets what goes wrong.
            plan: what is served.
            decoders: threads that encode pictures.
            budget: how much of requests may be held.
            callers: whose requests are answered.
            max_body: bytes of the largest request.
            receive_timeout: seconds that the body of a request may take to come.
        """
        self._state, self._log, self._plan, self._budget = state, log, plan, budget
        self._page, self._decoders, self._callers = Page(plan), decoders, callers
        self._max_body, self._receive_timeout = max_body, receive_timeout
        self._refusals = Pace()

    def application(self) -> web.Application:
        """Return the application."""
        from aiohttp import web

        app = web.Application(middlewares=[self._middleware()])
        model = "/v2/models/{model}"
        for prefix in (model, model + "/versions/{version}"):
            app.router.add_get(prefix, self.model_metadata)
            app.router.add_get(prefix + "/ready", self.model_ready)
            app.router.add_get(prefix + "/config", self.model_config)
            app.router.add_get(prefix + "/stats", self.model_statistics)
            app.router.add_post(prefix + "/infer", self.infer)
        app.router.add_get("/v2", self.server_metadata)
        app.router.add_get("/v2/health/live", self.live)
        app.router.add_get("/v2/health/ready", self.ready)
        app.router.add_post("/v2/repository/index", self.repository_index)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post(CLASSIFY, self.classify)
        app.router.add_post(PICTURE, self.picture)
        app.router.add_get("/status", self.status)
        app.router.add_get("/", self.page)
        # Last, as it reads like a model named "stats".
        app.router.add_get("/v2/models/stats", self.all_statistics)
        return app

    def _middleware(self) -> Any:
        """Make every error an answer of the protocol, and write down what went wrong."""
        from aiohttp import web

        @web.middleware
        async def answering(request: web.Request, handler: Handler) -> web.StreamResponse:
            transport = request.transport
            if isinstance(transport, PacedTransport):
                transport.speed_up()
            try:
                self._callers.check(request.method, request.path, request.headers)
                response = await handler(request)
            except Refusal as refusal:
                response = self._error(request, refusal.status, refusal.message)
                if refusal.retry_after is not None:
                    response.headers["Retry-After"] = str(refusal.retry_after)
                if refusal.status in (408, 413):
                    # The rest of the body may never come, or be long.
                    response.force_close()
            except web.HTTPException as error:
                response = self._error(request, error.status, _reason(request, error.status))
                if "Allow" in error.headers:
                    response.headers["Allow"] = error.headers["Allow"]
            except Exception as error:
                self._log.error("defect", protocol="http", path=request.path[:200], error=repr(error)[:1000])
                response = self._error(request, 500, "a defect of the server; its log says more")
            if response.status >= 400 and isinstance(transport, PacedTransport):
                # What is left of the body is read and thrown away.
                transport.slow_down()
            response.headers["X-Content-Type-Options"] = "nosniff"
            response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
            if not self._state.ready:
                # Who asks again had better ask another server.
                response.force_close()
            return response

        return answering

    def _error(self, request: web.Request, status: int, message: str) -> web.Response:
        if status not in NOT_LOGGED:
            self._log.seldom(
                f"refused over HTTP {status}",
                "warning",
                "refused",
                path=request.path[:200],
                status=status,
                reason=message[:300],
            )
        return _json({"error": message}, status)

    # Health and metadata.

    async def live(self, request: web.Request) -> web.Response:
        """Whether the server runs."""
        return _json({"live": True})

    async def ready(self, request: web.Request) -> web.Response:
        """Whether the server takes requests."""
        ready = self._state.ready
        return _json({"ready": ready, "phase": self._state.phase}, 200 if ready else 503)

    async def server_metadata(self, request: web.Request) -> web.Response:
        """What the server is."""
        return _json({"name": SERVER_NAME, "version": __version__, "extensions": EXTENSIONS})

    async def model_ready(self, request: web.Request) -> web.Response:
        """Whether a model takes requests."""
        ready = self._state.ready
        name = self._model(request).description.name if self._state.models else request.match_info["model"]
        return _json({"name": name, "ready": ready}, 200 if ready else 503)

    async def model_metadata(self, request: web.Request) -> web.Response:
        """What a model is."""
        return _json(http_codec.metadata(self._model(request).description))

    async def model_config(self, request: web.Request) -> web.Response:
        """How a model is served."""
        config = grpc_codec.configuration(self._model(request).description)
        for tensor in (*config["input"], *config["output"]):
            tensor["data_type"] = grpc_codec.CONFIG_NAMES[tensor["data_type"]]
        return _json(config)

    async def repository_index(self, request: web.Request) -> web.Response:
        """Which models there are."""
        state = "READY" if self._state.ready else "UNAVAILABLE"
        return _json([{"name": name, "version": VERSION, "state": state} for name in self._state.models])

    # Statistics.

    async def model_statistics(self, request: web.Request) -> web.Response:
        """The counters of one model."""
        return _json({"model_stats": [self._model(request).statistics.to_dict()]})

    async def all_statistics(self, request: web.Request) -> web.Response:
        """The counters of all models."""
        return _json({"model_stats": [model.statistics.to_dict() for model in self._state.models.values()]})

    async def metrics(self, request: web.Request) -> web.Response:
        """The counters for Prometheus."""
        from aiohttp import web

        text = prometheus(model.statistics for model in self._state.models.values())
        return web.Response(body=text.encode(), headers={"Content-Type": METRICS_TYPE})

    async def status(self, request: web.Request) -> web.Response:
        """What the page shows anew every second."""
        models = self._state.models.values()
        return _json(
            {
                "phase": self._state.phase,
                "seconds": time.monotonic() - self._state.started,
                "window_seconds": RECENT,
                "models": [
                    {
                        "name": model.description.name,
                        "success": model.statistics.success.count,
                        "failure": model.statistics.fail.count,
                        "images": model.statistics.inferences,
                        "executions": model.statistics.executions,
                        **model.statistics.recent(),
                    }
                    for model in models
                ],
            }
        )

    async def page(self, request: web.Request) -> web.Response:
        """The page."""
        from aiohttp import web

        return web.Response(body=self._page.html, headers=self._page.headers)

    # Inference.

    async def infer(self, request: web.Request) -> web.Response:
        """Run a model."""
        from aiohttp import web

        arrived = time.monotonic_ns()
        with self._state.request():
            model = self._model(request)
            try:
                with self._budget.share() as share:
                    body = await self._body(request, share, model.description.most_bytes)
                    header_length = request.headers.get(http_codec.HEADER_LENGTH)
                    parsed = http_codec.parse_request(body, header_length, model.description)
                    outputs = await infer(model, parsed, arrived)
                content, headers = http_codec.build_response(model.description, parsed, outputs)
            except BaseException:
                model.statistics.failed(time.monotonic_ns() - arrived)
                raise
        response = web.Response(body=content, headers=headers)
        if "Accept-Encoding" in request.headers:
            response.enable_compression()
        return response

    async def classify(self, request: web.Request) -> web.Response:
        """Classify uploaded files: those of a form, or one that is the body."""
        top = _top(request.query.get("top", str(TOP)), max(1, len(self._plan.model.labels)))

        async def answer(row: NDArray[Any]) -> dict[str, Any]:
            return classes_answer(self._plan, row, top)

        return await self._upload(request, CLASSIFY, answer)

    async def picture(self, request: web.Request) -> web.Response:
        """Return masks or images for uploaded files, likewise."""

        async def answer(values: NDArray[Any]) -> dict[str, Any]:
            return await self._decoders.encode(lambda: picture_answer(self._plan, values))

        return await self._upload(request, PICTURE, answer)

    async def _upload(
        self, request: web.Request, path: str, answer: Callable[[NDArray[Any]], Awaitable[dict[str, Any]]]
    ) -> web.Response:
        """Run uploaded files; `answer` says what of the first output of each goes back."""
        try:
            return await self._run_upload(request, path, answer)
        except Refusal as error:
            refusal = error.bare()
        # Who sends what is refused, again and again, would keep the loop as busy as others who are answered.
        await asyncio.sleep(min(LONGEST_TURN, self._refusals.turn(REFUSAL)))
        raise refusal

    async def _run_upload(
        self, request: web.Request, path: str, answer: Callable[[NDArray[Any]], Awaitable[dict[str, Any]]]
    ) -> web.Response:
        arrived = time.monotonic_ns()
        with self._state.request():
            require_path(self._plan, path)
            if isinstance(request.transport, PacedTransport):
                request.transport.slow_down()
            model = next(model for model in self._state.models.values() if isinstance(model, ImageModel))
            (spec,), output = model.description.inputs, model.description.outputs[0].name
            try:
                with self._budget.share() as share:
                    files = await self._files(request, share)
                    shape = spec.check(spec.datatype, [len(files)], model.description.max_batch)
                    images = from_strings(spec, shape, [file.content for file in files])
                    parsed = InferRequest({spec.name: images}, [RequestedOutput(output)])
                    outputs = (await infer(model, parsed, arrived))[output]
            except BaseException:
                model.statistics.failed(time.monotonic_ns() - arrived)
                raise
            found = [
                {"file": file.name, **await answer(values)}
                for file, values in zip(files, outputs, strict=True)
            ]
        return _json(
            {
                "model": model.description.name,
                "milliseconds": (time.monotonic_ns() - arrived) / 1e6,
                "images": found,
            }
        )

    async def _files(self, request: web.Request, share: Share) -> list[FormFile]:
        """Read the files of an upload."""
        if request.content_type in IMAGE_TYPES:
            return [FormFile("", await self._body(request, share))]
        if request.content_type != FORM:
            raise Refusal(
                415,
                f"the content type is {request.content_type[:80]}; send a form with files (multipart/form-data), or "
                f"one file as {', '.join(IMAGE_TYPES)}",
            )
        if _encoding(request):
            raise Refusal(
                415, "the form is compressed; send it as it is, as its files are compressed themselves"
            )
        reader = FormReader(request.headers["Content-Type"], self._plan.model.max_batch + FIELDS)
        async with self._receiving(request, share, self._max_body) as count:
            while data := await request.content.readany():
                count(data)
                start = time.perf_counter()
                reader.feed(data)
                if isinstance(request.transport, PacedTransport):
                    request.transport.spend(time.perf_counter() - start)
            return reader.end()

    async def _body(self, request: web.Request, share: Share, most: int | None = None) -> bytearray:
        """Read the body of a request, of `most` bytes if the model's largest request has no more."""
        limit = self._max_body if most is None else min(most, self._max_body)
        encoding = _encoding(request)
        unpacker = Unpacker(encoding) if encoding else None
        body = bytearray()
        async with self._receiving(request, share, limit) as count:
            while part := await request.content.readany():
                if unpacker is None:
                    count(part)
                    body += part
                    continue
                for piece in unpacker.feed(part):
                    count(piece)
                    body += piece
                    # Some bytes may unpack to very many, and others wait for their turn.
                    await asyncio.sleep(0)
            if unpacker is not None:
                unpacker.end()
        return body

    @asynccontextmanager
    async def _receiving(
        self, request: web.Request, share: Share, limit: int
    ) -> AsyncIterator[Callable[[bytes], None]]:
        """While open, a body is received; every part of it has to be counted.

        Raises:
            Refusal: if it is too large, does not come in time, is broken, too much is held at the moment, or it is slow
                and others need the memory.
        """
        from aiohttp import web
        from aiohttp.http_exceptions import HttpProcessingError

        announced = request.content_length
        if announced is not None and announced > limit:
            raise self._too_large(f"has {announced:,} bytes", limit)

        def count(part: bytes) -> None:
            share.add(len(part))
            if share.held > limit:
                raise self._too_large("is larger", limit)

        try:
            with share.arriving():
                async with timeout(self._receive_timeout):
                    yield count
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body did not come within {self._receive_timeout:g} s") from None
        except (web.RequestPayloadError, HttpProcessingError) as error:
            # Chunks that are not what the headers say.
            raise invalid(f"the body cannot be read: {' '.join(str(error).split())[:200]}") from None

    def _too_large(self, found: str, limit: int) -> Refusal:
        return Refusal(413, f"the body {found}; at most {limit:,} bytes are taken here")

    def _model(self, request: web.Request) -> ServedModel:
        match = request.match_info
        return self._state.model(match["model"], match.get("version", ""))


def _json(value: object, status: int = 200) -> web.Response:
    from aiohttp import web

    return web.Response(
        body=json.dumps(value).encode("ascii"), status=status, headers={"Content-Type": "application/json"}
    )


def _encoding(request: web.Request) -> str:
    """How the body is compressed; empty if it is not."""
    encoding = request.headers.get("Content-Encoding", "").strip()
    return "" if encoding.lower() == "identity" else encoding


def _reason(request: web.Request, status: int) -> str:
    if status == 404 and request.path.startswith("/v2"):
        return f"this server has no {request.path[:200]}: docs/serving.md lists what it has of the protocol"
    if status == 404:
        return f"there is no {request.path[:200]}; the protocol's paths begin with /v2"
    if status == 405:
        return f"{request.path[:200]} does not take {request.method}"
    return http.HTTPStatus(status).phrase


def _top(text: str, classes: int) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) < 1:
        raise invalid(f"top is {text[:40]!r}; expected a number of classes")
    return min(int(text), classes)
