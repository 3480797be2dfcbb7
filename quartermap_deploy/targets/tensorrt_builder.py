"""Build an engine: ONNX in, engine file and manifest entry out. One builder for TensorRT and TensorRT for RTX.

    parse → profiles → options → build → compare with the graph → write

Types come from the graph: networks are strongly typed, which TensorRT 10 offers and TensorRT 11 always is.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from quartermap_deploy.errors import EngineError, InputError
from quartermap_deploy.files import file_hash, write_whole
from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets.gpu import Gpu, find_gpu
from quartermap_deploy.targets.tensorrt_checks import (
    check_plugins,
    check_types,
    inspected,
    network_types,
    plan_kernels,
    plan_types,
)
from quartermap_deploy.targets.tensorrt_flavour import Flavour
from quartermap_deploy.targets.tensorrt_monitor import (
    PeakMemory,
    Phases,
    make_logger,
    make_monitor,
    seconds_since,
)
from quartermap_deploy.targets.tensorrt_options import CACHE_FOLDER, EngineOptions

_NO_GPU = re.compile(
    r"cudaError 35|cudaError 100|driver version is insufficient|no CUDA-capable", re.IGNORECASE
)


def build_engine(
    flavour: Flavour,
    model_path: Path,
    directory: Path,
    options: EngineOptions,
    prepare: Callable[[onnx.ModelProto], onnx.ModelProto],
    *,
    plugin: Path | None = None,
    examples: Sequence[Sequence[int]] = (),
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Build an engine from a portable model and write it.

    Args:
        flavour: which TensorRT.
        model_path: the portable model.
        directory: where to write the engine.
        options: how to build.
        prepare: makes of the portable model what the parser is given.
        plugin: the plugin library, where scans are plugin nodes.
        examples: shapes of inputs that the engine must take.
        progress: told about TensorRT's phases.

    Returns:
        The manifest entry: what `open` needs to know the engine again, and what the build took.

    Raises:
        MissingDependencyError: if TensorRT is absent or its version is not supported.
        InputError: if the profiles do not fit the model or exclude an example.
        EngineError: if there is no GPU where one is needed, the parser refuses a node, the build fails, or the engine
            is not what the graph says. Nothing is written then.
    """
    trt = flavour.load()
    gpu = find_gpu()
    if not flavour.portable and gpu is None:
        raise EngineError(
            f"{flavour.title} builds engines for the GPU at hand, and there is none (no NVIDIA driver answers); "
            "compile on the machine that will run the engine, or for the target tensorrt-rtx, which builds without one"
        )
    model = onnx.load(model_path)
    shapes = input_shapes(model)
    check_examples(options, shapes, examples)
    prepared = prepare(model)
    data = prepared.SerializeToString()
    key = cache_key(flavour, data, options, plugin, trt.__version__, gpu)

    logger = make_logger(trt)
    if plugin is not None:
        load_plugin(trt, logger, plugin)
    builder = trt.Builder(logger)
    network, parser = parse(trt, builder, logger, data)
    graph_types = network_types(network)
    config = configure(trt, builder, flavour, options)
    for profile in options.profiles:
        built = builder.create_optimization_profile()
        for name, shape in shapes.items():
            built.set_shape(name, *profile.shapes(shape))
        if config.add_optimization_profile(built) < 0:
            raise InputError(f"{flavour.title} refuses the profile {profile}: {_last(logger)}")
    timing = TimingCache(trt, config, flavour, options.cache or Path(directory).parent / CACHE_FOLDER, key)

    phases = Phases(progress)
    monitor = make_monitor(trt, phases)
    config.progress_monitor = monitor
    start = time.perf_counter()
    try:
        with PeakMemory() as memory:
            plan = builder.build_serialized_network(network, config)
    finally:
        phases.close()
    if phases.error is not None:
        raise phases.error
    if plan is None:
        raise EngineError(f"{flavour.title} could not build an engine: {build_reason(logger.errors)}")
    seconds = seconds_since(start)
    timing.save()
    engine = bytes(plan)

    how = compare(trt, flavour, engine, graph_types, scan_names(prepared), gpu)
    write_whole(Path(directory) / flavour.engine_file, engine)
    del parser, monitor
    return {
        "file": flavour.engine_file,
        "version": trt.__version__,
        "cuda": flavour.cuda(),
        "gpu": None if gpu is None or flavour.portable else gpu.name,
        "compute_capabilities": list(options.compute_capabilities)
        if flavour.portable or gpu is None
        else [gpu.compute_capability],
        "inputs": {name: list(shape) for name, shape in shapes.items()},
        "options": options.to_dict(),
        "plugin": None if plugin is None else {"file": plugin.name, "sha256": file_hash(plugin)},
        "key": key,
        "build": {
            "seconds": seconds,
            "peak_memory_bytes": memory.peak,
            "memory_before_bytes": memory.before,
            "engine_bytes": len(engine),
            "network_layers": network.num_layers,
            **how,
        },
    }


