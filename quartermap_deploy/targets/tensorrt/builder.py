"""Build an engine: ONNX in, engine file and manifest entry out. One builder for TensorRT and TensorRT for RTX.

    parse → profiles → options → build → compare with the graph → write

Types come from the graph: networks are strongly typed, which TensorRT 10 offers and TensorRT 11 always is.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from quartermap_deploy import gpu as devices
from quartermap_deploy.errors import EngineError, InputError
from quartermap_deploy.files import write_whole
from quartermap_deploy.gpu import Gpu
from quartermap_deploy.lowering.operator import SELECTIVE_SCAN_2D
from quartermap_deploy.native.alias import give_alias
from quartermap_deploy.onnx_bounds import check_model
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.targets.tensorrt.caches import TimingCache, cache_key
from quartermap_deploy.targets.tensorrt.checks import (
    INSPECTOR,
    PLAN,
    check_plugins,
    check_types,
    inspected,
    network_types,
    plan_kernels,
    plan_plugins,
    plan_types,
)
from quartermap_deploy.targets.tensorrt.flavour import Flavour, version_numbers
from quartermap_deploy.targets.tensorrt.monitor import (
    PeakMemory,
    Phases,
    interruptible,
    make_logger,
    make_monitor,
    seconds_since,
)
from quartermap_deploy.targets.tensorrt.objects import (
    NO_GPU,
    driver_lack,
    last_error,
    make_builder,
    make_runtime,
    require_gpu,
)
from quartermap_deploy.targets.tensorrt.options import (
    EngineOptions,
    ModelShapes,
    named_shapes,
    taken_shapes,
)
from quartermap_deploy.targets.tensorrt.plugin import load_plugin
from quartermap_deploy.targets.tensorrt.products import (
    check_products,
    inspected_products,
    network_products,
    plan_products,
)

TURING = "7.5"
"""A compute capability that TensorRT for RTX lists and cannot build the scan for."""


def build_engine(
    flavour: Flavour,
    model_path: Path,
    directory: Path,
    options: EngineOptions,
    prepare: Callable[[onnx.ModelProto, Sequence[Mapping[str, Sequence[int]]]], onnx.ModelProto],
    *,
    plugin: Path | None = None,
    examples: Sequence[Mapping[str, Sequence[int]]] = (),
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Build an engine from a portable model and write it.

    Args:
        flavour: which TensorRT.
        model_path: the portable model.
        directory: where to write the engine.
        options: how to build.
        prepare: makes of the portable model what the parser is given; it is told the smallest and the largest shapes of
            all inputs.
        plugin: the plugin library, where scans are plugin nodes.
        examples: inputs that the engine must take: for each, the shape of every input by name.
        progress: told about TensorRT's phases.

    Returns:
        The manifest entry: what `open` needs to know the engine again, and what the build took.

    Raises:
        MissingDependencyError: if TensorRT is absent or its version is not supported.
        InputError: if the profiles do not fit the model or exclude an example.
        TrustError: if others could write to the cache.
        EngineError: if there is no GPU where one is needed, the parser refuses a node, the build fails, or the engine
            is not what the graph says. Nothing is written then.
    """
    trt = flavour.load()
    gpu = devices.find_gpu()
    require_gpu(flavour, gpu)
    check_model(model_path)
    model = onnx.load(model_path, load_external_data=False)
    shapes = input_shapes(model)
    check_examples(options, shapes, examples)
    prepared = prepare(model, extremes(options, shapes))
    data = prepared.SerializeToString()
    key = cache_key(flavour, data, options, plugin, trt.__version__, gpu)

    logger = make_logger(trt)
    # Before the plugin: the first object gives the registry its logger.
    builder = make_builder(trt, flavour, logger)
    library = None if plugin is None else load_plugin(trt, logger, plugin)
    if library is not None and flavour.portable:
        name_library_for_parser(trt)
    network, parser = parse(trt, builder, logger, data)
    graph = GraphTypes(network_types(network), network_products(network), scan_names(prepared))
    config = configure(trt, builder, flavour, options, plugin)
    for profile in options.profiles:
        built = builder.create_optimization_profile()
        for name, ranges in profile.shapes(shapes).items():
            built.set_shape(name, *ranges)
        if config.add_optimization_profile(built) < 0:
            raise InputError(f"{flavour.title} refuses the profile {profile}: {last_error(logger)}")
    timing = TimingCache(config, flavour, options.cache, key)

    phases = Phases(progress)
    monitor = make_monitor(trt, phases)
    config.progress_monitor = monitor
    start, processor = time.perf_counter(), time.process_time()
    try:
        with PeakMemory() as memory:
            plan = interruptible(lambda: builder.build_serialized_network(network, config), phases.stop)
    finally:
        phases.close()
    if phases.error is not None:
        raise phases.error
    if plan is None:
        raise EngineError(f"{flavour.title} could not build an engine: {build_reason(logger.errors)}")
    seconds, processor = seconds_since(start), round(time.process_time() - processor, 2)
    timing.save()
    engine = bytes(plan)

    how = compare(trt, flavour, engine, graph, gpu, options)
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
        "outputs": [value.name for value in model.graph.output],
        "options": options.to_dict(),
        "plugin": None if library is None else library.to_dict(),
        "key": key,
        "build": {
            "seconds": seconds,
            "processor_seconds": processor,
            "peak_memory_bytes": memory.peak,
            "memory_before_bytes": memory.before,
            "engine_bytes": len(engine),
            "network_layers": network.num_layers,
            **how,
        },
    }


