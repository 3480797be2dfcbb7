"""What Python and torch do anew in every test, once in a process."""

from __future__ import annotations

import copy
import gc
from typing import Any


def look_less_for_garbage() -> None:
    """Leave what the libraries hold out of every search for garbage, and search less often.

    An export makes millions of objects, and a search finds nearly nothing among them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def read_translations_once() -> None:
    """Let torch's exporter keep its table of translations, for which it parses 500 functions at every export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read, kept = ONNXRegistry.from_torchlib, dict[int, Any]()

    def from_torchlib(opset_version: int) -> Any:
        if opset_version not in kept:
            kept[opset_version] = read(opset_version)
        # Every export puts translations of its own into the table that it gets.
        own = copy.copy(kept[opset_version])
        own.functions = {name: list(found) for name, found in own.functions.items()}
        return own

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[assignment, method-assign]
