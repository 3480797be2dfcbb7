"""The nodes that keep some positions of a feature map and those that restore the map: how they are written and found.

Kept positions are a Slice with a step when one position of every `stride` is kept, else one Gather for each axis.

Restoring by nearest upsampling means source position floor(i·H'/H), exactly. ONNX's Resize (nearest, asymmetric, floor)
means the same but runtimes compute it in float32, some as i·(H'/H), some as i/(H/H'); where i·H'/H is a whole number
the rounding may land one position too low. So Resize is written only where both float formulas give the exact index
for every i, which includes all sizes at stride 2, and a Gather with integer indices elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from quartermap_deploy.errors import PassError
from quartermap_deploy.passes.base import GraphWriter, ScanNode, constant_of, producer, sizes
from quartermap_deploy.pruning.plan import Subsample

INT64 = np.dtype(np.int64)
_SCANNED = "scanned_"
SPATIAL = (2, 3)
"""The axes of height and width in a feature map (batch, channels, H, W)."""


def write_keep(write: GraphWriter, x: gs.Tensor, subsample: Subsample) -> gs.Variable:
    """Write the nodes that keep the plan's rows and columns of x; returns the smaller map."""
    if subsample.keep == 1:
        far = np.iinfo(np.int64).max
        bounds = {
            "starts": [0, 0],
            "ends": [far, far],
            "axes": list(SPATIAL),
            "steps": [subsample.stride, subsample.stride],
        }
        inputs = [x, *(write.constant(name, np.array(values, INT64)) for name, values in bounds.items())]
        return write("Slice", "keep", inputs)
    for axis, size in zip(SPATIAL, sizes(x)[2:], strict=True):
        if size is None:
            indices: gs.Tensor = _dynamic_kept_indices(write, x, axis, subsample)
        else:
            positions = np.arange(size)
            kept = positions[positions % subsample.stride < subsample.keep]
            indices = write.constant(f"kept_{axis}", kept.astype(INT64))
        x = write("Gather", f"keep_{axis}", [x, indices], axis=axis)
    return x


def write_restore(write: GraphWriter, y: gs.Tensor, full: gs.Tensor, subsample: Subsample) -> gs.Variable:
    """Write the nodes that bring y back to the height and width of `full`; returns the map."""
    targets = sizes(full)[2:]
    if subsample.upsample != "nearest":
        # torch.nn.functional.interpolate with align_corners=False: half-pixel centres, and a = -0.75 for bicubic.
        mode = {"bilinear": "linear", "bicubic": "cubic"}[subsample.upsample]
        extra = {"cubic_coeff_a": -0.75} if mode == "cubic" else {}
        return _resize(
            write, y, full, mode=mode, coordinate_transformation_mode="pytorch_half_pixel", **extra
        )
    if all(_resize_is_exact(size, subsample) for size in targets):
        modes = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return _resize(write, y, full, mode="nearest", **modes)
    for axis, size in zip(SPATIAL, targets, strict=True):
        if size is None:
            source: gs.Tensor = _dynamic_nearest_indices(write, y, full, axis)
        else:
            exact = np.arange(size) * subsample.kept_size(size) // size
            source = write.constant(f"source_{axis}", exact.astype(INT64))
        y = write("Gather", f"restore_{axis}", [y, source], axis=axis)
    return y


def scanned_name(scan: ScanNode, subsample: Subsample) -> str:
    """How the output of a subsampled scan is named: it tells by which plan, whatever later passes have moved."""
    plan = f"{subsample.upsample}_{subsample.keep}_of_{subsample.stride}"
    return f"{pruned_prefix(scan)}/{_SCANNED}{plan}"


def pruned_prefix(scan: ScanNode) -> str:
    """What the names of a pruned scan's nodes start with: `block_3/quartermap` for `block_3/scan`."""
    return "/quartermap".join(scan.name.rsplit("/scan", maxsplit=1))


def is_pruned(scan: ScanNode, subsample: Subsample, pass_name: str) -> bool:
    """Whether a scan was subsampled by this plan.

    Raises:
        PassError: if another plan has subsampled it.
    """
    found, expected = str(scan.node.outputs[0].name), scanned_name(scan, subsample)
    own = f"{pruned_prefix(scan)}/{_SCANNED}"
    if found != expected and found.startswith(own):
        raise PassError(
            f"{pass_name}: block {scan.block} was pruned by another plan already ({found.removeprefix(own)}), expected "
            f"{expected.removeprefix(own)}; start from the unpruned model"
        )
    return found == expected


def require_pruned(scan: ScanNode, subsample: Subsample, pass_name: str) -> None:
    """Refuse a scan that this plan has not subsampled yet.

    Raises:
        PassError: if the scan has its whole map, or was subsampled by another plan.
    """
    if not is_pruned(scan, subsample, pass_name):
        raise PassError(
            f"{pass_name}: block {scan.block} is in the plan, but its scan has the whole map; run insert_quartermap "
            "first"
        )


def is_keep(node: gs.Node | None) -> bool:
    """Whether a node was written by `write_keep`."""
    return node is not None and node.op in ("Slice", "Gather") and _last_part(node).startswith("keep")


def restore_chain(y: gs.Tensor) -> list[gs.Node]:
    """The nodes written by `write_restore` that bring y back to its size, first to last; empty if there are none."""
    chain: list[gs.Node] = []
    while True:
        # Shape nodes read y too, for the sizes that restoring leaves alone.
        readers = [node for node in y.outputs if node.op != "Shape"]
        if len(readers) != 1 or not _last_part(readers[0]).startswith("restore"):
            return chain
        chain.append(readers[0])
        y = readers[0].outputs[0]


