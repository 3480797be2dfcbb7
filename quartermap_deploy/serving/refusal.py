"""The answer to a request that is not carried out: one error for both protocols."""

from __future__ import annotations

import reprlib

from quartermap_deploy.plain_text import printable

_GRPC_CODES = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "RESOURCE_EXHAUSTED",
    415: "INVALID_ARGUMENT",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
}
"""Names of gRPC's status codes by the HTTP status that means the same."""
LONGEST = 1000
"""Letters of a message."""
NOT_LOGGED = (404, 405, 503)
"""Errors that are only counted: of other paths and models, and of a server that had better not write as well."""


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 8, 4
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100


class Refusal(Exception):
    """A request that gets an error for an answer.

    Attributes:
        status: of HTTP.
        message: what was found, and what was expected.
        retry_after: seconds after which the same request may succeed; None where it never will.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        # It may quote the request, and reaches terminals and logs.
        message = printable(message, LONGEST)
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after

    def bare(self) -> Refusal:
        """Return the same without what led to it: its traceback holds the request, and Python holds tracebacks long."""
        return Refusal(self.status, self.message, self.retry_after)

    @property
    def grpc_code(self) -> str:
        """Name of the status code of gRPC."""
        return _GRPC_CODES[self.status]


def shown(value: object, limit: int = 60) -> str:
    """Return a value of a request as a message quotes it, however large it is and however deep its lists are."""
    text = _SHORT.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def invalid(message: str) -> Refusal:
    """A request that says something wrong."""
    return Refusal(400, message)


def busy(message: str) -> Refusal:
    """A request that came at a bad time."""
    return Refusal(503, message, retry_after=1)
