"""Recipes: everything that decides what a bundle holds, as one frozen value and as a TOML file.

[model]
name = "vmamba_base_s2l15"
checkpoint = "vssm_base_0229_ckpt_epoch_237.pth"   # beside the recipe; leave out for new weights
labels = "classes.txt"  # names of the classes, one a line, or a list; leave out for the card's

[module]                # a module of your own in place of a card; [model] may then name it as you like
factory = "my_package.models:build"                # or "model.py:Net", beside the recipe
example = [1, 3, 224, 224]                         # or { first = [1, 3, 64, 64], second = [1, 3, 64, 64] }
types = {}                                         # of inputs that are not float32, such as { ids = "int64" }
arguments = { num_classes = 10 }                   # of the factory

[preprocessing]         # what is otherwise than the card says; for a module of your own, everything
mean = [0.5, 0.5, 0.5]

[quartermap]            # leave out to prune nothing
every = 3

[input]
size = [224, 224]       # leave out for the size of the model's card
dynamic_batch = true
dynamic_size = false

[export]
precision = "float32"   # or "float16", "bfloat16"
optimize = true
inline = false          # write the scans out, for tools that know no functions; no native operator takes their place
opset = 20              # 17 to 23; leave out for 20, or 22 in bfloat16
io = "float32"          # with 16 bits: the type of input and output, "float32" or "same"
blocks_float32 = [2]    # with 16 bits: blocks that stay float32 all the same; `validate --localise` tells which
keep_float32 = []       # with 16 bits: operators and values that do, by name

[targets]
names = ["onnxruntime"]
device = "cpu"          # where onnxruntime runs it, too, to prove it: "cpu", "cuda", or "auto"
providers = ["CPU"]     # in the place of a device, execution providers in order of preference, without their options

[engine]                # for tensorrt and tensorrt-rtx; every key may be left out
profiles = [{ batch = [1, 8, 32] }]
compute_capabilities = ["8.6", "8.9"]

[validation]
images = "photographs"  # a folder beside the recipe; leave out for the images that come with the package
reference = "golden.npz" # inputs and outputs of a module of your own, saved where it runs in its own environment
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quartermap_deploy.data.labels import label_sets
from quartermap_deploy.data.preprocessing import check_keys
from quartermap_deploy.errors import InputError, PlanError, RecipeError, UnknownNameError
from quartermap_deploy.exporting.export import IO_TYPES, PRECISIONS
from quartermap_deploy.lowering.operator import OPSETS
from quartermap_deploy.pruning.plan import QuarterMap
from quartermap_deploy.reading import ReadingError, read_toml
from quartermap_deploy.sources.factories import UserModule
from quartermap_deploy.targets.execution import DEVICES, ON_CPU, Execution
from quartermap_deploy.targets.tensorrt.options import EngineOptions

_TABLES: dict[str, dict[str, str]] = {
    "model": {
        "name": "model",
        **{
            key: key
            for key in ("checkpoint", "num_classes", "in_chans", "features_only", "seed", "task", "labels")
        },
    },
    "input": {"size": "input_size", "dynamic_batch": "dynamic_batch", "dynamic_size": "dynamic_size"},
    "export": {
        name: name
        for name in ("precision", "optimize", "inline", "opset", "io", "keep_float32", "blocks_float32")
    },
    "targets": {"names": "targets", "providers": "execution"},
    "validation": {"images": "images", "reference": "reference"},
}
"""Tables of the file: key → field of the recipe. The others, in `_VALUES`, are values by themselves."""
SIXTEEN_BIT_OPSETS = {"bfloat16": 22}
"""The first opset in which every operator takes the type, where that is not every opset that can be asked for."""
_VALUES = ("quartermap", "engine", "module", "preprocessing")


@dataclass(frozen=True)
class Recipe:
    """What to compile, and how.

    Attributes:
        model: name of the model: one of `list_models()`, or what a module of the user's is called.
        checkpoint: file with its weights; None takes those that come with the package or the module has, or else new
            ones.
        num_classes: size of the output; None takes the checkpoint's or the card's.
        in_chans: channels of the input; None takes the checkpoint's or the card's.
        features_only: the backbone of a card's model, whose outputs are the maps of its stages.
        task: what the outputs of a module of the user's are; None tells it from their shapes.
        labels: names of the classes: a list, a file, or a set that comes with the package; None takes the card's.
        module: a module of the user's in place of a card, or None.
        preprocessing: how an image becomes an input: what is otherwise than the card says, or, for a module of the
            user's, everything.
        input_size: (height, width) in pixels; None takes the card's.
        dynamic_batch: leave the batch size open.
        dynamic_size: leave height and width open; `input_size` is then the size to validate with.
        quartermap: the plan, or None to prune nothing.
        precision: element type of weights and activations: "float32", "float16" or "bfloat16".
        io: with 16 bits, the type of input and output: "float32" or "same".
        blocks_float32: with 16 bits, blocks that stay float32 all the same, from 1.
        keep_float32: with 16 bits, operators and values that stay float32 all the same, by name.
        optimize: run the passes that make pruned blocks cheaper without changing a number.
        inline: write the scans out in standard operators, without functions; no native operator takes their place then.
        opset: of the standard operators, 17 to 23; None takes 20, or 22 in bfloat16.
        targets: what to build and validate.
        execution: the providers by which `onnxruntime` runs the bundle, too, to prove it; the CPU's always do.
        engine: how engines are built, for the targets that have some.
        images: folder of images to validate with; None takes those that come with the package.
        reference: .npz file of the inputs and outputs of a module of the user's, by name, saved where it runs in its
            own environment; the unpruned graph is compared with them.
        seed: seed of new weights, where there is no checkpoint.
    """

    model: str
    checkpoint: str | Path | None = None
    num_classes: int | None = None
    in_chans: int | None = None
    features_only: bool = False
    task: str | None = None
    labels: str | Path | tuple[str, ...] | None = None
    module: UserModule | None = None
    preprocessing: Mapping[str, Any] | None = None
    input_size: tuple[int, int] | None = None
    dynamic_batch: bool = True
    dynamic_size: bool = False
    quartermap: QuarterMap | None = None
    precision: str = "float32"
    optimize: bool = True
    inline: bool = False
    opset: int | None = None
    io: Literal["float32", "same"] = "float32"
    blocks_float32: tuple[int, ...] = ()
    keep_float32: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("onnxruntime",)
    execution: Execution = ON_CPU
    engine: EngineOptions = field(default_factory=EngineOptions)
    images: str | Path | None = None
    reference: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        faults = Faults()
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                faults.add(f"{name} = {value!r} is no {kind.__name__}")
        if self.preprocessing is not None:
            with faults.gathered():
                check_keys(self.preprocessing)
        for name in _TYPES:
            if name not in _OPTIONAL or getattr(self, name) is not None:
                with faults.gathered():
                    _checked(name, getattr(self, name), Path())
        for name in ("labels", "checkpoint", "images", "reference", "input_size", *_LISTS):
            value = getattr(self, name)
            if value is not None:
                with faults.gathered():
                    given = list(value) if _is_list(value) and name != "labels" else value
                    object.__setattr__(self, name, _checked(name, given, Path()))
        for name, known in (("precision", PRECISIONS), ("io", IO_TYPES)):
            value = getattr(self, name)
            if isinstance(value, str) and value not in known:
                faults.add(f"{name} = {value!r} is unknown; expected {' or '.join(known)}")
        if self.precision == "float32":
            idle = [name for name in ("blocks_float32", "keep_float32") if getattr(self, name)]
            idle += ["io"] if self.io != "float32" else []
            if idle:
                faults.add(
                    f"{', '.join(idle)} would change nothing in float32; set a precision of 16 bits too"
                )
        if self.opset is not None and self.precision in SIXTEEN_BIT_OPSETS:
            least = SIXTEEN_BIT_OPSETS[self.precision]
            if self.opset < least:
                faults.add(
                    f"opset = {self.opset}, but operators take {self.precision} from opset {least} on; leave opset out"
                )
        with faults.gathered():
            self._check_module()
        faults.tell()

    def path(self, name: Literal["checkpoint", "images", "reference"]) -> Path | None:
        """One of the fields that may be given as a text, as the path that it is."""
        value: Path | None = getattr(self, name)
        return value

    def _check_module(self) -> None:
        """Refuse what belongs to a card in the recipe of a module, and the other way round."""
        if self.module is not None:
            idle = [n for n in ("num_classes", "in_chans", "input_size") if getattr(self, n) is not None]
            idle += ["features_only"] if self.features_only else []
            if idle:
                raise RecipeError(
                    f"{idle[0]} is for models of cards; a module of your own gets arguments = {{…}}, and its example "
                    "input says the size"
                )
        elif self.task is not None or self.reference is not None:
            idle = ["task"] if self.task is not None else ["reference"]
            raise RecipeError(f"{idle[0]} is for a module of your own; models of cards need none")

    @classmethod
    def load(cls, path: Path, *, run_module: bool = False) -> Recipe:
        """Read a recipe file. Paths in it are relative to it.

        Args:
            path: the file.
            run_module: agree to run what its table [module] names; without, it is read and never run.

        Raises:
            RecipeError: if the file is missing or no TOML, or a key or value is wrong.
        """
        path = Path(path)
        try:
            document = read_toml(path)
        except FileNotFoundError:
            raise RecipeError(f"there is no recipe {path}") from None
        except ReadingError as error:
            raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
        try:
            return cls._from_document(document, path.parent, None if run_module else path)
        except (RecipeError, PlanError, InputError, UnknownNameError) as error:
            raise RecipeError(f"the recipe {path}: {error}") from error

    @classmethod
    def _from_document(cls, document: Mapping[str, Any], folder: Path, named_by: Path | None) -> Recipe:
        fields: dict[str, Any] = {}
        faults = Faults()
        for table, entries in document.items():
            with faults.gathered():
                fields |= _fields(table, entries, folder, named_by, faults)
        if "model" not in fields and "module" in fields:
            fields["model"] = fields["module"].name
        if "model" not in fields and not faults.found:
            faults.add('it names no model; expected [model] with name = "…", or [module] with factory = "…"')
        with faults.gathered():
            # What could be read is looked at too.
            recipe = cls(**{"model": "", **fields})
        faults.tell()
        return recipe

    def to_toml(self, folder: Path) -> str:
        """Return the text of a recipe file in `folder`, which `load` reads back; what is a default is left out."""
        default = Recipe(self.model)
        document: dict[str, dict[str, Any]] = {}
        for table, keys in _TABLES.items():
            values = {key: getattr(self, name) for key, name in keys.items()}
            changed = {
                key: value
                for key, value in values.items()
                if key == "name" or value != getattr(default, keys[key])
            }
            if "providers" in changed:
                # Neither their options, which no file decides.
                changed["providers"] = list(self.execution.names)
            if changed:
                document[table] = changed
        if self.quartermap is not None:
            plan = self.quartermap.to_dict()
            # A list of blocks says everything; every would contradict it, and stages are excluded from every alone.
            for key in ("every", "exclude_stages") if self.quartermap.blocks is not None else ():
                del plan[key]
            document["quartermap"] = plan
        engine, usual = self.engine.to_dict(), EngineOptions().to_dict()
        if self.preprocessing is not None:
            document["preprocessing"] = dict(self.preprocessing)
        if self.module is not None:
            document["module"] = self._module_table(folder)
        # Neither the plugin nor a cache, which no file decides.
        if options := {key: value for key, value in engine.items() if value != usual[key]}:
            document["engine"] = options
        order = [
            "model",
            "module",
            "quartermap",
            *(table for table in (*_TABLES, "preprocessing", "engine") if table != "model"),
        ]
        blocks = [
            "\n".join(
                [f"[{table}]", *(f"{key} = {_toml(value, folder)}" for key, value in document[table].items())]
            )
            for table in order
            if table in document
        ]
        return "\n\n".join(blocks) + "\n"

    def _module_table(self, folder: Path) -> dict[str, Any]:
        """The table of the user's module, with a file as a path from the folder of the recipe."""
        assert self.module is not None
        table = {key: value for key, value in self.module.to_dict().items() if value not in ({}, True)}
        where, _, name = self.module.factory.rpartition(":")
        if where.endswith(".py"):
            table["factory"] = f"{json.loads(_toml(Path(where), folder))}:{name}"
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values for JSON."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["module"] = None if self.module is None else self.module.to_dict()
        values["preprocessing"] = None if self.preprocessing is None else dict(self.preprocessing)
        if self.labels is not None:
            names = self.labels
            values["labels"] = list(names) if isinstance(names, tuple) else Path(names).name
        values["quartermap"] = None if self.quartermap is None else self.quartermap.to_dict()
        values["engine"] = self.engine.to_dict()
        # Nor what options of providers name.
        values["providers"] = list(values.pop("execution").names)
        values["keep_float32"], values["blocks_float32"] = list(self.keep_float32), list(self.blocks_float32)
        # The file name alone: where it lay on the machine that compiled is nobody else's business.
        for name in ("checkpoint", "images", "reference"):
            path = getattr(self, name)
            values[name] = None if path is None else Path(path).name
        values["input_size"] = None if self.input_size is None else list(self.input_size)
        values["targets"] = list(self.targets)
        return values


