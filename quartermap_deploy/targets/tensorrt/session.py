"""Run an engine, without torch: TensorRT by polygraphy's runner, TensorRT for RTX by a small session of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy import gpu as devices
from quartermap_deploy.errors import BundleError, EngineError, InputError
from quartermap_deploy.gpu import Gpu
from quartermap_deploy.plain_text import command
from quartermap_deploy.size_rules import SizeRules
from quartermap_deploy.targets.session import Session, check_feeds
from quartermap_deploy.targets.tensorrt.caches import RuntimeCache
from quartermap_deploy.targets.tensorrt.checks import check_file
from quartermap_deploy.targets.tensorrt.cuda_runtime import require_runtime
from quartermap_deploy.targets.tensorrt.flavour import Flavour, version_numbers
from quartermap_deploy.targets.tensorrt.monitor import make_logger
from quartermap_deploy.targets.tensorrt.objects import driver_lack, last_error, make_runtime
from quartermap_deploy.targets.tensorrt.options import (
    EngineOptions,
    ModelShapes,
    named_shapes,
    taken_shapes,
)
from quartermap_deploy.targets.tensorrt.plugin import (
    WantedLibrary,
    find_library,
    load_plugin,
    require_code,
    wrong_library,
)
from quartermap_deploy.tensor_info import TensorInfo

TRUST_VARIABLE = "QUARTERMAP_TRUST_ENGINE_CODE"
"""Set to 1, lets an engine that carries code of its own run it in this process."""
TYPES = {
    "FLOAT": "float32",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""NumPy's names of TensorRT's element types that inputs and outputs may have."""
NO_GPU = "there is no NVIDIA GPU (no NVIDIA driver answers)"


def open_engine(
    flavour: Flavour,
    bundle_path: Path,
    entry: Mapping[str, Any],
    *,
    plugin: Path | None = None,
    built_here: bool = False,
) -> EngineSession:
    """Open a bundle's engine.

    Args:
        flavour: which TensorRT.
        bundle_path: the bundle.
        entry: its manifest entry.
        plugin: the plugin library; None looks where `plugin.find_library` does.
        built_here: this process has just built the engine, so that code which it carries is known.

    Raises:
        MissingDependencyError: if TensorRT or the CUDA runtime is absent, or the version is not supported.
        BundleError: if the engine does not fit this machine, is not whole, or brings code that nobody trusts; the
            message says how to make it again.
        QuartermapError: of the plugin library, if it is missing or wrong.
        TrustError: if others could write to this user's cache.
    """
    remedy = (
        f"make it again with `{command('quartermap', 'rebuild', bundle_path, '--target', flavour.target)}`"
    )
    needed = ("file", "version", "compute_capabilities", "inputs", "outputs", "options", "build")
    missing = [name for name in needed if name not in entry]
    if missing or (missing := _misshapen(entry)):
        raise BundleError(
            f"the manifest of {bundle_path} says too little about its {flavour.target} engine "
            f"({', '.join(missing)}); {remedy}"
        )
    path = Path(bundle_path) / entry["file"]
    try:
        wanted = WantedLibrary.of_entry(entry)
        check_file(path, entry)
    except EngineError as error:
        raise BundleError(f"{error}; {remedy}") from error
    trt = flavour.load()
    gpu = devices.find_gpu()
    if (reason := refusal(flavour, entry, trt.__version__, gpu)) is not None:
        raise BundleError(f"the engine {path} cannot run here: {reason}; {remedy}")
    if gpu is None:
        raise BundleError(
            f"the engine {path} needs an NVIDIA GPU, and there is none (no NVIDIA driver answers); run it where "
            "there is one; on a CPU, a bundle compiled with --target onnxruntime runs"
        )
    host_code = bool(entry["options"].get("version_compatible"))
    if host_code and not built_here and os.environ.get(TRUST_VARIABLE) != "1":
        raise BundleError(
            f"the engine {path} is version-compatible: it carries a TensorRT runtime and the plugin, which would run "
            f"in this process. Set {TRUST_VARIABLE}=1 if you trust where the bundle comes from, or compile it without "
            "version_compatible"
        )
    require_runtime(f"running the engine {path}")
    logger = make_logger(trt)
    # Before the plugin: the first object gives the registry its logger.
    runtime = make_runtime(trt, flavour, logger, host_code=host_code)
    # A version-compatible engine brings its plugin along, for the registry of its own runtime.
    if wanted is not None and not host_code:
        library = find_library(plugin, wanted)
        if (reason := wrong_library(library, wanted)) is not None:
            raise BundleError(
                f"the engine {path} cannot run here: {reason}; name that one with --plugin, or {remedy}"
            )
        require_code(load_plugin(trt, logger, library, wanted.sha256), [gpu.compute_capability])
    data = path.read_bytes()
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise BundleError(f"{flavour.title} refuses the engine {path}: {last_error(logger)}; {remedy}")
    check_bindings(trt, engine, entry, path)
    if flavour.portable:
        cache = RuntimeCache(data, trt.__version__, gpu)
        return RtxSession(trt, runtime, engine, entry, logger, cache)
    return TensorRTSession(trt, runtime, engine, entry, logger)


