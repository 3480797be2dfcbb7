"""The models: `list_models`, `create_model`, their cards and what they have in common."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quartermap_deploy.architectures.cards import ModelCard, list_models, load_card

if TYPE_CHECKING:
    from quartermap_deploy.architectures.base import Block, VisualStateSpaceModel
    from quartermap_deploy.architectures.factory import create_model

__all__ = ["Block", "ModelCard", "VisualStateSpaceModel", "create_model", "list_models", "load_card"]

# Cards are read by commands that never touch torch, so what needs torch is imported when it is first asked
# for.
_LAZY = {"Block": "base", "VisualStateSpaceModel": "base", "create_model": "factory"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
