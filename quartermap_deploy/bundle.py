"""Bundles: the folder that compiling leaves behind, its manifest, and running it.

    model.onnx            the portable model
    inputs.json           inputs for a check without PyTorch, in polygraphy's format
    golden_outputs.json   what PyTorch computes for them, in float64
    report.json           parity of every output and every block
    manifest.json         recipe, versions, block map, and the hash of every other file
    manifest.sig          signatures of the manifest, if somebody signed it

Loading and running a bundle needs NumPy and its target's runtime, not torch.
"""

from __future__ import annotations

import functools
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from quartermap_deploy.bundle_schema import check_manifest, check_report
from quartermap_deploy.data.preprocessing import Preprocessing
from quartermap_deploy.errors import BundleError, InputError, QuartermapError, UnknownNameError
from quartermap_deploy.files import FolderKind, file_hash
from quartermap_deploy.onnx_bounds import check_model
from quartermap_deploy.plain_text import command, encoded, printable
from quartermap_deploy.progress import SILENT, Progress
from quartermap_deploy.reading import LARGEST_JSON, ReadingError, parse_json, read_bytes
from quartermap_deploy.signatures import SIGNATURES, check_signatures
from quartermap_deploy.size_rules import SizeRules
from quartermap_deploy.targets import DEFAULT, ENGINE_TARGETS, Session, open_session
from quartermap_deploy.targets.execution import ON_CPU, Execution, Where
from quartermap_deploy.tensor_info import TensorInfo

if TYPE_CHECKING:
    import onnx

    from quartermap_deploy.data.images import ImageLike
    from quartermap_deploy.predicting import Predictions
    from quartermap_deploy.recipe import Recipe

FORMAT = 2
MANIFEST, MODEL, REPORT = "manifest.json", "model.onnx", "report.json"
ENGINE_SUFFIX = ".engine"
MOST_VALUES = 200_000
"""Values in a manifest or a report, as comparing a million with a schema takes minutes. With names for 20,000 classes
there are 25,000."""
_FOLDER = FolderKind("bundle", MANIFEST, BundleError)
_MEND = "the bundle was altered or damaged; compile it again"


