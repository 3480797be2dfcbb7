"""Polygraphy runners: the PyTorch reference, a target's session, and ONNX Runtime with the outputs of all blocks."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata

from quartermap_deploy.frontend.exporter import INPUT, OUTPUT, block_output
from quartermap_deploy.targets import Session
from quartermap_deploy.targets.onnxruntime_cpu import inference_session

if TYPE_CHECKING:
    import onnx

    from quartermap_deploy.architectures.base import VisualStateSpaceModel


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """A PyTorch model whose outputs are the logits and, named as in the graph, the output of every block."""

    def __init__(self, model: VisualStateSpaceModel, *, blocks: bool = True, double: bool = False) -> None:
        """Wrap a model.

        Args:
            model: the model, pruned or not.
            blocks: also return the output of every block.
            double: compute in float64 and round the outputs to float32.
        """
        super().__init__(name="torch")
        self._model, self._blocks, self._double = model, blocks, double

    def get_input_metadata_impl(self) -> Any:
        """Name and type of the input."""
        return TensorMetadata().add(INPUT, np.float32, (None, self._model.in_channels, None, None))

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Run the model on one batch."""
        import copy

        import torch

        model = copy.deepcopy(self._model).double() if self._double else self._model
        images = torch.from_numpy(np.ascontiguousarray(feed_dict[INPUT]))
        outputs: OrderedDict[str, Any] = OrderedDict()

        def keep(name: str) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                outputs[name] = output.float().numpy()

            return hook

        handles = [
            block.module.register_forward_hook(keep(block_output(block.index)))
            for block in (model.blocks() if self._blocks else [])
        ]
        try:
            start = time.perf_counter()
            with torch.no_grad():
                logits = model(images.double() if self._double else images)
            self.inference_time = time.perf_counter() - start
        finally:
            for handle in handles:
                handle.remove()
        outputs[OUTPUT] = logits.float().numpy()
        return outputs


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
        start = time.perf_counter()
        logits = self._session.run(feed_dict[INPUT])
        self.inference_time = time.perf_counter() - start
        return OrderedDict({OUTPUT: logits})


def onnxruntime_runner(model: onnx.ModelProto) -> OnnxrtRunner:
    """A runner for a model in memory whose outputs are its own and the output of every block."""
    marked = with_block_outputs(model)
    return OnnxrtRunner(lambda: inference_session(marked.SerializeToString()), name="onnxruntime")


def with_block_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the output of every block as a graph output, before its own outputs."""
    import onnx

    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    made = {name for node in marked.graph.node for name in node.output}
    own = list(marked.graph.output)
    del marked.graph.output[:]
    index = 1
    while block_output(index) in made:
        info = onnx.helper.make_tensor_value_info(block_output(index), onnx.TensorProto.FLOAT, None)
        marked.graph.output.append(info)
        index += 1
    marked.graph.output.extend(own)
    return marked
