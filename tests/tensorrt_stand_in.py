"""A stand-in for the module `tensorrt`, for what the real one does not do without a GPU: build engines and run them.

It is no TensorRT: it claims nothing about what TensorRT does, only which calls our code makes. It is strict about
those. Every class has exactly the names that the release has in `data/tensorrt_api.json`, which are those of NVIDIA's
own bindings (`tensorrt_names.py`, `test_real_tensorrt.py`): another method, property, argument or member of an
enumeration is an error, as it is in the real module, and a name that is there but not implemented here says so. An
"engine" is the ONNX graph; it is run by ONNX Runtime, on memory that `HostCuda` gives out instead of CUDA, and
asynchronously: copies and runs wait in their stream until somebody synchronises it.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import inspect
import json
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from tensorrt_names import RELEASES, api_of_module, public_api

from quartermap_deploy.lowering.operator import DOMAIN, SELECTIVE_SCAN_2D
from quartermap_deploy.passes.lower import lower

__all__ = ["RELEASES", "Engines", "api_of_module", "implemented", "installed", "public_api"]

NUMPY_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
ALIASES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""What the module calls its element types beside their own names."""
ONNX_NAMES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.BOOL: "BOOL",
}
SHOWN = {
    "FLOAT": "Row major linear FP32",
    "HALF": "Row major linear FP16 format",
    "BF16": "Row major linear BF16",
}


@dataclass
class Behaviour:
    """What the stand-in does, to plant faults.

    Attributes:
        driver: whether objects can be made at all.
        driver_cuda: the newest CUDA that the driver says it knows; None for no driver.
        damaged_timing_cache: what `create_timing_cache` makes of data that it does not know: "none" or "refused".
        silent_float32: whether engines compute in float32 whatever the graph says.
        lost_types: names of nodes that engines compute in float32 whatever the graph says.
        inspected_types: whether the inspector names types.
        lost_scan: the name of a scan that does not become the plugin.
        wrong: what an engine multiplies its floating-point results with, by its graph.
        fails: what fails: "build", "load_library", "context" or "run".
        calls: what was called, in order.
    """

    driver: bool = True
    driver_cuda: tuple[int, int] | None = (13, 0)
    damaged_timing_cache: str = "none"
    silent_float32: bool = False
    lost_types: frozenset[str] = frozenset()
    inspected_types: bool = True
    lost_scan: str = ""
    wrong: Callable[[onnx.ModelProto], float] = lambda model: 1.0
    fails: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)


