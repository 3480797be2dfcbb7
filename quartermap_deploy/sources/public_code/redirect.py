"""Where code that is loaded scans, and how it comes to scan with our operator.

A function is redirected by its code: the new code passes the arguments on, so that every name the function goes by
(from-imports, `self.selective_scan = selective_scan_fn`, `functools.partial`) follows. What is redirected:

- in mamba-ssm, causal-conv1d and their like, the functions that `stand_ins.FUNCTIONS` names;
- in a model's own code, these too, and every function, method and autograd function that takes (u, delta, A, B, C, …),
  such as the loops over positions that most repositories carry, which would be unrolled otherwise;
- the kernels of CUDA extensions;
- the names that code uses and that an import that failed has left undefined, or None.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quartermap_deploy.errors import UnknownNameError, UnsupportedScanError
from quartermap_deploy.sources.public_code import imports, scans, stand_ins
from quartermap_deploy.sources.public_code.patches import Code, Item, Patches

Namespace = dict[str, Any]
Target = Callable[..., Any]

SPELLINGS = (
    ("u", "delta", "A", "B", "C"),
    ("x", "delta", "A", "B", "C"),
    ("us", "dts", "As", "Bs", "Cs"),
)
"""How a scan names its first arguments."""
_MEANING = {
    **{name: meant for names in SPELLINGS for name, meant in zip(names, SPELLINGS[0], strict=True)},
    **{name: name for name in ("D", "z", "delta_bias", "delta_softplus", "return_last_state")},
    "Ds": "D",
    "dt_bias": "delta_bias",
    "dt_softplus": "delta_softplus",
    "oflex": "float_output",
    "out_float": "float_output",
}
_IGNORED = frozenset({"nrows", "backnrows", "backend", "mode", "chunksize", "chunk_size", "HWDC"})
"""Arguments that choose or tune a kernel and change no number."""
_MAMBA_SSM = frozenset({"delta_bias", "delta_softplus", "dt_bias"})
_BEFORE = (("self",), ("cls",), ("ctx",), ("context",))
"""What comes before the arguments of a method, and of an autograd function."""

_targets: weakref.WeakValueDictionary[int, Target] = weakref.WeakValueDictionary()
_serials = itertools.count()


def call(serial: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Call what a redirected function leads to; its code holds the serial number."""
    return _targets[serial](*arguments, **keywords)


def _code(function: types.FunctionType, serial: int) -> types.CodeType:
    """Code that passes the arguments of a function on to a target, with as many free variables as the function's."""
    free = [f"free_{place}" for place in range(len(function.__code__.co_freevars))]
    lines = [
        "def outer():",
        *(f"    {name} = None" for name in free),
        "    def redirected(*arguments, **keywords):",
        "        from quartermap_deploy.sources.public_code.redirect import call",
        f"        return call({serial}, arguments, keywords)",
        *(f"        {name}" for name in free),
        "    return redirected",
    ]
    space: Namespace = {}
    exec(compile("\n".join(lines), f"<{function.__qualname__}, redirected>", "exec"), space)
    made: types.FunctionType = space["outer"]()
    return made.__code__.replace(co_name=function.__code__.co_name)


def redirect(patches: Patches, owner: object, function: types.FunctionType, target: Target) -> None:
    """Let a function lead to `target` until the owner lets go."""
    serial = next(_serials)
    _targets[serial] = target
    patches.put(owner, Code(function), _code(function, serial), needs=target)


# What a function is ---------------------------------------------------------------------------------------------


def scan_target(function: types.FunctionType, skip: int = 0) -> Target | None:
    """Return what a function that scans, by its arguments, is redirected to, or None if it is no scan.

    Args:
        function: of a model's own code, not redirected.
        skip: arguments before the first: self, or the context of an autograd function.
    """
    code = function.__code__
    names = code.co_varnames[skip : code.co_argcount]
    if names[:5] not in SPELLINGS or "dout" in names:
        return None
    signature = inspect.signature(function, follow_wrapped=False)
    label = f"{function.__module__}.{function.__qualname__}"
    # What takes a bias of the steps has the interface of mamba-ssm, and with it the channels before the positions.
    run = (
        scans.selective_scan if _MAMBA_SSM.intersection(names) else functools.partial(_scan_either_way, label)
    )

    def target(*arguments: Any, **keywords: Any) -> Tensor:
        bound = signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        meant: dict[str, Any] = {}
        for name, value in itertools.islice(bound.arguments.items(), skip, None):
            parameter = signature.parameters[name]
            if name in _MEANING:
                meant[_MEANING[name]] = value
            elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in _IGNORED:
                continue
            elif value is not None and value is not parameter.default:
                scans.refuse(f"{label} with {name}", "it is not known what this argument does")
        return run(**meant)

    return target


