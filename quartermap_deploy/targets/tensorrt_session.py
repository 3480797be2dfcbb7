"""Run an engine, without torch: TensorRT by polygraphy's runner, TensorRT for RTX by a small session of its own."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.errors import BundleError, EngineError, InputError
from quartermap_deploy.files import file_hash, write_whole
from quartermap_deploy.targets.gpu import Gpu, find_gpu
from quartermap_deploy.targets.tensorrt_builder import load_plugin
from quartermap_deploy.targets.tensorrt_checks import check_file
from quartermap_deploy.targets.tensorrt_flavour import Flavour, version_numbers
from quartermap_deploy.targets.tensorrt_monitor import make_logger
from quartermap_deploy.targets.tensorrt_options import CACHE_FOLDER, EngineOptions


def open_engine(
    flavour: Flavour,
    bundle_path: Path,
    entry: Mapping[str, Any],
    plugin_library: Callable[[], Path] | None = None,
) -> EngineSession:
    """Open a bundle's engine.

    Args:
        flavour: which TensorRT.
        bundle_path: the bundle.
        entry: its manifest entry.
        plugin_library: finds the plugin library, where the engine needs it.

    Raises:
        MissingDependencyError: if TensorRT is absent or its version is not supported.
        BundleError: if the engine does not fit this machine, or is not whole; the message says how to make it again.
    """
    needed = ("file", "version", "compute_capabilities", "inputs", "options", "key", "build")
    if missing := [name for name in needed if name not in entry]:
        raise BundleError(
            f"the manifest of {bundle_path} says too little about its {flavour.target} engine ({', '.join(missing)}); "
            f"make it again with `quartermap rebuild {bundle_path} --target {flavour.target}`"
        )
    path = Path(bundle_path) / entry["file"]
    mend = f"make it again with `quartermap rebuild {bundle_path} --target {flavour.target}`"
    try:
        check_file(path, entry)
    except EngineError as error:
        raise BundleError(f"{error}; {mend}") from error
    trt = flavour.load()
    plugin = plugin_library() if plugin_library and entry.get("plugin") else None
    gpu = find_gpu()
    if (reason := refusal(flavour, entry, trt.__version__, gpu, plugin)) is not None:
        raise BundleError(f"the engine {path} cannot run here: {reason}; {mend}")
    if gpu is None:
        raise BundleError(
            f"the engine {path} needs an NVIDIA GPU, and there is none (no NVIDIA driver answers); run it where "
            "there is one; on a CPU, a bundle compiled with --targets onnxruntime runs"
        )
    logger = make_logger(trt)
    if plugin is not None:
        load_plugin(trt, logger, plugin)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        why = logger.errors[-1] if logger.errors else "no reason given"
        raise BundleError(f"{flavour.title} refuses the engine {path}: {why}; {mend}")
    if flavour.portable:
        cache = Path(bundle_path).absolute().parent / CACHE_FOLDER / f"{entry['key'][:32]}.runtime"
        return RtxSession(trt, runtime, engine, entry, logger, cache)
    return TensorRTSession(trt, runtime, engine, entry, logger)


def refusal(
    flavour: Flavour, entry: Mapping[str, Any], version: str, gpu: Gpu | None, plugin: Path | None
) -> str | None:
    """Why an engine cannot run here, or None if nothing speaks against it.

    Args:
        flavour: which TensorRT.
        entry: the engine's manifest entry.
        version: of the TensorRT that is installed.
        gpu: the GPU at hand; None leaves it out.
        plugin: the plugin library at hand, if the engine needs one.
    """
    built, here = version_numbers(entry["version"]), version_numbers(version)
    options = entry["options"]
    compatible = options.get("version_compatible") and built[0] <= here[0] and built <= here
    if built[:3] != here[:3] and not compatible:
        return f"it was built with {flavour.title} {entry['version']}, found {version}"
    if gpu is not None and not _fits(gpu.compute_capability, entry["compute_capabilities"], options):
        expected = " or ".join(entry["compute_capabilities"])
        return f"it was built for GPUs of compute capability {expected}, found a {gpu.name} of {gpu.compute_capability}"
    expected_plugin = entry.get("plugin")
    if expected_plugin is not None and plugin is not None and file_hash(plugin) != expected_plugin["sha256"]:
        return (
            f"it was built with the plugin {expected_plugin['file']}, sha256 {expected_plugin['sha256'][:12]}…, found "
            f"another library {plugin}"
        )
    return None


def _fits(capability: str, built_for: list[str], options: Mapping[str, Any]) -> bool:
    if options.get("hardware_compatibility") == "ampere_plus":
        return version_numbers(capability) >= (8, 0)
    return capability in built_for


class EngineSession:
    """An engine that is ready to run; what both kinds share."""

    def __init__(self, trt: Any, runtime: Any, engine: Any, entry: Mapping[str, Any], logger: Any) -> None:
        self.trt, self.runtime, self.engine, self.logger = trt, runtime, engine, logger
        self.options = EngineOptions.from_dict(entry["options"])
        ((self.input, self.shape),) = entry["inputs"].items()
        self.output = next(
            name
            for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
            if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT
        )

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits, (batch, num_classes), for images (batch, channels, height, width).

        Raises:
            InputError: if no profile of the engine takes the images.
            EngineError: if TensorRT fails.
        """
        index = profile_for(images, self.shape, self.options)
        logits: NDArray[np.float32] = np.asarray(self.infer(np.ascontiguousarray(images), index))
        return logits.astype(np.float32, copy=False)

    def infer(self, images: NDArray[np.float32], profile: int) -> NDArray[Any]:
        """Run the engine with one of its profiles."""
        raise NotImplementedError


