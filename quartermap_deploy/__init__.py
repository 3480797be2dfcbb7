"""quartermap-deploy compiles visual state-space models into verified, deployable bundles.

    source model → export → recover → passes → lower per target → build → validate → bundle → serve / bench / eval

The public names are imported when they are first used, so that `import quartermap_deploy` is fast and serving a bundle
never imports torch.
"""

from __future__ import annotations

__version__ = "0.1.0"

_PUBLIC = {
    "Bundle": "bundle",
    "Execution": "targets.execution",
    "QuarterMap": "pruning.plan",
    "QuartermapError": "errors",
    "Recipe": "recipe",
    "Preprocessing": "data.preprocessing",
    "compile": "compiler",
    "compile_module": "compiler",
    "create_model": "architectures",
    "export_onnx": "exporting.export",
    "inline": "exporting.inlining",
    "list_models": "architectures",
    "load_bundle": "bundle",
    "load_card": "architectures",
    "load_like": "like",
    "prune": "pruning.reference",
    "public_code": "sources.public_code.context",
    "selective_scan": "sources.public_code.scans",
}

__all__ = [
    "Bundle",
    "Execution",
    "Preprocessing",
    "QuarterMap",
    "QuartermapError",
    "Recipe",
    "__version__",
    "compile",
    "compile_module",
    "create_model",
    "export_onnx",
    "inline",
    "list_models",
    "load_bundle",
    "load_card",
    "load_like",
    "prune",
    "public_code",
    "selective_scan",
]

# Nothing is imported here, not even typing: the command line begins with this file, and what comes before its own code
# answers an interruption with a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from quartermap_deploy.architectures import create_model, list_models, load_card
    from quartermap_deploy.bundle import Bundle, load_bundle
    from quartermap_deploy.compiler import compile, compile_module
    from quartermap_deploy.data.preprocessing import Preprocessing
    from quartermap_deploy.errors import QuartermapError
    from quartermap_deploy.exporting.export import export_onnx
    from quartermap_deploy.exporting.inlining import inline
    from quartermap_deploy.like import load_like
    from quartermap_deploy.pruning.plan import QuarterMap
    from quartermap_deploy.pruning.reference import prune
    from quartermap_deploy.recipe import Recipe
    from quartermap_deploy.sources.public_code.context import public_code
    from quartermap_deploy.sources.public_code.scans import selective_scan
    from quartermap_deploy.targets.execution import Execution


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
