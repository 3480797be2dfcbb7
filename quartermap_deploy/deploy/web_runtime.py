"""ONNX Runtime for browsers, as a site carries it: two files of the npm package onnxruntime-web.

It comes from a folder or a tarball that the user names. Without one, the user's own npm, which knows mirrors and
proxies, fetches the version that sites are tested with into the user's own cache. Nothing but the tarball with the
known hash is ever taken from there.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from quartermap_deploy.errors import DeployError, MissingDependencyError
from quartermap_deploy.files import read_regular
from quartermap_deploy.plain_text import command, printable
from quartermap_deploy.private_folders import HOME_VARIABLE, make_private, own_folder
from quartermap_deploy.reading import ReadingError, parse_json

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
"""The version that sites are tested with."""
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Of its tarball, as npm states it."""
OLDEST = (1, 20)
"""The first version with a build in one module; older ones have other files."""
SCRIPT, BINARY, DESCRIPTION = (
    "dist/ort.wasm.bundle.min.mjs",
    "dist/ort-wasm-simd-threaded.wasm",
    "package.json",
)
LARGEST = {SCRIPT: 4 << 20, BINARY: 128 << 20, DESCRIPTION: 1 << 20}
"""Bytes that each may have."""
LARGEST_TARBALL = 512 << 20
MOST_ENTRIES = 10_000
"""Entries of a tarball that are looked at."""
NPM_SECONDS = 300
"""How long npm may take."""


@dataclass(frozen=True)
class WebRuntime:
    """ONNX Runtime for browsers.

    Attributes:
        version: of the package.
        script: its module.
        binary: its WebAssembly.
    """

    version: str
    script: bytes
    binary: bytes


def find_runtime(path: Path | None) -> WebRuntime:
    """Return the runtime of a folder or tarball, or the one that sites are tested with.

    Args:
        path: the package unpacked, its `dist` folder, or its tarball; None takes the user's cache, and has npm fill it.

    Raises:
        DeployError: if it is none, is too old, or cannot be fetched.
        MissingDependencyError: if it would have to be fetched, and there is no npm.
        TrustError: if others may write to the user's cache.
    """
    if path is None:
        return _from_tarball(_cached())
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_tarball(path)
    raise DeployError(
        f"there is no runtime {printable(path)}; expected the folder or the tarball of the npm package {PACKAGE}"
    )


def _from_folder(path: Path) -> WebRuntime:
    root = path.parent if path.name == "dist" and not (path / "dist").is_dir() else path

    def read(name: str) -> bytes:
        try:
            return read_regular(root / name, LARGEST[name])
        except OSError as error:
            raise _no_package(path, f"{name}: {error.strerror}") from error

    return _runtime(path, read)


def _from_tarball(path: Path) -> WebRuntime:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for number, entry in enumerate(archive):
                if number >= MOST_ENTRIES:
                    raise _no_package(path, f"more than {MOST_ENTRIES:,} entries")
                # npm packs everything below one folder.
                name = entry.name.partition("/")[2]
                if name in LARGEST and entry.isreg() and name not in found:
                    if entry.size > LARGEST[name]:
                        raise _no_package(path, f"{name} has more than {LARGEST[name]:,} bytes")
                    file = archive.extractfile(entry)
                    assert file is not None
                    found[name] = _all_of(file)
                if len(found) == len(LARGEST):
                    break
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise _no_package(path, str(error)) from error

    def read(name: str) -> bytes:
        if name not in found:
            raise _no_package(path, f"no {name}")
        return found[name]

    return _runtime(path, read)


def _all_of(file: IO[bytes]) -> bytes:
    with file:
        return file.read()


def _runtime(path: Path, read: Callable[[str], bytes]) -> WebRuntime:
    """Check what a package says about itself, and read its two files."""
    try:
        description = parse_json(read(DESCRIPTION), unicode=True)
    except ReadingError as error:
        raise _no_package(path, f"{DESCRIPTION}: {error}") from error
    if not isinstance(description, dict) or description.get("name") != PACKAGE:
        raise _no_package(path, f"{DESCRIPTION} names another package")
    version = str(description.get("version"))
    numbers = version.split(".")[:2]
    if not all(number.isdecimal() and len(number) < 6 for number in numbers) or len(numbers) < 2:
        raise _no_package(path, f"version {printable(version, 40)}")
    if tuple(map(int, numbers)) < OLDEST:
        raise DeployError(
            f"{printable(path)} is {PACKAGE} {printable(version, 40)}; sites need {'.'.join(map(str, OLDEST))} or "
            f"newer, and are tested with {VERSION}"
        )
    return WebRuntime(version, read(SCRIPT), read(BINARY))


def _no_package(path: Path, reason: str) -> DeployError:
    return DeployError(
        f"{printable(path)} is not the npm package {PACKAGE} ({printable(reason)}); expected its folder or its "
        f"tarball, which `npm pack {PACKAGE}@{VERSION}` fetches"
    )


# The user's cache -----------------------------------------------------------------------------------------------


def _cached() -> Path:
    """The tarball of the tested version in the user's cache, fetched where it is not there yet."""
    cache = own_folder("cache")
    if cache is None:
        raise DeployError(
            f"this user has no home to keep {PACKAGE} in; name a folder in the environment variable {HOME_VARIABLE}, "
            f"or the package with --runtime"
        )
    path = cache / f"{PACKAGE}-{VERSION}.tgz"
    try:
        make_private(cache)
        if not path.is_file() or _integrity(path) != INTEGRITY:
            _fetch(path)
    except OSError as error:
        raise DeployError(f"{PACKAGE} cannot be kept in {printable(cache)}: {error}") from error
    return path


def _fetch(path: Path) -> None:
    """Have npm fetch the tarball, and put it in its place only when it is whole and the right one.

    Raises:
        DeployError: if npm cannot, or fetches another one.
        MissingDependencyError: if there is no npm.
        OSError: if it cannot be written.
    """
    wanted = f"{PACKAGE}@{VERSION}"
    elsewhere = (
        f"fetch it where there is a network, by `npm pack {wanted}`, and name the file with --runtime FILE"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise MissingDependencyError(
            f"a site carries the npm package {wanted}, and npm, which fetches it, is not installed: install Node.js, "
            f"or {elsewhere}"
        )
    with tempfile.TemporaryDirectory(prefix=".npm.", dir=path.parent) as folder:
        # In an empty folder, so that no project's settings are read; the user's own are.
        call = [npm, "pack", wanted, "--ignore-scripts", "--silent", "--pack-destination", "."]
        try:
            done = subprocess.run(
                call, cwd=folder, capture_output=True, timeout=NPM_SECONDS, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            raise DeployError(f"npm did not fetch {wanted} within {NPM_SECONDS} s; {elsewhere}") from None
        fetched = Path(folder) / path.name
        if done.returncode or not fetched.is_file():
            said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            reason = f" ({printable(said[-1])})" if said else ""
            raise DeployError(
                f"npm could not fetch {wanted}{reason}; see {command(*call[1:4])}, or {elsewhere}"
            )
        if (found := _integrity(fetched)) != INTEGRITY:
            raise DeployError(
                f"npm fetched a {wanted} with the hash {found}; expected {INTEGRITY}. Somebody changed it on its way; "
                f"{elsewhere}"
            )
        os.replace(fetched, path)


def _integrity(path: Path) -> str:
    """The SHA-512 of a file as npm writes it."""
    digest = hashlib.sha512()
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > LARGEST_TARBALL:
            return f"of a file of more than {LARGEST_TARBALL:,} bytes"
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return f"sha512-{base64.b64encode(digest.digest()).decode()}"
