"""The target `onnxruntime`: the portable model as it is, on a CPU.

Its scans run by the native operator of the CPU library where that is found and takes the model (`native.cpu_library`),
and by the standard operators in the file everywhere else. Both are the same file. With the library, the session's copy
of the graph also has its layer normalisations of maps as one operator each (`fused_norms`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from quartermap_deploy.errors import BundleError, InputError
from quartermap_deploy.lowering.operator import SCANS
from quartermap_deploy.machine import all_cores, usable_cores
from quartermap_deploy.native.cpu_library import find_cpu_library
from quartermap_deploy.onnx_bounds import check_model
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.size_rules import SizeRules
from quartermap_deploy.targets.fused_norms import fused_model
from quartermap_deploy.targets.scan_form import ScanForm
from quartermap_deploy.targets.session import Session, check_feeds
from quartermap_deploy.tensor_info import TensorInfo

if TYPE_CHECKING:
    from quartermap_deploy.native.cpu_library import CpuLibrary
    from quartermap_deploy.targets.tensorrt.options import EngineOptions

MODEL_FILE = "model.onnx"
PRECISIONS = ("float32", "float16")
"""ONNX Runtime has no kernels for bfloat16 on a CPU and refuses such a model."""
THREADS_VARIABLE = "QUARTERMAP_THREADS"
THREADS_ENTRY = "quartermap.threads"
"""The entry of a session's configuration by which the native operator learns how many threads there are."""
LARGEST_FOLDED = str(64 << 20)
"""Bytes of a tensor that ONNX Runtime computes of constants ahead of time."""


class OnnxRuntimeSession(Session):
    """A model in ONNX Runtime's CPU provider.

    Attributes:
        scans: what computes its scans.
    """

    scans: ScanForm

    def __init__(
        self,
        model: Path | bytes,
        threads: int | None = None,
        rules: Sequence[str] = (),
        *,
        native: bool | None = None,
        fuse: bool = True,
    ) -> None:
        """Load a model.

        Args:
            model: its file, or its serialised bytes.
            threads: threads for one operator; None takes the environment variable QUARTERMAP_THREADS, or else all
                cores.
            rules: what the sizes of its inputs must fulfil; see `size_rules`.
            native: whether the native operator computes its scans; None where it is there and takes the model.
            fuse: with the native operator, also normalise maps by one operator each; see `fused_norms`.

        Raises:
            BundleError: as `open_session` raises it.
        """
        self._session, self.scans = open_session(model, threads, native=native, fuse=fuse)
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
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

        check_feeds(self.inputs, feeds)
        self._rules.check({name: array.shape for name, array in feeds.items()})
        try:
            found = self._session.run(None, dict(feeds))
        except InvalidArgument as error:
            raise InputError(
                f"the model cannot take these values: {' '.join(str(error).split())[:300]}"
            ) from error
        except (Fail, RuntimeException) as error:
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


def open_session(
    model: Path | bytes,
    threads: int | None = None,
    *,
    native: bool | None = None,
    profile: Path | None = None,
    fuse: bool = True,
) -> tuple[Any, ScanForm]:
    """An `onnxruntime.InferenceSession` on the CPU, for a file or serialised bytes, and what computes its scans.

    Args:
        model: its file, or its serialised bytes.
        threads: threads for one operator; None takes the environment variable QUARTERMAP_THREADS, or else all cores
            that the process may use.
        native: whether the native operator computes its scans. None takes it where it is there and takes the model;
            False keeps to the portable body; True refuses a session without it.
        profile: record the time of every node; `end_profiling` writes it into a file whose name starts so.
        fuse: with the native operator, also normalise maps by one operator each; see `fused_norms`.

    Raises:
        BundleError: if the model holds what this package does not write (see `onnx_bounds`), ONNX Runtime refuses it,
            or it has scans for which the native operator is wanted and cannot be had.
    """
    has_scans = not check_model(model).isdisjoint(SCANS)
    threads = threads if threads is not None else _threads_wanted()
    refused = "it was not wanted"
    if has_scans and native is not False:
        found = find_cpu_library()
        if found.library is None:
            refused = found.summary
        else:
            try:
                form = fused_model(model) if fuse else model
                session = _session(form, _options(threads, profile, found.library))
            except Exception as error:  # the model's own fault shows again below
                refused = " ".join(str(error).split())[:400]
            else:
                return session, ScanForm("native", found.library.instruction_set)
        if native:
            raise BundleError(f"the native operator cannot run the scans of {_name(model)}: {refused}")
    try:
        session = _session(model, _options(threads, profile, None))
    except Exception as error:
        raise BundleError(
            f"ONNX Runtime refuses {_name(model)}: {' '.join(str(error).split())[:400]}"
        ) from error
    return session, ScanForm("portable", reason=refused) if has_scans else ScanForm("none")