@dataclass(frozen=True)
class Bundle:
    """A compiled model on disk.

    Attributes:
        path: its folder.
        manifest: what `manifest.json` holds.
        report: what `report.json` holds.
        changed: a file that runs in the place of its model, as another tool changed it; None of a bundle as it is. See
            `load_like`, which also says what of the manifest is then the file's.
    """

    path: Path
    manifest: dict[str, Any] = field(repr=False)
    report: dict[str, Any] = field(repr=False)
    changed: Path | None = field(default=None, repr=False)

    @property
    def model_path(self) -> Path:
        """The portable ONNX model."""
        return self.path / MODEL if self.changed is None else self.changed

    @property
    def name(self) -> str:
        """What results call it: its folder's name, or that of the file in the place of its model."""
        path = self.path if self.changed is None else self.changed
        return path.name or str(path)

    def __str__(self) -> str:
        return f"the bundle {self.path}" if self.changed is None else f"the file {self.changed}"

    @property
    def default_target(self) -> str:
        """The target that `run` takes when none is named."""
        targets = list(self.manifest["targets"])
        return DEFAULT if DEFAULT in targets else targets[0]

    def session(
        self,
        target: str | None = None,
        *,
        plugin: Path | None = None,
        native: bool | None = None,
        execution: Where = ON_CPU,
    ) -> Session:
        """Return a session that is ready to run; the same one at every call.

        Args:
            target: one of the targets the bundle was built for; None for the default.
            plugin: the plugin library, for an engine that needs it; None looks for it.
            native: for `onnxruntime`, whether the native operator computes the scans: None where it is there and takes
                the model, False never, True or not at all.
            execution: for `onnxruntime`, the providers that run it, whatever the bundle was proved on; a device, a
                provider, or a list of providers does as well.

        Raises:
            UnknownNameError: if the bundle was not built for the target, or there is no such device or provider.
            InputError: if a native operator, or a provider, is asked for, or refused, for an engine, which has none.
            MissingDependencyError: if a provider is not in the package of ONNX Runtime that is installed.
            BundleError: if the target's runtime refuses it, or a provider cannot start.
        """
        name = self.target(target)
        if native is not None and name in ENGINE_TARGETS:
            raise InputError(f"an engine of {name} has no native operator for CPUs; leave native out")
        return _session(self, name, plugin, native, Execution.read(execution))

    def target(self, name: str | None) -> str:
        """Return the name of a target that the bundle was built for; of its default for None.

        Raises:
            UnknownNameError: if it was not built for it.
        """
        name = name or self.default_target
        entries = self.manifest["targets"]
        if name in entries:
            return name
        if self.changed is not None:
            raise UnknownNameError(
                f"{self} runs by the target {DEFAULT} alone, found the target {printable(name)}; leave it out"
            )
        if name in ENGINE_TARGETS:
            raise UnknownNameError(
                f"the bundle {self.path} has no engine for {name}, it has {', '.join(entries)}; build one with "
                f"`{command('quartermap', 'rebuild', self.path, '--target', name)}`"
            )
        raise UnknownNameError.for_choice(f"target of {self.path.name}", name, entries)

    def entry(self, target: str) -> dict[str, Any]:
        """What a target opens the bundle by: its entry in the manifest, and what the sizes of inputs must fulfil."""
        entry = {**self.manifest["targets"][target], "size_rules": self.manifest["size_rules"]}
        # Targets look for it in the bundle, and a whole path leads to itself from there.
        return entry if self.changed is None else {**entry, "file": str(self.changed.absolute())}

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """What the model takes."""
        return tuple(TensorInfo.from_dict(values) for values in self.manifest["inputs"])

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """What the model gives."""
        return tuple(TensorInfo.from_dict(values) for values in self.manifest["outputs"])

    @property
    def task(self) -> str:
        """What its outputs are: "classification", "segmentation", "features", "image" or "other"."""
        return str(self.manifest["task"])

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; nothing where nobody gave any."""
        return tuple(self.manifest["labels"])

    @property
    def num_classes(self) -> int | None:
        """How many classes the model tells apart; None where it tells none."""
        count = self.manifest["model"].get("num_classes")
        return None if count is None else int(count)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How an image becomes an input; None where nobody said."""
        values = self.manifest["preprocessing"]
        return None if values is None else Preprocessing.from_dict(values)

    def run(
        self, inputs: NDArray[Any] | Mapping[str, NDArray[Any]], target: str | None = None
    ) -> NDArray[Any] | dict[str, NDArray[Any]]:
        """Run the model.

        Args:
            inputs: for a model of one input, an array, (batch, …), prepared as `preprocessing` says; else an array for
                each input, by name. Types and shapes are checked at every call, values are not, for speed: NaN or
                infinite ones give outputs that mean nothing.
            target: one of the targets the bundle was built for; None for the default.

        Returns:
            For one array, the only output, such as logits (batch, num_classes); otherwise every output by name.

        Raises:
            InputError: if the inputs do not fit the model.
            UnknownNameError: if the bundle was not built for the target.
        """
        session = self.session(target)
        if isinstance(inputs, Mapping):
            return session.infer(inputs)
        if len(session.outputs) > 1 and len(session.inputs) == 1:
            return session.infer({session.inputs[0].name: inputs})
        return session.run(inputs)

    def predict(
        self,
        files: ImageLike | Iterable[ImageLike],
        *,
        top: int = 5,
        batch: int | None = None,
        target: str | None = None,
        execution: Where = ON_CPU,
        preprocessing: Mapping[str, Any] | None = None,
        labels: str | os.PathLike[str] | Sequence[str] | None = None,
        progress: Progress = SILENT,
    ) -> Predictions:
        """Run the model on image files, and say what comes out by its task.

        `Classes` with probabilities for classification, `Mask`s for segmentation, `Picture`s for image, and `Arrays`
        for every other task; see `predicting`.

        Args:
            files: files, folders of files, arrays (H, W), (H, W, 3) or (H, W, 4) of uint8 or Pillow images, or one.
            top: how many classes of each image, the most probable ones.
            batch: images at once; None takes 8, or what the graph or the engine takes.
            target: one of the targets the bundle was built for; None for the default.
            execution: for `onnxruntime`, the providers that run it, as for `session`.
            preprocessing: values of the bundle's preprocessing to replace, by name, such as {"mean": [0.5, 0.5, 0.5]}.
            labels: names of the classes in the place of the bundle's: a list, a file with one on each line, or the name
                of a set that comes with this package.
            progress: told how many images are done.

        Returns:
            A sequence with a prediction for each image, in their order. Images that cannot be read are left out and
            named in its `broken`.

        Raises:
            InputError: if no image can be read, if the model has several inputs or none for images, if nobody said how
                an image becomes its input, or if an argument does not fit it.
            UnknownNameError: if the bundle was not built for the target.
        """
        from quartermap_deploy import predicting

        return predicting.predict(
            self,
            files,
            top=top,
            batch=batch,
            target=target,
            execution=Execution.read(execution),
            preprocessing=preprocessing,
            labels=labels,
            progress=progress,
        )

    def check_graph(self) -> None:
        """Check that the portable model is valid ONNX with the operators that the manifest lists; nothing is run.

        A hash alone proves little: who replaces the model can write its hash into the manifest.

        Raises:
            BundleError: if it is not.
        """
        import onnx

        check_model(self.model_path)
        try:
            model = onnx.load(self.model_path, load_external_data=False)
            onnx.checker.check_model(model)
        except Exception as error:  # protobuf and onnx.checker have several kinds
            reason = " ".join(str(error).split())[:400]
            raise BundleError(f"{self.model_path} is no valid ONNX model ({reason}); {_MEND}") from error
        found, listed = operators(model), self.manifest["graph"]
        if any(found[key] != listed.get(key) for key in found):
            counts, others = (entry.get("operators") or {} for entry in (found, listed))
            differing = [
                f"{counts.get(name, 0)} {name} instead of {others.get(name, 0)}"
                for name in sorted({*counts, *others})
                if counts.get(name, 0) != others.get(name, 0)
            ]
            raise BundleError(
                f"{self.model_path} has {found['nodes']} nodes, its manifest lists {listed.get('nodes')} "
                f"({', '.join(differing[:3]) or 'the same operators'}); {_MEND}"
            )

    def recipe(self) -> Recipe:
        """The recipe that the bundle was compiled from; its paths are file names only."""
        from quartermap_deploy.pruning.plan import QuarterMap
        from quartermap_deploy.recipe import Recipe
        from quartermap_deploy.sources.factories import UserModule
        from quartermap_deploy.targets.tensorrt.options import EngineOptions

        values = dict(self.manifest["recipe"])
        plan = values["quartermap"]
        values["quartermap"] = None if plan is None else QuarterMap.from_dict(plan)
        values["targets"] = tuple(values["targets"])
        for name in ("keep_float32", "blocks_float32"):
            values[name] = tuple(values.get(name, ()))
        # The manifest has the names of the classes themselves.
        values["labels"] = self.labels or None
        if (module := values.get("module")) is not None:
            module = UserModule.from_dict(module, named_by=self.path)
        values["module"] = module
        values["engine"] = EngineOptions.from_dict(values.get("engine", {}))
        values["execution"] = Execution.from_names(values.pop("providers", ON_CPU.names))
        values["input_size"] = None if values["input_size"] is None else tuple(values["input_size"])
        for name in ("checkpoint", "images", "reference"):
            values[name] = None if values.get(name) is None else Path(values[name])
        return Recipe(**values)

    def __hash__(self) -> int:
        return hash((self.path, json.dumps(self.manifest["files"], sort_keys=True)))


