"""Modules by the name of what makes them: `package.module:factory`, or `path/to/model.py:Net`."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from quartermap_deploy.errors import InputError, QuartermapError, RecipeError, TrustError

if TYPE_CHECKING:
    from torch import nn

INPUT = "images"
"""Name of an example input that has none."""
LARGEST_EXAMPLE = 1 << 28
"""Most numbers of an example input: 1 GiB of float32."""
FLOAT32 = "float32"
EXAMPLE_TYPES = (FLOAT32, "int64", "int32", "uint8", "bool")
"""Element types of example inputs. Floating-point models are compiled in float32; the others are indices and masks."""


@dataclass(frozen=True)
class UserModule:
    """A module of the user's, as a recipe or the command line names it.

    Attributes:
        factory: `package.module:name`, or `path/to/file.py:name`; what returns the module, such as its class.
        example: shape of each example input, by name; one without a name is `images`.
        arguments: keyword arguments of the factory.
        strict_weights: refuse weights whose keys are not exactly the module's.
        stages: how many blocks each stage has; None tells stages apart by the length of their sequences.
        scans: adapters for scans that this package does not know, both as `package.module:name`; see `public_code`.
        types: element type of the example inputs that are not float32, by name; one of `EXAMPLE_TYPES`.
        named_by: the file that names all this, for as long as nobody agreed to run code that a file names.

    Raises:
        RecipeError: if a value is of the wrong kind.
    """

    factory: str
    example: Mapping[str, tuple[int, ...]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    strict_weights: bool = True
    stages: tuple[int, ...] | None = None
    scans: Mapping[str, str] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    named_by: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.factory, str) or not _split(self.factory):
            raise RecipeError(
                f"factory = {self.factory!r} names no factory; expected package.module:name or path/to/file.py:name"
            )
        if not isinstance(self.example, Mapping) or not self.example:
            raise RecipeError("there is no example input; say the shape of each, such as 1x3x224x224")
        for name, shape in self.example.items():
            check_shape(name, shape)
        object.__setattr__(self, "example", {name: tuple(shape) for name, shape in self.example.items()})
        self._check_types()
        if not isinstance(self.arguments, Mapping) or not all(isinstance(key, str) for key in self.arguments):
            raise RecipeError(f"arguments = {self.arguments!r} is no table of keyword arguments")
        if type(self.strict_weights) is not bool:
            raise RecipeError(f"strict_weights = {self.strict_weights!r} is neither true nor false")
        if self.stages is not None:
            stages = tuple(self.stages)
            if not stages or not all(type(count) is int and count > 0 for count in stages):
                raise RecipeError(
                    f"stages = {self.stages!r} is no list of numbers of blocks, such as [2, 2, 8, 2]"
                )
            object.__setattr__(self, "stages", stages)

        named = isinstance(self.scans, Mapping) and all(
            isinstance(text, str) and _split(text) for pair in self.scans.items() for text in pair
        )
        if not named:
            raise RecipeError(
                f"scans = {self.scans!r} is no table of scans and adapters, such as "
                '{ "package.ops:my_scan" = "my_adapters:my_scan" }'
            )

    def _check_types(self) -> None:
        if not isinstance(self.types, Mapping):
            raise RecipeError(
                f'types = {self.types!r} is no table of element types, such as {{ ids = "int64" }}'
            )
        for name, kind in self.types.items():
            if name not in self.example:
                raise RecipeError(
                    f"types names {name!r}, which is no example input; those are {', '.join(self.example)}"
                )
            check_type(name, kind)
        known = {name: kind for name, kind in self.types.items() if kind != FLOAT32}
        object.__setattr__(self, "types", known)

    @property
    def name(self) -> str:
        """The name of the factory."""
        return self.factory.rpartition(":")[2]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON and TOML; a path in them is the file's name alone."""
        where, _, name = self.factory.rpartition(":")
        values: dict[str, Any] = {
            "factory": f"{Path(where).name}:{name}" if where.endswith(".py") else self.factory,
            "example": {key: list(shape) for key, shape in self.example.items()},
            "arguments": dict(self.arguments),
            "strict_weights": self.strict_weights,
        }
        if self.stages is not None:
            values["stages"] = list(self.stages)
        if self.types:
            values["types"] = dict(self.types)
        return {**values, "scans": dict(self.scans)} if self.scans else values

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], folder: Path = Path(), *, named_by: Path | None = None
    ) -> UserModule:
        """Read the table `[module]` of a recipe; a file is looked for in `folder`, beside the recipe.

        Raises:
            RecipeError: if a key is unknown or missing, or a value is wrong.
        """
        known = ("factory", "example", "arguments", "strict_weights", "stages", "scans", "types")
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise RecipeError(f"unknown key in [module] {key!r}; expected {', '.join(known)}.{hint}")
        if absent := [key for key in ("factory", "example") if key not in values]:
            raise RecipeError(f"[module] has no {absent[0]}; expected factory and example")
        fields = dict(values)
        where, _, name = str(fields["factory"]).rpartition(":")
        if where.endswith(".py"):
            fields["factory"] = f"{folder / where}:{name}"
        if isinstance(fields["example"], (list, tuple)):
            fields["example"] = {INPUT: tuple(fields["example"])}
        return cls(**fields, named_by=named_by)