def inference_session(model: Path | bytes, threads: int | None = None) -> Any:
    """A session as `open_session` makes it, which keeps to the portable body; `open_session` says what is raised."""
    return open_session(model, threads, native=False)[0]


def _name(model: Path | bytes) -> str:
    return "the model" if isinstance(model, bytes) else str(model)


def _session(model: Path | bytes, options: Any) -> Any:
    import onnxruntime

    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _options(threads: int, profile: Path | None, library: CpuLibrary | None) -> Any:
    """The options of a session with so many threads, 0 for ONNX Runtime's own number."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # What it would write of errors are names from the file, unescaped; the exception says the same.
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # Idle workers spin for some milliseconds after a run and would take the cores from the next session's run.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # What stands in the file is computed once, while it is loaded; versions that do not know this setting ignore it.
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", LARGEST_FOLDED)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if library is not None:
        # Nothing in ONNX Runtime's interface tells an operator how many threads its session has. The library reads
        # this as it is registered.
        options.add_session_config_entry(THREADS_ENTRY, str(threads or usable_cores()))
        options.register_custom_ops_library(str(library.path))
    return options


def _threads_wanted() -> int:
    """The number in the environment, or that of a process that may not use all cores, or else 0 for all of them.

    Raises:
        InputError: if it is no number.
    """
    text = os.environ.get(THREADS_VARIABLE, "0")
    if not text.isdecimal():
        raise InputError(
            f"the environment variable {THREADS_VARIABLE} is {text!r}; expected a number of threads"
        )
    usable = usable_cores()
    # By itself ONNX Runtime takes as many threads as the machine has cores, in a container with two of 64 as well.
    return int(text) or (usable if usable < all_cores() else 0)


def default_threads() -> int:
    """The threads that one operator gets where a session is made without a number: the environment's, or all cores.

    Raises:
        InputError: if the environment holds no number.
    """
    return _threads_wanted() or usable_cores()


def check(recipe: Any = None) -> None:
    """Nothing has to be there but the core install."""


def build(
    model_path: Path,
    directory: Path,
    options: EngineOptions | None = None,
    *,
    examples: Sequence[Mapping[str, Sequence[int]]] = (),
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Nothing has to be written: the portable model is loaded as it is. Returns the manifest entry."""
    import onnxruntime

    return {
        "file": model_path.name,
        "onnxruntime": onnxruntime.__version__,
        "provider": "CPUExecutionProvider",
    }


def cannot_run(entry: Mapping[str, Any]) -> str | None:
    """Nothing speaks against running the portable model."""
    return None


def open(
    bundle_path: Path,
    entry: Mapping[str, Any],
    *,
    plugin: Path | None = None,
    native: bool | None = None,
    built_here: bool = False,
) -> OnnxRuntimeSession:
    """Return a session for the bundle's portable model, which has no plugin and no code of its own."""
    path = Path(bundle_path) / entry["file"]
    return OnnxRuntimeSession(path, rules=entry.get("size_rules", ()), native=native)
