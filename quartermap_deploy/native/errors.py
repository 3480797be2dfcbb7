"""The error of this subpackage."""

from __future__ import annotations

from quartermap_deploy.errors import QuartermapError


class PluginError(QuartermapError):
    """A plugin library that cannot be built, is damaged, of another release, or refused by TensorRT or the device."""
