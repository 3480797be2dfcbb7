"""Models of `architectures`, exported by torch once in a test run: the same model again gets the same graph.

So are models that merge tokens, which are exported as any module is.

Torch takes seconds for each export, and many tests compile the same few models. A model is the same if its modules have
the same classes, code, settings and weights; what cannot be told, such as a function as a setting, is exported anew.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import onnx
import torch
from made_once import made_once

from quartermap_deploy.architectures.base import VisualStateSpaceModel
from quartermap_deploy.evaluation import tome
from quartermap_deploy.frontend.exporter import to_onnx, trace
from quartermap_deploy.scan import operators


def traced_once(
    model: VisualStateSpaceModel, input_shape: Sequence[int], **settings: bool
) -> onnx.ModelProto:
    """Export a model as `trace` does, or return what it was exported to before."""
    if settings.get("dynamic_batch", True) and len(input_shape) == 4 and input_shape[0] > 0:
        # The batch is open, so that the graph is the same for all.
        input_shape = (2, *input_shape[1:])
    asked = (tuple(input_shape), sorted(settings.items()))
    return _once(model, asked, lambda: trace(model, input_shape, **settings))


def merging_once(
    model: VisualStateSpaceModel, arguments: tuple[torch.Tensor, ...], **settings: Any
) -> onnx.ModelProto:
    """Export a model of `merge_tokens` as `to_onnx` does, or return what it was exported to before."""
    # The code of merging is in functions, which no module holds.
    asked = (Path(tome.__file__).read_bytes(), [item.shape for item in arguments], sorted(settings.items()))
    return _once(model, asked, lambda: to_onnx(model, arguments, **settings))


def _once(
    model: VisualStateSpaceModel, asked: object, export: Callable[[], onnx.ModelProto]
) -> onnx.ModelProto:
    key = hashlib.sha256()
    for part in _parts(model, asked):
        key.update(part)
        key.update(b"\0")

    def make(path: Path) -> None:
        draft = path.with_suffix(".draft")
        draft.write_bytes(export().SerializeToString())
        draft.rename(path)

    return onnx.load(made_once(f"traced_{key.hexdigest()[:32]}.onnx", make))


def _parts(model: VisualStateSpaceModel, settings: object) -> Iterator[bytes]:
    """What the graph of a model depends on."""
    yield repr(settings).encode()
    yield _code(trace) + _code(to_onnx) + _code(operators.selective_scan_2d) + _code(operators.selective_scan)
    for name, module in model.named_modules():
        kind = type(module)
        yield f"{name} {kind.__module__}.{kind.__qualname__}".encode()
        for base in kind.__mro__:
            yield from (_code(value) for value in vars(base).values() if inspect.isfunction(value))
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        yield repr(sorted(own.items(), key=lambda item: item[0])).encode()
        yield repr([list(hooks.items()) for hooks in _hooks(module)]).encode()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.detach().float().contiguous().numpy().tobytes()


def _hooks(module: Any) -> list[dict[Any, Any]]:
    return [module._forward_hooks, module._forward_pre_hooks]


def _code(function: Any) -> bytes:
    """A function's code with that of the functions in it."""
    code = getattr(function, "__code__", function)
    if not isinstance(code, CodeType):
        return repr(function).encode()
    inner = b"".join(
        _code(value) if isinstance(value, CodeType) else repr(value).encode() for value in code.co_consts
    )
    return code.co_code + repr(code.co_names).encode() + inner
