"""The sections that the PyTorch model fills: activation maps and effective receptive fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quartermap_deploy.bundle import describe_file
from quartermap_deploy.data.images import restored
from quartermap_deploy.errors import BundleError, CheckpointError, QuartermapError
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.report.markup import Html, element
from quartermap_deploy.report.parts import Figure, Heading, Note, Part, Section, Table
from quartermap_deploy.report.pictures import heat_colours, heat_scale, picture
from quartermap_deploy.report.receptive import SHARES

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle
    from quartermap_deploy.data.preprocessing import Preprocessing
    from quartermap_deploy.recipe import Recipe
    from quartermap_deploy.report.activations import BlockActivations
    from quartermap_deploy.report.receptive import ReceptiveField
    from quartermap_deploy.sources.architectures import ArchitectureSource

MOST_IMAGES = 16
"""Over how many images a receptive field is averaged at most."""
MOST_BLOCKS = 6
"""Of how many pruned blocks the activation maps are shown at most."""

ACTIVATIONS, FIELDS = "Activation maps of pruned blocks", "Effective receptive fields"


def map_sections(
    bundles: Mapping[str, Bundle],
    checkpoints: Sequence[Path] = (),
    images: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[Section, Section]:
    """Return the activation maps and the receptive fields of all bundles.

    Where a bundle's model cannot be built here, or is not what the bundle holds, a note says why it is left out.

    Args:
        bundles: by their names in the report.
        checkpoints: files with weights, each for the bundles that were compiled from it.
        images: folder of images to compute on; None takes those that come with the package.
        progress: shows the steps.

    Raises:
        CheckpointError: if a checkpoint belongs to none of the bundles.
        InputError: if the folder has no images, or one of them cannot be read.
    """
    known = _by_hash(checkpoints, bundles)
    activations: list[Part] = []
    fields: list[Part] = []
    unpruned: dict[str, ReceptiveField] = {}
    shown: dict[str, str] = {}
    for name, bundle in bundles.items():
        heading = Heading(name)
        first = shown.setdefault(f"{_weights(bundle)} {bundle.manifest['plan']}", name)
        if first != name:
            same = Note(f"The same weights and plan as {first}, so the same maps.", reason=True)
            activations += [heading, same]
            fields += [heading, same]
            continue
        try:
            source = source_of(bundle, known, progress)
        except QuartermapError as error:
            reason = Note(f"Left out: {error}.", reason=True)
            activations += [heading, reason]
            fields += [heading, reason]
            continue
        recipe = bundle.recipe()
        pictures = _images(source, recipe, images)
        if recipe.quartermap is None:
            activations += [heading, Note("Nothing is pruned in this bundle.", reason=True)]
        else:
            activations += [heading, *_activation_parts(bundle, source, pictures[:1], progress)]
        fields += [heading, *_field_parts(bundle, source, pictures, unpruned, progress)]
    return (
        Section("activations", ACTIVATIONS, tuple(activations)),
        Section("fields", FIELDS, tuple(fields)),
    )


def _by_hash(checkpoints: Sequence[Path], bundles: Mapping[str, Bundle]) -> dict[str, Path]:
    """The checkpoints by the hash under which manifests know them."""
    from quartermap_deploy.weights import require_file

    wanted = {bundle.manifest["model"].get("weights_sha256") for bundle in bundles.values()}
    found = {}
    for path in checkpoints:
        require_file(path)
        digest = describe_file(path)["sha256"]
        if digest not in wanted:
            raise CheckpointError(
                f"none of the bundles was compiled from {path} (sha256 {digest[:12]}…); give the file that their "
                "manifests name, or leave it out"
            )
        found[digest] = path
    return found


def source_of(
    bundle: Bundle, checkpoints: Mapping[str, Path], progress: Progress = SILENT
) -> ArchitectureSource:
    """Build the PyTorch model of a bundle and make sure that it is the bundle's own.

    Args:
        bundle: the bundle.
        checkpoints: files with weights, by their hash.
        progress: shows the steps.

    Raises:
        BundleError: if it is of a module of the user's.
        CheckpointError: if the file that the bundle was compiled from is not there, or the model does not compute the
            outputs that the bundle keeps.
    """
    from quartermap_deploy.evaluation.runs import require_own
    from quartermap_deploy.revalidate import rebuild_torch
    from quartermap_deploy.sources.architectures import ArchitectureSource

    if bundle.manifest["model"].get("source") == "module":
        raise BundleError(
            "the bundle is of a module of the user's, and these pictures are made inside the blocks of models of cards"
        )
    recipe, path = bundle.recipe(), None
    if (weights := recipe.path("checkpoint")) is not None:
        path = checkpoints.get(str(bundle.manifest["model"].get("weights_sha256")))
        if path is None:
            raise CheckpointError(
                f"the bundle was compiled from the checkpoint {weights.name}, which is not in it; give the "
                "file with --checkpoint"
            )
    source = rebuild_torch(bundle, path, progress=progress)
    assert isinstance(source, ArchitectureSource)
    with progress.step("comparing it with what the bundle keeps"):
        require_own(bundle, source.reference(recipe.quartermap))
    return source


def _images(source: ArchitectureSource, recipe: Recipe, folder: Path | None) -> NDArray[np.float32]:
    """Different images, at most `MOST_IMAGES`."""
    from quartermap_deploy.compiling.cases import validation_cases

    cases = validation_cases(dataclasses.replace(recipe, images=folder), source, MOST_IMAGES)
    found: NDArray[np.float32] = cases["images"][source.inputs[0].name]
    different = {image.tobytes(): i for i, image in reversed(list(enumerate(found)))}
    return found[sorted(different.values())]


# Activation maps --------------------------------------------------------------------------------------------------


def _activation_parts(
    bundle: Bundle, source: ArchitectureSource, image: NDArray[np.float32], progress: Progress
) -> list[Part]:
    from quartermap_deploy.evaluation.runs import pruned
    from quartermap_deploy.report.activations import block_activations

    with progress.step("activation maps"):
        found = block_activations(pruned(source, bundle.recipe().quartermap), image)
    every = -(-len(found) // MOST_BLOCKS)
    shown = found[::every]
    some = f" {len(shown)} of {len(found)} pruned blocks are shown." if len(shown) < len(found) else ""
    caption = (
        "What a pruned block makes of the image: the map that goes into its scan, the positions that are kept, what "
        "the scan returns for them, the same filled up again, and, for comparison, what the scan would return for the "
        "full map. Colours are the mean size of the values over the channels, from the smallest to the largest of a "
        "block: one scale for what goes into the scan, and one for what comes out." + some
    )
    prepared = source.image_preprocessing(source.inputs[0])
    rows = [_image_row(image[0], prepared), *(_activation_row(entry) for entry in shown)]
    content = element("div", {"class": "maps"}, *rows, heat_scale("smallest", "largest"))
    table = Table(
        "how far the restored map is from that of a full scan, after the normalisation that follows both: norm of the "
        "difference, as a share of the norm",
        ("block", "stage", "map", "scanned", ">difference"),
        tuple(
            (
                entry.block,
                entry.stage,
                _size(entry.before),
                _size(entry.kept),
                f"{entry.difference:.2f}",
            )
            for entry in found
        ),
        folded=len(found) > 8,
    )
    return [*_untrained(bundle), Figure(caption, content), table]


def _activation_row(entry: BlockActivations) -> Html:
    into = {"into the scan": entry.before, "kept": entry.kept}
    out_of = {"out of the scan": entry.scanned, "restored": entry.restored, "a full scan": entry.whole}
    title = element("p", {"class": "row-title"}, f"Block {entry.block}, stage {entry.stage}")
    cells = [
        _cell(_heat(values, _range(*maps.values()), f"block {entry.block}, {name}"), name, _size(values))
        for maps in (into, out_of)
        for name, values in maps.items()
    ]
    return element("div", {"class": "row"}, title, element("div", {"class": "cells"}, *cells))


def _range(*maps: NDArray[Any]) -> tuple[float, float]:
    return min(float(values.min()) for values in maps), max(float(values.max()) for values in maps)


def _image_row(image: NDArray[np.float32], preprocessing: Preprocessing) -> Html:
    pixels = np.asarray(restored(image, preprocessing).convert("RGB"))
    drawn = picture(pixels, "the image as the model sees it", sharp=False)
    title = element("p", {"class": "row-title"}, "Image")
    cell = _cell(drawn, "as the model sees it", _size(pixels))
    return element("div", {"class": "row"}, title, element("div", {"class": "cells"}, cell))


def _heat(values: NDArray[Any], limits: tuple[float, float], name: str) -> Html:
    low, high = _range(values)
    description = f"{name}: {_size(values)} positions, from {low:.3g} to {high:.3g}"
    return picture(heat_colours(values, *limits), description)


def _cell(drawn: Html, name: str, size: str) -> Html:
    return element(
        "figure",
        {"class": "cell"},
        drawn,
        element("figcaption", None, name, " ", element("span", {"class": "quiet-text"}, size)),
    )


# Receptive fields -------------------------------------------------------------------------------------------------


def _field_parts(
    bundle: Bundle,
    source: ArchitectureSource,
    images: NDArray[np.float32],
    known: dict[str, ReceptiveField],
    progress: Progress,
) -> list[Part]:
    """The fields without and with the plan; that without is kept in `known` for other bundles of the same weights."""
    from quartermap_deploy.evaluation.runs import pruned
    from quartermap_deploy.report.receptive import receptive_field

    plan, key = bundle.recipe().quartermap, _weights(bundle)
    if key not in known:
        known[key] = receptive_field(source.module, images, progress)
    fields = {"without pruning": known[key]}
    if plan is not None:
        fields["with QuarterMap"] = receptive_field(pruned(source, plan), images, progress)
    highest = max(float(field.field.max()) for field in fields.values())
    cells = [
        _cell(_field_picture(field, highest, name), name, _size(field.field))
        for name, field in fields.items()
    ]
    content = element(
        "div",
        {"class": "maps fields"},
        element("div", {"class": "cells"}, *cells),
        heat_scale("a hundredth of the largest, or less", "largest"),
    )
    first = known[key]
    caption = (
        "On which pixels the middle of the last feature map depends (Luo et al. 2016): the size of its "
        f"gradient with respect to the input, mean over {first.images} image{'s' if first.images > 1 else ''}. Colours "
        "are logarithmic. The ring marks the middle of the image."
    )
    table = Table(
        "reach: side of the smallest square around the middle that holds a share of the whole gradient, in pixels",
        ("model", *(f">{share:.0%}" for share in SHARES)),
        tuple((name, *(field.reach(share) for share in SHARES)) for name, field in fields.items()),
    )
    return [*_untrained(bundle), Figure(caption, content), table]


def _weights(bundle: Bundle) -> str:
    """What tells the unpruned PyTorch models of two bundles, and the images that they are shown, apart."""
    manifest, recipe = bundle.manifest, bundle.recipe()
    parts = [
        manifest["model"].get(name) for name in ("name", "source", "weights", "weights_sha256", "num_classes")
    ]
    return str([*parts, manifest["task"], manifest["inputs"], manifest["preprocessing"], recipe.seed])


def _field_picture(field: ReceptiveField, highest: float, name: str) -> Html:
    values = np.log10(np.maximum(field.field, highest * 1e-2))
    reaches = ", ".join(f"{share:.0%} within {field.reach(share)} pixels" for share in SHARES)
    description = f"receptive field {name}: {reaches}"
    drawn = picture(heat_colours(values, np.log10(highest) - 2, np.log10(highest)), description)
    spot = element("span", {"class": "spot"})
    return element("span", {"class": "spotted"}, drawn, spot)


def _untrained(bundle: Bundle) -> list[Part]:
    if bundle.manifest["model"]["weights"] != "new":
        return []
    return [
        Note("The weights are newly initialised: this shows the architecture, not what training makes of it.")
    ]


def _size(values: NDArray[Any]) -> str:
    return f"{values.shape[0]}x{values.shape[1]}"
