"""Caches of a build: what they belong to, and the timings that TensorRT measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from quartermap_deploy.files import file_hash, write_whole
from quartermap_deploy.gpu import Gpu
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

    def __init__(self, config: Any, flavour: Flavour, folder: Path, key: str) -> None:
        """Give a build the timings of an earlier one.

        Args:
            config: the builder configuration.
            flavour: which TensorRT.
            folder: where caches lie.
            key: as `cache_key` returns it.
        """
        self.path = folder / f"{key[:32]}.timing"
        self._config: Any = None
        self._cache: Any = None
        if flavour.portable:
            return
        try:
            before = self.path.read_bytes()
        except OSError:
            before = b""
        for data in dict.fromkeys((before, b"")):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                # It has to live as long as the builder does.
                self._config, self._cache = config, cache
                return

    def save(self) -> None:
        """Write what was measured; a folder that cannot be written to is no error, the cache is only for speed."""
        cache = None if self._config is None else self._config.get_timing_cache()
        data = None if cache is None else cache.serialize()
        if data is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, bytes(data))
        except OSError:
            return