def _misshapen(entry: Mapping[str, Any]) -> list[str]:
    """Which of an entry's inputs and outputs are nothing that `build` writes."""
    inputs, outputs = entry["inputs"], entry["outputs"]
    shaped = isinstance(inputs, Mapping) and all(
        isinstance(shape, (list, tuple)) and all(isinstance(size, (int, str)) for size in shape)
        for shape in inputs.values()
    )
    named = isinstance(outputs, list) and all(isinstance(name, str) for name in outputs)
    return [name for name, proper in (("inputs", shaped), ("outputs", named)) if not proper]


def cannot_run(flavour: Flavour, entry: Mapping[str, Any]) -> str | None:
    """Why no engine with this entry can be run on this machine, whatever its file holds; None if nothing is against it.

    Raises:
        MissingDependencyError: if TensorRT is absent or its version is not supported.
    """
    version, gpu = flavour.load().__version__, devices.find_gpu()
    if gpu is None:
        return NO_GPU
    return driver_lack(flavour) or refusal(flavour, entry, version, gpu)


def refusal(flavour: Flavour, entry: Mapping[str, Any], version: str, gpu: Gpu | None) -> str | None:
    """Why an engine cannot run here, or None if nothing speaks against it.

    A version-compatible engine is taken by later versions with the same major number alone. TensorRT itself promises
    more, but the plugin that such an engine carries is built for one major version.

    An engine of `tensorrt` that was built without hardware compatibility is for one model of GPU: TensorRT tuned it for
    that number of multiprocessors and that memory, and warns that on another model, though of the same compute
    capability, it may be slow or fail. Building it again is cheap, and there is an option for engines that are to serve
    several models.

    Args:
        flavour: which TensorRT.
        entry: the engine's manifest entry.
        version: of the TensorRT that is installed.
        gpu: the GPU at hand; None leaves it out.
    """
    built, here = version_numbers(entry["version"]), version_numbers(version)
    options = entry["options"]
    if options.get("version_compatible"):
        if built[0] != here[0] or built > here:
            return (
                f"it was built with {flavour.title} {entry['version']} for that and later versions of "
                f"{flavour.title} {built[0]}, found {version}"
            )
    elif built[:3] != here[:3]:
        return f"it was built with {flavour.title} {entry['version']}, found {version}"
    if gpu is None:
        return None
    hardware = options.get("hardware_compatibility", "none")
    if hardware == "ampere_plus":
        if version_numbers(gpu.compute_capability) < (8, 0):
            return f"it was built for GPUs from compute capability 8.0 on, found {_shown(gpu)}"
        return None
    if gpu.compute_capability not in entry["compute_capabilities"]:
        expected = " or ".join(entry["compute_capabilities"])
        return f"it was built for GPUs of compute capability {expected}, found {_shown(gpu)}"
    model = entry.get("gpu")
    if not flavour.portable and hardware == "none" and model is not None and model != gpu.name:
        return (
            f"it was built for the GPU {model}, found {_shown(gpu)}; an engine for several models is built with "
            "hardware_compatibility"
        )
    return None


def _shown(gpu: Gpu) -> str:
    return f"a {gpu.name} of {gpu.compute_capability}"


def check_bindings(trt: Any, engine: Any, entry: Mapping[str, Any], path: Path) -> None:
    """Check that an engine has the inputs and outputs of its manifest entry, floating-point ones in float32.

    Raises:
        BundleError: if not: sessions would hand over and read memory of another layout.
    """
    for what, mode in (("inputs", trt.TensorIOMode.INPUT), ("outputs", trt.TensorIOMode.OUTPUT)):
        found = _bindings(engine, mode)
        if sorted(found) != sorted(entry[what]):
            raise BundleError(
                f"the engine {path} has the {what} {', '.join(found) or 'none'}; expected {', '.join(entry[what])}"
            )
        for name in found:
            if (kind := _type_name(engine.get_tensor_dtype(name))) not in TYPES:
                raise BundleError(
                    f"{name} of the engine {path} is {kind.lower()}, expected float32 or whole numbers; compile with "
                    'io = "float32"'
                )


