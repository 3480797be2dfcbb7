"""What several test files share: running ONNX models, random scans, small hand-written graphs, traced models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from reference_models import CONFIGS, DIMS, Reference, load
from torch import Tensor
from traced_once import traced_once

from quartermap_deploy.architectures.base import VisualStateSpaceModel
from quartermap_deploy.architectures.medmamba import MedMamba, MedMambaConfig
from quartermap_deploy.architectures.vmamba import VMamba
from quartermap_deploy.frontend.exporter import INPUT, OUTPUT
from quartermap_deploy.frontend.node_names import block_output, scan_name
from quartermap_deploy.lowering.operator import DOMAIN, INPUTS_2D, SELECTIVE_SCAN_2D, VERSION, ScanVariant
from quartermap_deploy.lowering.scan_body import scan_body
from quartermap_deploy.scan.definition import DIRECTIONS, selective_scan_2d_definition

Array = np.ndarray[Any, Any]
REPOSITORY = Path(__file__).resolve().parent.parent

ONNX_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
}


# Running and comparing ------------------------------------------------------------------------------------------


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a session of plain ONNX Runtime on one thread, with no library of ours."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Small models run once: to plan where values may take the place of others takes a third of all.
    options.enable_mem_reuse = False
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(model: onnx.ModelProto, inputs: Mapping[str, Array | Tensor]) -> dict[str, Array]:
    """Run a model once and return its outputs by name."""
    return run_session(session(model), inputs)


def run_session(
    ready: onnxruntime.InferenceSession, inputs: Mapping[str, Array | Tensor]
) -> dict[str, Array]:
    """Run a session and return its outputs by name."""
    feeds = {name: np.asarray(value) for name, value in inputs.items()}
    names = [output.name for output in ready.get_outputs()]
    return dict(zip(names, ready.run(names, feeds), strict=True))


def error(actual: Array | Tensor, expected: Array | Tensor) -> float:
    """Return the largest difference as a share of the largest expected value; a NaN or another shape is infinite."""
    found, wanted = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    assert np.isfinite(wanted).all(), "the expected values must be finite"
    largest = np.abs(wanted).max()
    difference = np.abs(found - wanted).max()
    return float(difference / largest) if largest > 0 else float(difference)


# The scan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScanCase:
    """Arguments of selective_scan_2d in float64, and the result of its definition.

    Attributes:
        tensors: x, dt, B, C, A, D, dt_bias and, at low rank, dt_weight.
        directions: the scan orders.
        softplus: whether softplus is applied to the time step.
    """

    tensors: tuple[Tensor, ...]
    directions: tuple[str, ...]
    softplus: bool

    @property
    def low_rank(self) -> bool:
        """Whether dt is projected by a dt_weight."""
        return len(self.tensors) == len(INPUTS_2D)

    @property
    def variant(self) -> ScanVariant:
        """What a function body for this case depends on."""
        return ScanVariant(self.directions, self.softplus, self.tensors[4].shape[1], self.low_rank)

    def converted(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the tensors with maps and dt_weight in an element type; A, D and dt_bias are at least float32."""
        parameters = torch.promote_types(dtype, torch.float32)
        return tuple(
            tensor.to(parameters if name in ("A", "D", "dt_bias") else dtype)
            for name, tensor in zip(INPUTS_2D, self.tensors, strict=False)
        )

    def expected(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the definition's result in float64, for arguments that were rounded to an element type."""
        *tensors, weight = [*self.converted(dtype), None][: len(INPUTS_2D)]
        doubles = [tensor.double() for tensor in tensors if tensor is not None]
        return selective_scan_2d_definition(
            *doubles,
            dt_weight=None if weight is None else weight.double(),
            directions=self.directions,
            softplus=self.softplus,
        )


def scan_case(
    batch: int = 1,
    d_inner: int = 3,
    height: int = 4,
    width: int = 5,
    d_state: int = 1,
    rank: int | None = 2,
    directions: Sequence[str] = DIRECTIONS,
    softplus: bool = True,
    steps: tuple[float, float] = (0.01, 1.0),
    decay: float = 1.0,
    skip: bool = True,
    even: bool = False,
    seed: int = 0,
) -> ScanCase:
    """Return a random case whose time steps dt·|A| are spread evenly over orders of magnitude.

    Args:
        batch: images.
        d_inner: channels.
        height: positions.
        width: positions.
        d_state: N.
        rank: R of a low-rank time step, or None for a full one.
        directions: the scan orders.
        softplus: whether softplus is applied to the time step.
        steps: smallest and largest dt·|A|, after bias and softplus; met exactly at full rank, about at low rank.
        decay: largest |A|; the time steps are smaller by as much.
        skip: whether D is other than zero.
        even: whether all positions of a map are the same, as in a blank image.
        seed: of the random numbers.
    """
    random = torch.Generator().manual_seed(seed)
    count = len(directions)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=random, dtype=torch.float64)

    def over_positions(map_: Tensor) -> Tensor:
        return map_[:, :, :1, :1].expand_as(map_).contiguous() if even else map_

    smallest, largest = (step / decay for step in steps)
    low, high = np.log(smallest), np.log(largest)
    x = over_positions(normal(batch, d_inner, height, width))
    B, C = (over_positions(normal(batch, count * d_state, height, width)) for _ in range(2))
    A = -decay * uniform(0.5, 1.0, count * d_inner, d_state)
    A[:, -1] = -decay
    D = normal(count * d_inner) if skip else torch.zeros(count * d_inner, dtype=torch.float64)

    def before_softplus(step: Tensor) -> Tensor:
        return step + torch.log(-torch.expm1(-step)) if softplus else step

    if rank is None:
        bias = 0.5 * normal(count * d_inner)
        wanted = uniform(low, high, batch, count * d_inner, height, width).exp()
        dt = over_positions(before_softplus(wanted) - bias[:, None, None])
        return ScanCase((x, dt, B, C, A, D, bias), tuple(directions), softplus)
    # Each channel has a step of its own, from its bias; the low-rank part moves it about.
    bias = before_softplus(uniform(low, high, count * d_inner).exp())
    spread = 0.3 if softplus else 0.3 * smallest
    dt = over_positions(spread * uniform(-1, 1, batch, count * rank, height, width))
    weight = uniform(-1, 1, count * d_inner, rank) / rank
    return ScanCase((x, dt, B, C, A, D, bias, weight), tuple(directions), softplus)


