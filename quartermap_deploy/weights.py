"""Files of weights: finding the state dict in a file, without running anything that is in it, and loading it.

Training scripts keep the weights beside optimizer, epoch and so on, under one of `WRAPPERS`, and put the name of what
holds the network in front of every key, one of `PREFIXES`. Both are taken off. What only this package's own
architectures need, the spellings of their keys, is in `architectures/checkpoint.py`.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quartermap_deploy.errors import CheckpointError
from quartermap_deploy.weight_files.stored import CodeError, Content, OtherTensor, StoredTensor, WeightsError
from quartermap_deploy.weight_files.torch_files import ProgramError, read_torch_file

StateDict = dict[str, Tensor]

EMA_WRAPPERS = ("model_ema", "state_dict_ema", "params_ema")
"""Keys under which training scripts keep an exponential moving average of the weights."""
WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "params")
"""Keys under which they keep the weights."""
PREFIXES = ("module", "_orig_mod", "model", "net", "backbone")
"""What stands in front of every key: of DistributedDataParallel, torch.compile, Lightning, GANs and mmengine."""

COUNTER = re.compile(r"(^|\.)(num_batches_tracked|total_ops|total_params)$")
"""Tensors without influence on the output: of BatchNorm in training, and of the profiler thop."""

_WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_CODE_OPERATIONS = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE"})
"""Operations of a pickle by which it names or calls something of the running program."""
_SEARCHED = 1 << 20

_LISTED = 5
_LONGEST = 200
"""Characters of a name in a message."""
_LARGEST_HEADER = 8 << 20
"""Bytes of the header of a safetensors file; a tensor takes about a hundred."""
_MOST_WRAPPERS, _MOST_PREFIXES = 64, 8
"""Dictionaries that are looked through for a state dict, and names that are taken off the front of keys."""


@dataclass(frozen=True, eq=False)
class StoredWeights:
    """The state dict of a file.

    Attributes:
        path: the file.
        wrapper: the key under which it lay, keys of keys with dots; empty if it was all there is.
        state: its tensors under the names that the file has.
    """

    path: Path
    wrapper: str
    state: StateDict

    @property
    def place(self) -> str:
        """For messages: the file, and where in it the tensors lay."""
        return f"{self.path} (its {self.wrapper})" if self.wrapper else str(self.path)


@dataclass(frozen=True)
class LoadedWeights:
    """What came of loading a file into a module.

    Attributes:
        path: the file.
        removed_prefix: what was taken off the front of its keys, as "module."; empty if nothing.
        wrapper: the key under which the weights lay; empty if they were all there is.
        missing: tensors of the module that the file does not have, and which stayed as they were.
        unexpected: tensors of the file that the module does not have.
    """

    path: Path
    removed_prefix: str
    wrapper: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_weights(
    module: nn.Module, path: str | PathLike[str], *, strict: bool = True, prefer_ema: bool = True
) -> LoadedWeights:
    """Load the weights of a file into any module.

    Args:
        module: receives the weights, converted to its element types. After an error they may have changed in part.
        path: a `.safetensors` file, or a file of `torch.save` under any other name.
        strict: whether the tensors of both have to be the same ones, but for training counters. Otherwise those that
            both have are loaded.
        prefer_ema: which weights are taken when the file holds both; see `read_weights`.

    Raises:
        CheckpointError: if the file is missing, damaged or unsafe, if a tensor has another shape or type or is not
            finite, if strict and tensors are missing or unexpected, or if nothing fits.
    """
    stored = read_weights(path, prefer_ema=prefer_ema)
    own = module.state_dict()
    state, prefix = without_prefix(stored.state, own.__contains__)
    fitting = {key: tensor for key, tensor in state.items() if key in own}
    odd_shapes = misshapen(fitting, own)
    if not odd_shapes:
        check_values(stored.path, _judged(module, fitting))
    missing, unexpected = _load(module, state) if not odd_shapes else _compare(state, own)
    problem = ""
    if odd_shapes or (strict and (missing or unexpected)):
        problem = describe_misfit(missing, unexpected, odd_shapes)
    elif len(unexpected) == len(_uncounted(state)):
        problem = f"none of its {len(state)} tensors is one of the module's: {some_names(state)}"
    if problem:
        removed = f" after {prefix!r} was taken off its keys" if prefix else ""
        raise CheckpointError(
            f"the weights of {stored.place} do not fit {type(module).__name__} ({len(own)} tensors){removed}. {problem}"
            ". Build the module with the arguments that it was trained with"
        )
    return LoadedWeights(stored.path, prefix, stored.wrapper, missing, unexpected)


def _judged(module: nn.Module, fitting: StateDict) -> StateDict:
    """The tensors that have to be finite numbers: all of floating point, but masks that are infinite on purpose."""
    own, parameters = module.state_dict(), dict(module.named_parameters(remove_duplicate=False))
    return {
        key: tensor
        for key, tensor in fitting.items()
        if own[key].is_floating_point() and (key in parameters or not tensor.isinf().any())
    }


def _load(module: nn.Module, state: StateDict) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Load what fits; returns what is missing and what is left over, as the module itself sees it.

    Modules may rename keys of older versions while they load, so what they report counts, not a comparison of names.
    """
    result = module.load_state_dict(state, strict=False)
    identities = {name: id(value) for name, value in module.named_parameters(remove_duplicate=False)}
    loaded = {identities[key] for key in state if key in identities}
    # A parameter with two names is stored under one of them in safetensors.
    missing = (key for key in result.missing_keys if identities.get(key) not in loaded)
    return _uncounted(missing), _uncounted(result.unexpected_keys)


