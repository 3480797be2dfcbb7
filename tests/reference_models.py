"""The models whose outputs were computed once with the public VMamba and MedMamba code (tests/data)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quartermap_deploy.architectures.base import VisualStateSpaceModel
from quartermap_deploy.architectures.checkpoint import canonical_state_dict, load_state
from quartermap_deploy.architectures.medmamba import MedMamba, MedMambaConfig
from quartermap_deploy.architectures.vmamba import VMamba, VMambaConfig

DATA = Path(__file__).parent / "data"
DIMS = (16, 32, 64, 128)

CONFIGS: dict[str, VMambaConfig | MedMambaConfig] = {
    "vmamba_s2_channel_first": VMambaConfig(depths=(2, 2, 3, 2), dims=DIMS, num_classes=10),
    "vmamba_s1_channel_last": VMambaConfig(
        depths=(2, 2, 3, 2), dims=DIMS, num_classes=10, ssm_ratio=1.0, norm_layer="ln"
    ),
    "vmamba_v0_gated": VMambaConfig(
        depths=(2, 2, 2, 2),
        dims=DIMS,
        num_classes=10,
        ssm_d_state=16,
        ssm_conv_bias=True,
        forward_type="v0",
        mlp_ratio=0.0,
        norm_layer="ln",
        patchembed_version="v1",
        downsample_version="v1",
    ),
    "medmamba": MedMambaConfig(depths=(2, 2, 2, 2), dims=DIMS, num_classes=8),
}


TINY: dict[str, VMambaConfig | MedMambaConfig] = {
    "v2": VMambaConfig(depths=(1, 1), dims=(16, 32), num_classes=3),
    "v2_channel_last": VMambaConfig(depths=(1, 1), dims=(16, 32), num_classes=3, norm_layer="ln"),
    "v0": dataclasses.replace(
        CONFIGS["vmamba_v0_gated"], depths=(1, 1), dims=(16, 32), num_classes=3, ssm_d_state=2
    ),
    "medmamba": MedMambaConfig(depths=(1, 1), dims=(16, 32), num_classes=3, d_state=2),
}
"""Very small models of each kind, for tests that export or load many of them."""


@dataclass(frozen=True)
class Reference:
    """One model with the public code's weights, input and outputs.

    Attributes:
        model: our model with these weights, in eval mode.
        state: the weights under the public keys.
        input: (batch, 3, H, W).
        output: logits of the public code.
        mixers: input and output of two SS2D modules by module path.
    """

    model: VisualStateSpaceModel
    state: dict[str, Tensor]
    input: Tensor
    output: Tensor
    mixers: dict[str, tuple[Tensor, Tensor]]


def build(name: str) -> VisualStateSpaceModel:
    """Return a newly initialised model with the settings of a reference, in eval mode."""
    return _build(CONFIGS[name])


def tiny(name: str) -> VisualStateSpaceModel:
    """Return a newly initialised very small model, in eval mode."""
    return _build(TINY[name])


def _build(config: VMambaConfig | MedMambaConfig) -> VisualStateSpaceModel:
    model = MedMamba(config) if isinstance(config, MedMambaConfig) else VMamba(config)
    return model.eval()


def load(name: str) -> Reference:
    """Return a reference with its weights loaded."""
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    state = {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/")}
    model = build(name)
    load_state(model, canonical_state_dict(state, model), source=name)
    paths = {key.split("/")[1] for key in arrays if key.startswith("act/")}
    mixers = {path: (arrays[f"act/{path}/in"], arrays[f"act/{path}/out"]) for path in sorted(paths)}
    return Reference(model, state, arrays["input"], arrays["output"], mixers)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value; shapes must agree."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()
