"""Caches of this user: the timings that TensorRT measured for a build, and the kernels that an engine became.

They lie in a folder that is the user's alone, never beside a bundle: TensorRT believes what it reads there. The names
of their files are hashes that are computed here, of what the cache belongs to; nothing that a bundle says is part of
them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from quartermap_deploy.files import file_hash, write_whole
from quartermap_deploy.gpu import Gpu
from quartermap_deploy.private_folders import check_private, make_private, own_folder
from quartermap_deploy.targets.tensorrt.flavour import Flavour
from quartermap_deploy.targets.tensorrt.options import EngineOptions


def cache_key(
    flavour: Flavour, data: bytes, options: EngineOptions, plugin: Path | None, version: str, gpu: Gpu | None
) -> str:
    """What a cache belongs to: the graph with its weights, the options, the plugin, the versions and the GPU."""
    known = {
        "graph": hashlib.sha256(data).hexdigest(),
        "options": options.to_dict(),
        "plugin": None if plugin is None else file_hash(plugin),
        "tensorrt": [flavour.target, version],
        "cuda": flavour.cuda(),
        "gpu": None if flavour.portable or gpu is None else [gpu.name, gpu.compute_capability],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


class TimingCache:
    """The timings that a build measured, kept for the next build of the same thing. TensorRT-RTX has none.

    A file that TensorRT cannot read, or does not want, is no error: the build starts with an empty cache and what it
    measured takes the file's place.
    """

    def __init__(self, config: Any, flavour: Flavour, folder: Path | None, key: str) -> None:
        """Give a build the timings of an earlier one.

        Args:
            config: the builder configuration.
            flavour: which TensorRT.
            folder: where caches lie; None for this user's.
            key: as `cache_key` returns it.

        Raises:
            TrustError: if others could write to the folder.
        """
        self.path = _place(folder, f"{key[:32]}.timing")
        self._config: Any = None
        self._cache: Any = None
        if flavour.portable:
            return
        before = _read(self.path) or b""
        for data in dict.fromkeys((before, b"")):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                # It has to live as long as the builder does.
                self._config, self._cache = config, cache
                return

    def save(self) -> None:
        """Write what was measured."""
        cache = None if self._config is None else self._config.get_timing_cache()
        data = None if cache is None else cache.serialize()
        if data is not None:
            _write(self.path, bytes(data))


class RuntimeCache:
    """The kernels that TensorRT for RTX compiled an engine into, kept for the next process that runs it here."""

    def __init__(self, engine: bytes, version: str, gpu: Gpu) -> None:
        """Find the cache of an engine.

        Args:
            engine: the engine itself: two bundles share a cache only where they have the same one.
            version: of TensorRT for RTX.
            gpu: the GPU at hand.

        Raises:
            TrustError: if others could write to the folder.
        """
        known = [hashlib.sha256(engine).hexdigest(), version, gpu.name, gpu.compute_capability]
        name = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        self.path = _place(None, f"{name[:32]}.runtime")

    def read(self) -> bytes | None:
        """What is kept, or None."""
        return _read(self.path)

    def write(self, data: bytes) -> None:
        """Keep something in the place of what was kept."""
        _write(self.path, data)


def _place(folder: Path | None, name: str) -> Path | None:
    """Where a cache lies; None where this user has no home."""
    folder = folder or own_folder("cache")
    if folder is None:
        return None
    if os.path.lexists(folder):
        check_private(folder)
    return folder / name


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError:
        return None


def _write(path: Path | None, data: bytes) -> None:
    """Write a cache; a folder that cannot be written to is no error, as caches are only for speed."""
    if path is not None:
        with contextlib.suppress(OSError):
            make_private(path.parent)
            write_whole(path, data)