def _bindings(engine: Any, mode: Any) -> list[str]:
    """Names of an engine's inputs or outputs."""
    names = map(engine.get_tensor_name, range(engine.num_io_tensors))
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def _type_name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


class EngineSession(Session):
    """An engine that is ready to run; what both kinds share."""

    def __init__(self, trt: Any, runtime: Any, engine: Any, entry: Mapping[str, Any], logger: Any) -> None:
        """Take over an engine whose bindings were checked.

        Args:
            trt: the module.
            runtime: that deserialised the engine, and has to live as long.
            engine: the engine.
            entry: its manifest entry; `size_rules` in it are what the sizes of inputs must fulfil.
            logger: as `make_logger` returns it.
        """
        self.trt, self.runtime, self.engine, self.logger = trt, runtime, engine, logger
        self.options = EngineOptions.from_dict(entry["options"])
        self.shapes: ModelShapes = entry["inputs"]
        self.inputs = tuple(self._info(name, shape) for name, shape in self.shapes.items())
        self.outputs = tuple(
            self._info(name, ["any" if size < 0 else size for size in engine.get_tensor_shape(name)])
            for name in entry["outputs"]
        )
        self._rules = SizeRules(entry.get("size_rules", ()))

    def _info(self, name: str, shape: Sequence[int | str]) -> TensorInfo:
        return TensorInfo(name, tuple(shape), TYPES[_type_name(self.engine.get_tensor_dtype(name))])

    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the engine on one batch, by the first profile that takes it; the results belong to the caller.

        Raises:
            InputError: if an input is missing, unknown or of another type or shape than the model takes, or no profile
                of the engine takes the inputs.
            EngineError: if TensorRT fails.
        """
        check_feeds(self.inputs, feeds)
        shapes = {name: array.shape for name, array in feeds.items()}
        self._rules.check(shapes)
        profile = profile_for(shapes, self.shapes, self.options)
        # Not ascontiguousarray, which gives a scalar an axis.
        return self._execute({name: np.asarray(feeds[name], order="C") for name in self.shapes}, profile)

    def _execute(self, feeds: Mapping[str, NDArray[Any]], profile: int) -> dict[str, NDArray[Any]]:
        """Run the engine with one of its profiles on contiguous arrays that fit it."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the memory on the GPU back; the session cannot run any more.

        Raises:
            EngineError: if CUDA fails.
        """
        with self._failures("give the engine's memory back"):
            self.release()

    def release(self) -> None:
        """Free what is held on the GPU, if anything is."""
        raise NotImplementedError

    def __del__(self) -> None:
        # At the end of the process the libraries may have gone already.
        with contextlib.suppress(Exception):
            self.close()

    @contextlib.contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        """Turn what polygraphy raises, CUDA's errors among them, into an error that says what TensorRT said."""
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER

        try:
            with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
                yield
        except PolygraphyException as error:
            said = f"{last_error(self.logger)}; " if self.logger.errors else ""
            raise EngineError(f"TensorRT could not {what}: {said}{' '.join(str(error).split())}") from error


def profile_for(shapes: Mapping[str, Sequence[int]], inputs: ModelShapes, options: EngineOptions) -> int:
    """The first profile that takes inputs of these shapes.

    Args:
        shapes: of the inputs at hand, by name.
        inputs: the shape of each input of the model; a string is an open axis.
        options: with the profiles.

    Raises:
        InputError: if none does.
    """
    for index, profile in enumerate(options.profiles):
        if profile.takes(shapes, inputs):
            return index
    raise InputError(
        f"the engine takes inputs of shape {taken_shapes(options, inputs)}, found {named_shapes(shapes)}; run fewer at "
        "a time, or compile with a wider profile"
    )