@functools.lru_cache(maxsize=8)
def _session(
    bundle: Bundle, target: str, plugin: Path | None, native: bool | None, execution: Execution
) -> Session:
    return open_session(
        target, bundle.path, bundle.entry(target), plugin=plugin, native=native, execution=execution
    )


def load_bundle(path: str | os.PathLike[str], *, signed_by: Sequence[str | os.PathLike[str]] = ()) -> Bundle:
    """Open a bundle and check that its files are those that were written.

    Args:
        path: its folder.
        signed_by: PEM files of the public keys of those who must have signed it, all of them; see docs/signing.md. That
            is checked before anything of the bundle is believed.

    Raises:
        BundleError: if it is missing, no bundle, of a newer format, or a file is missing, altered or not listed.
        TrustError: if somebody did not sign it.
    """
    folder = Path(path)
    require_folder(folder)
    manifest = read_manifest(folder, signed_by=signed_by)
    _verify(folder, manifest["files"])
    report = _read_json(folder / REPORT)
    try:
        check_report(report)
    except InputError as error:
        raise BundleError(
            f"{folder / REPORT} is not the report of a bundle: {error}; compile it again"
        ) from error
    return Bundle(folder, manifest, report)


def read_manifest(folder: Path, *, signed_by: Sequence[str | os.PathLike[str]] = ()) -> dict[str, Any]:
    """Read the manifest of a bundle, and check all that it says, without a look at the bundle's other files.

    Args:
        folder: the bundle.
        signed_by: who must have signed it; see `load_bundle`. The bytes that are checked are those that are read.

    Raises:
        BundleError: if there is none, if it is of another format, or if anything in it means nothing.
        TrustError: if somebody did not sign it.
    """
    from quartermap_deploy.targets.tensorrt.options import EngineOptions

    path = folder / MANIFEST
    data = _read(path)
    if signed_by:
        check_signatures(folder, data, signed_by)
    manifest = _parsed(path, data)
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise BundleError(f"{path} is not the manifest of a bundle")
    if manifest["format"] != FORMAT:
        raise BundleError(
            f"the bundle {folder} has format {printable(repr(manifest['format']), 40)}, this version of "
            f"quartermap-deploy reads format {FORMAT}; compile it again from its recipe, or install the version that "
            "wrote it"
        )
    try:
        check_manifest(manifest)
        for entry in (*manifest["inputs"], *manifest["outputs"]):
            TensorInfo.from_dict(entry)
        if manifest["preprocessing"] is not None:
            Preprocessing.from_dict(manifest["preprocessing"])
        SizeRules(manifest["size_rules"])
        Bundle(folder, manifest, {}).recipe()
        for entry in manifest["targets"].values():
            EngineOptions.from_dict(entry.get("options", {}))
    except (QuartermapError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}; {_MEND}") from error
    return manifest


