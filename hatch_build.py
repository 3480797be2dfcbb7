"""The wheel's build hook: builds the CPU library into the wheel, where there is a C++ compiler.

    QUARTERMAP_BUILD_NATIVE=0    never: a wheel of Python alone, for every platform
    QUARTERMAP_BUILD_NATIVE=1    always: no wheel without it

Without either, a wheel without the library is made where it cannot be built; `quartermap native build` makes up for it.
Editable installs and source distributions never build it.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "QUARTERMAP_BUILD_NATIVE"


class CpuLibraryHook(BuildHookInterface):
    """Puts the library into `quartermap_deploy/_native` of the wheel, and tags the wheel for its platform."""

    folder: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library, before the wheel is put together."""
        wanted = os.environ.get(VARIABLE, "")
        if version == "editable" or wanted == "0":
            return
        # From the sources that the wheel is made of; this needs none of the package's dependencies.
        sys.path.insert(0, self.root)
        try:
            from quartermap_deploy.errors import QuartermapError
            from quartermap_deploy.native.cpu_build import build_cpu_library
        finally:
            sys.path.remove(self.root)
        self.folder = tempfile.mkdtemp(prefix="quartermap-wheel-")
        try:
            library = build_cpu_library(Path(self.folder))
        except QuartermapError as error:
            if wanted == "1":
                raise
            self.app.display_warning(
                f"the wheel is made without the CPU library, so models will run slower: {error}\n"
                "Once there is a compiler: quartermap native build"
            )
            return
        build_data["force_include"][str(library)] = f"quartermap_deploy/_native/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was built, once the wheel holds it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _platform() -> str:
    """Name the platform that the library was built for, as wheels name it."""
    if sys.platform == "darwin":
        from packaging.tags import platform_tags

        # Python itself may be built for several processors and older systems; the library is not.
        return next(iter(platform_tags()))
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
