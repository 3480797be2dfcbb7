"""How a bundle is served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartermap_deploy.errors import ServeError
from quartermap_deploy.plain_text import printable
from quartermap_deploy.serving.callers import ANY, host_name
from quartermap_deploy.targets.execution import ON_CPU, Execution

MIB = 1 << 20
MOST_BODY = 2048 * MIB
MOST_WORKERS = 256
DEFAULT_BATCH = 8
"""Largest batch where no engine says: on a CPU larger ones gain little and make the first image wait."""


@dataclass(frozen=True)
class ServeOptions:
    """How a bundle is served.

    Attributes:
        target: one of the bundle's targets; None for its default.
        execution: of the target `onnxruntime`, the providers that run it.
        tolerance: for a file that another tool changed, how far it may depart from the golden outputs, as a share of
            the largest; None takes the bundle's.
        name: what clients call the model; None takes the name that it has in the bundle.
        labels: a file with the name of a class on each line, or a set of `data/labels.py`; None takes the bundle's.
        preprocessing: values of the bundle's preprocessing to replace, by name.
        host: address to listen at.
        allow_hosts: names that clients may ask for, beside addresses, localhost and `host`, and whose pages may ask;
            "*" for all of them, which is for a server behind a proxy that looks at them.
        port: for HTTP; 0 takes a free one.
        grpc_port: for gRPC; 0 takes a free one.
        workers: batches that run side by side, each with its share of the cores. None, with ONNX Runtime: under load as
            many as there are cores, and a batch that comes alone gets all of them; with engines or other providers: 1.
        max_batch: most images that are run at once; None takes the engine's largest batch, or `DEFAULT_BATCH`.
        max_delay: seconds that an image may wait for others while a worker is free.
        queue: most images that may wait for a worker.
        max_body: bytes of the largest request.
        receive_timeout: seconds that a client may take to send the body of a request.
        shutdown_timeout: seconds that accepted requests have to be answered in once the server is told to stop.
    """

    target: str | None = None
    execution: Execution = ON_CPU
    tolerance: float | None = None
    name: str | None = None
    labels: str | Path | None = None
    preprocessing: Mapping[str, Any] | None = None
    host: str = "127.0.0.1"
    allow_hosts: tuple[str, ...] = ()
    port: int = 8000
    grpc_port: int = 8001
    workers: int | None = None
    max_batch: int | None = None
    max_delay: float = 0.001
    queue: int = 256
    max_body: int = 64 * MIB
    receive_timeout: float = 30.0
    shutdown_timeout: float = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "execution", Execution.read(self.execution))
        for port in (self.port, self.grpc_port):
            if not 0 <= port <= 65535:
                raise ServeError(f"{port} is no port; expected 0 to 65535")
        if self.port == self.grpc_port != 0:
            raise ServeError(
                f"HTTP and gRPC cannot both have port {self.port}; choose another for one of them"
            )
        if not self.host.strip():
            raise ServeError(
                "the address to listen at is empty; expected one such as 127.0.0.1, or 0.0.0.0 for all"
            )
        for allowed in self.allow_hosts:
            if allowed != ANY and host_name(allowed) is None:
                raise ServeError(
                    f'"{printable(allowed, 100)}" is no name of a host; expected one such as models.example.com, '
                    f"without a port, or {ANY} for all"
                )
        for name in ("workers", "queue", "max_body", "max_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ServeError(f"{name} = {value}; expected at least 1")
        if self.max_body >= MOST_BODY:
            raise ServeError(
                f"requests of {self.max_body // MIB:,} MiB; gRPC takes less than {MOST_BODY // MIB:,} MiB"
            )
        if (self.workers or 0) > MOST_WORKERS:
            raise ServeError(f"workers = {self.workers}; expected at most {MOST_WORKERS}")
        if self.tolerance is not None and not 0 < self.tolerance <= 1:
            raise ServeError(f"tolerance = {self.tolerance}; expected a share above 0 and up to 1")
        if self.max_delay < 0 or self.receive_timeout <= 0 or self.shutdown_timeout <= 0:
            raise ServeError("a delay must not be negative, and a timeout must be positive")
