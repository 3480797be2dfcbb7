"""Polygraphy runners: the PyTorch reference, a target's session, and ONNX Runtime with every scan and every block.

The outputs beside the logits are `block_<i>/scan`, what the selective scan of block i returns, and `block_<i>`, what
leaves the block. A pruned scan returns the smaller map, before it is restored.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata

from quartermap_deploy.frontend.exporter import INPUT, OUTPUT
from quartermap_deploy.frontend.node_names import block_output, scan_name
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D
from quartermap_deploy.targets import Session
from quartermap_deploy.targets.onnxruntime_cpu import inference_session

if TYPE_CHECKING:
    import onnx
    import torch

    from quartermap_deploy.architectures.base import VisualStateSpaceModel


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """A PyTorch model whose outputs are those of every scan and block, in the order of the network, and the logits."""

    def __init__(self, model: VisualStateSpaceModel, *, blocks: bool = True, double: bool = False) -> None:
        """Wrap a model.

        Args:
            model: the model, pruned or not.
            blocks: also return the output of every scan and every block.
            double: compute in float64 and round the outputs to float32.
        """
        super().__init__(name="torch")
        self._model, self._blocks, self._double = model, blocks, double
        self._followed: Iterator[Mapping[str, NDArray[Any]]] = iter(())

    def follow(self, outputs: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        """Compute every block from what a target handed to it, so that errors do not add up from block to block.

        That is done in float64. The logits stay those of the model by itself.

        Args:
            outputs: what the target returned for each of the batches to come. A block's output that is absent, has
                another shape or is not finite is not followed.
        """
        self._followed = iter(outputs)

    def get_input_metadata_impl(self) -> Any:
        """Name and type of the input."""
        return TensorMetadata().add(INPUT, np.float32, (None, self._model.in_channels, None, None))

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Run the model on one batch."""
        import torch

        images = torch.from_numpy(np.ascontiguousarray(feed_dict[INPUT]))
        outputs: OrderedDict[str, Any] = OrderedDict()

        def keep(name: str, value: torch.Tensor) -> None:
            outputs[name] = value.float().numpy()

        followed = next(self._followed, None)
        start = time.perf_counter()
        with torch.no_grad():
            if followed is not None:
                with _recording(wide := _in_float64(self._model), keep, followed):
                    wide(images.double())
            model = _in_float64(self._model) if self._double else self._model
            record = self._blocks and followed is None
            with _recording(model, keep, {}) if record else contextlib.nullcontext():
                logits = model(images.double() if self._double else images)
        self.inference_time = time.perf_counter() - start
        keep(OUTPUT, logits)
        return outputs


def _in_float64(model: VisualStateSpaceModel) -> VisualStateSpaceModel:
    return copy.deepcopy(model).double()


@contextlib.contextmanager
def _recording(
    model: VisualStateSpaceModel,
    keep: Callable[[str, torch.Tensor], None],
    followed: Mapping[str, NDArray[Any]],
) -> Iterator[None]:
    """Give the output of every scan and every block of a model to `keep`, and hand on those that are followed instead.

    Blocks are seen by forward hooks. A scan is a call of the torch operator in the middle of its mixer, so it is seen
    where torch dispatches operators.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    operator = torch.ops.quartermap.selective_scan_2d.default
    running: list[int] = []

    class Scans(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is operator:
                keep(scan_name(running[-1]), result)
            return result

    def enter(index: int) -> Callable[..., None]:
        return lambda module, inputs: running.append(index)

    def leave(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        name = block_output(running.pop())
        keep(name, output)
        other = followed.get(name)
        if other is None or other.shape != tuple(output.shape) or not np.isfinite(other).all():
            return None
        return torch.tensor(other, dtype=output.dtype)

    handles = [
        handle
        for block in model.blocks()
        for handle in (
            block.module.register_forward_pre_hook(enter(block.index)),
            block.module.register_forward_hook(leave),
        )
    ]
    try:
        with Scans():  # type: ignore[no-untyped-call]
            yield
    finally:
        for handle in handles:
            handle.remove()


class SessionRunner(BaseRunner):  # type: ignore[misc]
    """The session of a target, whose only output is the logits."""

    def __init__(self, session: Session, name: str) -> None:
        super().__init__(name=name)
        self._session = session

    def get_input_metadata_impl(self) -> Any:
        """Name and type of the input."""
        return TensorMetadata().add(INPUT, np.float32, (None, None, None, None))

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Run the session on one batch."""
        # A model whose input has 16 bits takes nothing else; the comparison is made in float32.
        images = feed_dict[INPUT].astype(getattr(self._session, "input_type", np.float32), copy=False)
        start = time.perf_counter()
        logits = self._session.run(images)
        self.inference_time = time.perf_counter() - start
        return OrderedDict({OUTPUT: logits.astype(np.float32, copy=False)})


def onnxruntime_runner(model: onnx.ModelProto) -> OnnxrtRunner:
    """A runner for a model in memory whose outputs are those of every scan and every block, and its own."""
    marked = with_block_outputs(model)
    return OnnxrtRunner(lambda: inference_session(marked.SerializeToString()), name="onnxruntime")


def with_block_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the outputs of every scan and every block as graph outputs, before its own outputs.

    What the scan named `block_<i>/scan` makes is named like it. One that is gone is not marked, and the comparison then
    finds that it is missing.
    """
    import onnx

    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    scans = {
        node.output[0]: node.name
        for node in marked.graph.node
        if node.domain == DOMAIN and node.op_type == SELECTIVE_SCAN_2D
    }
    for node in marked.graph.node:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name in scans:
                    names[position] = scans[name]
    # Shapes noted under the old names would belong to no value.
    kept = [info for info in marked.graph.value_info if info.name not in scans]
    del marked.graph.value_info[:]
    marked.graph.value_info.extend(kept)

    made = {name for node in marked.graph.node for name in node.output}
    own = list(marked.graph.output)
    del marked.graph.output[:]
    index = 1
    while found := [name for name in (scan_name(index), block_output(index)) if name in made]:
        marked.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in found
        )
        index += 1
    marked.graph.output.extend(own)
    return marked