def _compare(state: StateDict, own: Mapping[str, Tensor]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return _uncounted(key for key in own if key not in state), _uncounted(k for k in state if k not in own)


def _uncounted(keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(key for key in keys if not COUNTER.search(key))


def read_weights(path: str | PathLike[str], *, prefer_ema: bool = True) -> StoredWeights:
    """Read the state dict of a file.

    Args:
        path: a `.safetensors` file, or a file of `torch.save` under any other name.
        prefer_ema: when a file holds the weights and their exponential moving average, take the average. That
            is the default because VMamba's published models, except `vmamba_tiny_v0`, were trained with it.

    Raises:
        CheckpointError: if the file is missing, damaged or holds code, is a program of TorchScript or torch.export, or
            holds no state dict.
    """
    path = Path(path)
    require_file(path)
    if path.stat().st_size == 0:
        raise CheckpointError(f"the checkpoint {path} is empty; download it again")
    stored = None if path.suffix == ".safetensors" else _read_torch(path)
    content = _read_safetensors(path) if stored is None else stored.values
    wrapper, found = unwrap(content, prefer_ema=prefer_ema)
    if not found:
        held = some_names(map(_key, content)) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"the checkpoint {path} holds no state dict; expected tensors by name, alone or under one of "
            f"{', '.join((*WRAPPERS, *EMA_WRAPPERS))}, but found {held or 'nothing'}"
        )
    for kind in dict.fromkeys(tensor.kind for tensor in found.values() if isinstance(tensor, OtherTensor)):
        odd = [key for key, tensor in found.items() if tensor == OtherTensor(kind)]
        raise CheckpointError(
            f"the checkpoint {path} holds {kind} tensors in {some_names(odd)}; give the checkpoint as it was trained"
        )
    try:
        return StoredWeights(path, wrapper, found if stored is None else stored.tensors(found))
    except WeightsError as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error


def require_file(path: Path) -> None:
    """Check that there is a checkpoint file.

    Raises:
        CheckpointError: if there is none.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; expected a checkpoint file")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path}")


def unwrap(content: Any, *, prefer_ema: bool = True) -> tuple[str, dict[str, Any]]:
    """Find the state dict inside a training checkpoint, as deep as training scripts put it.

    Args:
        content: what the file holds; tensors in it are of torch's class or of those of `weight_files/stored.py`.
        prefer_ema: whether a moving average comes before the weights.

    Returns:
        The keys under which it lies, with dots between them, and the tensors by name, none if there is no state dict.
    """
    order = (*EMA_WRAPPERS, *WRAPPERS) if prefer_ema else (*WRAPPERS, *EMA_WRAPPERS)
    return _unwrapped(content, order, set())


def _unwrapped(content: Any, order: Sequence[str], seen: set[int]) -> tuple[str, dict[str, Any]]:
    # A dictionary may hold itself, or another one under each key and that a third one; each is looked at once.
    if not isinstance(content, Mapping) or id(content) in seen or len(seen) >= _MOST_WRAPPERS:
        return "", {}
    seen.add(id(content))
    for key in order:
        if isinstance(content.get(key), Mapping):
            inner, state = _unwrapped(content[key], order, seen)
            if state:
                return f"{key}.{inner}" if inner else key, state
    if not all(
        isinstance(key, (str, int)) and isinstance(value, (Tensor, StoredTensor, OtherTensor))
        for key, value in content.items()
    ):
        return "", {}
    return "", {_key(key): value for key, value in content.items()}


def _key(key: object) -> str:
    """The name of a tensor, or what stands in its place; numbers may have thousands of digits, and tuples no end."""
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, int) and key.bit_length() < 64 else f"a {type(key).__name__}"


def without_prefix(state: StateDict, known: Callable[[str], bool]) -> tuple[StateDict, str]:
    """Take off the prefix, made of `PREFIXES`, without which most keys are known; other keys stay as they are.

    Args:
        state: tensors by name; is not changed.
        known: whether a key is one of the module's.

    Returns:
        The tensors, and the prefix with its last dot; the shortest of several that are as good, empty if none is.

    Raises:
        CheckpointError: if a key would be there twice.
    """
    hits: Counter[str] = Counter()
    for key in state:
        prefix, rest = "", key
        for _ in range(_MOST_PREFIXES):
            hits[prefix] += known(rest)
            first, dot, rest = rest.partition(".")
            if not dot or first not in PREFIXES:
                break
            prefix += f"{first}."
    best = max(hits, key=lambda prefix: (hits[prefix], -len(prefix)), default="")
    short: StateDict = {}
    for key, tensor in state.items():
        name = key.removeprefix(best)
        if name in short:
            raise CheckpointError(f"the checkpoint holds {name} twice, with and without {best!r} before it")
        short[name] = tensor
    return short, best


def check_values(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Check that tensors are finite floating-point numbers.

    Raises:
        CheckpointError: if one is sparse, quantised, a whole number, NaN or infinite.
    """
    if sparse := [key for key, tensor in weights.items() if tensor.layout != torch.strided]:
        raise CheckpointError(f"the checkpoint {path} holds sparse tensors in {some_names(sparse)}")
    odd = [
        f"{key} ({str(tensor.dtype).removeprefix('torch.')})"
        for key, tensor in weights.items()
        if tensor.dtype not in _WEIGHT_TYPES
    ]
    if odd:
        raise CheckpointError(
            f"the checkpoint {path} holds weights that are no floating-point numbers of 16 to 64 bits: "
            f"{some_names(odd)}. Give the checkpoint as it was trained, not a quantised one"
        )
    if broken := [key for key, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"the checkpoint {path} has NaN or infinite values in {some_names(broken)}")


def misshapen(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Return, for messages, the tensors that both have in different shapes."""
    return [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]


def describe_misfit(missing: Iterable[str], unexpected: Iterable[str], odd_shapes: Iterable[str]) -> str:
    """Return what is wrong, for messages: how many of each kind, and the first of them; empty if nothing is."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", odd_shapes))
    counted = [(what, list(names)) for what, names in kinds]
    return "; ".join(f"{len(names)} {what}: {some_names(names)}" for what, names in counted if names)


