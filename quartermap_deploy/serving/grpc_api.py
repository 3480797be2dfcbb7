"""The protocol over gRPC, and gRPC's own health checking."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from quartermap_deploy import __version__
from quartermap_deploy.serving import grpc_codec
from quartermap_deploy.serving.arrivals import Turns
from quartermap_deploy.serving.bodies import Budget
from quartermap_deploy.serving.grpc_messages import HEALTH, INFERENCE, SERVICES, messages
from quartermap_deploy.serving.logs import EventLog
from quartermap_deploy.serving.models import VERSION, infer
from quartermap_deploy.serving.refusal import NOT_LOGGED, Refusal, invalid
from quartermap_deploy.serving.state import State
from quartermap_deploy.serving.timeouts import timeout
from quartermap_deploy.serving.wire import size_in_memory

EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "statistics"]
SERVER_NAME = "quartermap-deploy"
SERVING, NOT_SERVING, UNKNOWN_SERVICE = 1, 2, 3
CONCURRENT = 1024
"""Calls that are open at once; every further one is refused."""
RECEIVED = 1 << 30
"""Bytes of messages that are being received at most: gRPC tells how long one is only once it has all of it."""
MOST_QUESTION = 1 << 16
"""Bytes of a message that asks for anything but inference."""
LEAST_TURNS, MOST_TURNS = 4, 256


def turns(max_body: int) -> int:
    """How many messages are received at a time, where the largest has so many bytes."""
    return min(MOST_TURNS, max(LEAST_TURNS, RECEIVED // max_body))


class GrpcApi:
    """The calls of both services."""

    def __init__(
        self, state: State, log: EventLog, budget: Budget, *, max_body: int, receive_timeout: float
    ) -> None:
        """Describe the server.

        Args:
            state: what it is about.
            log: gets what goes wrong.
            budget: how much of requests may be held.
            max_body: bytes of the largest message.
            receive_timeout: seconds that the message of a call may take to come.
        """
        self._state, self._log, self._budget = state, log, budget
        self._max_body, self._receive_timeout = max_body, receive_timeout
        # Slow senders of requests must not hold up those who ask for the server's health.
        self._turns = {infers: Turns(turns(max_body)) for infers in (True, False)}
        self._messages, self._health = messages(INFERENCE), messages(HEALTH)

    def handlers(self) -> list[Any]:
        """Return gRPC's handlers."""
        import grpc

        calls: dict[str, dict[str, Callable[[Any], Awaitable[Any]]]] = {
            INFERENCE: {
                "ServerLive": self.server_live,
                "ServerReady": self.server_ready,
                "ModelReady": self.model_ready,
                "ServerMetadata": self.server_metadata,
                "ModelMetadata": self.model_metadata,
                "ModelInfer": self.model_infer,
                "ModelConfig": self.model_config,
                "ModelStatistics": self.model_statistics,
                "RepositoryIndex": self.repository_index,
            },
            HEALTH: {"Check": self.check},
        }
        requests = {**{name: f"{name}Request" for name in calls[INFERENCE]}, "Check": "HealthCheckRequest"}
        return [
            grpc.method_handlers_generic_handler(
                SERVICES[package],
                {
                    # Without a deserialiser of gRPC's, which answers broken messages with the status UNKNOWN. As a
                    # stream, though it has one message: gRPC would receive that before anybody is asked.
                    name: grpc.stream_unary_rpc_method_handler(
                        self._answering(messages(package)[requests[name]], call),
                        response_serializer=lambda response: response.SerializeToString(),
                    )
                    for name, call in methods.items()
                },
            )
            for package, methods in calls.items()
        ]

    def _answering(
        self, kind: Any, call: Callable[[Any], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        """Read the message of a call, of a class of messages, and make a refusal its status."""
        import grpc
        from google.protobuf.message import DecodeError

        async def outcome(context: Any) -> Any:
            """The answer; or what is wrong, as a value."""
            try:
                with self._budget.share() as share:
                    data = await self._message(context, self._turns[call == self.model_infer])
                    share.add(len(data))
                    if call != self.model_infer and len(data) > MOST_QUESTION:
                        raise Refusal(
                            413, f"the message has {len(data):,} bytes; {MOST_QUESTION:,} are enough"
                        )
                    size = size_in_memory(data, kind)
                    if size > self._max_body:
                        raise Refusal(413, "the message has too many small numbers; send values raw")
                    share.add(size)
                    try:
                        request = kind.FromString(data)
                    except DecodeError:
                        raise invalid(f"the message of {len(data)} bytes cannot be read") from None
                    # The values of the request are in `request` as well.
                    share.add(-len(data))
                    del data
                    return await call(request)
            except Refusal as refusal:
                return refusal.with_traceback(None)
            except Exception as error:
                self._log.error("defect", protocol="grpc", error=repr(error)[:1000])
                return Refusal(500, "a defect of the server; its log says more")

        async def answer(messages: Any, context: Any) -> Any:
            # gRPC keeps what `abort` raises, and with it this function's variables, until Python's collector comes by.
            # So the request is none of them.
            result = await outcome(context)
            if not isinstance(result, Refusal):
                return result
            if result.status not in NOT_LOGGED:
                self._log.seldom(
                    f"refused over gRPC {result.status}",
                    "warning",
                    "refused",
                    call=getattr(call, "__name__", ""),
                    status=result.grpc_code,
                    reason=result.message[:300],
                )
            trailer: tuple[tuple[str, str], ...] = ()
            if result.retry_after is not None:
                # What gRPC's own retries wait for.
                trailer = (("grpc-retry-pushback-ms", str(1000 * result.retry_after)),)
            return await context.abort(getattr(grpc.StatusCode, result.grpc_code), result.message, trailer)

        return answer

    async def _message(self, context: Any, turns: Turns) -> bytes:
        """Receive the message of a call.

        Raises:
            Refusal: if it does not come in time, has to give way to others, or there is none.
        """
        import grpc

        try:
            async with turns.turn(self._receive_timeout), timeout(self._receive_timeout):
                data = await context.read()
        except asyncio.TimeoutError:
            raise Refusal(408, f"the message did not come within {self._receive_timeout:g} s") from None
        if data is grpc.aio.EOF:
            raise invalid("the call has no message")
        message: bytes = data
        return message

    async def server_live(self, request: Any) -> Any:
        """Whether the server runs."""
        return self._messages["ServerLiveResponse"](live=True)

    async def server_ready(self, request: Any) -> Any:
        """Whether the server takes requests."""
        return self._messages["ServerReadyResponse"](ready=self._state.ready)

    async def model_ready(self, request: Any) -> Any:
        """Whether a model takes requests."""
        # As in Triton, a name that is not there is no error here: those who poll for a model expect an answer.
        try:
            self._state.model(request.name, request.version)
        except Refusal:
            return self._messages["ModelReadyResponse"](ready=False)
        return self._messages["ModelReadyResponse"](ready=self._state.ready)

    async def server_metadata(self, request: Any) -> Any:
        """What the server is."""
        return self._messages["ServerMetadataResponse"](
            name=SERVER_NAME, version=__version__, extensions=EXTENSIONS
        )

    async def model_metadata(self, request: Any) -> Any:
        """What a model is."""
        return grpc_codec.metadata(self._state.model(request.name, request.version).description)

    async def model_config(self, request: Any) -> Any:
        """How a model is served."""
        model = self._state.model(request.name, request.version).description
        return self._messages["ModelConfigResponse"](config=grpc_codec.configuration_message(model))

    async def model_statistics(self, request: Any) -> Any:
        """The counters of one model, or of all."""
        if request.name:
            models = [self._state.model(request.name, request.version)]
        else:
            models = list(self._state.models.values())
        return grpc_codec.statistics([model.statistics.to_dict() for model in models])

    async def repository_index(self, request: Any) -> Any:
        """Which models there are."""
        response = self._messages["RepositoryIndexResponse"]()
        for name in self._state.models:
            response.models.add(
                name=name, version=VERSION, state="READY" if self._state.ready else "UNAVAILABLE"
            )
        return response

    async def model_infer(self, request: Any) -> Any:
        """Run a model."""
        arrived = time.monotonic_ns()
        with self._state.request():
            model = self._state.model(request.model_name, request.model_version)
            try:
                parsed = grpc_codec.parse_request(request, model.description)
                outputs = await infer(model, parsed, arrived)
                return grpc_codec.build_response(model.description, parsed, outputs)
            except BaseException:
                model.statistics.failed(time.monotonic_ns() - arrived)
                raise

    async def check(self, request: Any) -> Any:
        """Whether the server takes requests, as gRPC's own health checking asks, and Kubernetes with it."""
        if request.service not in ("", SERVICES[INFERENCE]):
            raise Refusal(404, f"unknown service {request.service[:80]!r}")
        return self._health["HealthCheckResponse"](status=SERVING if self._state.ready else NOT_SERVING)
