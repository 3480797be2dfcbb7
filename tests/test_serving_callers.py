"""Pages of other sites, and names that lead here: neither makes the server work, and neither reads its answers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from deploy_bundles import dynamic_bundle
from multidict import CIMultiDict
from served import IMAGE_MODEL, MODEL, Served, ask, digits, file_of, serving

from quartermap_deploy.errors import ServeError
from quartermap_deploy.serving.callers import Callers
from quartermap_deploy.serving.options import ServeOptions
from quartermap_deploy.serving.refusal import Refusal

HOSTILE = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "x",
    "[::1].evil",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(
        dynamic_bundle(), "--allow-host", "models.example", "--allow-host", "Second.Example"
    ) as running:
        yield running


def answers(
    host: str, allowed: tuple[str, ...] = (), method: str = "GET", path: str = "/", **headers: str
) -> bool:
    given = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
    try:
        Callers(host, allowed).check(method, path, given)
    except Refusal as refusal:
        assert refusal.status == 403 and "--allow-host" in refusal.message and refusal.message.isprintable()
        return False
    return True


@pytest.mark.parametrize(
    "name",
    [
        *("127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "[fe80::1]", "10.1.2.3:8000", "0.0.0.0:8000"),
        *(
            "localhost",
            "localhost:8000",
            "LOCALHOST.",
            "box.example:8000",
            "Models.Example",
            "models.example.:80",
        ),
        "",
    ],
)
def test_hosts_that_are_answered(name: str) -> None:
    assert answers("box.example", ("models.example",), Host=name)


@pytest.mark.parametrize(
    "name",
    [*HOSTILE, "box.example.evil", "models.example@evil", "a b", "\x1b[2J", "localhost:8000:1", "..", "é"],
)
def test_hosts_that_are_not(name: str) -> None:
    assert not answers("box.example", ("models.example",), Host=name)
    assert answers("0.0.0.0", ("*",), Host=name)
    # Load balancers ask by their own names, and are told nothing.
    assert answers("0.0.0.0", path="/v2/health/ready", Host=name)


@pytest.mark.parametrize(
    ("allowed", "headers"),
    [
        (True, {}),
        (True, {"Origin": "http://localhost:8000"}),
        (True, {"Origin": "https://localhost:8000"}),
        (True, {"Origin": "http://models.example"}),
        (True, {"Origin": "https://MODELS.example:444", "Sec-Fetch-Site": "cross-site"}),
        (True, {"Sec-Fetch-Site": "same-origin"}),
        (True, {"Sec-Fetch-Site": "none"}),
        (False, {"Origin": "http://localhost:3000"}),
        (False, {"Origin": "http://evil.example"}),
        (False, {"Origin": "http://localhost:8000.evil.example"}),
        (False, {"Origin": "http://models.example.evil"}),
        (False, {"Origin": "http://models.example@evil.example"}),
        (False, {"Origin": "null"}),
        (False, {"Origin": "file://"}),
        (False, {"Origin": "http://[::1"}),
        (False, {"Origin": "\x1b]0;x"}),
        (False, {"Sec-Fetch-Site": "cross-site"}),
        (False, {"Sec-Fetch-Site": "same-site"}),
    ],
)
def test_pages_that_may_ask_for_something_to_be_done(allowed: bool, headers: dict[str, str]) -> None:
    def asked(method: str) -> bool:
        return answers(
            "127.0.0.1", ("models.example",), method, "/classify", Host="localhost:8000", **headers
        )

    assert asked("POST") == asked("PUT") == allowed
    # Nobody but the page's own site is given the answer.
    assert asked("GET")


@pytest.mark.parametrize(
    "path", ["/classify", f"/v2/models/{MODEL}/infer", f"/v2/models/{IMAGE_MODEL}/infer"]
)
def test_a_foreign_page_makes_the_server_do_nothing(server: Served, path: str) -> None:
    image = file_of(digits(1)[0][0])
    before = json.loads(ask(server, "GET", "/status")[2])["models"]
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}):
        status, _, body = ask(server, "POST", path, image, Content_Type="image/png", **headers)
        assert status == 403 and "--allow-host" in json.loads(body)["error"]
    assert json.loads(ask(server, "GET", "/status")[2])["models"] == before


def test_a_foreign_name_is_told_nothing(server: Served) -> None:
    for host in HOSTILE:
        for path in ("/", "/status", "/metrics", "/v2", f"/v2/models/{MODEL}", "/nowhere"):
            status, headers, body = ask(server, "GET", path, Host=host)
            assert (
                status == 403 and MODEL.encode() not in body and headers["content-type"] == "application/json"
            )
    for host in ("models.example", "second.example:8000", "localhost", "10.0.0.1"):
        status, headers, body = ask(server, "GET", "/", Host=host)
        assert status == 200 and MODEL.encode() in body
        assert headers["cross-origin-resource-policy"] == "same-origin"
    with server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert b" 400 " in connection.recv(65536)


def test_the_own_page_and_other_programs_go_on(server: Served) -> None:
    image = file_of(digits(1)[0][0])
    own = {"Origin": f"http://{server.http}", "Sec_Fetch_Site": "same-origin"}
    for headers in ({}, own, {"Origin": "https://models.example"}):
        status, _, body = ask(server, "POST", "/classify", image, Content_Type="image/png", **headers)
        assert status == 200, body


def test_a_server_for_all_addresses_is_asked_by_address_or_by_a_name_it_was_given() -> None:
    """As in a container: probes go by address, clients by the name of a service."""
    with serving(
        dynamic_bundle(), "--host", "0.0.0.0", "--allow-host", "digits.models.svc.cluster.local"
    ) as running:
        port = running.port

        def status(host: str) -> int:
            # `ask` goes to the address that the server says, which is all of them.
            return ask(running, "GET", "/v2", Host=host)[0]

        assert status(f"127.0.0.1:{port}") == status(f"digits.models.svc.cluster.local:{port}") == 200
        assert status(f"0.0.0.0:{port}") == 200 and status("digits") == 403


def test_names_that_are_none_are_refused_at_the_start() -> None:
    for name in ("", "http://x", "x:80", "a b", "*.example", "x/y", "-"):
        with pytest.raises(ServeError, match="no name of a host"):
            ServeOptions(allow_hosts=(name,))
    assert ServeOptions(allow_hosts=("*", "a.b", "10.0.0.1", "x_y"))