class Faults:
    """What is wrong with a recipe, gathered so that all of it is told at once.

    Attributes:
        found: each in words.
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, text: str) -> None:
        """Note a fault; the same one counts once."""
        if text not in self.found:
            self.found.append(text)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While open, an error about the recipe is noted instead of raised."""
        try:
            yield
        except RecipeFaults as error:
            for text in error.faults:
                self.add(text)
        except (RecipeError, PlanError, InputError, UnknownNameError) as error:
            self.add(str(error))

    def tell(self) -> None:
        """Raise a `RecipeError` if anything was noted."""
        if self.found:
            raise RecipeFaults(self.found)


class RecipeFaults(RecipeError):
    """Several things that are wrong with a recipe, or one."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        lines = "".join(f"\n- {text}" for text in faults)
        super().__init__(faults[0] if len(faults) == 1 else f"{len(faults)} things are wrong:{lines}")


def _fields(table: str, entries: Any, folder: Path, named_by: Path | None, faults: Faults) -> dict[str, Any]:
    """The fields of a recipe that a table of its file gives."""
    _require_known("table", table, [*_TABLES, *_VALUES])
    if not isinstance(entries, dict):
        raise RecipeError(f"[{table}] must be a table, found {entries!r}")
    if table == "quartermap":
        if "every" in entries and "blocks" in entries:
            raise RecipeError("[quartermap] has both every and blocks; leave one of them out")
        return {table: QuarterMap.from_dict(entries)}
    if table == "module":
        return {table: UserModule.from_dict(entries, folder, named_by=named_by)}
    if table == "preprocessing":
        return {table: dict(entries)}
    if table == "engine":
        return {table: EngineOptions.from_dict(entries)}
    if table == "targets" and "device" in entries:
        entries = _with_providers(entries)
    fields = {}
    for key, value in entries.items():
        with faults.gathered():
            _require_known(f"key in [{table}]", key, list(_TABLES[table]))
            name = _TABLES[table][key]
            fields[name] = _checked(name, value, folder)
    return fields


def _with_providers(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The table [targets] with the providers of its device."""
    device = entries["device"]
    if "providers" in entries:
        raise RecipeError("[targets] has both device and providers; leave one of them out")
    if not isinstance(device, str):
        raise RecipeError(f"device = {device!r} is no device; expected {', '.join(DEVICES)}")
    others = {key: value for key, value in entries.items() if key != "device"}
    return {**others, "providers": list(Execution.of_device(device).names)}