def input_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """The shapes of a graph's inputs; an open size is a string."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: tuple(
            side.dim_value or side.dim_param or "open" for side in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
        if value.name not in weights
    }


def check_examples(
    options: EngineOptions, shapes: Mapping[str, tuple[int | str, ...]], examples: Sequence[Sequence[int]]
) -> None:
    """Check, before any work, that each example is taken by a profile.

    Raises:
        InputError: if one is not, or a profile does not fit the model.
    """
    for shape in shapes.values():
        ranges = [profile.shapes(shape) for profile in options.profiles]
        for example in examples:
            if not any(profile.takes(example, shape) for profile in options.profiles):
                taken = " or ".join(f"{low} to {high}" for low, _, high in ranges)
                raise InputError(
                    f"no profile takes an input of shape {tuple(example)}: they take {taken}; widen a profile"
                )


def load_plugin(trt: Any, logger: Any, plugin: Path) -> None:
    """Load the plugin library into TensorRT's registry.

    Raises:
        EngineError: if it cannot be loaded.
    """
    registry = trt.get_plugin_registry()
    if has_creator(registry):
        # As after an earlier build in this process: TensorRT refuses to load the same plugins twice.
        return
    try:
        registry.load_library(str(plugin))
    except Exception as error:  # pybind11 passes on whatever the library throws
        raise EngineError(f"TensorRT cannot load the plugin {plugin}: {error}") from error
    if not has_creator(registry):
        raise EngineError(
            f"the plugin {plugin} brought no creator of {SELECTIVE_SCAN_2D} ({_last(logger)}); look at it with "
            f"`quartermap plugin check {plugin}`"
        )


def has_creator(registry: Any) -> bool:
    """Whether TensorRT's registry knows our plugin."""
    return any(
        (creator.name, creator.plugin_namespace) == (SELECTIVE_SCAN_2D, DOMAIN)
        for creator in registry.all_creators
    )


def parse(trt: Any, builder: Any, logger: Any, data: bytes) -> tuple[Any, Any]:
    """Parse an ONNX model into a strongly typed network; returns it and its parser, which must outlive it.

    Raises:
        EngineError: if the parser refuses it, with the node and the module that it comes from.
    """
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    # TensorRT 11 deprecates the flag: there every network is strongly typed.
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if parser.parse(data):
        return network, parser
    reasons = [describe_error(parser.get_error(index)) for index in range(parser.num_errors)]
    # Without a driver, TensorRT-RTX adds an error about that to every other one.
    telling = [reason for reason in reasons if not _NO_GPU.search(reason)] or reasons or [_last(logger)]
    raise EngineError(f"TensorRT's parser refuses the graph: {'; '.join(telling[:3])}")


def describe_error(error: Any) -> str:
    """One line about a parser's error: the operator, the node, the block it belongs to, and why."""
    node = error.node_name() or f"number {error.node()}"
    stack = error.local_function_stack() if hasattr(error, "local_function_stack") else []
    inside = f" in {' in '.join(stack)}" if stack else ""
    block = re.match(r"block_(\d+)/", node)
    place = f", block {block[1]}" if block else ""
    why = " ".join(error.desc().split())
    return f"{error.node_operator() or 'the graph'} at node {node}{place}{inside}: {why[:300]}"


def configure(trt: Any, builder: Any, flavour: Flavour, options: EngineOptions) -> Any:
    """A builder configuration with everything but profiles and caches.

    Raises:
        InputError: if an option does not exist in this TensorRT.
    """
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    flags = {
        "TF32": options.tf32,
        "REFIT": options.refit,
        "VERSION_COMPATIBLE": options.version_compatible and not flavour.portable,
    }
    for name, wanted in flags.items():
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is None and wanted:
            raise InputError(f"{flavour.title} {trt.__version__} has no {name.lower()}; leave the option out")
        if flag is not None:
            (config.set_flag if wanted else config.clear_flag)(flag)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if flavour.portable:
        set_compute_capabilities(trt, config, options.compute_capabilities)
    elif options.hardware_compatibility != "none":
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper(), None)
        if level is None:
            raise InputError(
                f"{flavour.title} {trt.__version__} has no hardware compatibility {options.hardware_compatibility!r}"
            )
        config.hardware_compatibility_level = level
    return config