class HostCuda:
    """What polygraphy asks of CUDA, on the host's memory. Streams do their work when they are synchronised."""

    def __init__(self) -> None:
        self.handle = SimpleNamespace(cudaRuntimeGetVersion=self._version)
        self.memory: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self._next = 1

    @staticmethod
    def _version(pointer: Any) -> int:
        pointer._obj.value = 13000
        return 0

    def create_stream(self) -> int:
        self._next += 1
        self.streams[self._next] = []
        return self._next

    def destroy_stream(self, stream: int) -> None:
        # Work that is left is dropped: after a failure, what it would write to may have gone.
        del self.streams[stream]

    def stream_synchronize(self, stream: int) -> None:
        work, self.streams[stream] = self.streams[stream], []
        for each in work:
            each()

    def malloc(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(
            b"\xff" * max(1, size), max(1, size)
        )  # not a number, until it is written
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        return address

    def free(self, address: int) -> None:
        if address:
            del self.memory[address]

    def memcpy(self, dst: int, src: int, nbytes: int, kind: Any, stream_ptr: int | None = None) -> None:
        def copy() -> None:
            ctypes.memmove(dst, src, nbytes)

        if stream_ptr is None:
            copy()
        else:
            self.streams[stream_ptr].append(copy)


# Classes of a release -------------------------------------------------------------------------------------------


def _strict(name: str, entry: Mapping[str, Any], implementation: type) -> type:
    """A class with the public names of the API and no other; what the implementation has not is not implemented."""
    methods, properties = entry["methods"], entry["properties"]
    members: dict[str, Any] = {
        key: value for key, value in vars(implementation).items() if key.startswith("_") and key != "__init__"
    }
    members.pop("__dict__", None)
    members.pop("__weakref__", None)
    for key, overloads in methods.items():
        if key == "__init__":
            continue
        made = vars(implementation).get(key)
        members[key] = _checked(name, key, overloads, made) if made else _missing(name, key)
    for key, access in properties.items():
        made = vars(implementation).get(key)
        members[key] = made if isinstance(made, property) else _stored(name, key, access)
    begin = vars(implementation).get("__init__")
    if "__init__" in methods and begin is not None:
        members["__init__"] = _checked(name, "__init__", methods["__init__"], begin)
    elif begin is not None:
        members["__init__"] = begin

    def setattr_(self: Any, key: str, value: Any) -> None:
        # A Python class that derives from one of TensorRT's takes any name.
        if key.startswith("_") or type(self) is not result or "w" in properties.get(key, ""):
            object.__setattr__(self, key, value)
        else:
            raise AttributeError(f"{name!r} object has no attribute {key!r} that can be set")

    members["__setattr__"] = setattr_
    result = type(name, (), members)
    return result


def _checked(
    kind: str, name: str, overloads: list[list[str]], made: Callable[..., Any]
) -> Callable[..., Any]:
    signatures = [_signature(names) for names in overloads]

    @functools.wraps(made)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        for signature in signatures:
            try:
                bound = signature.bind(*arguments, **named)
            except TypeError:
                continue
            return made(self, *bound.args)
        raise TypeError(f"{kind}.{name}() takes {overloads}, found {arguments} {named}")

    return call


def _signature(names: list[str]) -> inspect.Signature:
    return inspect.Signature(
        [
            inspect.Parameter(
                name.removesuffix("?"),
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None if name.endswith("?") else inspect.Parameter.empty,
            )
            for name in names
        ]
    )


def _missing(kind: str, name: str) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError(f"the stand-in has no {kind}.{name}")

    return call


def _stored(kind: str, name: str, access: str) -> property:
    key = f"_{name}"

    def read(self: Any) -> Any:
        if key not in self.__dict__:
            raise NotImplementedError(f"the stand-in has no {kind}.{name}")
        return self.__dict__[key]

    def write(self: Any, value: Any) -> None:
        self.__dict__[key] = value

    return property(read if "r" in access else None, write if "w" in access else None)


def _enum(name: str, members: list[str]) -> Any:
    kind = enum.Enum(name, {member: index for index, member in enumerate(members)})  # type: ignore[misc]
    kind.__int__ = lambda self: self.value  # type: ignore[attr-defined]
    kind.__str__ = lambda self: f"{name}.{self.name}"  # type: ignore[assignment]
    return kind


# What the classes do --------------------------------------------------------------------------------------------


class Engines:
    """One stand-in: the module, and what its objects share."""

    def __init__(self, version: str, api: Mapping[str, Any], cuda: HostCuda, name: str = "tensorrt") -> None:
        self.behaviour, self.cuda, self.creators = Behaviour(), cuda, list[Any]()
        self.module = module = ModuleType(name)
        module.__version__ = version  # type: ignore[attr-defined]
        module.__spec__ = ModuleSpec(name, None)
        enums = {key: _enum(key, members) for key, members in api["enums"].items()}
        for key, value in enums.items():
            setattr(module, key, value)
        implementations = _implementations(self, SimpleNamespace(**enums), module)
        for key, entry in api["classes"].items():
            setattr(module, key, _strict(key, entry, implementations.get(key, type(key, (), {}))))
        module.ILogger.Severity = enums["Severity"]  # type: ignore[attr-defined]
        for member in enums["Severity"]:
            setattr(module.ILogger, member.name, member)  # type: ignore[attr-defined]
        for key, alias in ALIASES.items():
            setattr(module, alias, enums["DataType"][key])
        registry = module.IPluginRegistry()  # type: ignore[attr-defined]
        functions = {"get_plugin_registry": lambda: registry}
        for key in api["functions"]:
            if key in functions:
                setattr(module, key, functions[key])

    def log(self, logger: Any, message: str) -> None:
        logger.log(self.module.ILogger.ERROR, message)  # type: ignore[attr-defined]


def implemented() -> dict[str, set[str]]:
    """Return the public names that the stand-in implements, by class."""
    module, enums = ModuleType("none"), SimpleNamespace()
    made = _implementations(None, enums, module)  # type: ignore[arg-type]
    return {name: {key for key in vars(kind) if not key.startswith("_")} for name, kind in made.items()}


def _implementations(shared: Engines, enums: Any, module: Any) -> dict[str, type]:
    def need(kind: Any, value: Any) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"expected a {kind.__name__}, found {value!r}")

    def need_driver() -> None:
        if not shared.behaviour.driver:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    class ILogger:
        pass

    class IProgressMonitor:
        pass

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._shapes[input] = (tuple(min), tuple(opt), tuple(max))

    class ITimingCache:
        def __init__(self, data: bytes) -> None:
            self._data = data

        def serialize(self) -> Any:
            return module.IHostMemory(self._data + b"timings;")

    class IHostMemory:
        def __init__(self, data: bytes) -> None:
            self._bytes = data

        def __bytes__(self) -> bytes:
            return self._bytes

    class Builder:
        def __init__(self, logger: Any) -> None:
            need(module.ILogger, logger)
            need_driver()
            self._logger = logger

        def create_network(self, flags: Any = None) -> Any:
            shared.behaviour.calls.append(("create_network", flags or 0))
            return module.INetworkDefinition()

        def create_optimization_profile(self) -> Any:
            return module.IOptimizationProfile()

        def create_builder_config(self) -> Any:
            return module.IBuilderConfig(self._logger)

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            need(module.INetworkDefinition, network)
            need(module.IBuilderConfig, config)
            if shared.behaviour.fails == "build":
                shared.log(self._logger, "no tactic for block_1/conv")
                return None
            if (monitor := config.__dict__.get("_progress_monitor")) is not None:
                monitor.phase_start("Building Engine", None, 1)
                monitor.phase_start("Tactics", "Building Engine", 3)
                if not all(monitor.step_complete("Tactics", step) for step in range(3)):
                    return None
                monitor.phase_finish("Tactics")
                monitor.phase_finish("Building Engine")
            named = {flag.name for flag in config._set}
            plan = {
                "model": network._model.SerializeToString(),
                "version": module.__version__,
                "profiles": [profile._shapes for profile in config._profiles],
                "flags": sorted(named),
                "plugins": config.__dict__.get("_plugins_to_serialize", []),
                "detailed": config.__dict__.get("_profiling_verbosity") is enums.ProfilingVerbosity.DETAILED,
            }
            return module.IHostMemory(pickle.dumps(plan))

    class IBuilderConfig:
        def __init__(self, logger: Any) -> None:
            self._logger = logger
            self._profiles: list[Any] = []
            # TF32 is set where nobody clears it.
            self._set = {enums.BuilderFlag.TF32}
            self._limits: dict[Any, int] = {}
            self._timing: Any = None
            self._capabilities: list[Any] = []

        def set_flag(self, flag: Any) -> None:
            need(enums.BuilderFlag, flag)
            self._set.add(flag)

        def clear_flag(self, flag: Any) -> None:
            need(enums.BuilderFlag, flag)
            self._set.discard(flag)

        def get_flag(self, flag: Any) -> bool:
            return flag in self._set

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            need(enums.MemoryPoolType, pool)
            self._limits[pool] = pool_size

        def get_memory_pool_limit(self, pool: Any) -> int:
            return self._limits[pool]

        def add_optimization_profile(self, profile: Any) -> int:
            need(module.IOptimizationProfile, profile)
            if any(not low <= opt <= high for low, opt, high in profile._shapes.values()):
                return -1
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
            data = bytes(memoryview(serialized_timing_cache))
            known = not data.replace(b"timings;", b"")
            if not known and shared.behaviour.damaged_timing_cache == "none":
                shared.log(self._logger, "Timing cache header mismatch")
                return None
            return module.ITimingCache(data)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            need(module.ITimingCache, cache)
            need(bool, ignore_mismatch)
            if cache._data.replace(b"timings;", b"") and not ignore_mismatch:
                return False
            self._timing = cache
            return True

        def get_timing_cache(self) -> Any:
            return self._timing

        def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
            need(enums.ComputeCapability, compute_capability)
            self._capabilities.append(compute_capability)
            return True

    class INetworkDefinition:
        def __init__(self) -> None:
            self._model = onnx.ModelProto()
            self._types: dict[str, int] = {}

        @property
        def num_layers(self) -> int:
            return len(self._model.graph.node)

        def get_layer(self, index: int) -> Any:
            return module.ILayer(self._model.graph.node[index], self._types)

    class ILayer:
        def __init__(self, node: onnx.NodeProto, types: Mapping[str, int]) -> None:
            self._node, self._types = node, types

        @property
        def type(self) -> Any:
            names = {
                "Constant": "CONSTANT",
                "Conv": "CONVOLUTION",
                "Gemm": "MATRIX_MULTIPLY",
                "MatMul": "MATRIX_MULTIPLY",
                SELECTIVE_SCAN_2D: "PLUGIN_V3",
            }
            return enums.LayerType[names.get(self._node.op_type, "ELEMENTWISE")]

        @property
        def name(self) -> str:
            return self._node.name

        @property
        def metadata(self) -> str:
            return f"[ONNX Layer: {self._node.name}]"

        @property
        def num_inputs(self) -> int:
            return len(self._node.input)

        def get_input(self, index: int) -> Any:
            return self._tensor(self._node.input[index])

        @property
        def num_outputs(self) -> int:
            return len(self._node.output)

        def get_output(self, index: int) -> Any:
            return self._tensor(self._node.output[index])

        def _tensor(self, name: str) -> Any:
            return module.ITensor(ONNX_NAMES.get(self._types.get(name, onnx.TensorProto.FLOAT), "BOOL"))

    class ITensor:
        def __init__(self, dtype: str) -> None:
            self._type_name = dtype

        @property
        def dtype(self) -> Any:
            return enums.DataType[self._type_name]

    class OnnxParser:
        def __init__(self, network: Any, logger: Any) -> None:
            need(module.INetworkDefinition, network)
            self._network, self._logger, self._errors = network, logger, list[Any]()

        def parse(self, model: bytes, path: Any = None) -> bool:
            parsed = onnx.load_from_string(model)
            for index, node in enumerate(parsed.graph.node):
                if node.domain not in ("", "ai.onnx") and not self._has_plugin(node):
                    self._errors.append(module.ParserError(index, node))
            self._network._model = parsed
            self._network._types = node_types(parsed)
            return not self._errors

        def _has_plugin(self, node: onnx.NodeProto) -> bool:
            values = {item.name: helper.get_attribute_value(item) for item in node.attribute}
            wanted = (
                node.op_type,
                values.get("plugin_namespace", b"").decode(),
                values.get("plugin_version"),
            )
            return any(
                (creator.name, creator.plugin_namespace, creator.plugin_version.encode()) == wanted
                for creator in shared.creators
            )

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> Any:
            return self._errors[index]

    class ParserError:
        def __init__(self, index: int, node: onnx.NodeProto) -> None:
            self._index, self._proto = index, node

        def node(self) -> int:
            return self._index

        def node_name(self) -> str:
            return self._proto.name

        def node_operator(self) -> str:
            return self._proto.op_type

        def desc(self) -> str:
            return "Plugin not found, are the plugin name, version, and namespace correct?"

        def local_function_stack(self) -> list[str]:
            return []

    class IPluginRegistry:
        @property
        def all_creators(self) -> list[Any]:
            return list(shared.creators)

        def load_library(self, plugin_path: str) -> Any:
            need(str, plugin_path)
            shared.behaviour.calls.append(("load_library", plugin_path))
            if shared.behaviour.fails == "load_library":
                return None
            if any(creator.plugin_namespace == DOMAIN for creator in shared.creators):
                return None
            shared.creators.append(
                SimpleNamespace(name=SELECTIVE_SCAN_2D, plugin_namespace=DOMAIN, plugin_version="1")
            )
            return object()

    class Runtime:
        def __init__(self, logger: Any) -> None:
            need(module.ILogger, logger)
            need_driver()
            self._logger = logger
            self._engine_host_code_allowed = False

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            try:
                plan = pickle.loads(serialized_engine)
            except Exception:
                shared.log(self._logger, "Serialization assertion header.magicTag == kEXPECTED failed")
                return None
            portable = "VERSION_COMPATIBLE" in plan["flags"]
            if portable and not self._engine_host_code_allowed:
                shared.log(self._logger, "Engine has host code, and the runtime does not allow it")
                return None
            model = onnx.load_from_string(plan["model"])
            scans = any(node.domain == DOMAIN for node in model.graph.node)
            if scans and not (plan["plugins"] if portable else shared.creators):
                shared.log(self._logger, "Cannot deserialize plugin: no creator in the registry")
                return None
            return module.ICudaEngine(plan, model)

    class ICudaEngine:
        def __init__(self, plan: dict[str, Any], model: onnx.ModelProto) -> None:
            self._plan, self._model = plan, model
            self._io = {value.name: value for value in (*model.graph.input, *model.graph.output)}
            self._inputs = [value.name for value in model.graph.input]
            self._outputs = [value.name for value in model.graph.output]
            self._function: Any = None

        def _run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
            self._function = self._function or runnable(self._model)
            found: dict[str, np.ndarray[Any, Any]] = self._function(feeds)
            return found

        def _type_of(self, name: str) -> str:
            return ONNX_NAMES[self._io[name].type.tensor_type.elem_type]

        def _sizes(self, name: str) -> list[int | str]:
            sides = self._io[name].type.tensor_type.shape.dim
            return [side.dim_value if side.HasField("dim_value") else side.dim_param for side in sides]

        @property
        def num_io_tensors(self) -> int:
            return len(self._io)

        @property
        def num_layers(self) -> int:
            return len(self._model.graph.node)

        def get_tensor_name(self, index: int) -> str:
            return list(self._io)[index]

        def get_tensor_mode(self, name: str) -> Any:
            return enums.TensorIOMode.INPUT if name in self._inputs else enums.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return enums.DataType[self._type_of(name)]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(size if isinstance(size, int) else -1 for size in self._sizes(name))

        def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
            return enums.TensorFormat.LINEAR

        def is_shape_inference_io(self, name: str) -> bool:
            return False

        def get_aliased_input_tensor(self, name: str) -> None:
            return None

        def create_engine_inspector(self) -> Any:
            return module.EngineInspector(self)

        def create_execution_context(self, strategy: Any = None) -> Any:
            if shared.behaviour.fails == "context":
                return None
            return module.IExecutionContext(self)

        def create_runtime_config(self) -> Any:
            return module.IRuntimeConfig()

    class IRuntimeConfig:
        def create_runtime_cache(self) -> Any:
            return module.IRuntimeCache()

        def set_runtime_cache(self, cache: Any) -> bool:
            need(module.IRuntimeCache, cache)
            self._cache = cache
            return True

    class IRuntimeCache:
        def deserialize(self, runtime_cache: bytes) -> bool:
            shared.behaviour.calls.append(("runtime cache", bytes(runtime_cache)))
            return bytes(runtime_cache).startswith(b"kernels")

        def serialize(self) -> Any:
            return module.IHostMemory(b"kernels")

    class EngineInspector:
        def __init__(self, engine: Any) -> None:
            self._engine_held = engine

        def get_engine_information(self, format: Any) -> str:
            need(enums.LayerInformationFormat, format)
            engine, behaviour = self._engine_held, shared.behaviour
            if not engine._plan["detailed"]:
                return json.dumps({"Layers": [node.name for node in engine._model.graph.node]})
            types = node_types(engine._model)
            layers = []
            for node in engine._model.graph.node:
                lost = behaviour.silent_float32 or node.name in behaviour.lost_types
                read, made = (
                    SHOWN.get("FLOAT" if lost else ONNX_NAMES.get(types.get(value, 1), ""), "")
                    for value in (node.input[0] if node.input else node.output[0], node.output[0])
                )
                plugin = node.domain == DOMAIN and node.name != behaviour.lost_scan
                layers.append(
                    {
                        "Name": node.name,
                        "LayerType": "PluginV3" if plugin else "kgen",
                        "Metadata": f"[ONNX Layer: {node.name}]",
                        "Inputs": [{"Name": next(iter(node.input), ""), "Format/Datatype": read}]
                        if behaviour.inspected_types
                        else [],
                        "Outputs": [{"Name": node.output[0], "Format/Datatype": made}]
                        if behaviour.inspected_types
                        else [],
                    }
                )
            return json.dumps({"Layers": layers, "Bindings": []})

    class IExecutionContext:
        def __init__(self, engine: Any) -> None:
            self._of = engine
            self._forget()
            self._profile = 0

        def _forget(self) -> None:
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._allocators: dict[str, Any] = {}

        @property
        def active_optimization_profile(self) -> int:
            return self._profile

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            shared.behaviour.calls.append(("profile", profile_index))
            if (
                not 0 <= profile_index < len(self._of._plan["profiles"])
                or stream_handle not in shared.cuda.streams
            ):
                return False
            # Shapes of another profile mean nothing, nor do addresses.
            self._profile = profile_index
            self._forget()
            return True

        def set_input_shape(self, name: str, shape: Any) -> bool:
            low, _, high = self._of._plan["profiles"][self._profile][name]
            shared.behaviour.calls.append(("shape", tuple(shape)))
            fits = len(shape) == len(low) and all(
                a <= s <= b for a, s, b in zip(low, shape, high, strict=True)
            )
            if fits:
                self._shapes[name] = tuple(shape)
            return fits

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name in self._shapes:
                return self._shapes[name]
            known = {
                label: size
                for key, shape in self._shapes.items()
                for label, size in zip(self._of._sizes(key), shape, strict=True)
                if isinstance(label, str)
            }
            return tuple(
                size if isinstance(size, int) else known.get(size, -1) for size in self._of._sizes(name)
            )

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return True

        def get_tensor_address(self, name: str) -> int:
            return self._addresses.get(name, 0)

        def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
            self._allocators[name] = output_allocator
            return True

        def set_all_tensors_debug_state(self, flag: bool) -> bool:
            return True

        def set_debug_listener(self, listener: Any) -> bool:
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            engine, behaviour = self._of, shared.behaviour
            behaviour.calls.append(("run", self._profile))
            if behaviour.fails == "run":
                return False
            shapes = {name: self.get_tensor_shape(name) for name in engine._inputs}
            ready = all(size >= 0 for shape in shapes.values() for size in shape)
            if not ready or not all(self._addresses.get(name) for name in engine._inputs):
                return False
            targets = {name: self._target(name, stream_handle) for name in engine._outputs}
            sources = {name: self._addresses[name] for name in engine._inputs}

            def work() -> None:
                feeds = {name: read(sources[name], engine._type_of(name), shapes[name]) for name in sources}
                for name, value in engine._run(feeds).items():
                    kind = NUMPY_TYPES[engine._type_of(name)]
                    result = np.asarray(value, dtype=kind, order="C")
                    if np.issubdtype(kind, np.floating):
                        result = result * kind(behaviour.wrong(engine._model))
                    ctypes.memmove(targets[name], result.ctypes.data, result.nbytes)

            shared.cuda.streams[stream_handle].append(work)
            return True

        def _target(self, name: str, stream_handle: int) -> int:
            """Where an output goes: to its allocator's memory, or to its address."""
            shape, kind = self.get_tensor_shape(name), NUMPY_TYPES[self._of._type_of(name)]
            target: int = self._addresses.get(name, 0)
            if (allocator := self._allocators.get(name)) is not None:
                size = int(np.prod(shape, dtype=int)) * np.dtype(kind).itemsize
                target = allocator.reallocate_output_async(name, target, size, 256, stream_handle)
                allocator.notify_shape(name, shape)
            return target

    return {name: kind for name, kind in locals().items() if isinstance(kind, type)}


