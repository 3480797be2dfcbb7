"""Reading checkpoints of VMamba and MedMamba, in every spelling in which they are public.

The same tensors go by several names. `neutral_key` maps every spelling of a key to one, and a checkpoint's
tensor belongs to the model's tensor with the same neutral key; so every spelling loads into every model, and
nothing is renamed by guessing. How files are read, and what of them is taken off, is in `quartermap_deploy/weights.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from quartermap_deploy.errors import CheckpointError
from quartermap_deploy.weights import (
    COUNTER,
    StateDict,
    check_values,
    describe_misfit,
    misshapen,
    read_weights,
    some_names,
    without_prefix,
)

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

_ROOTS = re.compile(r"(patch_embed|layers|classifier|outnorm\d+)\.")
"""What the neutral keys of our models begin with."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint of one of our models.

    Attributes:
        path: the file.
        removed_prefix: what was taken off the front of its keys, as "backbone."; empty if nothing.
        state: the model's tensors, in the spelling of the file.
        others: tensors that none of our models has: the heads of detectors and segmenters, or another model's.
    """

    path: Path
    removed_prefix: str
    state: StateDict
    others: StateDict

    @property
    def num_classes(self) -> int | None:
        """Size of its last layer, or None if it has none."""
        return self._size("classifier.head.weight", 0)

    @property
    def in_chans(self) -> int | None:
        """Channels of the image that its first convolution takes, or None if it has none."""
        return self._size("patch_embed.0.weight", 1)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks per stage, as its keys number them."""
        found: dict[int, int] = {}
        for key in self.state:
            if match := re.match(r"layers\.(\d{1,4})\.blocks\.(\d{1,4})\.", key):
                stage, block = map(int, match.groups())
                found[stage] = max(found.get(stage, 0), block + 1)
        return tuple(found[stage] for stage in sorted(found))

    def _size(self, name: str, axis: int) -> int | None:
        for key, tensor in self.state.items():
            if neutral_key(key) == name and tensor.ndim > axis:
                return tensor.shape[axis]
        return None


def read_checkpoint(path: str | PathLike[str], *, prefer_ema: bool = True) -> Checkpoint:
    """Read a checkpoint file, and check the values of the model's tensors.

    Args:
        path: a `.safetensors` file, or a file of `torch.save` under any other name.
        prefer_ema: which weights are taken when the file holds both; see `read_weights`.

    Raises:
        CheckpointError: if the file is missing, damaged or holds code, holds no state dict, or a weight is no
            floating-point number, NaN or infinite, or has no numbers.
    """
    stored = read_weights(path, prefer_ema=prefer_ema)
    short, prefix = without_prefix(stored.state, _is_ours)
    state = {key: tensor for key, tensor in short.items() if _is_ours(key)}
    weights = {key: tensor for key, tensor in state.items() if not COUNTER.search(key)}
    if empty := [key for key, tensor in weights.items() if not tensor.numel()]:
        # Their sizes would be a model's, without a single number for it.
        raise CheckpointError(f"the checkpoint {path} holds tensors without numbers: {some_names(empty)}")
    check_values(stored.path, weights)
    others = {k: tensor for k, tensor in short.items() if k not in state and not COUNTER.search(k)}
    return Checkpoint(stored.path, prefix, state, others)


def _is_ours(key: str) -> bool:
    return _ROOTS.match(neutral_key(key)) is not None


def load_checkpoint(model: nn.Module, path: str | PathLike[str], *, prefer_ema: bool = True) -> None:
    """Load the weights of a file into a model of the same settings and class count.

    Args:
        model: receives the weights, converted to its element type.
        path: a `.safetensors` file, or a file of `torch.save` under any other name.
        prefer_ema: which weights are taken when the file holds both; see `read_weights`.

    Raises:
        CheckpointError: if the file is missing, damaged or unsafe, or does not fit the model.
    """
    checkpoint = read_checkpoint(path, prefer_ema=prefer_ema)
    state = canonical_state_dict({**checkpoint.state, **checkpoint.others}, model)
    load_state(model, state, source=str(path))


def neutral_key(key: str) -> str:
    """Return the one name for all spellings of a key."""
    for pattern, replacement in _SPELLINGS:
        key = pattern.sub(replacement, key)
    return key


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
        if COUNTER.search(key):
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


def misfit(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Say how a state dict in the model's spelling departs from the model; empty if only training counters do."""
    own = model.state_dict()
    missing = [key for key in own if key not in state and not COUNTER.search(key)]
    unexpected = [key for key in state if key not in own]
    return describe_misfit(missing, unexpected, misshapen(state, own))


def require_fit(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    advice: str = "Choose the model that the checkpoint was trained as",
) -> None:
    """Check that a state dict in the model's spelling fits; only training counters may be missing.

    Args:
        model: is not changed, and may be one without memory.
        state: as `canonical_state_dict` returns it.
        source: file name, for messages.
        advice: the last sentence of the message when it does not fit.

    Raises:
        CheckpointError: if tensors are missing, unexpected or of another shape; the message names them.
    """
    if problem := misfit(model, state):
        count = len(model.state_dict())
        raise CheckpointError(
            f"the checkpoint {source} does not fit this model ({count} tensors). {problem}. {advice}"
        )


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state dict in the model's spelling, after a check as `require_fit` makes it.

    Raises:
        CheckpointError: as `require_fit` does.
    """
    require_fit(model, state, source=source)
    model.load_state_dict({key: state.get(key, tensor) for key, tensor in model.state_dict().items()})