def _toml(value: Any, folder: Path) -> str:
    """A value as TOML writes it; a path relative to the folder of the recipe."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Path):
        try:
            value = Path(os.path.relpath(value, folder)).as_posix()
        except ValueError:  # on another drive
            value = str(value.absolute())
    if isinstance(value, str):
        # JSON writes strings as TOML does, but for one control character that TOML wants to have written as a number.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(entry, folder)}" for key, entry in value.items()) + " }"
    if _is_list(value):
        return "[" + ", ".join(_toml(entry, folder) for entry in value) + "]"
    return str(value)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _require_known(kind: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"unknown {kind} {name!r}; expected {', '.join(known)}.{hint}")


_TYPES: dict[str, type] = {
    "model": str,
    "num_classes": int,
    "in_chans": int,
    "features_only": bool,
    "task": str,
    "dynamic_batch": bool,
    "dynamic_size": bool,
    "precision": str,
    "optimize": bool,
    "inline": bool,
    "opset": int,
    "io": str,
    "seed": int,
}


_OPTIONAL = ("num_classes", "in_chans", "task", "opset")
"""Fields of these types that may be None, which is what the card or the weights say."""
_LISTS = ("targets", "keep_float32", "blocks_float32")
_KINDS: dict[str, type] = {
    "quartermap": QuarterMap,
    "engine": EngineOptions,
    "execution": Execution,
    "module": UserModule,
}


def _checked(name: str, value: Any, folder: Path) -> Any:
    """The value of a field in its type.

    Raises:
        RecipeError: if it has another type.
    """
    if isinstance(value, (QuarterMap, EngineOptions)):
        return value
    if isinstance(value, UserModule) or name == "preprocessing":
        return value
    if name == "execution":
        return Execution.from_names(value)
    if name == "labels":
        return _labels(value, folder)
    if name in ("checkpoint", "images", "reference"):
        if isinstance(value, Path):
            return folder / value
        if not isinstance(value, str):
            raise RecipeError(f"{name} = {value!r} is not a path")
        return folder / value
    if name == "input_size":
        sides = value if isinstance(value, list) else []
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise RecipeError(f"size = {value!r} is not [height, width] in pixels")
        return tuple(sides)
    if name == "blocks_float32":
        if not isinstance(value, list) or not all(type(item) is int and item > 0 for item in value):
            raise RecipeError(f"blocks_float32 = {value!r} is not a list of blocks, which count from 1")
        return tuple(value)
    if name in ("targets", "keep_float32"):
        named = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not named or (name == "targets" and not value):
            key, what = ("names", "targets") if name == "targets" else (name, "names")
            raise RecipeError(f"{key} = {value!r} is not a list of {what}")
        return tuple(value)
    expected = _TYPES[name]
    if type(value) is not expected:
        raise RecipeError(f"{name} = {value!r} is not of type {expected.__name__}")
    if name == "opset" and value not in OPSETS:
        raise RecipeError(f"opset = {value}; expected {OPSETS[0]} to {OPSETS[-1]}")
    return value


def _labels(value: Any, folder: Path) -> str | Path | tuple[str, ...]:
    """Names of classes: a list of them, a set that comes with the package, or a file beside the recipe."""
    if isinstance(value, Path) or (isinstance(value, str) and value in label_sets()):
        return value
    if isinstance(value, str):
        return folder / value
    if not _is_list(value) or not all(isinstance(item, str) for item in value):
        raise RecipeError(
            f"labels = {value!r} is neither a list of names, a file, nor one of {', '.join(label_sets())}"
        )
    return tuple(value)