def restored_like(chain: list[gs.Node]) -> gs.Tensor:
    """The map whose height and width the nodes of a restoring chain bring back, as given to `write_restore`.

    Where both sizes are known the restored map itself will do, because only its shape is looked at.
    """
    small = chain[0].inputs[0]
    pending = [item for node in chain for item in node.inputs[1:]]
    while pending:
        node = producer(pending.pop())
        if node is None:
            continue
        if node.op != "Shape":
            pending += node.inputs
        elif node.inputs[0] is not small:
            return node.inputs[0]
    return chain[-1].outputs[0]


def strided_slice(node: gs.Node | None) -> int | None:
    """The stride of a Slice written by `write_keep`, or None if the node is something else."""
    if node is None or node.op != "Slice" or not is_keep(node) or len(node.inputs) != 5:
        return None
    steps = constant_of(node.inputs[4])
    return None if steps is None else int(steps[0])


def _last_part(node: gs.Node) -> str:
    return str(node.name).rsplit("/", maxsplit=1)[-1]


def _resize(write: GraphWriter, y: gs.Tensor, full: gs.Tensor, **attributes: Any) -> gs.Variable:
    """A Resize of y to the height and width of `full`."""
    height, width = sizes(full)[2:]
    # Sizes of all four axes, though the attribute `axes` would spare batch and channels: ONNX Runtime 1.31 moves
    # transposes through a Resize as if it had no such attribute, and then refuses the model.
    outer = write("Shape", "outer_size", [y], dtype=INT64, start=0, end=2)
    if height is not None and width is not None:
        inner: gs.Tensor = write.constant("inner_size", np.array([height, width], INT64))
    else:
        inner = write("Shape", "inner_size", [full], dtype=INT64, start=2, end=4)
    size = write("Concat", "size", [outer, inner], dtype=INT64, axis=0)
    empty = gs.Variable.empty()
    return write("Resize", "restore", [y, empty, empty, size], **attributes)


def _resize_is_exact(size: int | None, subsample: Subsample) -> bool:
    """Whether every float32 reading of Resize gives floor(i·kept/size) at this size."""
    if size is None:
        # Stride 2, keep 1: an even size has the ratio 2, exact in float, and for an odd size 2k - 1 the quotient
        # i·k/(2k - 1) is whole only at i = 0, so that rounding, 1e-7 of it, cannot cross a whole number.
        return subsample.stride == 2 and subsample.keep == 1
    kept = subsample.kept_size(size)
    positions = np.arange(size)
    exact = positions * kept // size
    as_float = positions.astype(np.float32)
    multiplied = np.floor(as_float * (np.float32(kept) / np.float32(size)))
    divided = np.floor(as_float / (np.float32(size) / np.float32(kept)))
    return bool((multiplied == exact).all() and (divided == exact).all())


def _axis_size(write: GraphWriter, x: gs.Tensor, axis: int, name: str) -> gs.Variable:
    """A scalar: the size of an axis at run time."""
    shape = write("Shape", f"{name}_shape_{axis}", [x], dtype=INT64, start=axis, end=axis + 1)
    return write(
        "Squeeze", f"{name}_{axis}", [shape, write.constant(f"{name}_zero_{axis}", _ints(0))], dtype=INT64
    )


def _dynamic_kept_indices(write: GraphWriter, x: gs.Tensor, axis: int, subsample: Subsample) -> gs.Variable:
    """Kept positions of an axis of open size: the j-th is j // keep · stride + j mod keep."""
    stride, keep = (
        write.constant(f"{n}_{axis}", np.array(v, INT64))
        for n, v in (("stride", subsample.stride), ("keep_count", subsample.keep))
    )
    size = _axis_size(write, x, axis, "full")

    def integer(op: str, name: str, *inputs: gs.Tensor) -> gs.Variable:
        return write(op, f"{name}_{axis}", list(inputs), dtype=INT64)

    whole = integer("Mul", "whole_groups", integer("Div", "groups", size, stride), keep)
    rest = integer("Min", "rest", integer("Mod", "remainder", size, stride), keep)
    count = integer("Add", "count", whole, rest)
    j = _count_up(write, count, axis, "kept")
    group = integer("Mul", "group_start", integer("Div", "group", j, keep), stride)
    return integer("Add", "kept", group, integer("Mod", "offset", j, keep))


def _dynamic_nearest_indices(write: GraphWriter, y: gs.Tensor, full: gs.Tensor, axis: int) -> gs.Variable:
    """floor(i·H'/H) in integers, for an axis of open size."""
    size, kept = _axis_size(write, full, axis, "target"), _axis_size(write, y, axis, "available")
    i = _count_up(write, size, axis, "source")
    scaled = write("Mul", f"scaled_{axis}", [i, kept], dtype=INT64)
    return write("Div", f"source_{axis}", [scaled, size], dtype=INT64)


def _count_up(write: GraphWriter, count: gs.Tensor, axis: int, name: str) -> gs.Variable:
    """0, 1, … count - 1."""
    bounds = [
        write.constant(f"{name}_{n}_{axis}", np.array(v, INT64)) for n, v in (("start", 0), ("step", 1))
    ]
    return write("Range", f"{name}_count_{axis}", [bounds[0], count, bounds[1]], dtype=INT64)


def _ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, INT64)