def name_library_for_parser(trt: Any) -> None:
    """Let the parser of TensorRT for RTX find the registry of plugins, on Linux.

    Where a graph has plugins, the parser opens its own library by a name that the wheel does not have, and ends the
    process when that fails.
    """
    if sys.platform == "linux":
        major = version_numbers(trt.__version__)[0]
        give_alias("libtensorrt_rtx.so", f"libtensorrt_rtx.so.{major}")


def input_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """The shapes of a graph's inputs; an open axis is a string."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: tuple(
            side.dim_value or side.dim_param or "any" for side in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
        if value.name not in weights
    }


def check_examples(
    options: EngineOptions, inputs: ModelShapes, examples: Sequence[Mapping[str, Sequence[int]]]
) -> None:
    """Check, before any work, that the profiles fit a model and that each example is taken by one of them.

    Args:
        options: with the profiles.
        inputs: the shape of each input of the model; a string is an open axis.
        examples: for each, the shape of every input by name.

    Raises:
        InputError: if not.
    """
    taken = taken_shapes(options, inputs)
    for example in examples:
        if not any(profile.takes(example, inputs) for profile in options.profiles):
            found = {name: tuple(shape) for name, shape in example.items()}
            what = "an input of shape" if len(found) == 1 else "inputs of shapes"
            raise InputError(
                f"no profile takes {what} {named_shapes(found)}: they take {taken}; widen a profile"
            )


def extremes(options: EngineOptions, inputs: ModelShapes) -> list[dict[str, tuple[int, ...]]]:
    """The smallest and the largest shapes of a model's inputs, by name, of each profile."""
    found = []
    for profile in options.profiles:
        shapes = profile.shapes(inputs)
        found += [{name: ranges[place] for name, ranges in shapes.items()} for place in (0, -1)]
    return found


def parse(trt: Any, builder: Any, logger: Any, data: bytes) -> tuple[Any, Any]:
    """Parse an ONNX model into a strongly typed network; returns it and its parser, which must outlive it.

    Raises:
        EngineError: if the parser refuses it, with the node and the module that it comes from.
    """
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    # TensorRT 11 deprecates the flag: there every network is strongly typed.
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if interruptible(lambda: parser.parse(data)):
        return network, parser
    reasons = [describe_error(parser.get_error(index)) for index in range(parser.num_errors)]
    # Without a driver, TensorRT-RTX adds an error about that to every other one.
    telling = [reason for reason in reasons if not NO_GPU.search(reason)] or reasons or [last_error(logger)]
    raise EngineError(f"TensorRT's parser refuses the graph: {'; '.join(telling[:3])}")


def describe_error(error: Any) -> str:
    """One line about a parser's error: the operator, the node, the block it belongs to, and why."""
    node = error.node_name() or f"number {error.node()}"
    stack = error.local_function_stack() if hasattr(error, "local_function_stack") else []
    inside = f" in {' in '.join(stack)}" if stack else ""
    block = re.match(r"block_(\d+)/", node)
    place = f", block {block[1]}" if block else ""
    why = " ".join(error.desc().split())
    if why.islower() and why.isalpha():
        # The parser's own condition, such as "false".
        why = f"{str(error.code()).rpartition('.')[2].replace('_', ' ').lower()}, this TensorRT has no such operator"
    return f"{error.node_operator() or 'the graph'} at node {node}{place}{inside}: {why[:300]}"