def _scan_either_way(label: str, **arguments: Any) -> Tensor:
    """Scan (batch, channels, L) or (batch, L, channels): loops over positions are written for both."""
    u, A, B = arguments["u"], arguments["A"], arguments["B"]
    if u.dim() != 3 or A.dim() != 2 or B.dim() != 3 or u.shape[2] != A.shape[0]:
        return scans.selective_scan(**arguments)
    if u.shape[1] == A.shape[0]:
        # As many positions as channels: B, (batch, N, L) or (batch, L, N), tells which are which.
        if B.shape[1] == B.shape[2]:
            scans.refuse(
                label, f"with u {tuple(u.shape)} and B {tuple(B.shape)} either axis may be the positions"
            )
        if B.shape[1] == A.shape[1]:
            return scans.selective_scan(**arguments)
    turned: dict[str, Any] = {
        name: value.transpose(1, 2) if isinstance(value, Tensor) and value.dim() == 3 else value
        for name, value in arguments.items()
    }
    return scans.selective_scan(**turned).transpose(1, 2)


def named_target(function: types.FunctionType) -> Target | None:
    """Return what a function of a package we know, or a copy of one, is redirected to, by its name and arguments."""
    ours = stand_ins.FUNCTIONS.get(function.__name__)
    if ours is None:
        return None
    signature = inspect.signature(function, follow_wrapped=False)
    # A function of the same name that takes something else is another function.
    if not set(signature.parameters) <= set(inspect.signature(ours).parameters):
        return None

    def target(*arguments: Any, **keywords: Any) -> Any:
        return ours(**signature.bind(*arguments, **keywords).arguments)

    return target


def _unwrapped(value: Any) -> types.FunctionType | None:
    """The Python function inside static methods and decorators, or None."""
    value = getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, types.FunctionType) else None


# Going through code ----------------------------------------------------------------------------------------------


def redirect_namespace(patches: Patches, owner: object, space: Namespace, found: list[str]) -> None:
    """Redirect what the globals of a module hold: functions and methods that scan, and autograd functions that do."""
    for value in list(space.values()):
        if isinstance(value, types.FunctionType):
            _redirect_function(patches, owner, value, found)
        elif isinstance(value, type) and value.__module__ == space.get("__name__"):
            _redirect_class(patches, owner, value, found)


def _redirect_function(patches: Patches, owner: object, value: Any, found: list[str]) -> bool:
    """Redirect a function if it scans; returns whether it is redirected."""
    function = _unwrapped(value)
    if function is None or imports.foreign(str(function.__globals__.get("__name__", ""))):
        return False
    if _shared(patches, owner, function):
        return True
    first = function.__code__.co_varnames[:1]
    target = scan_target(function, skip=1 if first in _BEFORE else 0) or named_target(function)
    if target is not None:
        redirect(patches, owner, function, target)
        found.append(f"{function.__module__}.{function.__qualname__}")
    return target is not None


def _shared(patches: Patches, owner: object, function: types.FunctionType) -> bool:
    """Whether a function is redirected by a block around this one, or in another thread; then it outlives that one."""
    if not patches.holds(Code(function)):
        return False
    patches.share(owner, Code(function))
    return True


def _redirect_class(patches: Patches, owner: object, kind: type, found: list[str]) -> None:
    if not issubclass(kind, torch.autograd.Function):
        for member in list(vars(kind).values()):
            _redirect_function(patches, owner, member, found)
        return
    forward, backward = (_unwrapped(vars(kind).get(name)) for name in ("forward", "backward"))
    if forward is None:
        return
    if not _redirect_function(patches, owner, forward, found):
        target = stand_ins.AUTOGRAD.get(kind.__name__)
        if target is None or forward.__code__.co_argcount != 2:
            return
        redirect(patches, owner, forward, functools.partial(_without_context, target))
        found.append(f"{forward.__module__}.{forward.__qualname__}")
    if backward is not None and not _shared(patches, owner, backward):
        # It would look in its context for what the original forward had put there.
        refusal = stand_ins.no_gradients(f"the gradient of {kind.__module__}.{kind.__qualname__}")
        redirect(patches, owner, backward, refusal)


def _without_context(target: Target, context: Any, *arguments: Any, **keywords: Any) -> Any:
    """Call a target as the forward of an autograd function."""
    return target(*arguments, **keywords)


def redirect_extension(patches: Patches, owner: object, module: types.ModuleType, found: list[str]) -> None:
    """Put our kernels into a CUDA extension that is installed."""
    for name, kernel in (stand_ins.contents(module.__name__) or {}).items():
        if name in vars(module):
            patches.put(owner, Item(vars(module), name), kernel)
            found.append(f"{module.__name__}.{name}")


def supply_globals(patches: Patches, owner: object, space: Namespace, found: list[str]) -> None:
    """Define the names that the functions of a module use and that are undefined or None."""
    for name in sorted(_used(space)):
        value = stand_ins.GLOBALS.get(name)
        if value is None and stand_ins.is_extension(name):
            value = imports.stand_in(name)
        place = Item(space, name)
        if value is None or (space.get(name) is not None and not patches.holds(place)):
            continue
        patches.put(owner, place, value)
        found.append(f"{space.get('__name__', '?')}.{name} (was undefined)")


