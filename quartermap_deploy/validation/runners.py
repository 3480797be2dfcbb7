"""Polygraphy runners: the PyTorch reference, a target's session, and ONNX Runtime with every scan and every block.

The outputs beside the model's own are `block_<i>/scan`, what the selective scan of block i returns, and `block_<i>`,
what leaves the block. A pruned scan returns the smaller map, before it is restored.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata

from quartermap_deploy.frontend.node_names import names_scan, read_name
from quartermap_deploy.passes.inline_scans import makes_scan
from quartermap_deploy.targets import Session
from quartermap_deploy.targets.execution import ON_CPU, Execution
from quartermap_deploy.targets.onnxruntime.opening import open_session

if TYPE_CHECKING:
    import onnx

    from quartermap_deploy.sources.reference import Reference


NATIVE = "onnxruntime with the native operator"
"""What that form of the target is called in reports."""


class TorchRunner(BaseRunner):  # type: ignore[misc]
    """The PyTorch reference: the outputs of every scan and block, in the order of the network, then its own."""

    def __init__(self, reference: Reference, *, blocks: bool = True, double: bool = False) -> None:
        """Wrap a reference.

        Args:
            reference: the model, pruned or not.
            blocks: also return the output of every scan and every block.
            double: compute in float64 where the model can, and round the outputs to float32.
        """
        super().__init__(name="torch")
        self._reference, self._blocks, self._double = reference, blocks, double
        self._followed: Iterator[Mapping[str, NDArray[Any]]] = iter(())

    def follow(self, outputs: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        """Compute every block from what a target handed to it, so that errors do not add up from block to block.

        The outputs stay those of the model by itself.

        Args:
            outputs: what the target returned for each of the batches to come. A block's output that is absent, has
                another shape or is not finite is not followed.
        """
        self._followed = iter(outputs)

    def get_input_metadata_impl(self) -> Any:
        """Names of the inputs."""
        metadata = TensorMetadata()
        for item in self._reference.inputs:
            metadata.add(item.name, np.dtype(item.type), [None] * len(item.shape))
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Run the model on one batch."""
        followed = next(self._followed, None)
        start = time.perf_counter()
        outputs: OrderedDict[str, Any] = OrderedDict()
        if self._blocks:
            parts = self._reference.run_parts(feed_dict, followed, double=self._double)
            if followed is not None and self._reference.scans is not None:
                parts = {name: value for name, value in parts.items() if _is_judged(name, followed)}
            outputs.update(parts)
        outputs.update(self._reference.run(feed_dict, double=self._double))
        self.inference_time = time.perf_counter() - start
        return outputs


def _is_judged(name: str, followed: Mapping[str, Any]) -> bool:
    """Whether a part of a foreign module has to be there in a target.

    Every scan has. A block's output is compared where the graph has it as a value; a recovered scan may have taken it.
    """
    return read_name(name) is None or names_scan(name) or name in followed


class SessionRunner(BaseRunner):  # type: ignore[misc]
    """The session of a target, which has the outputs of the model and no others."""

    def __init__(self, session: Session, name: str) -> None:
        super().__init__(name=name)
        self._session = session

    def get_input_metadata_impl(self) -> Any:
        """Names and types of the inputs."""
        metadata = TensorMetadata()
        for item in self._session.inputs:
            metadata.add(item.name, np.dtype(item.type), [None] * len(item.shape))
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Run the session on one batch."""
        # A model whose inputs have 16 bits takes nothing else; the comparison is made in float32.
        feeds = {
            item.name: feed_dict[item.name].astype(item.type, copy=False) for item in self._session.inputs
        }
        start = time.perf_counter()
        outputs = self._session.infer(feeds)
        self.inference_time = time.perf_counter() - start
        return OrderedDict(
            (name, value.astype(np.float32, copy=False) if value.dtype == np.float16 else value)
            for name, value in outputs.items()
        )


def onnxruntime_runner(
    model: onnx.ModelProto, *, native: bool | None = False, execution: Execution = ON_CPU
) -> OnnxrtRunner:
    """A runner for a model in memory whose outputs are those of every scan and every block, and its own.

    Args:
        model: the model.
        native: whether the native operator computes its scans, or else the portable body; None takes what the providers
            run by themselves.
        execution: the providers.
    """
    marked = with_block_outputs(model)
    data = marked.SerializeToString()
    name = NATIVE if native else "onnxruntime" if execution.on_cpu else f"onnxruntime by {execution}"
    return OnnxrtRunner(lambda: open_session(data, native=native, execution=execution).session, name=name)


def with_block_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the outputs of every scan and every block as graph outputs, before its own outputs.

    What the scan named `block_<i>/scan` makes is named like it, also where the scan is written out and only the last of
    its nodes has that name. One that is gone is not marked, and the comparison then
    finds that it is missing.
    """
    import onnx

    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    own = {value.name for value in marked.graph.output}
    named = {node.output[0]: node.name for node in marked.graph.node if makes_scan(node)}
    scans = {output: name for output, name in named.items() if output not in own}
    # What the model itself returns keeps its name, and is there under the scan's name too.
    marked.graph.node.extend(
        onnx.helper.make_node("Identity", [output], [name], f"{name}/again")
        for output, name in named.items()
        if output in own and output != name
    )
    for node in marked.graph.node:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name in scans:
                    names[position] = scans[name]
    # Shapes noted under the old names would belong to no value.
    kept = [info for info in marked.graph.value_info if info.name not in scans]
    del marked.graph.value_info[:]
    marked.graph.value_info.extend(kept)

    made = [name for node in marked.graph.node for name in node.output if read_name(name) is not None]
    outputs = list(marked.graph.output)
    del marked.graph.output[:]
    marked.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in made
        if name not in own
    )
    marked.graph.output.extend(outputs)
    return marked
