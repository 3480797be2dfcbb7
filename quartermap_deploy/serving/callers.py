"""Who may ask: pages of other sites may not make a browser send what costs the server work, nor read its answers.

A browser sends requests for any page that it shows, also to servers that only its user can reach. Two headers tell
what such a request is about, and no page can change them:

* `Host` is the name that the browser looked up. A foreign name that leads here (DNS rebinding) would make a foreign
  page one of ours, so only addresses, localhost, and names that the administrator gave are answered.
* `Origin` and `Sec-Fetch-Site` tell which page asks. Other programs send neither.

gRPC needs no such check: a browser cannot speak it without a proxy that translates.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from quartermap_deploy.plain_text import printable
from quartermap_deploy.serving.refusal import Refusal

ANY = "*"
HEALTH = ("/v2/health/live", "/v2/health/ready")
"""Paths that answer to every name, as load balancers ask by their own; they tell nothing."""
READING = ("GET", "HEAD", "OPTIONS")
"""Methods that cost nothing, and whose answers no foreign page is given."""
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_PORT = re.compile(r":[0-9]*$")


def host_name(text: str) -> str | None:
    """Return a name of a host as it is compared, or None if it is none."""
    name = text.strip().lower().removesuffix(".")
    return name if len(name) <= 253 and _NAME.fullmatch(name) else None


class Callers:
    """Which requests over HTTP are answered, by whom they come from."""

    def __init__(self, host: str, allowed: Iterable[str]) -> None:
        """Remember the names.

        Args:
            host: what the server listens at.
            allowed: further names of it, or `ANY`.
        """
        self._allowed = frozenset(host_name(name) or name for name in allowed)
        listens = host_name(host)
        self._names = self._allowed | {"localhost"} | ({listens} if listens else set())

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Check a request before anything of it is read but its head.

        Args:
            method: its method.
            path: its path.
            headers: its headers, which know their names in any spelling.

        Raises:
            Refusal: if it is for another host, or comes from a page of another site; the message says what to do.
        """
        if ANY in self._allowed:
            return
        host = headers.get("Host", "").strip()
        if path not in HEALTH and host and not self._known(host):
            raise Refusal(
                403,
                f'this server does not answer to the name "{printable(_without_port(host), 100)}"; ask it by its '
                "address, or start it with --allow-host and that name",
            )
        if method not in READING:
            self._check_page(host, headers)

    def _check_page(self, host: str, headers: Mapping[str, str]) -> None:
        """Check that no page of another site asks for something to be done."""
        origin = headers.get("Origin", "").strip()
        if origin:
            same = host and origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
            if same or self._page_allowed(origin):
                return
        elif headers.get("Sec-Fetch-Site", "same-origin").strip().lower() in ("same-origin", "none"):
            return
        who = f'of "{printable(origin, 100)}"' if origin else "of another site"
        raise Refusal(
            403,
            f"a page {who} asks, and only this server's own pages may; start it with --allow-host and the name of that "
            "page's host if it may, too",
        )

    def _page_allowed(self, origin: str) -> bool:
        """Whether pages of an origin may ask: those of names that the administrator gave."""
        try:
            name = urlsplit(origin).hostname
        except ValueError:
            return False
        return name is not None and host_name(name) in self._allowed

    def _known(self, host: str) -> bool:
        """Whether a header Host has an address, or a name that this server answers to."""
        name = _without_port(host)
        return _is_address(name) or host_name(name) in self._names


@functools.lru_cache(maxsize=64)
def _is_address(name: str) -> bool:
    """Whether a name is an address; clients ask by the same one again and again."""
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True


def _without_port(host: str) -> str:
    return _PORT.sub("", host)
