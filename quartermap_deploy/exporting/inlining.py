"""`inline`: a file without functions, for runtimes and tools that know none."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return an exported model with the scans written out in standard operators: no function, no domain of ours.

    Names of values and nodes are unique over all graphs of the file, every value has its type and, as far as it is
    known, its shape, and the numbers are the same. The native operator and the operator for normalisations of maps take
    the place of scans that a session can see, so for this file they are not used: export a file for each.

    Args:
        model: what `export_onnx` returns, or the `model.onnx` of a bundle; not changed.

    Returns:
        The model, checked by `onnx.checker`, in the same opset and with the lowest IR version that is valid.

    Raises:
        PassError: if a scan has no body.
    """
    import onnx

    from quartermap_deploy.lowering.versions import stamp_ir_version
    from quartermap_deploy.passes.inline_scans import inline_scans
    from quartermap_deploy.passes.settle_shapes import settle_shapes

    flat = settle_shapes(inline_scans(model))
    stamp_ir_version(flat)
    onnx.checker.check_model(flat, full_check=True)
    return flat