def check_shape(name: str, shape: object) -> None:
    """Check the shape of an example input.

    Raises:
        RecipeError: if it is none, or of more numbers than any model takes.
    """
    if not isinstance(shape, (list, tuple)) or not shape or not all(type(s) is int and s > 0 for s in shape):
        raise RecipeError(
            f"the example input {name!r} has the shape {shape!r}; expected sizes such as 1x3x224x224"
        )
    count = 1
    for size in shape:
        count *= size
    if count > LARGEST_EXAMPLE:
        raise RecipeError(f"the example input {name!r} of {count:,} numbers is too large; give a smaller one")


def check_type(name: str, kind: object) -> None:
    """Check the element type of an example input.

    Raises:
        RecipeError: if it is none of `EXAMPLE_TYPES`.
    """
    if kind not in EXAMPLE_TYPES:
        raise RecipeError(
            f"the example input {name!r} has the element type {kind!r}; expected one of {', '.join(EXAMPLE_TYPES)}"
        )


def parse_example(text: str) -> tuple[str, tuple[int, ...]]:
    """Read an example input from the command line: `1x3x224x224`, or `name=1x3x224x224`.

    Raises:
        RecipeError: if it is something else.
    """
    name, equals, sizes = text.rpartition("=")
    if not re.fullmatch(r"\d{1,9}([x×,]\d{1,9})*", sizes) or (equals and not name.isidentifier()):
        raise RecipeError(
            f"{text!r} is no example input; expected sizes such as 1x3x224x224, or name=1x3x224x224 for one by name"
        )
    shape = tuple(int(size) for size in re.split("[x×,]", sizes))
    check_shape(name or INPUT, shape)
    return name or INPUT, shape


def build_module(wanted: UserModule) -> nn.Module:
    """Import what the user named, call it, and return the module that it makes.

    This runs the user's code, and no other: nothing that a bundle or a checkpoint names is ever run.

    Raises:
        TrustError: if a file named it, and nobody agreed to that.
        InputError: if there is no such file, module or factory, it raises, or makes something else than a module.
    """
    from torch import nn

    from quartermap_deploy.sources.public_code.context import public_code

    _require_agreement(wanted)
    with public_code():
        factory = _find(wanted.factory)
        try:
            made = (
                factory(**wanted.arguments)
                if callable(factory) and not isinstance(factory, nn.Module)
                else factory
            )
        except QuartermapError:
            raise
        except Exception as error:
            raise InputError(
                f"{wanted.factory} raised {type(error).__name__}: {_line(error)}{_signature_of(factory, error)}"
            ) from error
    if not isinstance(made, nn.Module):
        raise InputError(
            f"{wanted.factory} made an object of type {type(made).__name__}; expected a torch.nn.Module, or a class or "
            "function that returns one"
        )
    return made


def _require_agreement(wanted: UserModule) -> None:
    if wanted.named_by is not None:
        code = ", ".join([wanted.factory, *wanted.scans.values()])
        raise TrustError(
            f"{wanted.named_by} names code that would be run: {code}. If you trust who wrote it, say --run-module (in "
            "Python: Recipe.load(path, run_module=True))"
        )


def find_scans(wanted: UserModule) -> dict[str, Any] | None:
    """Import the adapters of scans that the user named, by the scans; None if there are none.

    Raises:
        TrustError: if a file named them, and nobody agreed to that.
        InputError: if one is not there.
    """
    _require_agreement(wanted)
    return {scan: _find(adapter) for scan, adapter in wanted.scans.items()} or None


def _split(factory: str) -> tuple[str, str] | None:
    where, _, name = factory.rpartition(":")
    return (where, name) if where and all(part.isidentifier() for part in name.split(".")) else None


def _find(factory: str) -> Any:
    where, name = _split(factory) or ("", "")
    is_file = where.endswith(".py") or "/" in where or "\\" in where
    module = _from_file(Path(where)) if is_file else _imported(where)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=3)
            made_here = [name for name, value in vars(module).items() if _is_made_in(module, value)]
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"it has {', '.join(made_here[:8]) or 'none'}"
            )
            raise InputError(f"{where} has no {part!r}; {hint}")
        found = getattr(found, part)
    return found


def _is_made_in(module: ModuleType, value: object) -> bool:
    """Whether a class or function is a module's own."""
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _imported(where: str) -> ModuleType:
    with _current_folder_first():
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if where == missing or where.startswith(f"{missing}."):
                raise InputError(
                    f"there is no module {missing!r} to import; name a package that is installed or lies in the "
                    "current folder, or a file as path/to/model.py:Net"
                ) from error
            raise InputError(f"{where} needs the package {missing!r}, which is not installed here") from error
        except Exception as error:
            raise InputError(f"importing {where} raised {type(error).__name__}: {_line(error)}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path} with a model")
    resolved = path.resolve()
    # The folder of the file comes first while it is imported, as if the file were run; its name must be nobody else's.
    digest = hashlib.sha256(str(resolved).encode()).hexdigest()[:8]
    name = f"quartermap_user_{digest}_{''.join(c if c.isalnum() else '_' for c in resolved.stem)}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file; expected path/to/model.py:Net")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _folder_first(resolved.parent):
            spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        del sys.modules[name]
        raise InputError(f"{path} needs the package {error.name!r}, which is not installed here") from error
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"importing {path} raised {type(error).__name__}: {_line(error)}") from error
    return module


def _current_folder_first() -> contextlib.AbstractContextManager[None]:
    return _folder_first(Path.cwd())


@contextlib.contextmanager
def _folder_first(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _signature_of(factory: Any, error: Exception) -> str:
    """What the factory takes, where the call itself failed."""
    if not isinstance(error, TypeError):
        return ""
    with contextlib.suppress(TypeError, ValueError):
        return f"; it takes {inspect.signature(factory)}, give arguments with --arg name=value"
    return ""