class TensorRTSession(EngineSession):
    """An engine of TensorRT, run by polygraphy."""

    def __init__(self, trt: Any, runtime: Any, engine: Any, entry: Mapping[str, Any], logger: Any) -> None:
        from polygraphy.backend.trt import TrtRunner

        super().__init__(trt, runtime, engine, entry, logger)
        runner = TrtRunner(engine)
        with self._failures("prepare the engine"):
            runner.activate()
        self.runner = runner
        self.profile = 0

    def _execute(self, feeds: Mapping[str, NDArray[Any]], profile: int) -> dict[str, NDArray[Any]]:
        """Run the engine with one of its profiles on contiguous arrays that fit it."""
        with self._failures("run the engine"):
            if profile != self.profile:
                self.runner.set_profile(profile)
                self.profile = profile
            found: Mapping[str, Any] = self.runner.infer(dict(feeds), check_inputs=False)
        # Copied: the runner writes its next outputs over these.
        return {item.name: np.array(found[item.name]) for item in self.outputs}

    def release(self) -> None:
        """Free what is held on the GPU, if anything is."""
        runner = getattr(self, "runner", None)
        if runner is None or not runner.is_active:
            return
        # Polygraphy's runner forgets its outputs without freeing them.
        outputs = list(getattr(getattr(runner, "output_allocator", None), "buffers", {}).values())
        runner.deactivate()
        for output in outputs:
            output.free()


class RtxSession(EngineSession):
    """An engine of TensorRT for RTX, on polygraphy's device arrays.

    The runtime compiles an engine's kernels for the GPU at hand. They are kept in a cache of this user, so that only
    the first process that runs a bundle waits for that.
    """

    def __init__(
        self, trt: Any, runtime: Any, engine: Any, entry: Mapping[str, Any], logger: Any, kept: RuntimeCache
    ) -> None:
        from polygraphy import cuda

        super().__init__(trt, runtime, engine, entry, logger)
        self.cache: Any = None
        # The context is made from it and does not hold it; both live as long as the session.
        self.config: Any = None
        self.kept, self.saved = kept, False
        self.context = self._context()
        with self._failures("prepare the engine"):
            self.stream = cuda.Stream()
            self.arrays = {
                item.name: cuda.DeviceArray(dtype=np.dtype(item.type))
                for item in (*self.inputs, *self.outputs)
            }
        self.profile = 0

    def _context(self) -> Any:
        if hasattr(self.engine, "create_runtime_config"):
            self.config = self.engine.create_runtime_config()
            if hasattr(self.config, "create_runtime_cache"):
                self.cache = self.config.create_runtime_cache()
                # What it refuses is written anew after the first run.
                if (before := self.kept.read()) is not None:
                    self.cache.deserialize(before)
                self.config.set_runtime_cache(self.cache)
            context = self.engine.create_execution_context(self.config)
        else:
            context = self.engine.create_execution_context()
        if context is None:
            raise EngineError(f"TensorRT for RTX could not prepare the engine: {last_error(self.logger)}")
        return context

    def _execute(self, feeds: Mapping[str, NDArray[Any]], profile: int) -> dict[str, NDArray[Any]]:
        """Run the engine with one of its profiles on contiguous arrays that fit it."""
        context, stream = self.context, self.stream
        with self._failures("run the engine"):
            # First the profile, which forgets shapes and addresses.
            if profile != self.profile:
                self._require(
                    context.set_optimization_profile_async(profile, stream.ptr), f"profile {profile}"
                )
                self.profile = profile
            for name, array in feeds.items():
                self._require(context.set_input_shape(name, array.shape), f"shape {array.shape} of {name}")
                self.arrays[name].resize(array.shape)
                self.arrays[name].copy_from(array, stream)
            for item in self.outputs:
                self.arrays[item.name].resize(self._output_shape(item.name))
            for name, held in self.arrays.items():
                self._require(context.set_tensor_address(name, held.ptr), f"memory of {name}")
            if not context.execute_async_v3(stream.ptr):
                raise EngineError(f"TensorRT for RTX could not run the engine: {last_error(self.logger)}")
            results = {item.name: np.empty(self.arrays[item.name].shape, item.type) for item in self.outputs}
            for name, result in results.items():
                self.arrays[name].copy_to(result, stream)
            stream.synchronize()
        self._save()
        return results

    def _output_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an output for the shapes that the inputs have now.

        Raises:
            EngineError: if it depends on values.
        """
        shape = tuple(self.context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise EngineError(
                f"the shape of the output {name} depends on the values of the inputs, not on their shapes alone; such "
                "models run in onnxruntime"
            )
        return shape

    def _require(self, taken: bool, what: str) -> None:
        if not taken:
            raise EngineError(f"TensorRT for RTX refuses the {what}: {last_error(self.logger)}")

    def _save(self) -> None:
        if self.cache is None or self.saved:
            return
        self.saved = True
        self.kept.write(bytes(self.cache.serialize()))

    def release(self) -> None:
        """Free what is held on the GPU, if anything is."""
        for held in self.__dict__.pop("arrays", {}).values():
            held.free()
        if (stream := self.__dict__.pop("stream", None)) is not None:
            stream.free()