def scan_node(
    variant: ScanVariant, prefix: str = "", output: str = "y", overload: str = ""
) -> onnx.NodeProto:
    """Return a SelectiveScan2D node that reads values named after the operator's inputs."""
    names = INPUTS_2D if variant.low_rank else INPUTS_2D[:-1]
    node = helper.make_node(
        SELECTIVE_SCAN_2D,
        [f"{prefix}{name}" for name in names],
        [output],
        domain=DOMAIN,
        directions=list(variant.directions),
        softplus=int(variant.softplus),
    )
    node.overload = overload
    return node


def scan_model(variants: Sequence[ScanVariant], dtype: torch.dtype = torch.float32) -> onnx.ModelProto:
    """Return a model with one scan for each variant, all sizes open; the inputs of the n-th are named n/x and so on."""
    nodes, inputs, outputs, functions = [], [], [], []
    for index, variant in enumerate(variants):
        overload = "" if index == 0 else f"variant_{index}"
        nodes.append(scan_node(variant, f"{index}/", f"{index}/y", overload))
        functions.append(scan_body(variant, overload))
        for name in nodes[-1].input:
            short = name.split("/")[1]
            rank = 4 if short in INPUTS_2D[:4] else 1 if short in ("D", "dt_bias") else 2
            kind = ONNX_TYPES[torch.float32 if short in ("A", "D", "dt_bias") else dtype]
            inputs.append(
                helper.make_tensor_value_info(name, kind, [f"{name}_{axis}" for axis in range(rank)])
            )
        outputs.append(helper.make_tensor_value_info(f"{index}/y", ONNX_TYPES[dtype], [None] * 4))
    return helper.make_model(
        helper.make_graph(nodes, "scans", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)],
        functions=functions,
        ir_version=10,
    )