def some_names(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    listed = list(names)
    rest = len(listed) - _LISTED
    shown = (name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…" for name in listed[:_LISTED])
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _read_safetensors(path: Path) -> StateDict:
    from safetensors.torch import load_file

    try:
        with path.open("rb") as file:
            head = int.from_bytes(file.read(8), "little")
        # The library checks that what the header says fits the file, but reads one of 100 MB first.
        if head > min(_LARGEST_HEADER, path.stat().st_size):
            raise WeightsError(f"its header would have {head:,} bytes")
        return load_file(path)
    except Exception as error:  # of many kinds, some of the library's own
        raise CheckpointError(
            f"the checkpoint {path} is damaged or no safetensors file{_what_else(path)}: {error}"
        ) from error


def _read_torch(path: Path) -> Content:
    try:
        return read_torch_file(path)
    except ProgramError as error:
        raise CheckpointError(f"{path} {error}") from None
    except (WeightsError, OSError) as error:
        named = str(error) if isinstance(error, CodeError) else ""
        if isinstance(error, CodeError) or _may_run_code(path):
            raise CheckpointError(
                f"the checkpoint {path} {f'holds a pickled {named}' if named else 'is a plain pickle'}, which could "
                "run code, so it was refused. Where you trust it, load it yourself and save model.state_dict() as "
                "safetensors"
            ) from error
        raise CheckpointError(
            f"the checkpoint {path} is truncated, damaged or not a PyTorch file{_what_else(path)}: {error}; download "
            "it again"
        ) from error


def _what_else(path: Path) -> str:
    """What a file is that is no checkpoint, for messages, where that is plain to see."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return " (it is the pointer of Git LFS to a file that was not fetched)"
    if start.startswith((b"<!doctype html", b"<html")):
        return " (it is a web page)"
    return ""


def _may_run_code(path: Path) -> bool:
    """Whether the file starts with a pickle that names or calls anything; the pickle is read, never run.

    The oldest and the newest protocols have operations that torch's safe reader does not know, so it cannot tell.
    """
    with path.open("rb") as file:
        start = file.read(_SEARCHED)
    found = False
    try:
        for operation, _, _ in pickletools.genops(start):
            found = found or operation.name in _CODE_OPERATIONS
    except Exception:
        # Cut off, or no pickle. Text may look like one for a while, but has not the mark of all but the oldest.
        return found and start.startswith(pickle.PROTO)
    return found