def bundle_labels(paths: Sequence[Path]) -> list[str]:
    """Return a name for each bundle: its folder's, with a number where that name came before."""
    found: list[str] = []
    for path in paths:
        name = path.resolve().name
        count = sum(label == name or label.startswith(f"{name} (") for label in found)
        found.append(f"{name} ({count + 1})" if count else name)
    return found


def require_folder(folder: Path) -> None:
    """Check that there is a folder, before it is looked at as a bundle.

    Raises:
        BundleError: if there is none.
    """
    if folder.exists() and not folder.is_dir():
        changed = "; eval, bench and serve take a file that another tool changed, with --like BUNDLE"
        raise BundleError(
            f"{folder} is a file; expected the folder of a bundle that `quartermap compile` wrote"
            f"{changed if folder.suffix == '.onnx' else ''}"
        )
    if not folder.is_dir():
        raise BundleError(f"there is no bundle {folder}; expected a folder that `quartermap compile` wrote")


def _read_json(path: Path) -> Any:
    return _parsed(path, _read(path))


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, LARGEST_JSON)
    except FileNotFoundError:
        raise BundleError(f"{path.parent} is no bundle: it has no {path.name}") from None
    except ReadingError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def _parsed(path: Path, data: bytes) -> Any:
    try:
        return parse_json(data, unicode=True, most=MOST_VALUES)
    except ReadingError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def _verify(folder: Path, files: dict[str, Any]) -> None:
    """Compare the files of a bundle with what its manifest says about them."""
    for name, expected in files.items():
        verify_file(folder, name, expected)
    if unlisted := sorted({path.name for path in folder.iterdir()} - {*files, MANIFEST, SIGNATURES}):
        raise BundleError(
            f"the bundle {folder} holds {unlisted[0]}, which its manifest does not list; take it out"
        )


def verify_file(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Compare a file of a bundle with what its manifest says about it.

    Args:
        folder: the bundle.
        name: of the file, which `check_manifest` knows to be a plain one.
        expected: its "sha256" and "bytes".

    Raises:
        BundleError: if it is missing, a link, which would lead out of the bundle, or another one.
    """
    path = folder / name
    remedy = (
        f"make it again: {command('quartermap', 'rebuild', folder)}"
        if name.endswith(ENGINE_SUFFIX)
        else _MEND
    )
    if not os.path.lexists(path):
        raise BundleError(f"{name} is missing from the bundle {folder}; {remedy}")
    if not stat.S_ISREG(path.lstat().st_mode):
        raise BundleError(f"{name} in the bundle {folder} is a link or no file; expected a file of its own")
    size = path.stat().st_size
    found = describe_file(path) if size == expected["bytes"] else {"bytes": size}
    if found != expected:
        raise BundleError(
            f"{name} in the bundle {folder} does not match its manifest: {_size_and_hash(found)}, expected "
            f"{_size_and_hash(expected)}; {remedy}"
        )


def _size_and_hash(entry: Mapping[str, Any]) -> str:
    hashed = f", sha256 {entry['sha256'][:12]}…" if "sha256" in entry else ""
    return f"{entry['bytes']:,} bytes{hashed}"


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a manifest lists them."""
    return {"sha256": file_hash(path), "bytes": path.stat().st_size}


def operators(model: onnx.ModelProto) -> dict[str, Any]:
    """How many nodes the main graph has, and of which operators, as a manifest lists them."""
    counts = Counter(node.op_type for node in model.graph.node)
    return {"nodes": sum(counts.values()), "operators": dict(counts.most_common())}


def check_destination(path: Path, force: bool) -> None:
    """Check, before any work, that a bundle may be written to `path`.

    Raises:
        BundleError: if something is there and `force` is not given, or if it is no bundle, which is never removed.
    """
    _FOLDER.check_destination(path, force)


def new_bundle(path: Path, force: bool = False) -> AbstractContextManager[Path]:
    """A folder to write a bundle into, which takes its place under `path` when the block ends without an error.

    Whatever goes wrong, `path` then is what it was before, and nothing else is left behind.
    """
    return _FOLDER.new(path, force)


def write_json(path: Path, values: Any) -> None:
    """Write JSON for people and programs: indented, with a final newline."""
    path.write_bytes(encoded(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"))
