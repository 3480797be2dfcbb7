"""Source models from modules of the user's: any PyTorch module with selective scans in it, as it is."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import ExportError, InputError, UnknownNameError
from quartermap_deploy.frontend.exporter import trace_module
from quartermap_deploy.pruning.orders import ScanOrder
from quartermap_deploy.pruning.plan import QuarterMap, Subsample
from quartermap_deploy.pruning.scan_call import PrunedScans
from quartermap_deploy.size_rules import SizeRules, is_rule
from quartermap_deploy.sources.cases import batch_case, module_cases, size_cases
from quartermap_deploy.sources.description import TASKS, Feeds, Pictures, SourceBlock, WeightsOrigin
from quartermap_deploy.sources.discovery import Discovery, discover
from quartermap_deploy.sources.graph_facts import SizedOrders, output_infos
from quartermap_deploy.sources.public_code.context import public_code
from quartermap_deploy.sources.reference import Reference
from quartermap_deploy.sources.signature import BASE_NAMES, OTHER, Signature, as_tensors, input_names
from quartermap_deploy.sources.source_model import SourceModel, Traced
from quartermap_deploy.tensor_info import TensorInfo

Scans = Mapping[str, Callable[..., Any]]
SPREAD = 1e-5
"""Largest difference of two runs on the same inputs, as a share of the largest value, that may be rounding."""


@dataclass(frozen=True, eq=False)
class ModuleSource(SourceModel):
    """A module of the user's.

    Attributes:
        example: its example inputs, by name.
        signature: how it is called.
        discovery: what a run of it showed.
        scans: adapters for scans that this package does not know.
    """

    example: Feeds = field(kw_only=True)
    signature: Signature = field(kw_only=True)
    discovery: Discovery = field(kw_only=True)
    scans: Scans | None = field(kw_only=True, default=None)

    @property
    def kind(self) -> str:
        """Where it comes from."""
        return "module"

    @property
    def blocks(self) -> tuple[SourceBlock, ...]:
        """The modules that call scans, in the order of the run."""
        return self.discovery.blocks

    @property
    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the example inputs."""
        return {name: array.shape for name, array in self.example.items()}

    @property
    def dynamic_size(self) -> bool:
        """Whether an axis other than the batch is open."""
        return any(isinstance(size, str) for item in self.inputs for size in item.shape[1:])

    def with_labels(self, labels: Sequence[str]) -> ModuleSource:
        """The same model with names of its classes.

        Raises:
            InputError: if they do not fit its first output.
        """
        _check_labels(self.task, labels, self.discovery.outputs)
        return dataclasses.replace(self, labels=tuple(labels))

    def running(self) -> AbstractContextManager[Any]:
        """A context in which the module's code runs here, with its scans as our operator."""
        return public_code(self.module, self.scans)

    def trace(self) -> Traced:
        """Export it to ONNX, with the scans of maps recovered as such."""
        from quartermap_deploy.passes.recover_2d import recover_2d

        open_axes = {
            item.name: {axis: size for axis, size in enumerate(item.shape) if isinstance(size, str)}
            for item in self.inputs
        }
        # A batch of one would be burnt into the graph as a constant.
        feeds = self.feeds(2 if self.dynamic_batch else None)
        with self.running():
            graph = trace_module(
                self.module,
                feeds,
                open_axes,
                list(self.discovery.outputs),
                self.discovery.calls,
                by_keyword=self.signature.by_keyword,
            )
        refuse_random(graph.model)
        rules = self._kept_rules(graph.rules)
        recovered = recover_2d(graph.model, self.example_shapes)
        outputs = output_infos(recovered.model)
        nodes = {
            name: scan.nodes[0]
            for scan in recovered.report.scans
            if scan.refused is None and not scan.apart and len(scan.nodes) == 1
            for name in scan.scans
        }
        orders: Mapping[str, ScanOrder] = recovered.orders
        orders_at = None
        if self.dynamic_size:
            orders_at = SizedOrders(recovered.model, recovered.orders, nodes).at
            orders = orders_at(self.example_shapes)
        traced = Traced(recovered.model, outputs, rules, orders, nodes, (recovered.report,), orders_at)
        if self.dynamic_batch:
            self._require_open_batch(traced)
        return traced

    def reference(self, plan: QuarterMap | None, traced: Traced | None = None) -> Reference:
        """The module in PyTorch, with the scans of the plan's blocks pruned in their calls."""
        selected = self.selected(plan)
        pruned = frozenset(site.name for site in self.discovery.sites if site.block in selected)
        subsample = Subsample() if plan is None else plan.subsample
        if traced is None:
            scans = PrunedScans({}, pruned, subsample)
        else:
            scans = PrunedScans(traced.orders, pruned, subsample, traced.nodes, traced.orders_at)
        return Reference(
            self.module,
            self.inputs,
            self.blocks,
            self.signature,
            running=self.running,
            scans=scans,
            float64=self.discovery.float64,
        )

    def cases(self, pictures: Pictures | None) -> dict[str, Feeds]:
        """The example, real images where an input can hold some, and zeros."""
        images: Feeds = {}
        if pictures is not None:
            for place, item in enumerate(item for item in self.inputs if item.is_image):
                found = pictures(self.image_preprocessing(item))
                # Several images of one batch are different ones.
                images[item.name] = np.roll(found, place, axis=0)
        if images and not self.dynamic_batch:
            counts = {name: len(self.example[name]) for name in images}
            images = {
                name: np.resize(array, (counts[name], *array.shape[1:])) for name, array in images.items()
            }
        elif images:
            others = {n: a for n, a in self.example.items() if n not in images}
            if any(len(array) != len(next(iter(images.values()))) for array in others.values() if array.ndim):
                images = {}
        return module_cases(self.inputs, self.example, images)

    def further_cases(self, traced: Traced) -> dict[str, Feeds]:
        """Another batch than those that the user gave, and where sizes are open, other sizes.

        Raises:
            ExportError: if the graph takes no other size than that of the example.
        """
        cases: dict[str, Feeds] = {}
        if (batch := batch_case(self.inputs, self.example)) is not None:
            cases["three examples"] = batch
        if self.dynamic_size:
            refused: list[str] = []
            sizes = size_cases(self.inputs, self.example, lambda feeds: self._takes(feeds, traced, refused))
            if not sizes:
                raise ExportError(
                    "height and width were to be open, but no other size than the example's was found that can be run: "
                    f"{refused[0] if refused else 'none fits'}; leave them fixed with dynamic_size=False (without "
                    "--dynamic-size), or give an example of another size"
                )
            cases |= sizes
        return cases

    def _takes(self, feeds: Feeds, traced: Traced, refused: list[str]) -> bool:
        """Whether graph and module take such sizes; why not is added to `refused`."""
        try:
            SizeRules(traced.rules).check({name: array.shape for name, array in feeds.items()})
            with torch.no_grad(), self.running():
                self.signature.call(self.module, as_tensors(feeds))
        except Exception as error:
            refused.append(" ".join(str(error).split())[:300])
            return False
        return True

    def feeds(self, least: int | None = None) -> dict[str, Tensor]:
        """The example inputs as tensors.

        Args:
            least: repeat the batch so that it has this many at least.
        """
        tensors = {name: torch.from_numpy(array.copy()) for name, array in self.example.items()}
        if least is None:
            return tensors
        opened = {item.name for item in self.inputs if item.shape and isinstance(item.shape[0], str)}
        return {
            name: torch.cat([value] * -(-least // len(value)))
            if name in opened and len(value) < least
            else value
            for name, value in tensors.items()
        }

    def _kept_rules(self, rules: Sequence[str]) -> tuple[str, ...]:
        """The rules that can be looked up at run time.

        Raises:
            ExportError: if one cannot.
        """
        if unknown := [rule for rule in rules if not is_rule(rule)]:
            raise ExportError(
                f"the module decides by its sizes in a way that cannot be looked up at run time: {unknown[0][:200]}; "
                "fix the size with dynamic_size=False"
            )
        return tuple(rules)

    def _require_open_batch(self, traced: Traced) -> None:
        """Refuse a graph that fixes the batch of an output which follows that of the inputs.

        Code such as `int(x.shape[0] / 2)` makes a constant of the batch without a word.
        """
        first, second = (self._output_shapes(count) for count in (2, 3))
        graph = {item.name: item.shape for item in traced.outputs}
        for name, shape in first.items():
            for axis, (one, other) in enumerate(zip(shape, second[name], strict=True)):
                if one != other and isinstance(graph[name][axis], int):
                    raise ExportError(
                        f"the output {name!r} has {one} entries on axis {axis} for a batch of 2 and {other} for one of "
                        f"3, but the graph always has {graph[name][axis]}: the module makes a number of its batch, as "
                        "int(x.shape[0] / 2) does. Write // instead, or fix the batch with dynamic_batch=False "
                        "(--static-batch)"
                    )

    def _output_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        feeds = {name: value[:batch] for name, value in self.feeds(batch).items()}
        try:
            with torch.no_grad(), self.running():
                outputs = self.signature.call(self.module, feeds)
        except Exception as error:
            raise ExportError(
                f"the module fails on a batch of {batch}, so its batch cannot be open: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}; fix the batch with dynamic_batch=False (--static-batch)"
            ) from error
        return {name: tuple(value.shape) for name, value in outputs.items()}


def module_source(
    model: nn.Module,
    example_inputs: Any,
    *,
    name: str | None = None,
    task: str | None = None,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] = (),
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    stages: Sequence[int] | None = None,
    scans: Scans | None = None,
    weights: WeightsOrigin | None = None,
) -> ModuleSource:
    """A source model from a module of the user's, which is not changed.

    Args:
        model: any module with selective scans; it is taken in eval mode, in float32, on the CPU.
        example_inputs: a tensor, a tuple of them, or a dictionary by the names of the module's keyword arguments.
        name: how it is called; None takes the name of its class.
        task: one of `TASKS`; None tells it from the outputs.
        preprocessing: how an image becomes its input, or None.
        labels: names of the classes, or nothing.
        dynamic_batch: leave the batch open.
        dynamic_size: leave height and width of inputs of four axes open.
        stages: how many blocks each stage has; None tells stages apart by the length of their sequences.
        scans: adapters for scans that this package does not know, as for `public_code`.
        weights: where its weights come from; None says that the module had them.

    Raises:
        InputError: if the example inputs, the task, the labels or the preprocessing do not fit.
        ExportError: if the module fails, has no scan, or gives another output at every call.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"a {type(model).__name__} is no torch.nn.Module; give the module itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "the model is a TorchScript module, which cannot be exported as it is; give the Python module that it was "
            "made from, and its weights"
        )
    if task is not None and task not in TASKS:
        raise UnknownNameError.for_choice("task", task, TASKS)
    model = unwrapped(model)
    prepared = _prepared(model)
    example, by_keyword = _named_example(prepared, example_inputs)
    inputs = tuple(_inputs(example, dynamic_batch, dynamic_size))
    signature = Signature(tuple(example), by_keyword, BASE_NAMES.get(task or "", OTHER))
    tensors = {key: torch.from_numpy(array.copy()) for key, array in example.items()}
    running = functools.partial(public_code, prepared, scans)
    found = discover(prepared, tensors, signature, running, None if stages is None else tuple(stages))
    _require_deterministic(prepared, tensors, signature, running, found)
    if task is None:
        task = guessed_task(example, found.outputs)
        renamed = dataclasses.replace(signature, base=BASE_NAMES.get(task, OTHER))
        outputs = dict(zip(_renamed(found.outputs, renamed), found.outputs.values(), strict=True))
        signature, found = renamed, dataclasses.replace(found, outputs=outputs)
    _check_labels(task, labels, found.outputs)
    _check_preprocessing(preprocessing, inputs)
    return ModuleSource(
        name=name or type(model).__name__,
        title=name or type(model).__name__,
        module=prepared,
        inputs=inputs,
        task=task,
        preprocessing=preprocessing,
        labels=tuple(labels),
        weights=weights or WeightsOrigin("given"),
        example=example,
        signature=signature,
        discovery=found,
        scans=scans,
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module in what spreads it over devices, or compiles it for this one."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _prepared(model: nn.Module) -> nn.Module:
    """A copy of a module in eval mode, in float32, on the CPU.

    Raises:
        ExportError: if it cannot be copied, or some of its weights have no values.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    if empty := next((name for name, tensor in tensors if tensor.is_meta), None):
        raise ExportError(
            f"the module {type(model).__name__} is on the meta device, where {empty} has no values; make it on the CPU "
            "and load its weights"
        )
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise ExportError(
            f"the module {type(model).__name__} cannot be copied ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); it may hold a tensor that was computed with gradients: detach it"
        ) from error
    copied = copied.cpu().float()
    # Not chained: a module whose own train() returns nothing makes eval() return nothing.
    copied.eval()
    return copied


def _named_example(model: nn.Module, example: Any) -> tuple[Feeds, bool]:
    """The example inputs as arrays by name, and whether they are given by keyword."""
    if isinstance(example, Mapping):
        named, by_keyword = dict(example), True
    else:
        values = list(example) if isinstance(example, (tuple, list)) else [example]
        named, by_keyword = dict(zip(input_names(model, values), values, strict=True)), False
    if not named:
        raise InputError("there are no example inputs; give a tensor for each input of the module")
    arrays: Feeds = {}
    for name, value in named.items():
        if not isinstance(value, (Tensor, np.ndarray)):
            raise InputError(
                f"the example input {name!r} is a {type(value).__name__}; expected a tensor. What is no tensor belongs "
                "into a small module around it"
            )
        if isinstance(value, Tensor):
            # NumPy has no bfloat16.
            array = (value.detach().float() if value.is_floating_point() else value.detach()).cpu().numpy()
        else:
            array = np.asarray(value)
        if 0 in array.shape:
            raise InputError(f"the example input {name!r} of shape {array.shape} is empty")
        # Half and double precision alike: the portable model is in float32.
        arrays[name] = array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array.copy()
    return arrays, by_keyword


def _inputs(example: Feeds, dynamic_batch: bool, dynamic_size: bool) -> list[TensorInfo]:
    first = next(iter(example.values()))
    batch = first.shape[0] if first.ndim else None
    found: list[TensorInfo] = []
    sides: tuple[int, ...] | None = None
    for name, array in example.items():
        shape: list[int | str] = list(array.shape)
        if dynamic_batch and array.ndim and array.shape[0] == batch:
            shape[0] = "batch"
        if dynamic_size and array.ndim == 4:
            # Axes of one name have one size, so an input of another size has names of its own.
            sides = sides or array.shape[2:]
            prefix = "" if array.shape[2:] == sides else f"{name}_"
            shape[2:] = [f"{prefix}height", f"{prefix}width"]
        found.append(TensorInfo(name, tuple(shape), str(array.dtype)))
    return found


def guessed_task(example: Feeds, outputs: Mapping[str, Tensor]) -> str:
    """The task that the shapes of a module's inputs and outputs speak for.

    Logits of classes are (batch, classes); an image has the channels of the input, and its size or a multiple of it;
    feature maps come several at a time; a map of the input's size with other channels is one of logits.
    """
    first = next(iter(example.values()))
    shapes = [tuple(value.shape) for value in outputs.values()]
    if len(shapes) == 1 and len(shapes[0]) == 2:
        return "classification"
    if first.ndim != 4 or any(len(shape) != 4 for shape in shapes):
        return "other"
    if len(shapes) > 1:
        return "features"
    _, channels, height, width = shapes[0]
    if channels == first.shape[1] and height % first.shape[2] == 0 and width % first.shape[3] == 0:
        return "image"
    return "segmentation" if (height, width) == first.shape[2:] else "features"


def refuse_random(model: Any) -> None:
    """Refuse a graph that draws random numbers.

    Raises:
        ExportError: if it does.
    """
    for node in model.graph.node:
        if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial"):
            raise ExportError(
                f"the module draws random numbers in eval mode ({node.op_type} at {node.name or 'its top level'}), so "
                "nothing can be proved of what it computes; make it deterministic, such as argmax in place of "
                "gumbel_softmax"
            )


def _require_deterministic(
    module: nn.Module,
    feeds: Mapping[str, Tensor],
    signature: Signature,
    running: Callable[[], AbstractContextManager[Any]],
    found: Discovery,
) -> None:
    """Refuse a module whose output differs from call to call by more than rounding, and warn where it does by less."""
    if found.deterministic:
        return
    with torch.no_grad(), running():
        again = signature.call(module, feeds)
    for name, value in found.outputs.items():
        if value.shape != again[name].shape:
            spread = float("inf")
        else:
            spread = float((value.double() - again[name].double()).abs().max() / value.double().abs().max())
        if not spread <= SPREAD:
            drawn = f", which draws random numbers ({found.random})," if found.random else ""
            raise ExportError(
                f"the module {type(module).__name__}{drawn} gives another {name!r} at every call, by {spread:.1e} of "
                "its largest value on the same inputs; make it deterministic in eval mode"
            )
    import warnings

    warnings.warn(
        f"the module {type(module).__name__} is not deterministic: two runs on the same inputs differ by rounding",
        stacklevel=3,
    )


def _renamed(outputs: Mapping[str, Tensor], signature: Signature) -> list[str]:
    """The names of outputs once the task is known: those that have none of their own begin with its word."""
    found = []
    for name in outputs:
        plain = name.removesuffix("_output") if name != OTHER else name
        if plain == OTHER or plain.startswith(f"{OTHER}_"):
            name = signature.base + plain[len(OTHER) :]
            name = f"{name}_output" if name in signature.inputs else name
        found.append(name)
    return found


def _check_labels(task: str, labels: Sequence[str], outputs: Mapping[str, Tensor]) -> None:
    if not labels:
        return
    if task not in ("classification", "segmentation"):
        raise InputError(f"labels are names of classes, and the task is {task!r}; leave them out")
    name, value = next(iter(outputs.items()))
    if value.shape[1] != len(labels):
        raise InputError(
            f"there are {len(labels)} labels, but the output {name!r} has {value.shape[1]} classes (shape "
            f"{tuple(value.shape)})"
        )


def _check_preprocessing(preprocessing: Preprocessing | None, inputs: Sequence[TensorInfo]) -> None:
    if preprocessing is None:
        return
    images = [item for item in inputs if item.is_image]
    if not images:
        shapes = ", ".join(f"{item.name} {item.shape}" for item in inputs)
        raise InputError(f"a preprocessing is for images, and no input can hold one: {shapes}")
    sides = (preprocessing.channels, *preprocessing.crop)
    if not any(
        all(isinstance(own, str) or own == wanted for own, wanted in zip(item.shape[1:], sides, strict=True))
        for item in images
    ):
        raise InputError(
            f"the preprocessing makes images of {sides} (channels, height, width), but the module takes "
            f"{', '.join(f'{item.name} {item.shape}' for item in images)}; set color and crop"
        )