def profile_for(images: object, shape: list[int | str], options: EngineOptions) -> int:
    """The first profile that takes the images.

    Raises:
        InputError: if none does, or they are no float32 array.
    """
    if not isinstance(images, np.ndarray) or images.dtype != np.float32:
        found = (
            f"an array of {images.dtype}" if isinstance(images, np.ndarray) else f"a {type(images).__name__}"
        )
        raise InputError(
            f'the engine takes images of float32, found {found}; convert them with np.asarray(images, dtype="float32")'
        )
    for index, profile in enumerate(options.profiles):
        if profile.takes(images.shape, shape):
            return index
    ranges = [profile.shapes(shape) for profile in options.profiles]
    taken = " or ".join(f"{low} to {high}" for low, _, high in ranges)
    raise InputError(
        f"the engine takes images of shape {taken}, found {images.shape}; run fewer at a time, or compile with a wider "
        "profile"
    )


class TensorRTSession(EngineSession):
    """An engine of TensorRT, run by polygraphy."""

    def __init__(self, trt: Any, runtime: Any, engine: Any, entry: Mapping[str, Any], logger: Any) -> None:
        from polygraphy.backend.trt import TrtRunner

        super().__init__(trt, runtime, engine, entry, logger)
        self.runner = TrtRunner(engine)
        self.runner.activate()
        self.profile = 0

    def infer(self, images: NDArray[np.float32], profile: int) -> NDArray[Any]:
        """Run the engine with one of its profiles."""
        if profile != self.profile:
            self.runner.set_profile(profile)
            self.profile = profile
        # Copied: the runner writes its next outputs over these.
        outputs: OrderedDict[str, Any] = self.runner.infer({self.input: images}, check_inputs=False)
        return np.array(outputs[self.output])

    def __del__(self) -> None:
        runner = getattr(self, "runner", None)
        if runner is not None and runner.is_active:
            runner.deactivate()


class RtxSession(EngineSession):
    """An engine of TensorRT for RTX, on polygraphy's device arrays.

    The runtime compiles an engine's kernels for the GPU at hand. They are kept in a file beside the bundle, so that
    only the first process that runs a bundle waits for that.
    """

    def __init__(
        self, trt: Any, runtime: Any, engine: Any, entry: Mapping[str, Any], logger: Any, cache: Path
    ) -> None:
        from polygraphy import cuda

        super().__init__(trt, runtime, engine, entry, logger)
        self.cache: Any = None
        self.cache_path, self.saved = cache, False
        self.context = self._context()
        self.stream = cuda.Stream()
        self.inputs = cuda.DeviceArray(dtype=np.float32)
        self.outputs = cuda.DeviceArray(dtype=np.dtype(trt.nptype(engine.get_tensor_dtype(self.output))))
        self.profile = 0

    def _context(self) -> Any:
        if not hasattr(self.engine, "create_runtime_config"):
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        if hasattr(config, "create_runtime_cache"):
            self.cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                self.cache.deserialize(self.cache_path.read_bytes())
            config.set_runtime_cache(self.cache)
        return self.engine.create_execution_context(config)

    def infer(self, images: NDArray[np.float32], profile: int) -> NDArray[Any]:
        """Run the engine with one of its profiles."""
        context, stream = self.context, self.stream
        if profile != self.profile:
            if not context.set_optimization_profile_async(profile, stream.ptr):
                raise EngineError(f"TensorRT for RTX refuses the profile {profile}: {self._why()}")
            self.profile = profile
        self.inputs.resize(images.shape)
        self.inputs.copy_from(images, stream)
        context.set_input_shape(self.input, images.shape)
        self.outputs.resize(tuple(context.get_tensor_shape(self.output)))
        context.set_tensor_address(self.input, self.inputs.ptr)
        context.set_tensor_address(self.output, self.outputs.ptr)
        if not context.execute_async_v3(stream.ptr):
            raise EngineError(f"TensorRT for RTX could not run the engine: {self._why()}")
        result = np.empty(self.outputs.shape, dtype=self.outputs.dtype)
        self.outputs.copy_to(result, stream)
        stream.synchronize()
        self._save()
        return result

    def _save(self) -> None:
        if self.cache is None or self.saved:
            return
        self.saved = True
        try:
            self.cache_path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.cache_path, bytes(self.cache.serialize()))
        except OSError:
            return

    def _why(self) -> str:
        return self.logger.errors[-1] if self.logger.errors else "no reason given"
