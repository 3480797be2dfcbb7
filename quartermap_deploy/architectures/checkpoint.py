"""Reading checkpoints of VMamba and MedMamba, in every spelling in which they are public.

The same tensors go by several names. `neutral_key` maps every spelling of a key to one, and a checkpoint's
tensor belongs to the model's tensor with the same neutral key; so every spelling loads into every model, and
nothing is renamed by guessing. Files are read without running anything that is in them.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quartermap_deploy.errors import CheckpointError

StateDict = dict[str, Tensor]

EMA_WRAPPERS = ("model_ema", "state_dict_ema")
WRAPPERS = ("model", "state_dict")
"""Keys under which training scripts keep the weights beside optimizer, epoch and so on."""

_IGNORED = re.compile(r"(^|\.)(num_batches_tracked|total_ops|total_params)$")
"""Counters without influence on the output: of BatchNorm in training, and of the profiler thop."""

_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.(x_proj|dt_projs)\.(weight|bias)$", r".\1_\2"),
        (r"^patch_embed\.proj\.", "patch_embed.0."),
        (r"^patch_embed\.norm\.", "patch_embed.2."),
        (r"\.ln_1\.", ".norm."),
        (r"\.self_attention\.", ".op."),
        (r"\.downsample\.norm\.", ".downsample.1."),
        (r"\.downsample\.reduction\.", ".downsample.2."),
        (r"^(norm|head)\.", r"classifier.\1."),
    )
)

_PER_DIRECTION = re.compile(r"\.(x_proj_weight|dt_projs_weight|dt_projs_bias|A_logs|Ds)$")
"""Parameters with one part per direction, stored as (K, rows, …) or (K·rows, …)."""

_WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_CODE_OPERATIONS = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE"})
"""Operations of a pickle by which it names or calls something of the running program."""
_SEARCHED = 1 << 20

_LISTED = 5


def load_checkpoint(model: nn.Module, path: str | PathLike[str], *, prefer_ema: bool = True) -> None:
    """Load the weights of a file into a model of the same settings and class count.

    Args:
        model: receives the weights, converted to its element type.
        path: a `.safetensors` file, or a file of `torch.save` under any other name.
        prefer_ema: which weights are taken when the file holds both; see `read_checkpoint`.

    Raises:
        CheckpointError: if the file is missing, damaged or unsafe, or does not fit the model.
    """
    state = read_checkpoint(path, prefer_ema=prefer_ema)
    load_state(model, canonical_state_dict(state, model), source=str(path))


def read_checkpoint(path: str | PathLike[str], *, prefer_ema: bool = True) -> StateDict:
    """Read the state dict of a file, without wrappers and `module.` prefixes, and check its values.

    Args:
        path: a `.safetensors` file, or a file of `torch.save` under any other name.
        prefer_ema: when a file holds the weights and their exponential moving average, take the average. That
            is the default because VMamba's published models, except `vmamba_tiny_v0`, were trained with it.

    Raises:
        CheckpointError: if the file is missing, damaged or holds code, holds no state dict, or a weight is no
            floating-point number, NaN or infinite.
    """
    path = Path(path)
    require_file(path)
    if path.stat().st_size == 0:
        raise CheckpointError(f"the checkpoint {path} is empty; download it again")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = unwrap(content, prefer_ema=prefer_ema)
    if not state:
        held = _names(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"the checkpoint {path} holds no state dict; expected tensors by name, alone or under one of "
            f"{', '.join((*WRAPPERS, *EMA_WRAPPERS))}, but found {held or 'nothing'}"
        )
    _check_values(path, {key: tensor for key, tensor in state.items() if not _IGNORED.search(key)})
    return state


def require_file(path: Path) -> None:
    """Check that there is a checkpoint file.

    Raises:
        CheckpointError: if there is none.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; expected a checkpoint file")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path}")


def _check_values(path: Path, weights: StateDict) -> None:
    if sparse := [key for key, tensor in weights.items() if tensor.layout != torch.strided]:
        raise CheckpointError(f"the checkpoint {path} holds sparse tensors in {_names(sparse)}")
    odd = [
        f"{key} ({str(tensor.dtype).removeprefix('torch.')})"
        for key, tensor in weights.items()
        if tensor.dtype not in _WEIGHT_TYPES
    ]
    if odd:
        raise CheckpointError(
            f"the checkpoint {path} holds weights that are no floating-point numbers of 16 to 64 bits: "
            f"{_names(odd)}. Give the checkpoint as it was trained, not a quantised one"
        )
    if broken := [key for key, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"the checkpoint {path} has NaN or infinite values in {_names(broken)}")


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged or no safetensors file: {error}") from error


