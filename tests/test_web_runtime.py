"""Where a site's ONNX Runtime comes from: a folder, a tarball, or npm and the user's cache."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from npm_packages import WANTED, npm_package

from quartermap_deploy.deploy import web_runtime
from quartermap_deploy.deploy.web_runtime import BINARY, INTEGRITY, PACKAGE, SCRIPT, VERSION, find_runtime
from quartermap_deploy.errors import DeployError, MissingDependencyError

FILES = {
    "package.json": json.dumps({"name": PACKAGE, "version": VERSION}).encode(),
    SCRIPT: b"export const version = 1;",
    BINARY: b"\0asm, or nearly",
}


def tarball(files: Mapping[str, bytes], *, root: str = "package") -> bytes:
    """A tarball as npm makes it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"{root}/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def folder_of(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_a_folder_its_dist_folder_and_a_tarball_are_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / PACKAGE, FILES)
    file = tmp_path / "any name"
    file.write_bytes(tarball({"README.md": b"#", **FILES}))
    for path in (folder, folder / "dist", file):
        runtime = find_runtime(path)
        assert (runtime.version, runtime.script, runtime.binary) == (VERSION, FILES[SCRIPT], FILES[BINARY])


def test_the_real_package_is_taken() -> None:
    runtime = find_runtime(npm_package(PACKAGE))
    assert runtime.version == VERSION
    assert runtime.binary.startswith(b"\0asm") and b"MIT License" in runtime.script[:300]


def test_tests_fetch_what_is_pinned() -> None:
    lock = json.loads((WANTED / "package-lock.json").read_text())
    entry = lock["packages"][f"node_modules/{PACKAGE}"]
    assert (entry["version"], entry["integrity"]) == (VERSION, INTEGRITY)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"package.json": b'{"name": "react", "version": "1.30.0"}'}, "names another package"),
        ({"package.json": b"[]"}, "names another package"),
        ({"package.json": b"{"}, "package.json"),
        ({"package.json": json.dumps({"name": PACKAGE, "version": "1.19.2"}).encode()}, "need 1.20 or newer"),
        ({"package.json": json.dumps({"name": PACKAGE, "version": "new"}).encode()}, "version new"),
        ({SCRIPT: None}, SCRIPT),
        ({BINARY: None}, BINARY),
    ],
)
def test_what_is_no_runtime_is_refused(
    tmp_path: Path, changes: Mapping[str, bytes | None], expected: str
) -> None:
    files = {name: data for name, data in {**FILES, **changes}.items() if data is not None}
    file = tmp_path / "package.tgz"
    file.write_bytes(tarball(files))
    for path in (folder_of(tmp_path / "folder", files), file):
        with pytest.raises(DeployError, match=expected):
            find_runtime(path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    whole = tarball({**FILES, BINARY: os.urandom(100_000)})
    for name, data in {"text": b"no tarball", "cut": whole[:50_000], "empty": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DeployError, match="is not the npm package onnxruntime-web"):
            find_runtime(tmp_path / name)
    with pytest.raises(DeployError, match="there is no runtime"):
        find_runtime(tmp_path / "absent")


def test_a_large_entry_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(web_runtime.LARGEST, BINARY, 3)
    (tmp_path / "package.tgz").write_bytes(tarball(FILES))
    for path in (folder_of(tmp_path / "folder", FILES), tmp_path / "package.tgz"):
        with pytest.raises(DeployError, match=r"more than 3 bytes"):
            find_runtime(path)


def test_without_npm_the_message_says_how_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=rf"npm pack {PACKAGE}@{VERSION}.*--runtime FILE"):
        find_runtime(None)


# A registry of our own, which the real npm asks ------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A registry with one package, made of `FILES`; npm is told to ask it. Yields what was asked for."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    data, asked = tarball(FILES), []
    integrity = f"sha512-{b64encode(hashlib.sha512(data).digest()).decode()}"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            address = f"http://127.0.0.1:{self.server.server_address[1]}/package.tgz"
            version = {
                "name": PACKAGE,
                "version": VERSION,
                "dist": {"tarball": address, "integrity": integrity},
            }
            whole = {"name": PACKAGE, "dist-tags": {"latest": VERSION}, "versions": {VERSION: version}}
            answer = data if self.path == "/package.tgz" else json.dumps(whole).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_address[1]}/")
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
        monkeypatch.setenv("npm_config_fetch_retries", "0")
        monkeypatch.setenv("QUARTERMAP_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(web_runtime, "INTEGRITY", integrity)
        yield asked
        server.shutdown()


def test_npm_fetches_once_and_a_changed_file_is_fetched_again(registry: list[str], tmp_path: Path) -> None:
    kept = tmp_path / "home" / "cache" / f"{PACKAGE}-{VERSION}.tgz"
    assert find_runtime(None).script == FILES[SCRIPT]
    assert hash_of(kept) == web_runtime.INTEGRITY
    assert [file.name for file in kept.parent.iterdir()] == [kept.name]
    asked = len(registry)
    assert asked and find_runtime(None).script == FILES[SCRIPT] and len(registry) == asked
    kept.write_bytes(b"something else")
    assert find_runtime(None).script == FILES[SCRIPT] and hash_of(kept) == web_runtime.INTEGRITY


def hash_of(path: Path) -> str:
    return f"sha512-{b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()}"


def test_another_file_than_the_pinned_one_is_never_kept(
    registry: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_runtime, "INTEGRITY", INTEGRITY)
    with pytest.raises(DeployError, match=r"expected sha512-q0y\+"):
        find_runtime(None)
    assert list((tmp_path / "home" / "cache").iterdir()) == []


def test_without_a_network_the_message_says_so(
    registry: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A port on which nobody listens.
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    with pytest.raises(DeployError, match=rf"npm could not fetch {PACKAGE}@{VERSION}.*--runtime FILE"):
        find_runtime(None)
    assert list((tmp_path / "home" / "cache").iterdir()) == []