def configure(
    trt: Any, builder: Any, flavour: Flavour, options: EngineOptions, plugin: Path | None = None
) -> Any:
    """A builder configuration with everything but profiles and caches.

    Args:
        trt: the module.
        builder: its builder.
        flavour: which TensorRT.
        options: how to build.
        plugin: the plugin library, which a version-compatible engine carries along.

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
    if flags["VERSION_COMPATIBLE"] and plugin is not None:
        # The runtime in such an engine has a plugin registry of its own, which knows nothing of what we load.
        config.plugins_to_serialize = [str(plugin)]
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if flavour.portable:
        set_compute_capabilities(trt, config, options.compute_capabilities)
    elif options.hardware_compatibility != "none":
        config.hardware_compatibility_level = hardware_level(trt, flavour, options)
    return config


def hardware_level(trt: Any, flavour: Flavour, options: EngineOptions) -> Any:
    """The module's value for the hardware compatibility of the options.

    Raises:
        InputError: if this TensorRT has none.
    """
    level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper(), None)
    if level is None:
        raise InputError(
            f"{flavour.title} {trt.__version__} has no hardware compatibility {options.hardware_compatibility!r}; "
            "same_compute_capability came with TensorRT 10.9"
        )
    return level


def known_capabilities(trt: Any, wanted: Sequence[str]) -> list[Any]:
    """The module's values for compute capabilities such as "8.9".

    Raises:
        InputError: if TensorRT-RTX does not know one, or cannot build for it.
    """
    if TURING in wanted:
        raise InputError(
            f"TensorRT for RTX {trt.__version__} has no float32 matrix product for compute capability {TURING} "
            "(Turing), and the scan's time step is one; leave it out, or run the bundle by ONNX Runtime there"
        )
    members = trt.ComputeCapability.__members__
    known = {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name[:2] == "SM"}
    for capability in wanted:
        if capability not in known:
            raise InputError(
                f"TensorRT-RTX {trt.__version__} has no compute capability {capability!r}; expected some of "
                f"{', '.join(name for name in known if name != TURING)}"
            )
    return [known[capability] for capability in wanted]


def set_compute_capabilities(trt: Any, config: Any, wanted: Sequence[str]) -> None:
    """Name the GPUs that an engine is for.

    Raises:
        InputError: as `known_capabilities` says.
    """
    values = known_capabilities(trt, wanted)
    config.num_compute_capabilities = len(values)
    for index, value in enumerate(values):
        if not config.set_compute_capability(value, index):
            raise InputError(f"TensorRT-RTX refuses the compute capabilities {', '.join(wanted)}")


def build_reason(errors: Sequence[str]) -> str:
    """The errors that say why a build failed; that there is no driver is no reason where none is needed."""
    telling = [error for error in errors if not NO_GPU.search(error)] or list(errors)
    text = " ".join(" ".join(error.split()) for error in telling[-2:])[:600]
    return text or "it gives no reason; is there enough memory?"


@dataclass(frozen=True)
class GraphTypes:
    """What of a graph an engine is compared with.

    Attributes:
        layers: how many layers make values of each float type.
        products: the float type of each convolution and matrix product, by ONNX node.
        scans: names of the scans that have to become the plugin.
    """

    layers: Mapping[str, int]
    products: Mapping[str, str]
    scans: Sequence[str]


def compare(
    trt: Any, flavour: Flavour, engine: bytes, graph: GraphTypes, gpu: Gpu | None, options: EngineOptions
) -> dict[str, Any]:
    """Compare an engine with its graph, by the engine inspector, or without a GPU by the plan itself.

    Args:
        trt: the module.
        flavour: which TensorRT.
        engine: the engine.
        graph: what it should be.
        gpu: the GPU at hand.
        options: how the engine was built.

    Returns:
        For the manifest: the types of both, how the engine was read, whether its types were checked that way, how
        many of the graph's 16-bit products were found, how many scans are our plugin, all that should be, and how many
        layers or kernels the engine has.

    Raises:
        EngineError: if the engine departs from the graph.
    """
    if gpu is None or (flavour.portable and driver_lack(flavour) is not None):
        types, products = plan_types(engine), plan_products(engine)
        check_plugins(graph.scans, plan_plugins(engine), PLAN)
        return _compared(graph, types, products, PLAN) | {"layers": plan_kernels(engine)}
    logger = make_logger(trt)
    runtime = make_runtime(trt, flavour, logger, host_code=options.version_compatible)
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        if flavour.portable:
            # Built for other GPUs than the one at hand.
            return compare(trt, flavour, engine, graph, None, options)
        raise EngineError(f"{flavour.title} cannot read the engine it just built: {last_error(logger)}")
    inspector = loaded.create_engine_inspector()
    information = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    types, plugins = inspected(information)
    compared = _compared(graph, types, inspected_products(information), INSPECTOR)
    check_plugins(graph.scans, plugins, INSPECTOR)
    return compared | {"layers": loaded.num_layers}


def _compared(
    graph: GraphTypes, types: Mapping[str, int], products: Mapping[str, set[str]], where: str
) -> dict[str, Any]:
    check_types(graph.layers, types, where)
    found = check_products(graph.products, products, where)
    return {
        "network_types": dict(graph.layers),
        "engine_types": dict(types),
        "products": found,
        "plugins": len(graph.scans),
        "types_checked": bool(types) and found["in_engine"] == found["of_graph"],
        "read_by": where,
    }


def scan_names(model: onnx.ModelProto) -> list[str]:
    """Names of the scans that are nodes of their own."""
    return [node.name for node in model.graph.node if node.op_type == SELECTIVE_SCAN_2D]