def scan_feeds(case: ScanCase, dtype: torch.dtype = torch.float32, index: int = 0) -> dict[str, Array]:
    """Return the inputs of the `index`-th scan of a `scan_model`."""
    return {
        f"{index}/{name}": tensor.numpy()
        for name, tensor in zip(INPUTS_2D, case.converted(dtype), strict=False)
    }


# Small graphs, written by hand ----------------------------------------------------------------------------------

CHANNELS, D_INNER, D_STATE, RANK = 4, 6, 2, 1
SCAN = 'quartermap.SelectiveScan2D <directions = ["row", "column", "row_reverse", "column_reverse"], softplus = 1>'

CHANNEL_FIRST = f"""
    projected = Conv (x, in_proj)
    convolved = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = {D_INNER}> (projected, conv)
    gate = Sigmoid (convolved)
    features = Mul (convolved, gate)
    narrow = Conv (features, x_proj)
    dt, B, C = Split <axis = 1> (narrow, parts)
    scanned = {SCAN} (features, dt, B, C, A, D, dt_bias, dt_weight)
    last = Transpose <perm = [0, 2, 3, 1]> (scanned)
    normal = LayerNormalization <axis = -1> (last, norm_scale, norm_bias)
    first = Transpose <perm = [0, 3, 1, 2]> (normal)
    mixed = Conv (first, out_proj)
    y = Add (x, mixed)
"""
"""One channel-first block: in_proj, depthwise convolution, SiLU, projections, scan, out_norm, out_proj, residual."""

CHANNEL_LAST = f"""
    in_last = Transpose <perm = [0, 2, 3, 1]> (x)
    wide = MatMul (in_last, in_matrix)
    projected = Transpose <perm = [0, 3, 1, 2]> (wide)
    convolved = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = {D_INNER}> (projected, conv)
    gate = Sigmoid (convolved)
    features = Mul (convolved, gate)
    narrow = Conv (features, x_proj)
    dt, B, C = Split <axis = 1> (narrow, parts)
    scanned = {SCAN} (features, dt, B, C, A, D, dt_bias, dt_weight)
    last = Transpose <perm = [0, 2, 3, 1]> (scanned)
    normal = LayerNormalization <axis = -1> (last, norm_scale, norm_bias)
    mixed = MatMul (normal, out_matrix)
    added = Add (in_last, mixed)
    y = Transpose <perm = [0, 3, 1, 2]> (added)
"""
"""The same block, channel-last."""

GATED = CHANNEL_LAST.replace(
    "    mixed = MatMul (normal, out_matrix)",
    """    z = MatMul (in_last, in_matrix)
    z_gate = Sigmoid (z)
    z_activated = Mul (z, z_gate)
    gated = Mul (normal, z_activated)
    mixed = MatMul (gated, out_matrix)""",
)
"""The same block with a gate between out_norm and out_proj."""


