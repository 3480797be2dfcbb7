"""A model in ONNX Runtime, ready to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quartermap_deploy.errors import BundleError, InputError
from quartermap_deploy.size_rules import SizeRules
from quartermap_deploy.targets.execution import ON_CPU, Execution, Where
from quartermap_deploy.targets.onnxruntime.opening import open_session
from quartermap_deploy.targets.placement import Placement
from quartermap_deploy.targets.scan_form import ScanForm
from quartermap_deploy.targets.session import Session, check_feeds
from quartermap_deploy.tensor_info import TensorInfo


class OnnxRuntimeSession(Session):
    """A model in ONNX Runtime.

    Attributes:
        scans: what computes its scans.
        placement: what of it runs where.
    """

    scans: ScanForm
    placement: Placement

    def __init__(
        self,
        model: Path | bytes,
        threads: int | None = None,
        rules: Sequence[str] = (),
        *,
        native: bool | None = None,
        fuse: bool = True,
        execution: Where = ON_CPU,
    ) -> None:
        """Load a model.

        Args:
            model: its file, or its serialised bytes.
            threads: threads for one operator; None takes the environment variable QUARTERMAP_THREADS, or else all
                cores.
            rules: what the sizes of its inputs must fulfil; see `size_rules`.
            native: whether the native operator computes its scans; None where it is there and takes the model.
            fuse: with the native operator, also normalise maps by one operator each; see `fused_norms`.
            execution: the providers that run it; a device, a provider, or a list of providers does as well.

        Raises:
            InputError: if `execution` is none of these.
            BundleError: as `open_session` raises it.
            MissingDependencyError: the same.
        """
        self._session, self.scans, self.placement = open_session(
            model, threads, native=native, fuse=fuse, execution=Execution.read(execution)
        )
        self.inputs = tuple(_info(value) for value in self._session.get_inputs())
        self.outputs = tuple(_info(value) for value in self._session.get_outputs())
        self._rules = SizeRules(rules)

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the model on one batch, given and returned by name.

        Floating-point values are float32, or float16 where the model was exported with io = "same".

        Raises:
            InputError: if an input is missing, unknown, or of another type or shape than the model takes, or holds
                values that it cannot take, such as numbers of words that are not there.
            BundleError: if the model does what cannot be done, such as asking for more memory than there is.
        """
        from onnxruntime.capi.onnxruntime_pybind11_state import (
            EPFail,
            Fail,
            InvalidArgument,
            RuntimeException,
        )

        check_feeds(self.inputs, feeds)
        self._rules.check({name: array.shape for name, array in feeds.items()})
        try:
            found = self._session.run(None, dict(feeds))
        except InvalidArgument as error:
            raise InputError(
                f"the model cannot take these values: {' '.join(str(error).split())[:300]}"
            ) from error
        except (EPFail, Fail, RuntimeException) as error:
            raise BundleError(
                f"ONNX Runtime cannot run the model: {' '.join(str(error).split())[:300]}"
            ) from error
        return {item.name: value for item, value in zip(self.outputs, found, strict=True)}


_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(bool)": "bool"}


def _info(value: Any) -> TensorInfo:
    """What ONNX Runtime says of an input or output."""
    kind = _TYPES.get(value.type, str(value.type).removeprefix("tensor(").removesuffix(")"))
    shape = tuple(size if isinstance(size, int) else size or "any" for size in value.shape)
    return TensorInfo(value.name, shape, kind)