def _used(space: Namespace) -> set[str]:
    """The global names that the functions and methods of a module use."""
    names: set[str] = set()
    for value in list(space.values()):
        if getattr(value, "__module__", None) != space.get("__name__"):
            continue
        members = vars(value).values() if isinstance(value, type) else (value,)
        for member in members:
            function = _unwrapped(member)
            if function is not None and function.__globals__ is space:
                for code in _codes(function.__code__):
                    names.update(code.co_names)
    return names


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def own_namespaces(model: nn.Module) -> list[Namespace]:
    """The globals of all code that a model is made of: of its classes, their packages, and what these import."""
    found: dict[int, Namespace] = {}
    roots: set[str] = set()
    waiting: list[Namespace] = []
    for kind in {kind for module in model.modules() for kind in type(module).__mro__}:
        if imports.foreign(kind.__module__):
            continue
        roots.add(kind.__module__.split(".")[0])
        waiting.extend(f.__globals__ for f in map(_unwrapped, vars(kind).values()) if f is not None)
    starts = tuple(roots)  # passes over thousands of modules in no time
    waiting.extend(
        vars(module)
        for name, module in list(sys.modules.items())
        if name.startswith(starts) and name.split(".")[0] in roots and isinstance(module, types.ModuleType)
    )
    while waiting:
        space = waiting.pop()
        name = str(space.get("__name__", ""))
        if id(space) in found or imports.foreign(name):
            continue
        if imports.installed(space.get("__file__")) and name.split(".")[0] not in roots:
            continue
        found[id(space)] = space
        waiting.extend(_imported(space))
    return list(found.values())


def _imported(space: Namespace) -> Iterator[Namespace]:
    """The globals of the modules that a module names, or takes functions and classes from."""
    for value in list(space.values()):
        if isinstance(value, types.ModuleType):
            yield vars(value)
        elif isinstance(value, types.FunctionType):
            yield value.__globals__
        elif isinstance(value, type):
            module = sys.modules.get(value.__module__)
            if isinstance(module, types.ModuleType):
                yield vars(module)


# Scans that the user names ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedScan:
    """A function that the user says is a scan.

    Attributes:
        path: `package.module:name` or `package.module:Class.name`.
        holder: the module or class that has it.
        value: the function, or a class that derives from `torch.autograd.Function`.
    """

    path: str
    holder: Any
    value: Any


def find_scan(path: str, adapter: Any) -> NamedScan:
    """Import what a key of `scans=` names.

    Raises:
        UnknownNameError: if there is no such module or name, or the key or the adapter is none.
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not attribute or not callable(adapter):
        raise UnknownNameError(
            f"scans={{{path!r}: …}} must name a function as 'package.module:function' and give it a function that "
            "takes the same arguments"
        )
    holder = _module(module_name)
    *classes, name = attribute.split(".")
    for step in classes:
        holder = _member(holder, step, path)
    return NamedScan(path, holder, _member(holder, name, path))


def redirect_named(
    patches: Patches, owner: object, scan: NamedScan, adapter: Target, found: list[str]
) -> None:
    """Let a scan that the user names lead to an adapter.

    Raises:
        UnsupportedScanError: if it is no function.
    """
    path, name = scan.path, scan.path.rpartition(":")[2].rpartition(".")[2]
    holder, value = scan.holder, scan.value

    def checked(*arguments: Any, **keywords: Any) -> Any:
        result = adapter(*arguments, **keywords)
        if not isinstance(result, Tensor):
            raise UnsupportedScanError(
                f"the adapter for {path} returned a {type(result).__name__}; expected the tensor that the scan gives"
            )
        return result

    if isinstance(value, type) and issubclass(value, torch.autograd.Function):
        forward = _unwrapped(value.forward)
        assert forward is not None
        # Where the context has a function of its own, forward takes the arguments alone.
        takes_context = value.setup_context is torch.autograd.Function.setup_context
        target = functools.partial(_without_context, checked) if takes_context else checked
        redirect(patches, owner, forward, target)
    elif (function := _unwrapped(vars(holder).get(name, value))) is not None:
        redirect(patches, owner, function, checked)
    elif isinstance(holder, types.ModuleType) and callable(value):
        patches.put(owner, Item(vars(holder), name), checked)
    else:
        raise UnsupportedScanError(f"scans names {path}, a {type(value).__name__}; expected a function")
    found.append(path.replace(":", "."))


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        loaded = [n for n in list(sys.modules) if not imports.foreign(n)]
        raise UnknownNameError.for_choice("module in scans=", name, _near(name, loaded)) from error


def _member(holder: Any, name: str, path: str) -> Any:
    if not hasattr(holder, name):
        names = [n for n, value in vars(holder).items() if callable(value) and not n.startswith("__")]
        raise UnknownNameError.for_choice(f"function in scans={{{path!r}: …}}:", name, names)
    return getattr(holder, name)


def _near(name: str, loaded: Iterable[str]) -> list[str]:
    """The modules of the same package, or where it is unknown the packages."""
    root = name.split(".")[0]
    own = [n for n in loaded if n.split(".")[0] == root]
    return own or sorted({n.split(".")[0] for n in loaded})