def read(address: int, kind: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return a copy of an array in memory."""
    count = int(np.prod(shape, dtype=int))
    size = count * np.dtype(NUMPY_TYPES[kind]).itemsize
    return np.frombuffer(ctypes.string_at(address, size), NUMPY_TYPES[kind]).reshape(shape)


# ONNX Runtime behind it -----------------------------------------------------------------------------------------


def node_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element types that a graph notes for its values, or ONNX's own inference finds."""
    with suppress(Exception):
        model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def runnable(
    model: onnx.ModelProto,
) -> Callable[[Mapping[str, np.ndarray[Any, Any]]], dict[str, np.ndarray[Any, Any]]]:
    """Return a function that runs a graph whose scans are plugin nodes, on a CPU."""
    model = onnx.load_from_string(model.SerializeToString())
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type != SELECTIVE_SCAN_2D:
            continue
        values = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        del node.attribute[:]
        directions = values["directions"].decode().split(",")
        node.attribute.append(helper.make_attribute("directions", directions))
        node.attribute.append(helper.make_attribute("softplus", values["softplus"]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        lower(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


@contextmanager
def installed(version: str, api: Mapping[str, Any], name: str = "tensorrt") -> Iterator[Engines]:
    """While open, `import tensorrt` gives a stand-in, and polygraphy works with it on the host's memory."""
    import polygraphy.backend.trt.runner as runner
    import polygraphy.backend.trt.util as util
    import polygraphy.cuda.cuda as cuda
    import polygraphy.datatype.tensorrt as datatype

    from quartermap_deploy import bundle, gpu
    from quartermap_deploy.targets.tensorrt import cuda_runtime
    from quartermap_deploy.targets.tensorrt import plugin as tensorrt_plugin

    with pytest.MonkeyPatch.context() as patch:
        host = HostCuda()
        engines = Engines(version, api, host, name)
        patch.setitem(sys.modules, name, engines.module)
        for place in (runner, util, datatype):
            patch.setattr(place, "trt", LazyModule(engines.module))
        patch.setattr(cuda, "G_CUDA", host)
        patch.setattr(tensorrt_plugin, "_loaded", {})
        patch.setattr(gpu, "driver_cuda", lambda: engines.behaviour.driver_cuda)
        kept = (cuda_runtime.runtime_version, bundle._session)
        for function in kept:
            function.cache_clear()
        try:
            yield engines
        finally:
            for function in kept:
                function.cache_clear()


class LazyModule:
    """What polygraphy's lazy import of a module looks like."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def is_installed(self) -> bool:
        return True

    def is_importable(self) -> bool:
        return True
