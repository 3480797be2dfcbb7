"""Which block must go back to float32 for a 16-bit model to be right?

Casts are flipped in the ONNX graph: the float32 model is typed anew with some of its blocks in float32, and compared
with the reference. First each block alone; where none alone restores the model, blocks are taken back from a model that
is float32 everywhere, as long as it stays right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner

from quartermap_deploy.errors import PassError
from quartermap_deploy.frontend.node_names import block_output
from quartermap_deploy.passes.block_parts import block_parts
from quartermap_deploy.passes.cast_precision import cast_precision
from quartermap_deploy.passes.lower import lower
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.validation.parity import ParityReport, check_parity
from quartermap_deploy.validation.tolerances import Tolerance

AFTER_BLOCKS = 0
"""The number of the part that follows the last block."""


@dataclass(frozen=True)
class LocaliseReport:
    """What brings a 16-bit model back within its tolerance.

    Attributes:
        precision: the 16-bit type.
        passed: whether the model is within the tolerance as it is; then nothing was tried.
        alone: for each block, whether its return to float32 alone restores the model, and the error that is left.
        restoring: the blocks whose return restores the model: one, the best, if one is enough, else a smallest set that
            was found; None if none does, because the fault lies elsewhere. `AFTER_BLOCKS` stands for what follows the
            last block.
        error: the relative error of the model as it is; None for infinite.
        remaining: the relative error with `restoring` in float32; None for infinite.
        runs: how many models were compared.
    """

    precision: str
    passed: bool
    alone: Mapping[int, tuple[bool, float]] = field(default_factory=dict)
    restoring: tuple[int, ...] | None = ()
    error: float = 0.0
    remaining: float = 0.0
    runs: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks of `restoring` by name."""
        return tuple(map(part_name, self.restoring or ()))

    def describe(self) -> str:
        """One sentence."""
        if self.passed:
            return f"the model is within the tolerance in {self.precision}; there is nothing to localise"
        if self.restoring is None:
            return f"no set of blocks in float32 restores parity in {self.precision}; the fault is not one of precision"
        names = " and ".join(self.names)
        left = f"the largest relative error falls from {self.error:.2e} to {self.remaining:.2e}"
        if len(self.restoring) == 1:
            return f"{names} in float32 restores parity in {self.precision}: {left}"
        return f"no block alone restores parity in {self.precision}; {names} together do: {left}"

    def advice(self) -> str:
        """What to do about it, in one clause."""
        if self.passed or self.restoring is None:
            return "please report this with the recipe"
        blocks = [part for part in self.restoring if part != AFTER_BLOCKS]
        if not blocks:
            return "please report this with the recipe"
        return (
            f"keep it in float32: --float32-blocks {','.join(map(str, blocks))}, in a recipe blocks_float32"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which has no infinity."""
        return {
            "precision": self.precision,
            "passed": self.passed,
            "restoring": None if self.restoring is None else list(self.names),
            "relative_error": _plain(self.error),
            "remaining_relative_error": _plain(self.remaining),
            "alone": {
                part_name(part): {"passed": passed, "relative_error": _plain(left)}
                for part, (passed, left) in self.alone.items()
            },
            "models_compared": self.runs,
        }


def part_name(part: int) -> str:
    """The name of a block, or of what follows the last."""
    return "the part after the last block" if part == AFTER_BLOCKS else block_output(part)


def localise(
    model: onnx.ModelProto,
    precision: str,
    reference: BaseRunner,
    cases: Mapping[str, Mapping[str, NDArray[Any]]],
    tolerance: Tolerance,
    *,
    keep_float32: Iterable[str] = (),
    blocks_float32: Iterable[int] = (),
    runner: Callable[[onnx.ModelProto], BaseRunner] | None = None,
    progress: Progress = SILENT,
) -> LocaliseReport:
    """Find the block whose return to float32 brings a 16-bit model back within its tolerance.

    Args:
        model: the float32 model after the QuarterMap passes, without bodies, as `Export.float32` has it.
        precision: the 16-bit type.
        reference: a polygraphy runner with the outputs that are right.
        cases: for each case, by its name, an array for each input.
        tolerance: what counts as equal.
        keep_float32: what is kept in float32 anyway, as for `cast_precision`.
        blocks_float32: blocks that are kept in float32 anyway.
        runner: makes the runner of a typed model with bodies; None takes ONNX Runtime, with every 16-bit value
            rounded.
        progress: told about the steps.

    Raises:
        PassError: if the graph has no values named after blocks.
    """
    from quartermap_deploy.validation.rounding import rounded_in_float32
    from quartermap_deploy.validation.runners import onnxruntime_runner

    make = runner or (lambda typed: onnxruntime_runner(rounded_in_float32(typed)))
    parts = block_parts(model.graph)
    blocks = [part for part in parts if part != AFTER_BLOCKS]
    if not blocks:
        raise PassError(f"the graph has no value {block_output(1)}, so there are no blocks to tell apart")
    kept, anyway = tuple(keep_float32), set(blocks_float32)
    after = tuple(node.name for node in parts[AFTER_BLOCKS] if node.name)
    runs = 0

    def compare(float32: Iterable[int]) -> ParityReport:
        nonlocal runs
        runs += 1
        wanted = set(float32) | anyway
        names = (*kept, *after) if AFTER_BLOCKS in wanted else kept
        typed, _ = cast_precision(
            model, precision, keep_float32=names, blocks_float32=wanted - {AFTER_BLOCKS}
        )
        return check_parity(reference, make(lower(typed)), cases, tolerance)

    candidates = [part for part in ([*blocks, AFTER_BLOCKS] if after else blocks) if part not in anyway]
    with progress.step("flipping casts block by block", len(candidates) + 1) as advance:
        as_it_is = compare(())
        advance(1)
        if as_it_is.passed:
            return LocaliseReport(precision, True, error=as_it_is.worst, remaining=as_it_is.worst)
        alone = {}
        for part in candidates:
            report = compare([part])
            alone[part] = (report.passed, report.worst)
            advance(1)
    mending = [part for part, (passed, _) in alone.items() if passed]
    if mending:
        best = min(mending, key=lambda part: alone[part][1])
        return LocaliseReport(precision, False, alone, (best,), as_it_is.worst, alone[best][1], runs)
    restoring, left = _smallest_set(compare, candidates, alone, progress)
    return LocaliseReport(precision, False, alone, restoring, as_it_is.worst, left, runs)


def _smallest_set(
    compare: Callable[[Iterable[int]], ParityReport],
    candidates: list[int],
    alone: Mapping[int, tuple[bool, float]],
    progress: Progress,
) -> tuple[tuple[int, ...] | None, float]:
    """Blocks that together restore the model, none of which can be left out, and the error that is left.

    Starts from all and drops blocks, those first that helped least alone; first in halves, then one by one.
    """
    everything = compare(candidates)
    if not everything.passed:
        return None, everything.worst
    kept, left = list(candidates), everything.worst
    order = sorted(candidates, key=lambda part: -alone[part][1])
    size = max(1, len(order) // 2)
    with progress.step("finding the smallest set of blocks") as advance:
        while order:
            chunk, rest = order[:size], order[size:]
            fewer = [part for part in kept if part not in chunk]
            report = compare(fewer) if fewer else None
            advance(1)
            if report is not None and report.passed:
                kept, left, order = fewer, report.worst, rest
            elif size > 1:
                size //= 2
            else:
                order = rest
            size = max(1, min(size, len(order)))
    return tuple(kept), left


def _plain(value: float) -> float | None:
    return value if np.isfinite(value) else None
