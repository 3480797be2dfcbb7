"""Parity: does a target compute what PyTorch computes, at every scan, at every block and on every case?"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.frontend.node_names import names_scan
from quartermap_deploy.validation.comparison import OutputComparison, block_of, relative_to_largest
from quartermap_deploy.validation.tolerances import Tolerance

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner


@dataclass(frozen=True)
class ParityReport:
    """The outcome of a parity check.

    Attributes:
        reference: what was compared with.
        target: what was checked.
        tolerance: what counts as equal.
        cases: for each case, the comparison of each output, in the order of the network.
        paths: module paths of the blocks, for messages.
    """

    reference: str
    target: str
    tolerance: Tolerance
    cases: Mapping[str, Sequence[OutputComparison]]
    paths: Mapping[int, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every output of every case is within the tolerance; no cases, and no outputs, prove nothing."""
        return bool(self.cases) and all(
            bool(outputs) and all(output.passed for output in outputs) for outputs in self.cases.values()
        )

    @property
    def worst(self) -> float:
        """The largest relative error; infinite where nothing was compared."""
        errors = [output.relative_error for outputs in self.cases.values() for output in outputs]
        return max(errors, default=np.inf)

    @property
    def first_departing_block(self) -> int | None:
        """The first block of the network whose scan or output departs in any case."""
        departing = [
            block
            for outputs in self.cases.values()
            for output in outputs
            if not output.passed and (block := block_of(output.name)) is not None
        ]
        return min(departing, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "passed": self.passed,
            "reference": self.reference,
            "target": self.target,
            "tolerance": self.tolerance.to_dict(),
            "worst_relative_error": self.worst if np.isfinite(self.worst) else None,
            "first_departing_block": self.first_departing_block,
            "cases": [
                {"name": name, "outputs": [output.to_dict() for output in outputs]}
                for name, outputs in self.cases.items()
            ],
        }

    def describe_failure(self) -> str:
        """One sentence: where and by how much the target departs."""
        failures = [
            (name, output) for name, outputs in self.cases.items() for output in outputs if not output.passed
        ]
        if not failures:
            return "every output is within the tolerance"
        block = self.first_departing_block
        own = [(c, o) for c, o in failures if block_of(o.name) == block]
        if block is None:
            case, output = own[0]
            judged = any(block_of(o.name) is not None for outputs in self.cases.values() for o in outputs)
            # Where blocks were judged and are right, rounding errors have grown on their way through the network.
            where = f"{output.name} departs" + (", though no block does by itself" if judged else "")
        else:
            # A scan that departs takes its block's output along, so it tells more.
            case, output = next(((c, o) for c, o in own if names_scan(o.name)), own[0])
            place = "in or before its scan" if names_scan(output.name) else "behind its scan"
            path = f" ({self.paths[block]})" if self.paths.get(block) else ""
            where = f"block {block}{path} is the first that departs, {place}"
        count = sum(len(outputs) for outputs in self.cases.values())
        return (
            f"{self.target} departs from {self.reference} in {len(failures)} of {count} outputs; {where}, on case "
            f"{case!r}: {output.detail}"
        )


def check_parity(
    reference: BaseRunner,
    target: BaseRunner,
    cases: Mapping[str, Mapping[str, NDArray[Any]]],
    tolerance: Tolerance,
    paths: Mapping[int, str] | None = None,
) -> ParityReport:
    """Run two polygraphy runners over the cases and compare their outputs through polygraphy's Comparator.

    Args:
        reference: the runner that is right by definition. A `TorchRunner` follows the target, so that every block is
            judged by itself: given its input, does it return the right thing?
        target: the runner to check; it must have every output of the reference.
        cases: for each case, by its name, an array for each input.
        tolerance: what counts as equal.
        paths: module paths of the blocks, for messages.
    """
    from polygraphy.comparator import Comparator

    from quartermap_deploy.validation.runners import TorchRunner

    feeds = [dict(case) for case in cases.values()]
    # Polygraphy takes the mean of what it compares, NaN or not.
    with quiet_polygraphy(), np.errstate(invalid="ignore"):
        found = Comparator.run([target], data_loader=feeds)
        if isinstance(reference, TorchRunner):
            reference.follow([dict(outputs.items()) for outputs in found[target.name]])
        results = Comparator.run([reference], data_loader=feeds)
        results.extend(found)
        accuracy = Comparator.compare_accuracy(results, compare_func=relative_to_largest(tolerance))
    # One result per compare function since polygraphy 0.50, the one result itself before.
    by_pair = accuracy if hasattr(accuracy, "items") else accuracy[0]
    ((_, iterations),) = by_pair.items()
    return ParityReport(
        reference=reference.name,
        target=target.name,
        tolerance=tolerance,
        cases={name: list(result.values()) for name, result in zip(cases, iterations, strict=True)},
        paths=paths or {},
    )


@contextlib.contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep polygraphy's own log out of ours, what it finds is in the report; and keep it from importing torch.

    It asks of every array whether it is one of torch, and imports that for the question, which takes seconds.
    """
    from polygraphy.logger import G_LOGGER

    absent = "torch" not in sys.modules
    if absent:
        # So it cannot be imported.
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        # Above CRITICAL, because polygraphy also prints what it raises.
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            yield
    finally:
        if absent:
            del sys.modules["torch"]
