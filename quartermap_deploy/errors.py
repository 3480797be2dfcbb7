"""The errors this package raises on purpose.

Every message says what was found, what was expected and how to put it right. The command line prints the message alone
and exits with code 2; anything that is not a `QuartermapError` is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuartermapError(Exception):
    """Base of all errors that the user can put right."""


class UnknownNameError(QuartermapError):
    """A model, target or other name that does not exist."""

    @classmethod
    def for_choice(cls, kind: str, name: str, choices: Iterable[str]) -> UnknownNameError:
        """Build the error with the nearest valid names first, or all of them when none is near."""
        available = sorted(choices)
        name = name if isinstance(name, str) else repr(name)
        closest = max(
            (difflib.SequenceMatcher(None, choice, name).ratio() for choice in available), default=0.0
        )
        # Names much further off than the nearest one would only be noise beside it.
        near = difflib.get_close_matches(name, available, n=3, cutoff=max(0.6, closest - 0.1))
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Available: {', '.join(available)}."
        return cls(f"unknown {kind} {name!r}. {hint}")


class RecipeError(QuartermapError):
    """A recipe file that cannot be read, or whose keys or values are wrong."""


class CheckpointError(QuartermapError):
    """Weights that are missing, damaged, unsafe to load, or of another model."""


class PlanError(QuartermapError):
    """A QuarterMap plan that does not fit the model."""


class GoalError(QuartermapError):
    """A budget or a speed-up that no plan reaches; the message names the best that was found."""


class InputError(QuartermapError):
    """An image, array or input size that the model cannot take."""


class WriteError(QuartermapError, OSError):
    """A file that cannot be written; made of an error number, what it means, and the file, as every OSError."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}; choose another place, or see to this one"


class ExportError(QuartermapError):
    """A model that could not be turned into ONNX."""


class UnsupportedScanError(ExportError):
    """A selective scan, or a part of one, that the operator cannot express; the message names it."""


class PassError(QuartermapError):
    """A graph pass that did not find what the plan names, or met a graph it must refuse."""


class BundleError(QuartermapError):
    """A bundle that is missing, damaged, or in the way of a new one."""


class TrustError(QuartermapError):
    """A library, a folder or a bundle that is not trusted enough for what it was to be used for."""


class ParityError(QuartermapError):
    """A target whose outputs depart from the reference by more than the tolerance."""


class MissingDependencyError(QuartermapError):
    """An optional package is needed; the message holds the pip command that brings it."""

    @classmethod
    def for_extra(
        cls, purpose: str, package: str | None, extra: str, instead: str = ""
    ) -> MissingDependencyError:
        """Build the error for a package that one of our extras brings.

        Args:
            purpose: what needs it, with its verb.
            package: the package that is missing.
            extra: the extra.
            instead: what else helps, from its "or" on.
        """
        return cls(
            f"{purpose} {package}, which is not installed: run pip install 'quartermap-deploy[{extra}]'{instead}"
        )


class EngineError(QuartermapError):
    """An engine that could not be built, or is not what the graph says."""


class PredictionError(QuartermapError):
    """Predictions that cannot be written where they were asked for."""


class ReportError(QuartermapError):
    """A report that cannot be made or written, or results that are none of this package's commands."""


class DeployError(QuartermapError):
    """A bundle that cannot go out in the way that was asked for, or something in the way of what is written."""


class ServeError(QuartermapError):
    """A server that cannot be started as it was asked to, or that could not end in time."""