def known_capabilities(trt: Any, wanted: Sequence[str]) -> list[Any]:
    """The module's values for compute capabilities such as "8.9".

    Raises:
        InputError: if TensorRT-RTX does not know one.
    """
    members = trt.ComputeCapability.__members__
    known = {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name[:2] == "SM"}
    for capability in wanted:
        if capability not in known:
            raise InputError(
                f"TensorRT-RTX {trt.__version__} has no compute capability {capability!r}; expected some of "
                f"{', '.join(known)}"
            )
    return [known[capability] for capability in wanted]


def set_compute_capabilities(trt: Any, config: Any, wanted: Sequence[str]) -> None:
    """Name the GPUs that an engine is for.

    Raises:
        InputError: if TensorRT-RTX does not know one.
    """
    values = known_capabilities(trt, wanted)
    config.num_compute_capabilities = len(values)
    for index, value in enumerate(values):
        if not config.set_compute_capability(value, index):
            raise InputError(f"TensorRT-RTX refuses the compute capabilities {', '.join(wanted)}")


def build_reason(errors: Sequence[str]) -> str:
    """The errors that say why a build failed; that there is no driver is no reason where none is needed."""
    telling = [error for error in errors if not _NO_GPU.search(error)] or list(errors)
    text = " ".join(" ".join(error.split()) for error in telling[-2:])[:600]
    return text or "it gives no reason; is there enough memory?"


def compare(
    trt: Any,
    flavour: Flavour,
    engine: bytes,
    graph_types: Mapping[str, int],
    scans: Sequence[str],
    gpu: Gpu | None,
) -> dict[str, Any]:
    """Compare an engine with its graph, by the engine inspector, or without a GPU by the plan itself.

    Raises:
        EngineError: if the engine departs from the graph.
    """
    if gpu is None:
        types = plan_types(engine)
        check_types(graph_types, types, "its plan")
        return {
            "network_types": dict(graph_types),
            "engine_types": dict(types),
            "read_by": "plan",
            "layers": plan_kernels(engine),
        }
    logger = make_logger(trt)
    runtime = trt.Runtime(logger)
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        if flavour.portable:
            # Built for other GPUs than the one at hand.
            return compare(trt, flavour, engine, graph_types, scans, None)
        raise EngineError(f"{flavour.title} cannot read the engine it just built: {_last(logger)}")
    inspector = loaded.create_engine_inspector()
    types, plugins = inspected(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    check_types(graph_types, types, "engine inspector")
    if flavour.plugin:
        check_plugins(scans, plugins, "engine inspector")
    return {
        "network_types": dict(graph_types),
        "engine_types": dict(types),
        "read_by": "engine inspector",
        "layers": loaded.num_layers,
    }


def scan_names(model: onnx.ModelProto) -> list[str]:
    """Names of the scans that are nodes of their own."""
    return [node.name for node in model.graph.node if node.op_type == SELECTIVE_SCAN_2D]


# Caches ---------------------------------------------------------------------------------------------------------


def cache_key(
    flavour: Flavour, data: bytes, options: EngineOptions, plugin: Path | None, version: str, gpu: Gpu | None
) -> str:
    """What a cache belongs to: the graph with its weights, the options, the plugin, the versions and the GPU."""
    known = {
        "graph": hashlib.sha256(data).hexdigest(),
        "options": options.to_dict(),
        "plugin": None if plugin is None else file_hash(plugin),
        "tensorrt": [flavour.target, version],
        "cuda": flavour.cuda(),
        "gpu": None if flavour.portable or gpu is None else [gpu.name, gpu.compute_capability],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


class TimingCache:
    """The timings that a build measured, kept for the next build of the same thing. TensorRT-RTX has none."""

    def __init__(self, trt: Any, config: Any, flavour: Flavour, folder: Path, key: str) -> None:
        self.path = folder / f"{key[:32]}.timing"
        self._config = None
        if flavour.portable:
            return
        try:
            before = self.path.read_bytes()
        except OSError:
            before = b""
        cache = config.create_timing_cache(before)
        # A cache that TensorRT does not know is no error: it starts with an empty one.
        if config.set_timing_cache(cache, False):
            self._config = config

    def save(self) -> None:
        """Write what was measured; a folder that cannot be written to is no error, the cache is only for speed."""
        if self._config is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, bytes(self._config.get_timing_cache().serialize()))
        except OSError:
            return


def _last(logger: Any) -> str:
    return logger.errors[-1] if logger.errors else "no reason given"
