"""The target `onnxruntime`: the portable model as it is, on a CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.errors import BundleError, InputError
from quartermap_deploy.machine import all_cores, usable_cores
from quartermap_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from quartermap_deploy.targets.tensorrt.options import EngineOptions

MODEL_FILE = "model.onnx"
PRECISIONS = ("float32", "float16")
"""ONNX Runtime has no kernels for bfloat16 on a CPU and refuses such a model."""
THREADS_VARIABLE = "QUARTERMAP_THREADS"


class OnnxRuntimeSession:
    """A model in ONNX Runtime's CPU provider."""

    def __init__(self, model: Path | bytes, threads: int | None = None) -> None:
        """Load a model.

        Args:
            model: its file, or its serialised bytes.
            threads: threads for one operator; None takes the environment variable QUARTERMAP_THREADS, or else all
                cores.

        Raises:
            BundleError: if ONNX Runtime refuses the model.
        """
        self._session = inference_session(model, threads)
        self._input = self._session.get_inputs()[0]
        self._type = np.dtype(np.float16 if self._input.type == "tensor(float16)" else np.float32)

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits, (batch, num_classes), for images (batch, channels, height, width).

        Both are float32, or float16 where the model was exported with io = "same".

        Raises:
            InputError: if the images have another type or shape than the model takes.
        """
        self._check(images)
        logits: NDArray[np.float32] = self._session.run(None, {self._input.name: images})[0]
        return logits

    @property
    def input_type(self) -> np.dtype[Any]:
        """The element type of the images that the model takes."""
        return self._type

    def _check(self, images: NDArray[np.float32]) -> None:
        expected = tuple(self._input.shape)
        fits = (
            isinstance(images, np.ndarray)
            and images.dtype == self._type
            and images.ndim == len(expected)
            and images.shape[0] > 0
            and all(
                not isinstance(size, int) or size == own
                for size, own in zip(expected, images.shape, strict=True)
            )
        )
        if not fits:
            raise InputError(
                f"the model takes images of shape {expected} and {self._type}, found {_described(images, self._type)}"
            )


def _described(images: object, expected: np.dtype[Any]) -> str:
    """What was given instead of images, and how to mend it."""
    if not isinstance(images, np.ndarray):
        mend = f'np.asarray(images, dtype="{expected}") makes an array of it'
        return f"a {type(images).__name__}; {mend}, if the values are prepared as the model's card says"
    found = f"{images.shape} of {images.dtype}"
    if images.dtype != expected and np.issubdtype(images.dtype, np.floating):
        return f'{found}; convert them with images.astype("{expected}")'
    # Whole numbers are pixels that nobody has normalised: another type alone would not make an input of them.
    return f"{found}; prepare images as the model's card says"


def inference_session(model: Path | bytes, threads: int | None = None, *, profile: Path | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU, for a file or serialised bytes.

    Args:
        model: its file, or its serialised bytes.
        threads: threads for one operator; None takes the environment variable QUARTERMAP_THREADS, or else all cores
            that the process may use.
        profile: record the time of every node; `end_profiling` writes it into a file whose name starts so.

    Raises:
        BundleError: if ONNX Runtime refuses the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads if threads is not None else _threads_wanted()
    # Idle workers spin for some milliseconds after a run and would take the cores from the next session's run.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        name = "the model" if isinstance(model, bytes) else str(model)
        raise BundleError(f"ONNX Runtime refuses {name}: {str(error).strip()[:400]}") from error


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
    examples: Sequence[Sequence[int]] = (),
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
    bundle_path: Path, entry: Mapping[str, Any], *, plugin: Path | None = None, built_here: bool = False
) -> OnnxRuntimeSession:
    """Return a session for the bundle's portable model, which has no plugin and no code of its own."""
    return OnnxRuntimeSession(Path(bundle_path) / entry["file"])