def block_weights(seed: int = 0) -> dict[str, Array]:
    """Return random weights for the graphs above, with which the scan matters."""
    random = np.random.default_rng(seed)
    case = scan_case(d_inner=D_INNER, d_state=D_STATE, rank=RANK, steps=(0.05, 2.0), seed=seed)
    _, _, _, _, *parameters = (tensor.float().numpy() for tensor in case.tensors)

    def normal(*shape: int) -> Array:
        return (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    count = len(DIRECTIONS)
    parts = [count * RANK, count * D_STATE, count * D_STATE]
    weights = {
        "in_proj": normal(D_INNER, CHANNELS, 1, 1),
        "conv": normal(D_INNER, 1, 3, 3),
        "x_proj": 3 * normal(sum(parts), D_INNER, 1, 1),
        "parts": np.array(parts, dtype=np.int64),
        "norm_scale": 1 + normal(D_INNER, 1)[:, 0],
        "norm_bias": normal(D_INNER, 1)[:, 0],
        "out_proj": normal(CHANNELS, D_INNER, 1, 1),
    }
    weights |= dict(zip(INPUTS_2D[4:], parameters, strict=True))
    weights["in_matrix"] = weights["in_proj"][:, :, 0, 0].T.copy()
    weights["out_matrix"] = weights["out_proj"][:, :, 0, 0].T.copy()
    return weights


def text_model(
    text: str,
    height: int | str = "height",
    width: int | str = "width",
    weights: Mapping[str, Array] | None = None,
    outputs: Sequence[str] = ("y",),
    rank: int = 4,
) -> onnx.ModelProto:
    """Parse the nodes of a graph that reads x, (batch, 4, height, width), and the weights that it names.

    Args:
        text: nodes in ONNX's textual syntax, one each line; each is named after its first output, scans after their
            place, each of a block of its own.
        height: of x; a string leaves it open.
        width: of x.
        weights: arrays by name, beside those of `block_weights`; only those that are read are kept.
        outputs: values to return.
        rank: axes of each of them.
    """
    header = '<ir_version: 10, opset_import: ["": 20, "quartermap": 1]>\n'
    signature = f"block (float[batch, {CHANNELS}, {height}, {width}] x) => ({', '.join(outputs)}) {{"
    model = onnx.parser.parse_model(header + signature + text + "}")
    read = {name for node in model.graph.node for name in node.input}
    scans = 0
    for node in model.graph.node:
        node.name = node.output[0]
        if node.domain == DOMAIN:
            scans += 1
            node.name = scan_name(scans)
    for name, array in {**block_weights(), **(weights or {})}.items():
        if name in read:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    for output in model.graph.output:
        output.CopyFrom(helper.make_tensor_value_info(output.name, onnx.TensorProto.FLOAT, [None] * rank))
    return model


def chained(text: str, count: int) -> str:
    """Return the text of `count` blocks, one after the other; the values of block i end in _i, the last is y."""
    made = {line.split("=")[0].strip() for line in text.strip().splitlines()}
    names = {name.strip() for group in made for name in group.split(",")}
    parts = []
    for index in range(1, count + 1):
        renamed = {name: f"{name}_{index}" for name in names}
        renamed["x"] = "x" if index == 1 else f"y_{index - 1}"
        if index == count:
            renamed["y"] = "y"
        parts.append(_renamed_values(text, renamed))
    return "".join(parts)


def _renamed_values(text: str, names: Mapping[str, str]) -> str:
    lines = []
    for line in text.strip().splitlines():
        left, right = line.split("=", maxsplit=1)
        operator, arguments = right.rsplit("(", maxsplit=1)
        left = ", ".join(names.get(item.strip(), item.strip()) for item in left.split(","))
        arguments = ", ".join(
            names.get(item.strip(), item.strip()) for item in arguments.rstrip(") ").split(",")
        )
        lines.append(f"    {left} = {operator.strip()} ({arguments})\n")
    return "\n" + "".join(lines)


def edited(text: str, old: str, new: str) -> str:
    """Replace a part of a graph's text, which must be there."""
    assert text.count(old) == 1, old
    return text.replace(old, new)


def image(height: int, width: int, batch: int = 2, seed: int = 0) -> Array:
    """Return a random x for the graphs above."""
    random = np.random.default_rng(seed)
    return random.standard_normal((batch, CHANNELS, height, width)).astype(np.float32)


def operators(model: onnx.ModelProto) -> list[str]:
    """Return the operators of the main graph, in order."""
    return [node.op_type for node in model.graph.node]


def main_graph(model: onnx.ModelProto) -> bytes:
    """Return what a pass may change, for comparing two models: nodes and weights, without inferred shapes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    return copy.SerializeToString(deterministic=True)


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return the model with more values among its outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {output.name for output in copy.graph.output}
    copy.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in present
    )
    return copy


# Whole models -----------------------------------------------------------------------------------------------------


@functools.cache
def reference(name: str) -> Reference:
    """Return a model with the public code's weights; shared, so it must not be changed."""
    return load(name)


@functools.cache
def shortened(name: str) -> VisualStateSpaceModel:
    """Return one block for each of the first two stages of a reference, with its weights."""
    config = dataclasses.replace(CONFIGS[name], depths=(1, 1), dims=DIMS[:2], num_classes=3)
    torch.manual_seed(0)
    model = (MedMamba if isinstance(config, MedMambaConfig) else VMamba)(config)  # type: ignore[arg-type]
    initial, trained = model.state_dict(), reference(name).model.state_dict()
    model.load_state_dict(
        {
            key: trained[key] if key in trained and trained[key].shape == tensor.shape else tensor
            for key, tensor in initial.items()
        }
    )
    return model.eval()


def traced(name: str) -> onnx.ModelProto:
    """Return a reference as the exporter traces it; traced once in a test run."""
    given = reference(name)
    return traced_once(given.model, tuple(given.input.shape))


def traced_with_open_sizes(name: str) -> onnx.ModelProto:
    """Return a shortened reference, traced with open height and width."""
    return traced_once(shortened(name), (2, 3, 64, 96), dynamic_size=True)


@torch.inference_mode()
def torch_outputs(model: VisualStateSpaceModel, images: Tensor) -> dict[str, Array]:
    """Return the outputs of all blocks and the logits, under the names that they have in an exported graph."""
    outputs: dict[str, Array] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            outputs[name] = output.numpy()

        return hook

    handles = [
        block.module.register_forward_hook(keep(block_output(block.index))) for block in model.blocks()
    ]
    try:
        outputs[OUTPUT] = model(images).numpy()
    finally:
        for handle in handles:
            handle.remove()
    return {name: outputs[name] for name in (*map(block_output, range(1, len(handles) + 1)), OUTPUT)}


def onnx_outputs(model: onnx.ModelProto, images: Tensor | Array) -> dict[str, Array]:
    """Return the same of an exported graph with bodies."""
    names = [value for node in model.graph.node for value in node.output]
    blocks = [name for name in names if name.removeprefix("block_").isdigit()]
    return run(with_outputs(model, blocks), {INPUT: images})


def output_errors(actual: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """Return the error of every block and of the logits, in order; a missing output is infinitely wrong."""
    return {
        name: error(actual[name], value) if name in actual else float("inf")
        for name, value in expected.items()
    }


def images_for(name: str, batch: int) -> Tensor:
    """Return `batch` images of the size of a reference's input, the first of which are its own."""
    own = reference(name).input
    more = torch.randn(batch, *own.shape[1:], generator=torch.Generator().manual_seed(batch))
    return torch.cat([own, more])[:batch]


DIGITS = 4
"""Held-out digits in a comparison: enough to see every fault, few enough to be quick."""


@functools.cache
def digits() -> tuple[VisualStateSpaceModel, Tensor]:
    """Return the trained digits model and some held-out digits; shared, so they must not be changed."""
    from quartermap_deploy.architectures import create_model, load_card
    from quartermap_deploy.data.digits import load_digits
    from quartermap_deploy.data.images import prepare

    held_out = list(load_digits().held_out.images[:DIGITS])
    images = prepare(held_out, load_card("vmamba_digits").preprocessing)
    return create_model("vmamba_digits"), torch.from_numpy(images)


def traced_digits() -> onnx.ModelProto:
    """Return the digits model as the exporter traces it; traced once in a test run."""
    model, images = digits()
    return traced_once(model, tuple(images.shape))
