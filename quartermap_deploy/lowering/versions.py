"""The versions of ONNX that a file needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

FUNCTIONS, OVERLOADS = 8, 10
"""The first IR versions with local functions, and with several of one name."""


def opset_of(model: onnx.ModelProto | onnx.FunctionProto) -> int:
    """The opset of the standard operators in a model or a function."""
    (version,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return int(version)


def stamp_ir_version(model: onnx.ModelProto) -> None:
    """Give a model the lowest IR version that is valid for what it holds, in place.

    Runtimes refuse a file whose version is newer than they are, whatever is in it.
    """
    from onnx import helper

    wanted = [helper.find_min_ir_version_for([helper.make_opsetid("", opset_of(model))])]
    if model.functions:
        overloads = any(function.overload for function in model.functions)
        wanted.append(OVERLOADS if overloads else FUNCTIONS)
    model.ir_version = max(wanted)