def _read_pickle(path: Path) -> Any:
    # Training scripts of this family keep their settings beside the weights, as a yacs CfgNode (a dict) or an
    # argparse Namespace. Both hold values only; yacs need not be installed, an ordered dict takes the place
    # of its class.
    harmless: list[Any] = [(OrderedDict, "yacs.config.CfgNode"), argparse.Namespace]
    try:
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            # What torch has to say about an odd pickle is in the error below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises almost anything on a damaged file
        named = (
            re.search(r"GLOBAL (\w\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        )
        if named or _may_run_code(path):
            raise CheckpointError(
                f"the checkpoint {path} {f'holds a pickled {named[1]}' if named else 'is a plain pickle'}, which could "
                "run code, so it was refused. Where you trust it, load it yourself and save model.state_dict() as "
                "safetensors"
            ) from error
        raise CheckpointError(
            f"the checkpoint {path} is truncated, damaged or not a PyTorch file; download it again"
        ) from error


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


def unwrap(content: Any, *, prefer_ema: bool = True) -> StateDict:
    """Find the state dict inside a training checkpoint, however deep, and take prefixes off its keys.

    Returns:
        The tensors by name; empty if there is no state dict.
    """
    if not isinstance(content, Mapping):
        return {}
    order = (*EMA_WRAPPERS, *WRAPPERS) if prefer_ema else (*WRAPPERS, *EMA_WRAPPERS)
    for key in order:
        if isinstance(content.get(key), Mapping) and (state := unwrap(content[key], prefer_ema=prefer_ema)):
            return state
    if not all(isinstance(value, Tensor) for value in content.values()):
        return {}
    # DistributedDataParallel and torch.compile put these in front of every key.
    return {re.sub(r"^((module|_orig_mod)\.)+", "", str(key)): value for key, value in content.items()}


def neutral_key(key: str) -> str:
    """Return the one name for all spellings of a key."""
    for pattern, replacement in _SPELLINGS:
        key = pattern.sub(replacement, key)
    return key


def head_classes(state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes of a checkpoint's last layer, in any spelling, or None if it has none."""
    for key, tensor in state.items():
        if neutral_key(key) == "classifier.head.weight" and tensor.ndim:
            return tensor.shape[0]
    return None


def canonical_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> StateDict:
    """Rename and reshape a checkpoint's tensors to the model's spelling; neither argument is changed.

    Tensors are reshaped only between spellings of the same layout: (K·rows, …) and (K, rows, …), and weights
    of linear layers with or without the trailing axes of a 1x1 convolution. Keys that the model does not know
    keep their name, and shapes that do not fit stay as they are, for `load_state` to report. Training
    counters are left out.

    Raises:
        CheckpointError: if two keys are spellings of the same tensor.
    """
    expected = {neutral_key(key): (key, tensor) for key, tensor in model.state_dict().items()}
    renamed: StateDict = {}
    origin: dict[str, str] = {}
    for key, tensor in state.items():
        if _IGNORED.search(key):
            continue
        target, wanted = expected.get(neutral_key(key), (key, None))
        if target in renamed:
            raise CheckpointError(f"the checkpoint holds {target} twice, as {origin[target]} and as {key}")
        if wanted is not None and _same_layout(target, tensor.shape, wanted.shape):
            tensor = tensor.reshape(wanted.shape)
        renamed[target] = tensor
        origin[target] = key
    return renamed


def _same_layout(key: str, found: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether two shapes are spellings of each other, so that a reshape moves no value to another place."""
    return bool(_layouts(key, found) & _layouts(key, wanted))


def _layouts(key: str, shape: Sequence[int]) -> set[tuple[int, ...]]:
    without_ones = tuple(shape)
    while without_ones and without_ones[-1] == 1:
        without_ones = without_ones[:-1]
    layouts = {without_ones}
    if _PER_DIRECTION.search(key) and len(shape) > 1:
        merged = (shape[0] * shape[1], *shape[2:])
        while merged and merged[-1] == 1:
            merged = merged[:-1]
        layouts.add(merged)
    return layouts


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state dict in the model's spelling; only training counters may be missing.

    Args:
        model: receives the weights.
        state: as `canonical_state_dict` returns it.
        source: file name, for messages.

    Raises:
        CheckpointError: if tensors are missing, unexpected or of another shape; the message names them.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state and not _IGNORED.search(key)]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(names)} {what}: {_names(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint {source} does not fit this model ({len(own)} tensors). "
            + "; ".join(problems)
            + ". "
            "Choose the model that the checkpoint was trained as"
        )
    model.load_state_dict({key: state.get(key, tensor) for key, tensor in own.items()})


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    rest = len(listed) - _LISTED
    return ", ".join(listed[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
