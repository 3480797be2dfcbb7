"""Folders over HTTP, as any static web server gives them, for tests of sites in a browser."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: object, headers_to_send: Mapping[str, str], **settings: object) -> None:
        self._to_send = headers_to_send
        super().__init__(*arguments, **settings)  # type: ignore[arg-type]

    def end_headers(self) -> None:
        for name, value in self._to_send.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def serving_folder(folder: Path, headers: Mapping[str, str] | None = None) -> Iterator[str]:
    """Serve a folder on this machine alone, with some headers beside the usual ones; yields its address."""
    handler = functools.partial(_Handler, directory=str(folder), headers_to_send=headers or {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()
