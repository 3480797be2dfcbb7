"""What a site knows of a bundle: how images become its input, what comes out, and what is proved of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.batch_axis import batch_of
from quartermap_deploy.classes import Activation, activation_of, class_labels
from quartermap_deploy.errors import BundleError, DeployError, InputError
from quartermap_deploy.image_interface import ImageInterface, image_interface, no_image_model
from quartermap_deploy.onnx_bounds import check_model
from quartermap_deploy.passes.store_weights import Storage, store_weights
from quartermap_deploy.pictures import Shows, palette, what_it_shows
from quartermap_deploy.predicting import mask_labels
from quartermap_deploy.tables.words import (
    error_text,
    plan_text,
    preprocessing_text,
    ranges,
    size_text,
    task_text,
    tensor_text,
    weights_text,
    worst_error,
)
from quartermap_deploy.validation.tolerances import STORED

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle

LARGEST_GOLDEN = 4 << 20
"""Numbers of golden outputs that lie beside a page; with more, only the input does, and nothing is compared there."""


@dataclass(frozen=True)
class Golden:
    """A golden input for one image, and what PyTorch computes for it.

    Attributes:
        data: the input and the outputs, one after the other, as float32.
        shapes: {"input": shape, "outputs": {name: shape}}.
    """

    data: bytes
    shapes: dict[str, Any]


def golden_of(bundle: Bundle) -> Golden:
    """Return the first image of a bundle's golden cases.

    Raises:
        BundleError: if there is none.
    """
    from quartermap_deploy.validation.golden import read_golden

    inputs, outputs = read_golden(bundle.path, bundle.manifest["golden"])
    if not inputs:
        raise BundleError(f"the bundle {bundle.path} has no golden inputs; compile it again")
    case = "images" if "images" in inputs else next(iter(inputs))
    expected = outputs[list(inputs).index(case)]
    given = inputs[case][bundle.inputs[0].name][:1]
    arrays = {name: np.asarray(values)[:1] for name, values in expected.items()}
    if sum(values.size for values in arrays.values()) > LARGEST_GOLDEN:
        arrays = {}
    parts: list[NDArray[Any]] = [given, *arrays.values()]
    return Golden(
        b"".join(part.astype("<f4").tobytes() for part in parts),
        {"input": list(given.shape), "outputs": {name: list(part.shape) for name, part in arrays.items()}},
    )


@dataclass(frozen=True)
class SiteFacts:
    """What a site knows of a bundle.

    Attributes:
        bundle: the bundle.
        interface: how images become its input.
        shows: what visitors see of its outputs.
        activation: what makes probabilities of the first output.
        labels: names of the classes, or of the numbers in a mask.
    """

    bundle: Bundle
    interface: ImageInterface
    shows: Shows
    activation: Activation
    labels: tuple[str, ...]

    def write_model(self, path: Path, storage: Storage) -> float:
        """Write the model with its weights stored in some type, and prove it on the bundle's golden inputs.

        Returns:
            The worst error, as a share of the largest value.

        Raises:
            BundleError: if the model cannot be read, or ONNX Runtime refuses it.
            DeployError: if it departs from the golden outputs by more than the tolerance.
        """
        import onnx

        check_model(self.bundle.model_path)
        try:
            model = onnx.load(self.bundle.model_path, load_external_data=False)
        except Exception as error:  # protobuf has several kinds
            raise BundleError(
                f"{self.bundle.model_path} is no valid ONNX model ({str(error)[:200]}); compile it again"
            ) from error
        path.write_bytes(store_weights(model, storage).SerializeToString())
        return self._prove(path, storage)

    def _prove(self, path: Path, storage: Storage) -> float:
        from quartermap_deploy.targets.onnxruntime.session import OnnxRuntimeSession
        from quartermap_deploy.validation.golden import golden_runner, read_golden
        from quartermap_deploy.validation.parity import check_parity
        from quartermap_deploy.validation.runners import SessionRunner

        inputs, outputs = read_golden(self.bundle.path, self.bundle.manifest["golden"])
        # As in a browser: without an operator of ours.
        session = OnnxRuntimeSession(path, rules=self.bundle.manifest["size_rules"], native=False)
        tolerance = STORED[storage]
        if self.bundle.manifest["recipe"]["precision"] != "float32":
            # What the bundle's own 16 bits cost comes on top, and they have the same tolerance.
            tolerance = max(tolerance, STORED["float16"], key=lambda entry: entry.relative)
        runner = SessionRunner(session, f"the model with weights in {storage}")
        report = check_parity(golden_runner(outputs), runner, inputs, tolerance)
        if not report.passed:
            better = {"int8": "--weights float16", "float16": "--weights float32"}.get(storage)
            hint = "compile the bundle again" if better is None else f"take {better}"
            raise DeployError(f"{report.describe_failure()}; {hint}")
        return float(report.worst)

    def values(self, stored: Mapping[str, Any], runtime: str) -> dict[str, Any]:
        """Return what `facts.json` holds of the bundle; the page and its worker say how it is read."""
        from PIL import __version__ as pillow

        manifest = self.bundle.manifest
        first = self.bundle.outputs[0]
        pruned = [block["index"] for block in manifest["blocks"] if block["pruned"]]
        preprocessing = self.interface.preprocessing
        return {
            "name": manifest["model"]["name"],
            "title": manifest["model"]["title"],
            "subtitle": f"{task_text(manifest)}; {len(manifest['blocks'])} blocks, "
            + (f"QuarterMap prunes {len(pruned)} of them" if pruned else "none of them pruned"),
            "input": self.interface.item.name,
            "first_output": first.name,
            "shows": self.shows,
            "activation": self.activation,
            "labels": list(self.labels),
            "palette": palette().tolist() if self.shows == "mask" else [],
            # In its two orders of resizing, results differ by a level in some pixels.
            "preprocessing": {**preprocessing.to_dict(), "pillow": int(pillow.partition(".")[0])},
            "parity": self._parity(stored),
            "provenance": self._provenance(runtime, ranges(pruned)),
        }

    def _parity(self, stored: Mapping[str, Any]) -> list[tuple[str, str]]:
        report = self.bundle.report
        tolerance, cases = report["tolerance"], report["cases"]
        checks = sum(len(case["outputs"]) for case in cases)
        kept = (
            "as they are" if stored["as"] == "float32" else f"stored as {stored['as']}, computed in float32"
        )
        return [
            (
                "the bundle",
                f"{'passed' if report['passed'] else 'FAILED'}: {checks} outputs in {len(cases)} cases against PyTorch"
                f", worst error {error_text(worst_error(report))} of the largest value, tolerance "
                f"{tolerance['relative']:.0e} ({tolerance['element_type']})",
            ),
            (
                "this site's weights",
                f"{kept}: error {error_text(stored['error'])} on the golden inputs when the site was written, "
                f"tolerance {stored['tolerance']:.0e}",
            ),
        ]

    def _provenance(self, runtime: str, pruned: str) -> list[tuple[str, str]]:
        manifest = self.bundle.manifest
        model, versions = manifest["model"], manifest["versions"]
        plan = plan_text(manifest["plan"])
        rows = {
            "model": f"{model['name']}, {model['parameters']:,} parameters",
            "weights": weights_text(model),
            "weights, SHA-256": model.get("weights_sha256"),
            "input": tensor_text(manifest["inputs"][0]),
            "images": preprocessing_text(self.interface.preprocessing),
            "pruned": f"blocks {pruned} of {len(manifest['blocks'])}; {plan}" if pruned else "nothing",
            "map": ", ".join(dict.fromkeys(size_text(block["map_size"]) for block in manifest["blocks"])),
            "compiled": manifest["created"],
            "with": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "bundle's model, SHA-256": manifest["files"]["model.onnx"]["sha256"],
            "runs by": f"onnxruntime-web {runtime}",
        }
        return [(name, str(value)) for name, value in rows.items() if value]


def site_facts(
    bundle: Bundle, labels: str | Path | None = None, preprocessing: Mapping[str, Any] | None = None
) -> SiteFacts:
    """Find out what a site needs to know of a bundle.

    Raises:
        DeployError: if browsers cannot run it on single images of float32.
        InputError: if it takes no images, or the labels or the preprocessing do not fit.
    """
    precision = bundle.manifest["recipe"]["precision"]
    if precision == "bfloat16":
        raise DeployError(
            f"the bundle {bundle.path} computes in bfloat16, for which browsers have nothing; compile it with "
            'precision = "float32"'
        )
    if (reason := no_image_model(bundle)) is not None or batch_of(bundle) is None:
        raise InputError(
            f"a site shows what a model makes of one image, and {bundle.path} does not: {reason}"
        )
    interface = image_interface(bundle, preprocessing)
    other = [
        item for item in (*bundle.inputs, *bundle.outputs) if item.type not in ("float32", "int64", "bool")
    ]
    if interface.item.type != "float32" or other:
        found = interface.item if interface.item.type != "float32" else other[0]
        raise DeployError(
            f"{found.name} of {bundle.path} is of {found.type}; a site works with float32, so compile it with "
            'io = "float32"'
        )
    shows = what_it_shows(bundle, interface.preprocessing)
    names = class_labels(bundle, labels)
    if shows == "mask" and isinstance(classes := bundle.outputs[0].shape[1], int):
        names = mask_labels(names, classes)
    activation = activation_of(bundle) if shows in ("classes", "mask") else "none"
    return SiteFacts(bundle, interface, shows, activation, names)
